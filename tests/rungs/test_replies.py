"""NBD servers on unix sockets, which do not count bytes. Whether a server replies is shown only by
the context switches of the server and of QEMU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qkilld.model.constants import Result
from tests.lab import needs
from tests.lab.bare import bare_guest
from tests.lab.iscsi import iscsi_store
from tests.lab.nbd import NbdClient
from tests.rungs.stopping import actions
from tests.rungs.test_servers import make_image
from tests.rungs.test_signs import STALL, nbd_disk, program, raw, waited
from tests.rungs.test_yank import stop


@contextlib.contextmanager
def slow_server(directory: Path, path: Path) -> Iterator[None]:
    """Within the context, run a server of a qcow2 image that answers each write after 3 s."""
    image = make_image(directory / "image")
    argv = [needs.program("nbdkit", "nbdkit"), "--foreground", "-U", path, "--filter=delay"]
    with program([*argv, "file", image, "delay-write=3"], path):
        yield


@contextlib.contextmanager
def idle_client(path: Path) -> Iterator[Path]:
    client = NbdClient(str(path), "")
    try:
        yield path
    finally:
        client.close()


@contextlib.contextmanager
def relay(path: Path) -> Iterator[Path]:
    front = path.with_name("front")
    argv = [needs.program("socat", "socat"), f"UNIX-LISTEN:{front},fork", f"UNIX-CONNECT:{path}"]
    with program(argv, front):
        yield front


@pytest.mark.timeout(300)
@pytest.mark.parametrize("beside", [idle_client, relay])
def test_a_slow_server_with_another_client_or_a_relay_is_waited_for(
    lab_dir: Path, beside: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    """QEMU sends one request at a time: those for the tables of the image."""
    path = lab_dir / "socket"
    with slow_server(lab_dir, path), beside(path) as front:
        drive = f"file.driver=nbd,file.server.type=unix,file.server.path={front},format=qcow2"
        with bare_guest(lab_dir, ["-drive", f"{drive},if=none,id=remote"]) as guest:
            guest.write_later("remote", 0, 1)
            job = stop(guest, STALL)
    assert (actions(job), job.result) == (["SIGTERM"], Result.EXITED)


@pytest.mark.timeout(300)
def test_keepalives_of_another_disk_are_no_replies_of_a_dead_server(lab_dir: Path) -> None:
    """The server repeats a failing request forever. QEMU runs once a second for its iSCSI disk."""
    image, path, failing = raw(lab_dir / "image"), lab_dir / "socket", lab_dir / "fail"
    argv = [needs.program("nbdkit", "nbdkit"), "--foreground", "-U", path]
    argv += ["--filter=retry", "--filter=error", "file", image, "error=EIO", "error-rate=100%"]
    argv += [f"error-file={failing}", "retries=1000000", "retry-delay=1", "retry-exponential=no"]
    with program(argv, path), iscsi_store(raw(lab_dir / "lun")) as store:
        node = json.dumps({"driver": "raw", "file": store.node()}).replace(", ", ",,")
        beside = ["-drive", f"if=none,id=beside,file=json:{node}"]
        with bare_guest(lab_dir, [*nbd_disk(path), *beside]) as guest:
            failing.touch()
            guest.write_later("remote", 0, 2)
            job = stop(guest, STALL)
    assert waited(job) < 10 * STALL["storage_stall"]
