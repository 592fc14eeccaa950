"""Servers that wait for servers of their own, perhaps on other hosts, while QEMU waits for one
answer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.model.constants import Result
from tests.lab import needs
from tests.lab.bare import MIB, bare_guest
from tests.lab.fuse import fuse_store
from tests.rungs.stopping import actions
from tests.rungs.test_servers import make_image
from tests.rungs.test_signs import STALL, nbd_disk, program, raw, waited
from tests.rungs.test_yank import stop

_PART = 1 << 14


@contextlib.contextmanager
def sink(*, sticks: bool) -> Iterator[int]:
    """Run a TCP server that reads 160 kB/s, or nothing if it `sticks`. Yield its port."""
    over = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as connection:
            while not over.wait(0.1):
                if not sticks:
                    connection.recv(_PART)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sticks", [False, True])
def test_an_upload_at_a_flush(lab_dir: Path, sticks: bool) -> None:
    """The file system uploads the file when QEMU flushes it, which takes 12 s."""
    files = lab_dir / "files"
    files.mkdir()
    raw(files / "image")
    with sink(sticks=sticks) as port, fuse_store(files) as store:
        drive = f"file={store.directory / 'image'},if=none,id=image,format=raw"
        with bare_guest(lab_dir, ["-drive", drive]) as guest:
            assert not guest.hmp(f'qemu-io image "write -q 0 {MIB}"')
            store.upload(port, 2 * MIB)
            job = stop(guest, STALL)
            if sticks:
                store.leave()
    if sticks:
        assert waited(job) < 3 * STALL["storage_stall"]
    else:
        assert (actions(job), job.result) == (["SIGTERM"], Result.EXITED)


@pytest.mark.timeout(300)
def test_a_server_whose_server_answers_slowly_on_a_unix_socket(lab_dir: Path) -> None:
    """One request of QEMU is several requests of qemu-storage-daemon, for the tables of the
    image. Each is answered after 3 s. The whole takes less than five times storage_stall."""
    image, path, front = make_image(lab_dir / "image"), lab_dir / "socket", lab_dir / "front"
    nbdkit = [needs.program("nbdkit", "nbdkit"), "--foreground", "-U", path, "--filter=delay"]
    qsd = [
        *(needs.program("qemu-storage-daemon", "qemu-utils"), "--blockdev"),
        *(f"driver=nbd,node-name=far,server.type=unix,server.path={path}", "--blockdev"),
        *("driver=qcow2,node-name=image,file=far", "--nbd-server"),
        *(f"addr.type=unix,addr.path={front}", "--export"),
        "type=nbd,id=export,node-name=image,name=,writable=on",
    ]
    with (
        program([*nbdkit, "file", image, "delay-write=3"], path),
        program(qsd, front),
        bare_guest(lab_dir, nbd_disk(front)) as guest,
    ):
        guest.write_later("remote", 0, 1)
        job = stop(guest, STALL)
    assert (actions(job), job.result) == (["SIGTERM"], Result.EXITED)
