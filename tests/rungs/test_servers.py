"""A guest whose disk is served by another process. The guest is stopped together with this server.

The guest has a qcow2 over NBD with acknowledged records. The tables of the qcow2 are dirty in
QEMU's memory. The connection to the monitor is a socket pair, so the disks cannot be flushed before
SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qkilld.engine.job import Job
from qkilld.evidence.sockdiag import SocketTable
from qkilld.model.constants import Flag, Result
from qkilld.model.policy import Config
from tests.evidence.until import until as wait_until
from tests.lab import needs
from tests.lab.bare import BareGuest, Layout, bare_guest
from tests.lab.guest import QEMU, start_qemu
from tests.lab.nbd import free_port
from tests.lab.process import end, run, spawn, wait_gone
from tests.lab.qmp import Qmp
from tests.lab.scratch import scratch
from tests.monitor.connecting import run_for
from tests.rungs.stopping import Stopper, actions, codes, stopper, until

RECORDS = Layout(40, passes=3)
WRITTEN = 120
ROUNDS = 20
"""A test repeats the stop until records are lost, at most this many times. In most rows, the first
stop already loses some records."""


@dataclass
class Server:
    pid: int
    address: str
    """The options of QEMU's NBD node that name the server."""
    image: Path
    pidfd: int

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)


