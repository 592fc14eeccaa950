"""Before SIGTERM: the flush shows errors, and the guest is never left paused."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qkilld.adapters.host import LocalHost
from qkilld.engine.ports import GuestMonitor
from qkilld.evidence.sockdiag import listening_unix
from qkilld.model.block_state import BlockState, FlushResult, GuestDisk
from qkilld.model.constants import Flag, Result
from qkilld.monitor import disks
from qkilld.monitor.job_monitor import JobMonitors
from qkilld.monitor.nbd import NbdConnection
from qkilld.monitor.qmp import QmpClient
from tests.evidence.until import until as wait_until
from tests.lab import needs
from tests.lab.bus import Bus, Client, Daemon, plain
from tests.lab.guest import Guest, make_disk
from tests.lab.log import wait_for_path
from tests.lab.nbd import NbdStore, nbd_store
from tests.lab.process import end, run, spawn
from tests.lab.qmp import Qmp
from tests.monitor.connecting import run_for
from tests.rungs.stopping import FORCE, S, actions, codes, stop, stopper, until

Start = Callable[..., Guest]


def local_disk(directory: Path, name: str = "local", more: str = "") -> list[str]:
    image = make_disk(directory / f"{name}.qcow2")
    drive = f"file={image},if=none,id={name},format=qcow2{more}"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={name}"]


def nbd_disk(place: Mapping[str, object], name: str = "remote", more: str = "") -> list[str]:
    server = ",".join(f"server.{key}={value}" for key, value in place.items())
    drive = f"driver=nbd,{server},if=none,id={name}{more}"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive={name}"]


def machine(disks: Sequence[str]) -> list[str]:
    """Return QEMU's arguments. The processor stays stopped unless a test starts it, because the
    firmware would use the disks."""
    return ["-M", "q35", *disks]


@contextlib.contextmanager
def flush_fails(directory: Path) -> Iterator[Path]:
    """Yield the socket of an NBD server that accepts every write but fails every flush."""
    path = directory / "socket"
    script = [
        "get_size=echo 64M",
        "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none",
        "pwrite=cat >/dev/null",
        "can_write=exit 0",
        "can_flush=exit 0",
        "flush=echo EIO the disk is gone >&2; exit 1",
    ]
    server = spawn([needs.program("nbdkit", "nbdkit"), "-f", "-U", path, "eval", *script])
    try:
        wait_for_path(path, 30)
        yield path
    finally:
        end(server)


def kept(image: Path) -> bool:
    """Return whether the data of `write` is in the image."""
    qemu_io = needs.program("qemu-io", "qemu-utils")
    shown = run([qemu_io, "-r", "-f", "qcow2", "-c", "read -P 7 32M 64k", image], check=True).stdout
    return "verification failed" not in shown


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def write(guest: Guest, *disks: str) -> None:
    with Qmp(guest) as qmp:
        for disk in disks:
            qmp.hmp(f'qemu-io {disk} "write -P 7 32M 64k"')


DIES_LATER = """
import sys
from qkilld.model.block_state import FlushResult
from qkilld.monitor import disks

async def flush_by_name(qmp, disk, *, timeout_s):
    return FlushResult(disk.node, disk.title)

