"""Progress that only one sign shows, and movement that is no sign of progress. Each case was once
judged wrongly."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import pytest

from qkilld.engine.job import Job
from qkilld.evidence.threads import MAX_THREADS
from qkilld.model.constants import Result
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bare import MIB, BareGuest, Layout, bare_guest
from tests.lab.fuse import fuse_store
from tests.lab.nbd import NbdClient, free_port, nbd_store
from tests.lab.process import end, spawn
from tests.lab.storage import slow_disk
from tests.rungs.stopping import S, actions
from tests.rungs.test_yank import qcow2, stop

STALL = {"storage_stall": 5 * S, "stall": 2 * S, "grace": S}
RECORDS = Layout(20, passes=3)
_RATE = MIB


def raw(path: Path, size: int = 32 * MIB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@contextlib.contextmanager
def program(argv: Sequence[object], listens_at: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = spawn([str(word) for word in argv])
    try:
        until(listens_at.exists, bool)
        yield process
    finally:
        end(process)


def waited(job: Job) -> int:
    """Return the time from SIGTERM to SIGKILL, µs."""
    assert actions(job) == ["SIGTERM", "SIGKILL"]
    return job.rungs[1].at - job.rungs[0].at


def nbd_disk(path: Path) -> list[str]:
    return ["-drive", f"driver=nbd,server.type=unix,server.path={path},if=none,id=remote"]


def local_disk(directory: Path) -> list[str]:
    path = qcow2(directory / "local.qcow2")
    return ["-drive", f"file={path},if=none,id=local,format=qcow2"]


@pytest.fixture(params=["io_uring", "socat", "script"])
def server_on(request: pytest.FixtureRequest) -> Callable[[Path, Path], list[object]]:
    """Return a function that makes the command line of a server. There are three servers: one whose
    flush runs in a kernel thread, one to which a proxy connects through a pair of sockets, and one
    whose scripts write."""
    if request.param == "script":
        nbdkit = needs.program("nbdkit", "nbdkit")
        return lambda image, path: [
            *(nbdkit, "--foreground", "-U", path, "eval", "get_size=echo 32M"),
            *("can_write=exit 0", "can_flush=exit 0", f"flush=sync -d {image}"),
            f"pwrite=dd of={image} oflag=seek_bytes conv=notrunc seek=$4 status=none",
            f"pread=dd if={image} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
        ]
    if request.param == "socat":
        socat, nbdkit = needs.program("socat", "socat"), needs.program("nbdkit", "nbdkit")
        return lambda image, path: [
            *(socat, f"UNIX-LISTEN:{path},fork", f"EXEC:{nbdkit} -s file {image}")
        ]
    qsd = needs.program("qemu-storage-daemon", "qemu-utils")
    return lambda image, path: [
        *(qsd, "--blockdev", f"driver=file,node-name=store,filename={image},aio=io_uring"),
        *("--nbd-server", f"addr.type=unix,addr.path={path}"),
        *("--export", "type=nbd,id=export,node-name=store,name=,writable=on"),
    ]


@pytest.mark.timeout(300)
def test_a_flush_of_a_server_is_waited_for(
    lab_dir: Path, server_on: Callable[[Path, Path], list[object]]
) -> None:
    with slow_disk() as disk:
        assert disk.directory is not None
        image, path = raw(disk.directory / "image.raw"), lab_dir / "socket"
        with program(server_on(image, path), path) as server:
            disk.join(server.pid)
            with bare_guest(lab_dir, nbd_disk(path)) as guest:
                assert not guest.hmp(f'qemu-io remote "write -q 0 {12 * MIB}"')
                disk.slow(_RATE)
                job = stop(guest, STALL)
                disk.fast()
    assert (actions(job), job.result) == (["SIGTERM"], Result.EXITED)


@pytest.mark.timeout(300)
def test_a_flush_in_one_of_many_threads_is_waited_for(lab_dir: Path) -> None:
    arguments = [w for n in range(MAX_THREADS) for w in ("-object", f"iothread,id=t{n}")]
    with slow_disk() as disk:
        assert disk.directory is not None
        image = raw(disk.directory / "image.raw")
        arguments += ["-drive", f"file={image},if=none,id=local,format=raw"]
        with bare_guest(lab_dir, arguments) as guest:
            disk.join(guest.pid)
            assert not guest.hmp(f'qemu-io local "write -q 0 {12 * MIB}"')
            disk.slow(_RATE)
            job = stop(guest, STALL)
            disk.fast()
    assert (actions(job), job.result) == (["SIGTERM"], Result.EXITED)


@pytest.mark.timeout(300)
def test_a_dump_of_the_memory_is_waited_for(lab_dir: Path) -> None:
    """QEMU has opened the file only for writing. This shows that the file is no image."""
    files = lab_dir / "files"
    files.mkdir()
    raw(files / "dump", MIB)
    with fuse_store(files) as store, bare_guest(lab_dir, local_disk(lab_dir)) as guest:
        assert guest.write("local", RECORDS) == 60
        store.delay("write", 0.05)
        guest.begin_hmp(f"dump-guest-memory {store.directory / 'dump'}")
        until((files / "dump").stat, lambda status: status.st_size > 0)
        threading.Timer(12, store.fast).start()
        job = stop(guest, STALL)
        guest.close()
    assert (actions(job), job.result) == (["SIGTERM"], Result.EXITED)
    assert RECORDS.kept(lab_dir / "local.qcow2", "qcow2") == 60


@pytest.mark.timeout(300)
def test_a_pipe_that_is_read_slowly_is_waited_for(lab_dir: Path) -> None:
    read, write = os.pipe()
    is_slow, is_over = threading.Event(), threading.Event()

    def consume() -> None:
        while os.read(read, 4096):
            if is_slow.is_set():
                is_over.wait(2)

    reader = threading.Thread(target=consume, daemon=True)
    traces = [word for name in ("qcow2*", "bdrv_co_p*") for word in ("-trace", name)]
    reader.start()
    with bare_guest(lab_dir, [*local_disk(lab_dir), *traces], stderr=write) as guest:
        assert guest.write("local", RECORDS) == 60
        is_slow.set()
        os.set_blocking(write, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, b"x" * 4096)
        os.set_blocking(write, True)
        os.close(write)
        job = stop(guest, STALL)
        is_over.set()
        guest.close()
    reader.join(30)
    os.close(read)
    assert (actions(job), job.result) == (["SIGTERM"], Result.EXITED)
    assert RECORDS.kept(lab_dir / "local.qcow2", "qcow2") == 60


@pytest.mark.timeout(300)
def test_a_server_that_tries_again_without_end_is_given_up(lab_dir: Path) -> None:
    image, path, failing = raw(lab_dir / "image.raw"), lab_dir / "socket", lab_dir / "fail"
    argv = [needs.program("nbdkit", "nbdkit"), "--foreground", "-U", path]
    argv += ["--filter=retry", "--filter=error", "file", image, "error=EIO", "error-rate=100%"]
    argv += [f"error-file={failing}", "retries=1000000", "retry-delay=1", "retry-exponential=no"]
    with program(argv, path), bare_guest(lab_dir, nbd_disk(path)) as guest:
        assert not guest.hmp('qemu-io remote "write -q 0 64k"')
        failing.touch()
        guest.write_later("remote", 0, 2)
        assert waited(stop(guest, STALL)) < 10 * STALL["storage_stall"]


class Dying(NamedTuple):
    """Storage of qemu-storage-daemon that can hang."""

    node: str
    hang: Callable[[], None]
    recover: Callable[[], None]


@contextlib.contextmanager
def dying_file(directory: Path) -> Iterator[Dying]:
    directory.mkdir()
    raw(directory / "image")
    with fuse_store(directory) as store:
        node = f"driver=file,filename={store.directory / 'image'}"
        yield Dying(node, store.hang, store.fast)


@contextlib.contextmanager
def dying_server(directory: Path) -> Iterator[Dying]:
    directory.mkdir()
    with nbd_store(raw(directory / "image")) as store:
        node = f"driver=nbd,server.type=unix,server.path={store.server()['path']}"
        yield Dying(node, store.freeze, store.thaw)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dying", [dying_file, dying_server])
def test_a_job_of_the_server_itself_is_no_progress_of_a_dead_export(
    lab_dir: Path, dying: Callable[[Path], AbstractContextManager[Dying]]
) -> None:
    path, monitor = lab_dir / "socket", lab_dir / "monitor"
    source, copy = raw(lab_dir / "source"), raw(lab_dir / "copy")
    source.write_bytes(b"x" * (32 * MIB))
    with dying(lab_dir / "files") as storage:
        argv: list[object] = [needs.program("qemu-storage-daemon", "qemu-utils")]
        argv += ["--blockdev", f"node-name=i,{storage.node}"]
        for name, file in (("s", source), ("c", copy)):
            argv += ["--blockdev", f"driver=file,node-name={name},filename={file}"]
        argv += ["--nbd-server", f"addr.type=unix,addr.path={path}"]
        argv += ["--export", "type=nbd,id=export,node-name=i,name=,writable=on"]
        argv += ["--chardev", f"socket,id=m,path={monitor},server=on,wait=off"]
        argv += ["--monitor", "chardev=m"]
        with program(argv, monitor), bare_guest(lab_dir, nbd_disk(path)) as guest:
            assert not guest.hmp('qemu-io remote "write -q 0 64k"')
            copy_slowly(monitor)
            storage.hang()
            guest.write_later("remote", 0, 2)
            job = stop(guest, STALL)
            storage.recover()
    assert waited(job) < 10 * STALL["storage_stall"]


def copy_slowly(monitor: Path) -> None:
    """Make the server copy 32 MiB in 2 minutes, and close the connection to its monitor."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(monitor))
        stream = connection.makefile("rwb")
        stream.readline()
        job = {"job-id": "j", "device": "s", "target": "c", "sync": "full", "speed": MIB // 4}
        for name, arguments in (("qmp_capabilities", {}), ("blockdev-backup", job)):
            stream.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
            stream.flush()
            while "return" not in (answer := json.loads(stream.readline())):
                assert "error" not in answer, answer


@pytest.mark.timeout(300)
def test_a_client_that_goes_on_writing_is_no_progress_of_a_dead_disk(lab_dir: Path) -> None:
    """QEMU's main loop waits for the dead disk. So QEMU does not exit, and still exports the other
    disk."""
    arguments = ["-object", "iothread,id=exports"]
    with slow_disk() as disk, nbd_store(raw(lab_dir / "image.raw")) as store:
        assert disk.directory is not None
        copied, port = raw(disk.directory / "copied"), free_port()
        arguments += nbd_disk(Path(str(store.server()["path"])))
        with bare_guest(lab_dir, arguments) as guest:
            export(guest, copied, port)
            disk.join(guest.pid)
            disk.slow(_RATE)
            client = NbdClient(("127.0.0.1", port), "copied")
            writer = threading.Thread(target=write_on, args=(client,), daemon=True)
            writer.start()
            store.freeze()
            guest.flush_later("remote")
            job = stop(guest, STALL)
            disk.fast()
            store.thaw()
            client.close()
            writer.join(30)
    assert waited(job) < 120 * S


@pytest.mark.timeout(300)
def test_a_flush_beside_a_dead_disk_and_a_client_is_waited_for(lab_dir: Path) -> None:
    """The client reads all the time, and the flush takes longer than qkilld waits in doubt."""
    size = 100 * MIB
    with slow_disk() as disk, nbd_store(raw(lab_dir / "image.raw")) as store:
        assert disk.directory is not None
        local, port = raw(disk.directory / "local", size), free_port()
        arguments = ["-object", "iothread,id=exports"]
        arguments += ["-drive", f"file={local},if=none,id=local,format=raw"]
        arguments += nbd_disk(Path(str(store.server()["path"])))
        with bare_guest(lab_dir, arguments) as guest:
            export(guest, raw(lab_dir / "copied"), port)
            guest.add({"driver": "nbd", "node-name": "far", "server": store.server()})
            show(guest, "far")
            disk.join(guest.pid)
            assert not guest.hmp(f'qemu-io local "write -q 0 {size}"')
            disk.slow(_RATE)
            clients = [NbdClient(("127.0.0.1", port), name) for name in ("far", "copied")]
            work = (write_on, read_on)
            threads = [
                threading.Thread(target=run, args=(client,), daemon=True)
                for run, client in zip(work, clients, strict=True)
            ]
            store.freeze()
            for thread in threads:
                thread.start()
            guest.flush_later("local")
            timers = [threading.Timer(80, recover) for recover in (disk.fast, store.thaw)]
            for timer in timers:
                timer.start()
            job = stop(guest, STALL)
            for timer in timers:
                timer.join()
            for client, thread in zip(clients, threads, strict=True):
                client.close()
                thread.join(30)
    assert (actions(job), job.result) == (["SIGTERM"], Result.EXITED)


def export(guest: BareGuest, copied: Path, port: int) -> None:
    node = {"driver": "file", "node-name": "copied", "filename": str(copied)}
    guest.add({**node, "cache": {"direct": True}})
    address = {"host": "127.0.0.1", "port": str(port)}
    guest.call("nbd-server-start", addr={"type": "inet", "data": address})
    show(guest, "copied")


def show(guest: BareGuest, node: str) -> None:
    shown = {"type": "nbd", "id": f"export-{node}", "node-name": node, "iothread": "exports"}
    guest.call("block-export-add", **shown, writable=True, **{"fixed-iothread": True})


def write_on(client: NbdClient) -> None:
    with contextlib.suppress(OSError):
        while True:
            client.write(0, b"x" * (MIB // 4))


def read_on(client: NbdClient) -> None:
    with contextlib.suppress(OSError):
        while True:
            client.read(0, MIB // 4)