def make_image(path: Path) -> Path:
    qemu_img = needs.program("qemu-img", "qemu-utils")
    run([qemu_img, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4K", path, "3G"], check=True)
    with path.open("r+b") as file:
        file.truncate(64 << 20)  # An export cannot grow, so make the file large enough.
    return path


@contextlib.contextmanager
def server(kind: str, transport: str) -> Iterator[Server]:
    """Serve a new image. The kind `guest` is another QEMU; `lasting` and `leaving` are qemu-nbd
    with and without --persistent."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("s"))
        image, path, port = make_image(directory / "image"), directory / "nbd", free_port()
        address = f"file.server.type=unix,file.server.path={path}"
        if transport == "tcp":
            address = f"file.server.type=inet,file.server.host=127.0.0.1,file.server.port={port}"
        if kind == "guest":
            node = f"driver=file,node-name=image,filename={image}"
            other = stack.enter_context(start_qemu(arguments=["-blockdev", node]))
            serve(other.qmp, path if transport == "unix" else port)
            yield Server(other.pid, address, image, other.pidfd)
            return
        where = ["-k", str(path)] if transport == "unix" else ["-b", "127.0.0.1", "-p", str(port)]
        lasts = ["-t"] if kind == "lasting" else []
        argv: list[str | Path] = [needs.program("qemu-nbd", "qemu-utils"), "-f", "raw"]
        argv += ["-x", "disk", *lasts, *where]
        process = spawn([*argv, image], stderr=subprocess.DEVNULL)
        stack.callback(end, process)
        wait_for_listener(path if transport == "unix" else port)
        pidfd = stack.enter_context(pidfd_of(process.pid))
        yield Server(process.pid, address, image, pidfd)


def serve(qmp: Path | None, place: Path | int) -> None:
    assert qmp is not None
    address: dict[str, object] = {"type": "unix", "data": {"path": str(place)}}
    if isinstance(place, int):
        address = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(place)}}
    with Qmp(qmp) as monitor:
        monitor.call("nbd-server-start", addr=address)
        export = {"type": "nbd", "id": "disk", "node-name": "image", "name": "disk"}
        monitor.call("block-export-add", writable=True, **export)


def wait_for_listener(place: Path | int) -> None:
    """Wait until the server listens. Do not connect for this, because a server that exits with its
    client would then exit."""
    if isinstance(place, Path):
        wait_until(lambda: SocketTable().listens(lambda name: name == bytes(place)), bool)
    else:
        wait_until(lambda: SocketTable().listens_on(place), bool)


@contextlib.contextmanager
def pidfd_of(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def client(directory: Path, store: Server, more: str = "") -> Iterator[BareGuest]:
    """Run a guest whose records are on the server, in its qcow2."""
    drive = f"file.driver=nbd,{store.address},file.export=disk,if=none,id=d,format=qcow2{more}"
    with bare_guest(directory, ["-drive", drive, "-device", "virtio-blk-pci,drive=d"]) as guest:
        if not more:
            assert guest.write("d", RECORDS) == WRITTEN
        yield guest


OF_COPIES = Config(executables=(f"*/{QEMU}",))
"""A server that is a guest is a copy of QEMU at another path."""


def stop(
    guest: BareGuest | int, around: Callable[[Stopper, Job], Awaitable[None]] | None = None
) -> Job:
    """Stop a guest, wait for the end of the job, and return the job. `around` is called when the
    job has begun."""
    pid = guest if isinstance(guest, int) else guest.pid

    async def work() -> Job:
        async with stopper(OF_COPIES) as stopping:
            job = await stopping.begin_pid(pid, Flag(0))
            if around is not None:
                await around(stopping, job)
            await until(lambda: not job.running)
            return job

    return run_for(90, work())


def lost(store: Server, guest: BareGuest) -> int:
    """Return how many records were lost. Ends the guest and its server."""
    guest.close()
    store.terminate()
    assert wait_gone(store.pidfd, 30)
    return WRITTEN - RECORDS.kept(store.image, "qcow2")


def rounds_until_loss(one_round: Callable[[int], tuple[Job, int]]) -> None:
    """Repeat until records are lost. Check each time that the receipt names the risk."""
    for number in range(ROUNDS):
        job, missing = one_round(number)
        print(number, missing, job.risks)
        assert job.result is Result.EXITED
        assert not missing or codes(job) == {"unknown"}, f"{missing} were lost: {job.risks}"
        if missing:
            return
    raise AssertionError(f"no records were lost in {ROUNDS} rounds")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("kind", ["guest", "lasting"])
def test_a_server_that_another_program_stops_at_the_same_moment(
    lab_dir: Path, kind: str, transport: str
) -> None:
    def one_round(number: int) -> tuple[Job, int]:
        with server(kind, transport) as store, client(lab_dir, store) as guest:

            async def end_server(stopping: Stopper, job: Job) -> None:
                await until(lambda: "SIGTERM" in actions(job))
                await asyncio.sleep(number % 5 * 0.001)
                store.terminate()

            job = stop(guest, end_server)
            # On a busy host, a server may need longer than SETTLE to exit. This goes unnoticed.
            has_ended = wait_gone(store.pidfd, 0)
            missing = lost(store, guest)
            return job, missing if has_ended or job.risks else 0

    rounds_until_loss(one_round)


@pytest.mark.timeout(300)
def test_both_guests_are_stopped_by_qkilld_at_the_same_moment(lab_dir: Path) -> None:
    def one_round(number: int) -> tuple[Job, int]:
        with server("guest", "unix") as store, client(lab_dir, store) as guest:
            server_job: list[Job] = []

            async def stop_server(stopping: Stopper, job: Job) -> None:
                server_job.append(await stopping.begin_pid(store.pid, Flag(0)))
                await until(lambda: not server_job[0].running)

            job = stop(guest, stop_server)
            return job, lost(store, guest)

    rounds_until_loss(one_round)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_server_that_was_stopped_before_the_guest(lab_dir: Path, transport: str) -> None:
    with server("lasting", transport) as store, client(lab_dir, store) as guest:
        store.terminate()
        assert wait_gone(store.pidfd, 30)
        job = stop(guest)
        assert (job.result, codes(job)) == (Result.EXITED, {"unknown"})
        assert lost(store, guest) > 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("kind", ["guest", "lasting", "leaving"])
def test_a_healthy_server_is_no_risk(lab_dir: Path, kind: str, transport: str) -> None:
    with server(kind, transport) as store, client(lab_dir, store) as guest:
        job = stop(guest)
        # lost() ends the server right after the end of the job.
        assert lost(store, guest) == 0
    assert (job.result, job.risks, job.data_at_risk) == (Result.EXITED, (), False)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_disk_that_is_only_read_is_no_risk(lab_dir: Path, transport: str) -> None:
    with server("lasting", transport) as store, client(lab_dir, store, ",readonly=on") as guest:

        async def end_server(stopping: Stopper, job: Job) -> None:
            store.terminate()

        job = stop(guest, end_server)
    assert (job.result, job.risks) == (Result.EXITED, ())


def handles_sigterm(pid: int) -> bool:
    (line,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(line, 16) & 1 << signal.SIGTERM - 1)


def two_disks(path: Path) -> list[str]:
    """Return the arguments of a QEMU whose disks are two exports of one server."""
    files = [f"file=nbd:unix:{path}:exportname={name},format=raw" for name in ("one", "two")]
    return [word for file in files for word in ("-drive", f"{file},if=none")]


@pytest.mark.timeout(120)
def test_two_disks_of_one_server_and_no_monitor(lab_dir: Path) -> None:
    with contextlib.ExitStack() as stack:
        path = lab_dir / "nbd"
        process = spawn([needs.program("nbdkit", "nbdkit"), "-f", "-U", path, "memory", "1M"])
        stack.callback(end, process)
        wait_for_listener(path)
        guest = stack.enter_context(start_qemu(qmp=False, arguments=two_disks(path)))
        wait_until(lambda: handles_sigterm(guest.pid), bool)
        job = stop(guest.pid)
    assert (job.result, job.risks) == (Result.EXITED, ())


@pytest.mark.timeout(120)
def test_a_server_that_runs_its_guest(lab_dir: Path) -> None:
    """nbdkit ends its server when the guest exits."""
    with contextlib.ExitStack() as stack:
        path, pidfile = lab_dir / "nbd", lab_dir / "pid"
        qemu = shlex.join(
            [str(needs.program(QEMU, "qemu-system-x86")), "-M", "none", "-nodefaults"]
        )
        run_qemu = f"exec {qemu} -display none -pidfile {pidfile} {shlex.join(two_disks(path))}"
        nbdkit = needs.program("nbdkit", "nbdkit")
        process = spawn([nbdkit, "-U", path, "memory", "1M", "--run", run_qemu])
        stack.callback(end, process)
        pid = int(wait_until(lambda: pidfile.exists() and pidfile.read_text(), bool))
        wait_until(lambda: handles_sigterm(pid), bool)
        job = stop(pid)
        assert process.wait(30) == 0
    assert (job.result, job.risks) == (Result.EXITED, ())