disks.flush_by_name = flush_by_name
"""
"""Makes the first flush do nothing. This flush comes before the processors are stopped, so it is as
if the storage had died right after it. If the storage died earlier, the processors would not be
stopped."""


@pytest.fixture
def dies_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def flush_by_name(qmp: object, disk: GuestDisk, *, timeout_s: float) -> FlushResult:
        return FlushResult(disk.node, disk.title)

    monkeypatch.setattr(disks, "flush_by_name", flush_by_name)


@pytest.fixture
def store(lab_dir: Path) -> Iterator[NbdStore]:
    file = lab_dir / "remote.raw"
    file.touch()
    with file.open("r+b") as image:
        image.truncate(64 << 20)
    with nbd_store(file) as running:
        yield running


def test_all_disks_are_flushed_and_that_is_proven(
    qemu: Start, lab_dir: Path, store: NbdStore
) -> None:
    guest = qemu(arguments=machine([*local_disk(lab_dir), *nbd_disk(store.server())]))
    write(guest, "local", "remote")
    job = stop(guest, Flag(0))
    print(job.flush, job.rungs, job.history)
    assert (job.result, job.risks) == (Result.EXITED, ())
    assert (job.flush.outcome, job.flush.proven) == ("complete", True)
    assert actions(job) == ["flush", "SIGTERM"]


def test_a_flush_that_fails_is_told(qemu: Start, lab_dir: Path) -> None:
    with flush_fails(lab_dir) as path:
        remote = nbd_disk({"type": "unix", "path": str(path)})
        guest = qemu(arguments=machine([*local_disk(lab_dir), *remote]))
        write(guest, "local", "remote")
        job = stop(guest, Flag(0))
    assert (job.result, codes(job)) == (Result.EXITED, {"flush-failed"})
    assert (job.flush.outcome, job.flush.proven) == ("failed", False)
    assert "remote" in job.risks[0].text and "Input/output error" in job.risks[0].text


def test_a_disk_that_does_not_answer_keeps_nobody_from_flushing_the_others(
    qemu: Start, lab_dir: Path, store: NbdStore
) -> None:
    """No request is in flight, so `stop` is sent. After SIGKILL, the local disk is still
    complete."""
    guest = qemu(arguments=machine([*local_disk(lab_dir), *nbd_disk(store.server())]))
    write(guest, "local", "remote")
    store.freeze()
    job = stop(guest, Flag(0), {"storage_stall": 3 * S, "grace": S})
    assert (job.result, job.flush.outcome) == (Result.SURVIVED, "left-out")
    guest.signal(signal.SIGKILL)
    guest.wait_gone()
    assert kept(lab_dir / "local.qcow2")


@pytest.mark.usefixtures("dies_later")
@pytest.mark.parametrize("moment", [0.0, 0.01, 0.1, 0.5, 0.85])
def test_cancel_at_any_moment_leaves_the_guest_running(
    qemu: Start, lab_dir: Path, store: NbdStore, moment: float
) -> None:
    guest = qemu(arguments=machine([*local_disk(lab_dir), *nbd_disk(store.server())]))
    write(guest, "local", "remote")
    store.freeze()

    async def work() -> None:
        async with stopper() as stopping:
            job = await stopping.begin(guest, FORCE)
            await until(lambda: job.processors_stopped or not job.running)
            await asyncio.sleep(moment)
            job.cancel()
            assert job.result is Result.CANCELLED
            store.thaw()
            await until(lambda: not job.processors_stopped)

    run_for(60, work())
    with Qmp(guest) as qmp:
        assert qmp.call("query-status")["status"] == "running"
        assert qmp.call("query-block-exports") == []


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.6])
def test_a_daemon_that_is_killed_leaves_no_guest_paused(
    qemu: Start,
    lab_dir: Path,
    store: NbdStore,
    private_bus: Bus,
    start_daemon: Callable[..., Daemon],
    moment: float,
) -> None:
    state = lab_dir / "state"
    state.mkdir(mode=0o700)
    env = {"RUNTIME_DIRECTORY": str(state)}
    main = "from qkilld.daemon import main; sys.exit(main())"
    first = start_daemon(env=env, program=(sys.executable, "-c", DIES_LATER + main))
    guest = qemu(arguments=machine([*local_disk(lab_dir), *nbd_disk(store.server())]))
    write(guest, "local", "remote")
    store.freeze()
    with private_bus.client() as client:
        job = client.terminate(guest.pid, int(FORCE))
        stopped = '"processors_stopped":true'
        wait_until(lambda: text_of(state / "job-1.json"), lambda text: stopped in text)
        time.sleep(moment)
        first.process.kill()
        first.wait_gone()
        store.thaw()
        start_daemon(env=env)
        result, receipt = client.wait(job)
    assert (result, guest.wait_gone()) == ("exited", 0)
    assert [action for _, action, _ in receipt["rungs"]][-1] == "SIGTERM"


def test_a_server_of_somebody_elses_is_left_alone(qemu: Start, lab_dir: Path) -> None:
    guest = qemu(arguments=machine(local_disk(lab_dir)))
    with Qmp(guest) as qmp:
        address = {"type": "unix", "data": {"path": str(lab_dir / "theirs")}}
        qmp.call("nbd-server-start", addr=address)
    job = stop(guest, Flag(0))
    assert (job.result, job.flush.outcome) == (Result.EXITED, "left-out")
    assert "NBD server already running" in job.flush.reason


def test_a_backup_is_waited_for_and_told_if_it_is_cancelled(qemu: Start, lab_dir: Path) -> None:
    guest = qemu(arguments=machine(local_disk(lab_dir)))
    write(guest, "local")
    with Qmp(guest) as qmp:
        copy = {"device": "local", "target": str(lab_dir / "copy"), "sync": "full"}
        qmp.call("drive-backup", **copy, format="raw", speed=64 << 20)
    job = stop(guest, Flag(0))
    assert (job.result, codes(job)) == (Result.EXITED, set())
    assert any("backup local" in reason for turn in job.history for reason in turn.reasons)
    guest = qemu(arguments=machine(local_disk(lab_dir, "second")))
    with Qmp(guest) as qmp:
        copy = {"device": "second", "target": str(lab_dir / "copy2"), "sync": "full"}
        qmp.call("drive-backup", **copy, format="raw", speed=65536)
        qmp.call("block-job-pause", device="second")
    job = stop(guest, Flag(0), {"storage_stall": 2 * S})
    assert (job.result, codes(job)) == (Result.EXITED, {"job-cancelled"})


def test_cache_unsafe_and_a_full_disk_are_told(qemu: Start, lab_dir: Path) -> None:
    guest = qemu(arguments=machine(local_disk(lab_dir, more=",cache=unsafe")))
    job = stop(guest, Flag(0))
    assert (job.result, codes(job)) == (Result.EXITED, {"no-flush"})


def test_the_plan_names_what_is_never_flushed_and_what_would_be_cancelled(
    qemu: Start, lab_dir: Path, client: Client
) -> None:
    guest = qemu(arguments=machine(local_disk(lab_dir, more=",cache=unsafe")))
    with Qmp(guest) as qmp:
        copy = {"device": "local", "target": str(lab_dir / "copy"), "sync": "full"}
        qmp.call("drive-backup", **copy, format="raw", speed=65536)
    warnings = plain(client.call("Plan", "uta{sv}", guest.pid, int(FORCE), {})[0])["warnings"]
    assert any("local has cache=unsafe" in text for text in warnings)
    assert any("backup local" in text and text.endswith("and then cancels it") for text in warnings)
    assert guest.alive


def server_of(guest: Guest) -> str:
    """Start another NBD server in QEMU. Return the error, or "" if the start succeeded. Success
    proves that QEMU had no server."""
    with Qmp(guest) as qmp:
        assert qmp.call("query-status")["status"] == "running"
        assert qmp.call("query-block-exports") == []
        address = {"type": "unix", "data": {"path": str(guest.directory / "another")}}
        try:
            qmp.call("nbd-server-start", addr=address)
        except AssertionError as refused:
            return str(refused)
        qmp.call("nbd-server-stop")
    return ""


@contextlib.asynccontextmanager
async def open_monitor(guest: Guest) -> AsyncIterator[GuestMonitor]:
    opened: list[GuestMonitor | str | Exception] = []
    with contextlib.closing(LocalHost().open(guest.pid)) as process:
        JobMonitors(listening_unix).open(process, "", opened.append)
        await until(lambda: bool(opened))
        monitor = opened[0]
        assert not isinstance(monitor, str | Exception), monitor
        yield monitor
        monitor.close()


async def resume(monitor: GuestMonitor) -> None:
    ends: list[str | Exception] = []
    monitor.resume_guest(ends.append)
    await until(lambda: bool(ends))
    assert ends == [""]


@pytest.mark.parametrize(
    "device", [["virtio-blk-pci,drive=local"], ["virtio-scsi-pci", "scsi-hd,drive=local,id=disk"]]
)
def test_a_disk_is_flushed_by_its_device(qemu: Start, lab_dir: Path, device: list[str]) -> None:
    drive = f"file={make_disk(lab_dir / 'd')},if=none,id=local,format=qcow2"
    devices = [word for each in device for word in ("-device", each)]
    guest = qemu(arguments=machine(["-drive", drive, *devices]))
    with Qmp(guest) as qmp:
        name = qmp.call("query-blockstats")[0]["qdev"]
    disk = GuestDisk("no-such-node", "local", network=False, qdev=name)

    async def work() -> list[tuple[FlushResult, ...] | Exception]:
        async with open_monitor(guest) as monitor:
            ends: list[tuple[FlushResult, ...] | Exception] = []
            monitor.flush_running([disk, replace(disk, qdev="-x")], ends.append, timeout=30 * S)
            await until(lambda: bool(ends))
            return ends

    ends = run_for(120, work())
    assert isinstance(ends[0], tuple)
    by_device, by_name = ends[0]
    assert (by_device.error, by_name.refused) == ("", True)


NODE = GuestDisk("local", "local", network=False)


@pytest.mark.parametrize("moment", ["no-export", "export"])
@pytest.mark.parametrize("dies", [False, True])
def test_an_interrupted_flush_leaves_no_server(
    qemu: Start, lab_dir: Path, monkeypatch: pytest.MonkeyPatch, moment: str, dies: bool
) -> None:
    """The flush is interrupted while the NBD server runs, before or after its first export. With
    `dies`, the daemon ends, too, and the next daemon starts the processors again."""
    reached = asyncio.Event()

    async def stay(*arguments: object) -> None:
        reached.set()
        await asyncio.sleep(600)

    monkeypatch.setattr(NbdConnection, "greet" if moment == "no-export" else "open_export", stay)
    node = f"driver=qcow2,node-name=local,file.driver=file,file.filename={make_disk(lab_dir / 'd')}"
    guest = qemu(arguments=machine(["-blockdev", node]))

    async def work() -> None:
        async with open_monitor(guest) as monitor:
            monitor.stop_and_flush([NODE], lambda results: None, stop=True, timeout=60 * S)
            async with asyncio.timeout(60):
                await reached.wait()
            if not dies:
                await resume(monitor)
        if dies:
            async with open_monitor(guest) as monitor:
                await resume(monitor)

    run_for(120, work())
    assert server_of(guest) == ""


def test_what_is_known_of_one_disk_remains_if_qemu_stops_answering(
    qemu: Start, lab_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU is stopped right after the first disk has failed to flush."""
    flush_one = disks._flush_one

    async def stop_after(qmp: QmpClient, number: int, *more: Any) -> FlushResult:
        result = await flush_one(qmp, number, *more)
        guest.signal(signal.SIGSTOP)
        return result

    monkeypatch.setattr(disks, "_flush_one", stop_after)
    with flush_fails(lab_dir) as path:
        image = make_disk(lab_dir / "d")
        node = f"driver=qcow2,node-name=local,file.driver=file,file.filename={image}"
        remote = f"driver=nbd,node-name=remote,server.type=unix,server.path={path}"
        guest = qemu(arguments=machine(["-blockdev", remote, "-blockdev", node]))

        async def work() -> list[object]:
            async with open_monitor(guest) as monitor:
                ends: list[object] = []
                both = [replace(NODE, node=name, title=name) for name in ("remote", "local")]
                monitor.stop_and_flush(both, ends.append, stop=True, timeout=5 * S)
                await until(lambda: bool(ends))
                guest.signal(signal.SIGCONT)
                await resume(monitor)
                return ends

        (results,) = run_for(120, work())
    assert isinstance(results, tuple), results
    first, second = results
    assert (first.error, first.refused) == ("Input/output error", False)
    assert "block-export-add" in second.error and second.refused
    assert server_of(guest) == ""


