"""A QEMU that hangs during its exit, and the commands that still work on an earlier connection."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qkilld.adapters.process import PidfdProcess, open_process
from qkilld.evidence.sockdiag import listening_unix
from qkilld.model.errors import MonitorError, MonitorTimeout
from qkilld.model.guest_state import KeptMonitor
from qkilld.monitor.guest_control import GuestControl
from qkilld.monitor.job_monitor import JobMonitor, JobMonitors
from tests.lab import needs
from tests.lab.guest import Guest, make_disk
from tests.lab.process import run as run_program
from tests.lab.storage import nbd_server
from tests.monitor.connecting import run_for
from tests.monitor.test_guest_control import controlled

KILLS = 200
WRITES = 8


async def hang(control: GuestControl, guest: Guest, freeze: Callable[[], None]) -> None:
    """Send SIGTERM when the healthy disk has acknowledged its writes, and the dead disk has not
    acknowledged its only write."""
    for number in range(WRITES):
        await control.hmp(f'qemu-io local "write -P {number + 1} {number * 32}M 64k"')
    freeze()
    await control.hmp('qemu-io dead "aio_write 0 64k"')
    guest.signal(signal.SIGTERM)
    with pytest.raises(MonitorTimeout):
        while True:
            await control.runstate()


def dying_daemon(kept: socket.socket, number: int) -> None:
    """A daemon killed in the middle of a command leaves the reply, or half of it."""
    command = {"exec-oob": "query-yank", "id": number}
    kept.setblocking(True)
    kept.settimeout(30)
    kept.sendall(json.dumps(command).encode() + b"\n")
    if number % 2:
        kept.recv(1 + number % 60)
    kept.setblocking(False)


async def adopted(process: PidfdProcess, kept: socket.socket, own: frozenset[str]) -> GuestControl:
    copy = socket.socket(fileno=os.dup(kept.fileno()))
    return await GuestControl.adopt(process, copy, own, listening_unix)


def test_out_of_band_outlives_daemons_and_saves_the_healthy_disk(
    qemu: Callable[..., Guest], lab_dir: Path
) -> None:
    local = make_disk(lab_dir / "local.qcow2")
    dead = lab_dir / "dead.raw"
    dead.write_bytes(bytes(1 << 20))
    with nbd_server(dead) as server:
        drives = [f"file={server.uri},if=none,id=dead,format=raw"]
        drives += [f"file={local},if=none,id=local,format=qcow2"]
        guest = qemu(arguments=[word for drive in drives for word in ("-drive", drive)])

        async def work() -> None:
            process = open_process(guest.pid)
            try:
                async with controlled(guest) as control:
                    await hang(control, guest, server.freeze)
                    assert control.qmp is not None
                    kept = socket.socket(fileno=os.dup(control.qmp.fileno()))
                    own = control.own_chardevs
                with kept:
                    for number in range(KILLS):
                        dying_daemon(kept, number)
                        control = await adopted(process, kept, own)
                        instances = await control.query_yank()
                        assert {one.kind for one in instances} == {"block-node"}
                        control.close()
                        await asyncio.sleep(0)  # closes it
                    control = await adopted(process, kept, own)
                    await control.yank(await control.query_yank())
                    control.close()
            finally:
                process.close()

        run_for(170, work())
        assert guest.wait_gone(60) == 0
    qemu_io = needs.program("qemu-io", "qemu-utils")
    for number in range(WRITES):
        read = f"read -P {number + 1} {number * 32}M 64k"
        shown = run_program([qemu_io, "-r", "-f", "qcow2", "-c", read, local], check=True).stdout
        assert "verification failed" not in shown


def test_a_connection_that_comes_too_late(qemu: Callable[..., Guest], lab_dir: Path) -> None:
    """The connection gets only the greeting, so qkilld gives it up after a second."""
    dead = lab_dir / "dead.raw"
    dead.write_bytes(bytes(1 << 20))
    with nbd_server(dead) as server:
        guest = qemu(arguments=["-drive", f"file={server.uri},if=none,id=dead,format=raw"])

        async def work() -> None:
            process = open_process(guest.pid)
            try:
                async with controlled(guest) as control:
                    server.freeze()
                    await control.hmp('qemu-io dead "aio_write 0 64k"')
                guest.signal(signal.SIGTERM)
                with pytest.raises(MonitorError):
                    for _ in range(20):
                        late = await GuestControl.open(process, listening_unix)
                        late.close()
                        await asyncio.sleep(0.1)
            finally:
                process.close()

        run_for(100, work())
        guest.signal(signal.SIGKILL)


def test_a_kept_connection_that_cannot_be_used(qemu: Callable[..., Guest]) -> None:
    """systemd's copy must be dropped, because QEMU serves no new connection until then."""
    guest = qemu()

    async def work() -> None:
        outcome: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        process = open_process(guest.pid)
        ours, theirs = socket.socketpair()
        try:
            async with controlled(guest) as control:
                assert control.qmp is not None
                copy = socket.socket(fileno=os.dup(control.qmp.fileno()))
            kept = KeptMonitor(ours.detach(), ())
            monitors = JobMonitors(listening_unix)
            monitors.open(process, "", outcome.set_result, kept=kept, on_lost=copy.close)
            monitor = await outcome
            assert isinstance(monitor, JobMonitor), monitor
            monitor.close()
        finally:
            theirs.close()
            copy.close()
            process.close()

    run_for(60, work())
