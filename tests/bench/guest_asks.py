"""The time that qkilld needs to ask a guest, compared with one press of the power button; and the
time to open a monitor."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Iterator

from qkilld.adapters.process import open_process
from qkilld.evidence.sockdiag import listening_unix
from qkilld.monitor.guest_control import GuestControl
from tests.bench import progress
from tests.bench.figures import Figure, Row, at_most
from tests.lab.bus import Client, daemon, lab_config, private_bus
from tests.lab.debian import boot_debian
from tests.lab.guest import Guest, boot_guest, start_qemu
from tests.lab.process import wait_gone
from tests.lab.qmp import Qmp

POWERDOWN = 4
ADDED_MS = 50
OPEN_MS = 5.0


def measure(small: int, debian: int, opened: int) -> list[Figure]:
    return [_beside_one_press(small, debian), _opening(opened)]


def _beside_one_press(small: int, debian: int) -> Figure:
    """Stop guests in both ways in turn, so that other load on the machine affects both."""
    figure = Figure("From the call to the exit of an idle guest, asked by its power button")
    with private_bus() as bus, daemon(bus, config=lab_config()), bus.client() as client:
        for label, boot, rounds in (
            ("a small guest without an agent", _small, small),
            ("Debian, its agent stopped", _debian, debian),
        ):
            bare, asked = [], []
            for number in range(rounds):
                progress.show(f"{label}: {number + 1} of {rounds}")
                with boot() as guest:
                    bare.append(_press(guest))
                with boot() as guest:
                    asked.append(_terminate(guest, client))
            figure.rows += [
                Row(f"{label}, one press and a pidfd", "ms", bare),
                Row("  qkilld", "ms", asked),
            ]
            added = statistics.median(asked) - statistics.median(bare)
            figure.targets.append(at_most(f"qkilld adds, {label}", added, ADDED_MS, "ms"))
    figure.notes.append("Most of the time is the guest's. qkilld adds the difference of medians.")
    return figure


@contextlib.contextmanager
def _small() -> Iterator[Guest]:
    with boot_guest(job="power", append="lab.power=off", qmp=True) as guest:
        time.sleep(2.5)  # Wait until the guest's disks have been idle for IDLE_DISKS.
        yield guest


@contextlib.contextmanager
def _debian() -> Iterator[Guest]:
    with boot_debian() as debian:
        debian.shell.run("systemctl stop qemu-guest-agent; sync; sleep 3")
        yield debian.guest


def _press(guest: Guest) -> float:
    with Qmp(guest) as qmp:
        began = time.perf_counter()
        qmp.call("system_powerdown")
        assert wait_gone(guest.pidfd, 120)
        return (time.perf_counter() - began) * 1000


def _terminate(guest: Guest, client: Client) -> float:
    began = time.perf_counter()
    result, receipt = client.wait(client.terminate(guest.pid, POWERDOWN), timeout=120)
    took = (time.perf_counter() - began) * 1000
    assert (result, receipt["guest-asked"]) == ("exited", "shut-down")
    return took


def _opening(rounds: int) -> Figure:
    figure = Figure("Finding, proving and opening a QMP monitor, out-of-band negotiated")
    with start_qemu() as guest:
        times = asyncio.run(_open_times(guest, rounds))
    figure.rows.append(Row("a QEMU with one monitor", "ms", times))
    figure.targets.append(at_most("median", statistics.median(times), OPEN_MS, "ms"))
    return figure


async def _open_times(guest: Guest, rounds: int) -> list[float]:
    process = open_process(guest.pid)
    times = []
    try:
        for _ in range(rounds):
            began = time.perf_counter()
            control = await GuestControl.open(process, listening_unix)
            times.append((time.perf_counter() - began) * 1000)
            assert control.oob
            control.close()
            await asyncio.sleep(0.05)  # QEMU serves one connection at a time.
    finally:
        process.close()
    return times
