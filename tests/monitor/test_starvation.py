"""A guest that waits for the processors of a busy host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from qkilld.adapters.process import open_process
from qkilld.evidence.sockdiag import listening_unix
from qkilld.model.errors import (
    CommandRefused,
    MonitorBusy,
    MonitorError,
    MonitorProtocolError,
    MonitorTimeout,
)
from qkilld.model.guest_state import Button
from qkilld.monitor import guest_control
from qkilld.monitor.channel import MAX_FLOW
from qkilld.monitor.guest_control import GuestControl
from qkilld.monitor.qmp import OPEN_S, QmpClient, QmpEvent
from qkilld.monitor.starvation import Starvation
from tests.evidence.until import until
from tests.lab.process import end, spawn
from tests.monitor.connecting import run
from tests.monitor.test_guest_control import Start, controlled, stop

BUSY = ["/bin/sh", "-c", "while :; do :; done"]


def hold_back(pid: int) -> None:
    """Let a process run only if nobody else wants its processor."""
    os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):  # Kernels without CONFIG_SCHED_AUTOGROUP.
        Path(f"/proc/{pid}/autogroup").write_text("19")


def test_a_process_that_gets_no_processor_is_starved() -> None:
    with contextlib.ExitStack() as stack:

        def start(command: list[str]) -> int:
            pin = partial(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))})
            process = spawn(command, stdin=subprocess.PIPE, before=pin)
            stack.callback(end, process)
            return process.pid

        busy, idle = start(BUSY), start(["/bin/sh", "-c", "read nothing"])
        hold_back(busy)
        for _ in range(3):
            start(BUSY)
        observed = [Starvation(Path(f"/proc/{pid}/task")) for pid in (busy, idle)]
        time.sleep(1)
        assert [each.is_starved() for each in observed] == [True, False]
        assert not Starvation(Path("/proc/0/task")).is_starved()


@pytest.mark.parametrize("starved", [True, False])
def test_a_late_greeting(starved: bool) -> None:
    async def greet(ours: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(1.5 * OPEN_S)
        await loop.sock_sendall(ours, b'{"QMP": {"version": {}, "capabilities": []}}\n')
        command = json.loads(await loop.sock_recv(ours, 4096))
        answer = json.dumps({"return": {}, "id": command["id"]})
        await loop.sock_sendall(ours, answer.encode() + b"\n")

    async def open_monitor() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours:
            greeter = asyncio.create_task(greet(ours))
            try:
                client = await QmpClient.open(theirs, is_starved=lambda: starved)
                client.close()
                await greeter
            finally:
                greeter.cancel()

    with contextlib.nullcontext() if starved else pytest.raises(MonitorBusy):
        run(open_monitor())


@pytest.mark.parametrize(
    ("kind", "fault", "pressed"),
    [
        ("qmp", "late", True),
        ("qmp", "busy", False),
        ("qmp", "flood", True),
        ("qmp", "closed", False),
        ("qmp", "ended", False),
        ("monitor", "late", False),
    ],
)
def test_a_press_that_qemu_takes_late(
    qemu: Start,
    lab_dir: Path,
    kind: str,
    fault: str,
    pressed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the button is pressed in the end, the guest must not be asked again. It is not pressed if
    QEMU is busy with another command, if the connection was already closed, or if QEMU drops the
    line for its human monitor. QEMU 7.2 drops it; 10.0 and 11.1 execute it (measured), and then the
    register of the button shows the press."""
    monkeypatch.setattr(guest_control, "ORDER_S", 0.2)
    monitors = [f"-{kind}", f"unix:{lab_dir}/monitor,server=on,wait=off"]
    monitors += ["-qmp", f"unix:{lab_dir}/other,server=on,wait=off"]
    guest = qemu(qmp=False, arguments=monitors)

    async def press() -> tuple[bool, int]:
        with socket.socket(socket.AF_UNIX) as other:
            until(lambda: other.connect_ex(str(lab_dir / "other")), (0).__eq__)
            events: list[str] = []
            after_event: list[Callable[[], None]] = []

            def take_event(event: QmpEvent) -> None:
                events.append(event.name)
                for call in after_event:
                    call()

            watch = await QmpClient.open(other, take_event)
            async with controlled(guest) as control:
                stop(guest)
                if fault == "busy":
                    assert control.qmp is not None
                    with pytest.raises(MonitorTimeout):
                        await control.qmp.execute("query-status", timeout_s=0.1)
                elif fault == "flood":
                    # The flood comes after the press, and before the reply.
                    assert control.qmp is not None and control.qmp._transport is not None
                    control.qmp._transport.pause_reading()
                    after_event.append(partial(control.qmp.data_received, b" " * (MAX_FLOW + 1)))
                    os.kill(guest.pid, signal.SIGCONT)
                elif fault == "closed":
                    control.close()
                elif fault == "ended":
                    assert control.qmp is not None
                    with socket.socket(fileno=os.dup(control.qmp.fileno())) as ours:
                        ours.shutdown(socket.SHUT_WR)
                with contextlib.nullcontext() if pressed else pytest.raises(MonitorError):
                    await control.press()
                await asyncio.sleep(0.1)  # The human monitor's connection is closed meanwhile.
                os.kill(guest.pid, signal.SIGCONT)
                for _ in range(5):
                    await watch.execute("query-status", timeout_s=30)
            version = await watch.execute("query-version", timeout_s=30)
            watch.close()
            return "POWERDOWN" in events, version["qemu"]["major"]

    was_pressed, version = run(press())
    assert was_pressed is pressed or (kind == "monitor" and version >= 10)


def test_a_kept_connection_on_which_qemu_answers_late(
    qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGTERM, QEMU answers only on this connection."""
    monkeypatch.setattr(guest_control, "QUERY_S", 0.2)
    monkeypatch.setattr(Starvation, "is_starved", lambda self: True)
    guest = qemu()

    async def adopt() -> None:
        process = open_process(guest.pid)
        try:
            async with controlled(guest) as control:
                assert control.qmp is not None
                kept = socket.socket(fileno=os.dup(control.qmp.fileno()))
            stop(guest)
            asyncio.get_running_loop().call_later(0.6, os.kill, guest.pid, signal.SIGCONT)
            adopted = await GuestControl.adopt(process, kept, frozenset(), listening_unix)
            adopted.close()
        finally:
            process.close()

    run(adopt())


def test_an_observation_has_the_time_of_its_counters(
    qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy host, the replies before the counters may take seconds. If the time of the
    observation was taken before those replies, the rates of the guest's work would be wrong."""
    read_button = GuestControl.read_button

    async def read_late(control: GuestControl) -> tuple[Button, bool | None]:
        await asyncio.sleep(0.3)
        return await read_button(control)

    monkeypatch.setattr(GuestControl, "read_button", read_late)

    async def observe() -> None:
        async with controlled(qemu()) as control:
            began = time.monotonic_ns() // 1000
            seen = await control.observe()
            assert seen.requests == 0 and seen.at >= began + 300_000

    run(observe())


@pytest.mark.parametrize("error", [CommandRefused("query-cpus-fast", "", ""), MonitorProtocolError])
def test_an_observation_without_virtual_processors(
    qemu: Start, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """QEMU 2.11 and older have no query-cpus-fast."""
    monkeypatch.setattr(GuestControl, "_find_vcpus", AsyncMock(side_effect=error))

    async def observe() -> None:
        async with controlled(qemu()) as control:
            seen = await control.observe()
            assert (seen.requests, seen.vcpus) == (0, None)

    run(observe())
