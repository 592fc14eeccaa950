"""A guest at full load that ignores its power button, on a host whose load changes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qkilld.adapters.process import open_process
from qkilld.decision.powerdown import Conclusion
from qkilld.evidence.sockdiag import listening_unix
from qkilld.monitor.guest_control import GuestControl
from qkilld.monitor.qmp import OPEN_S
from tests.lab.debian import Debian, boot_debian
from tests.lab.process import end, spawn
from tests.monitor.connecting import connected, run, run_for
from tests.monitor.test_guest_control import Start, ask, controlled

RIVALS = 6
CHANGE_S = 5
"""Measuring takes at most 2 s on an idle host, so the guest is asked before the change."""
POWERDOWN_S = 20

# One at a time, because each takes most of one processor from the other tests.
pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("one-processor")]


class Rivals:
    """Programs that keep one processor busy. Each has a session of its own, because the kernel
    shares out the processor among sessions."""

    def __init__(self, processor: int, count: int = RIVALS) -> None:
        self._pin, self._count = partial(os.sched_setaffinity, 0, {processor}), count
        self._running: list[subprocess.Popen[bytes]] = []

    def begin(self) -> None:
        command = ["/bin/sh", "-c", "while :; do :; done"]
        self._running += [spawn(command, before=self._pin) for _ in range(self._count)]

    def end(self) -> None:
        while self._running:
            end(self._running.pop())


def load_guest(debian: Debian, load: str) -> int:
    """Put the guest under load, and its QEMU on one processor. Return the processor."""
    debian.shell.run(
        "mkdir -p /run/systemd/logind.conf.d;"
        " printf '[Login]\\nHandlePowerKey=ignore\\n' >/run/systemd/logind.conf.d/lab.conf;"
        " systemctl restart systemd-logind; systemctl stop qemu-guest-agent"
    )
    debian.shell.tell(f"while :; do {load}; done &")
    processor = min(os.sched_getaffinity(0))
    for task in Path(f"/proc/{debian.guest.pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {processor})
    return processor


async def ask_while(debian: Debian, change: Callable[[], object]) -> list[Conclusion]:
    """Ask the guest, and call `change` after CHANGE_S; return the conclusions."""
    process = open_process(debian.guest.pid)
    try:
        async with controlled(debian.guest) as control:
            await asyncio.sleep(3)
            asyncio.get_running_loop().call_later(CHANGE_S, change)
            return await ask(control, process, powerdown_s=POWERDOWN_S)
    finally:
        process.close()


@pytest.mark.parametrize("begins", [True, False], ids=["begins", "ends"])
@pytest.mark.parametrize(
    "load",
    [":", "dd if=/dev/zero of=/data/load bs=4k count=2000 oflag=direct conv=notrunc 2>/dev/null"],
    ids=["computes", "writes"],
)
def test_the_load_of_the_host(load: str, begins: bool) -> None:
    """When it begins or ends after the press, the guest's work seems to change."""
    with boot_debian() as debian:
        rivals = Rivals(load_guest(debian, load))
        try:
            if not begins:
                rivals.begin()
            change = rivals.begin if begins else rivals.end
            conclusions = run_for(600, ask_while(debian, change))
        finally:
            rivals.end()
    assert Conclusion.ASK in conclusions
    assert conclusions[-1] is Conclusion.IGNORED
    assert Conclusion.SHUTTING_DOWN not in conclusions


def hold_back(pid: int) -> int:
    """Let QEMU run only on one processor, and only if nobody else wants it. Return the
    processor."""
    processor = min(os.sched_getaffinity(0))
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {processor})
        os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):  # Kernels without CONFIG_SCHED_AUTOGROUP.
        Path(f"/proc/{pid}/autogroup").write_text("19")
    return processor


def test_a_monitor_is_opened_although_the_host_gives_the_guest_no_processor(qemu: Start) -> None:
    """QEMU sends its greeting a few seconds late."""
    guest = qemu()

    async def open_once() -> float:
        began = time.monotonic()
        process = open_process(guest.pid)
        try:
            control = await GuestControl.open(process, listening_unix)
            try:
                assert await control.runstate() == "running"
            finally:
                control.close()
        finally:
            process.close()
        return time.monotonic() - began

    run(connected(guest.pid)).close()  # Waits until the monitor is free.
    rivals = Rivals(hold_back(guest.pid), 15)
    rivals.begin()
    try:
        for _ in range(8):
            if run_for(120, open_once()) > 1.2 * OPEN_S:
                break
        else:
            raise AssertionError("the greeting was never late")
    finally:
        rivals.end()
