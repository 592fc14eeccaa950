"""A guest at full load that ignores its power button, on a host whose load changes meanwhile."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qkilld.adapters.process import open_process
from qkilld.decision.powerdown import Conclusion
from tests.lab.debian import Debian, boot_debian
from tests.lab.process import end, spawn
from tests.monitor.connecting import run_for
from tests.monitor.test_guest_control import ask, controlled

RIVALS = 20
CHANGE_S = 5
"""Measuring takes at most 2 s on an idle host, so the guest is asked before the change."""
POWERDOWN_S = 20

pytestmark = pytest.mark.timeout(900)


class Rivals:
    """Programs that keep one processor busy. Each has a session of its own, because the kernel
    shares out the processor among sessions."""

    def __init__(self, processor: int) -> None:
        self._pin = partial(os.sched_setaffinity, 0, {processor})
        self._running: list[subprocess.Popen[bytes]] = []

    def begin(self) -> None:
        command = ["/bin/sh", "-c", "while :; do :; done"]
        self._running += [spawn(command, before=self._pin) for _ in range(RIVALS)]

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
