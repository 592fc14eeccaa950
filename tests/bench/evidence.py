"""The cost of evidence: of one sample with its verdict, and of sampling a thousand jobs.

An earlier qkilld is measured in the same run, alternately with this one.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from qkilld.evidence.sampler import TABLES_AGE_S
from tests.bench import progress
from tests.bench.earlier import COMMIT, OURS, environment_of, trees
from tests.bench.figures import Figure, Row, at_most
from tests.bench.processor_usage import ProcessorUsage
from tests.bench.rest import resident as resident_mb
from tests.lab.bus import Client, Daemon, daemon, lab_config, private_bus
from tests.lab.guest import QEMU, boot_guest, fake_qemu, start_qemu
from tests.lab.process import end, spawn
from tests.lab.scratch import scratch

FORCE: Final = 1
GRACE_S: Final = 60
"""Long enough to start the jobs and to measure them."""
WATCHED_S: Final = 20
LIMIT_NOFILE: Final = 65536
"""LimitNOFILE= of qkilld.service."""
_IN_A_ROW: Final = 10
_LOOK: Final = Path(__file__).with_name("look.py")

_CROWD: Final = """
import os, socket, threading, time
files = [os.open("/dev/null", os.O_RDWR) for _ in range(100)]
for _ in range(63):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""


def measure_samples(rounds: int) -> Figure:
    with trees() as (checkouts, notes):
        return _sample_cost(rounds, checkouts, notes)


def measure_jobs(jobs: int) -> Figure:
    with trees() as (checkouts, notes):
        return _many_jobs(jobs, checkouts, notes)