def test_a_server_without_exports_of_somebody_elses_survives_a_cancel(
    qemu: Start, lab_dir: Path
) -> None:
    node = f"driver=qcow2,node-name=local,file.driver=file,file.filename={make_disk(lab_dir / 'd')}"
    guest = qemu(arguments=machine(["-blockdev", node]))
    with Qmp(guest) as qmp:
        address = {"type": "unix", "data": {"path": str(lab_dir / "theirs")}}
        qmp.call("nbd-server-start", addr=address)

    async def work() -> None:
        async with open_monitor(guest) as monitor:
            ends: list[object] = []
            monitor.stop_and_flush([NODE], ends.append, stop=True, timeout=5 * S)
            await until(lambda: bool(ends))
            assert "NBD server already running" in str(ends[0])
            await resume(monitor)

    run_for(120, work())
    assert "already running" in server_of(guest)


def test_our_export_on_somebody_elses_server_is_removed_alone(qemu: Start, lab_dir: Path) -> None:
    """Another program uses the NBD server that an earlier daemon has left behind."""
    node = f"driver=qcow2,node-name=local,file.driver=file,file.filename={make_disk(lab_dir / 'd')}"
    guest = qemu(arguments=machine(["-blockdev", node]))
    with Qmp(guest) as qmp:
        address = {"type": "unix", "data": {"path": str(lab_dir / "server")}}
        qmp.call("nbd-server-start", addr=address)
        for name in (f"{disks.EXPORT_PREFIX}0", "theirs"):
            export = {"type": "nbd", "id": name, "node-name": "local", "name": name}
            qmp.call("block-export-add", **export)

    async def work() -> None:
        async with open_monitor(guest) as monitor:
            await resume(monitor)

    run_for(120, work())
    with Qmp(guest) as qmp:
        assert [one["id"] for one in qmp.call("query-block-exports")] == ["theirs"]


def test_all_queues_are_seen(qemu: Start, lab_dir: Path) -> None:
    """The guest has no driver for the device. QEMU 11.1 aborts when it is asked for the status of
    such a device."""
    drive = f"file={make_disk(lab_dir / 'd')},if=none,id=local,format=qcow2"
    devices = ["-device", "virtio-blk-pci,drive=local,num-queues=3", "-device", "virtio-scsi-pci"]
    guest = qemu(arguments=machine(["-drive", drive, *devices]))

    async def work() -> list[BlockState | str | Exception]:
        async with open_monitor(guest) as monitor:
            states: list[BlockState | str | Exception] = []
            monitor.read_disks(states.append)
            await until(lambda: bool(states))
            return states

    state = run_for(120, work())[0]
    assert isinstance(state, BlockState)
    queues = {(queue.device.rpartition("[")[2], queue.number) for queue in state.queues or ()}
    assert {number for name, number in queues if name.startswith("0]")} == {0, 1, 2}
    assert min(number for name, number in queues if name.startswith("1]")) == 2