def _sample_cost(rounds: int, checkouts: dict[str, Path], notes: list[str]) -> Figure:
    """Measure the processor time of the sampling thread, for consecutive samples and for samples
    after a pause."""
    figure = Figure(f"One sample and its verdict, beside {COMMIT} (processor time)")
    with contextlib.ExitStack() as stack:
        guests = {
            "a small QEMU (-M none)": stack.enter_context(start_qemu()).pid,
            "64 threads, 100 descriptors": stack.enter_context(_crowd()),
            "a guest with Linux, idle": stack.enter_context(boot_guest()).pid,
        }
        bytecode = stack.enter_context(scratch("y"))
        lookers = {
            name: stack.enter_context(_looker(tree, bytecode)) for name, tree in checkouts.items()
        }
        for label, pid in guests.items():
            progress.show(f"samples: {label}")
            first = {name: [looker.look(pid)] for name, looker in lookers.items()}
            in_a_row: dict[str, list[float]] = {name: [] for name in lookers}
            alone: dict[str, list[float]] = {name: [] for name in lookers}
            for _ in range(rounds // _IN_A_ROW):
                for name, looker in lookers.items():
                    in_a_row[name] += [looker.look(pid) for _ in range(_IN_A_ROW)]
            for number in range(rounds):
                time.sleep(1.5 * TABLES_AGE_S)
                # The trees take turns in being first.
                for name in sorted(lookers, reverse=bool(number % 2)):
                    alone[name].append(lookers[name].look(pid))
            for kind, times in (("in a row", in_a_row), ("alone", alone), ("the first", first)):
                figure.rows += [
                    Row(f"{label}, {kind}" if name == OURS else f"  {name}", "µs", times[name])
                    for name in checkouts
                ]
            if COMMIT in checkouts:
                for kind, times, limit in (("in a row", in_a_row, 1.0), ("alone", alone, 0.5)):
                    ratio = statistics.median(times[OURS]) / statistics.median(times[COMMIT])
                    figure.targets.append(
                        at_most(f"{label}, {kind}, to {COMMIT}'s", ratio, limit, "times")
                    )
    figure.notes += [
        "In a row: as with many jobs, which share a reading of the host's sockets, disks, memory.",
        "Alone: after a pause, with a reading of its own, and with cold processor caches.",
        "The first, and one every 30 s, also finds out which files, disks and sockets there are.",
        *notes,
    ]
    return figure


class _Looker:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._to, self._from = process.stdin, process.stdout

    def look(self, pid: int) -> float:
        """Return the processor time (µs) of a sample of a process and its verdict."""
        self._to.write(b"%d\n" % pid)
        self._to.flush()
        return float(self._from.readline())


@contextlib.contextmanager
def _looker(tree: Path, bytecode: Path) -> Iterator[_Looker]:
    process = spawn(
        [sys.executable, "-P", _LOOK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | environment_of(tree, bytecode),
    )
    try:
        yield _Looker(process)
    finally:
        end(process)


@contextlib.contextmanager
def _crowd() -> Iterator[int]:
    process = spawn([sys.executable, "-c", _CROWD], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        end(process)


def _many_jobs(jobs: int, checkouts: dict[str, Path], notes: list[str]) -> Figure:
    """Stop substitutes for QEMU that ignore SIGTERM. Each has a job that uses evidence until
    SIGKILL.

    The earlier qkilld has a job for each of them, too, and is measured at the same time.
    """
    figure = Figure(f"{jobs} running jobs (stubborn stand-ins named {QEMU}), beside {COMMIT}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(many_descriptors())
        bytecode = stack.enter_context(scratch("y"))
        for tree in checkouts.values():
            with _daemon(tree, bytecode):
                pass  # Writes the bytecode, because an installed qkilld has it.
        daemons = {
            name: stack.enter_context(_daemon(tree, bytecode)) for name, tree in checkouts.items()
        }
        guests = [stack.enter_context(fake_qemu(stubborn=True)) for _ in range(jobs)]
        began = time.monotonic()
        paths = []
        for number, guest in enumerate(guests):
            progress.show(f"{jobs} jobs: starting {number + 1}")
            for name, (_, client) in daemons.items():
                # This qkilld kills the guests long before the earlier one would.
                grace = (GRACE_S if name == OURS else 10 * GRACE_S) * 1_000_000
                path = client.terminate(guest.pid, FORCE, grace_usec=("t", grace))
                if name == OURS:
                    paths.append(path)
        started = time.monotonic() - began
        time.sleep(8)  # Skip the frequent samples at the start.
        progress.show(f"{jobs} jobs: watched for {WATCHED_S} s")
        before = {name: ProcessorUsage.of(running.pid) for name, (running, _) in daemons.items()}
        time.sleep(WATCHED_S)
        spent = {
            name: (ProcessorUsage.of(running.pid) - before[name]).processor_ms / WATCHED_S / 10
            for name, (running, _) in daemons.items()
        }
        resident = {name: resident_mb(running.pid) for name, (running, _) in daemons.items()}
        progress.show(f"{jobs} jobs: waiting for their SIGKILL")
        client = daemons[OURS][1]
        for _ in paths:
            client.signal("JobRemoved", timeout=GRACE_S + 120)
        receipts = [client.wait(path)[1] for path in paths]
    late = [_late_ms(receipt) for receipt in receipts if _is_watched(receipt)]
    if unseen := len(receipts) - len(late):
        notes = [
            *notes,
            f"Jobs not counted, because late samples may have delayed their SIGKILL: {unseen}.",
        ]
    for name in checkouts:
        label = "processor time, share of one core" if name == OURS else f"  {name}"
        figure.rows.append(Row(label, "%", [spent[name]]))
    for name in checkouts:
        label = "resident (VmRSS)" if name == OURS else f"  {name}"
        figure.rows.append(Row(label, "MB", [resident[name]]))
    figure.rows += [
        Row("SIGKILL after its deadline", "ms", late),
        Row(
            "starting them, one after the other",
            "ms each",
            [started * 1000 / jobs / len(checkouts)],
        ),
    ]
    figure.targets += [
        at_most("share of one core", spent[OURS], 15, "%"),
        at_most("latest SIGKILL", max(late), 50, "ms"),
    ]
    if COMMIT in checkouts:
        figure.targets += [
            at_most(f"processor time to {COMMIT}'s", spent[OURS] / spent[COMMIT], 0.6, "times"),
            at_most(f"resident to {COMMIT}'s", resident[OURS] / resident[COMMIT], 1.0, "times"),
        ]
    figure.notes += notes
    return figure


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """If possible, allow as many descriptors as qkilld.service may have. Each job has about ten."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        most = max(most, LIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    soft_now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft_now < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


@contextlib.contextmanager
def _daemon(tree: Path, bytecode: Path) -> Iterator[tuple[Daemon, Client]]:
    with (
        private_bus() as bus,
        daemon(
            bus, config=lab_config("StallSec=10"), env=environment_of(tree, bytecode)
        ) as running,
        bus.client() as client,
    ):
        client.subscribe("type='signal',sender='org.qkilld1',member='JobRemoved'")
        yield running, client


def _is_watched(receipt: dict[str, Any]) -> bool:
    """Return whether every sample was in time. After a late sample, SIGKILL is delayed as for dead
    storage."""
    return all(verdict == "idle" for verdict, *_ in receipt["verdicts"])


def _late_ms(receipt: dict[str, Any]) -> float:
    (_, _, term), (_, _, kill) = receipt["rungs"]
    return float(kill - term) / 1000 - GRACE_S * 1000
