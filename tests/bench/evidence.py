"""What looking costs: one sample with its verdict, and a thousand jobs that are looked at."""

from __future__ import annotations

import contextlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from qkilld.adapters.evidence.sampler import TABLES_AGE_S, Reader, Tables
from qkilld.judgement.verdict import Assessment, assess
from tests.bench import progress
from tests.bench.figures import Figure, Row, at_most
from tests.bench.rest import resident as resident_mb
from tests.bench.spent import Spent
from tests.lab.bus import daemon, lab_config, private_bus
from tests.lab.guest import QEMU, fake_qemu, start_qemu
from tests.lab.process import end, spawn

FORCE = 1
GRACE_S = 45
"""Long enough to start the jobs and to watch them."""

_CROWD = """
import os, socket, threading, time
files = [os.open("/dev/null", os.O_RDWR) for _ in range(100)]
for _ in range(63):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""


def measure(rounds: int, jobs: int) -> list[Figure]:
    return [_sample_cost(rounds), _many_jobs(jobs)]


def _sample_cost(rounds: int) -> Figure:
    """Processor time of the thread that looks, at rest and in a row."""
    figure = Figure("One sample and its verdict (processor time)")
    with start_qemu() as small, _crowd() as large:
        for label, pid, limit in (
            ("a small QEMU (-M none)", small.pid, 150),
            ("a stand-in with 64 threads and 100 descriptors", large, 1000),
        ):
            progress.show(f"samples: {label}")
            first, in_a_row, alone = _costs(pid, rounds)
            figure.rows += [
                Row(f"{label}, in a row", "µs", in_a_row),
                Row("  alone, after a pause", "µs", alone),
                Row("  the first", "µs", [first]),
            ]
            median = statistics.median(in_a_row)
            figure.targets.append(at_most(f"median in a row, {label}", median, limit, "µs"))
    figure.notes += [
        "In a row: as with many jobs, which share a look at the host's sockets, disks and memory.",
        "Alone: with a look of its own, and whatever the processor has forgotten meanwhile.",
        "The first finds out which files, disks and sockets there are; so does one every 30 s.",
    ]
    return figure


def _costs(pid: int, rounds: int) -> tuple[float, list[float], list[float]]:
    reader = Reader(pid, Tables())
    known: Assessment | None = None

    def look() -> float:
        nonlocal known
        began = time.thread_time_ns()
        known = assess(known, reader.read())
        return (time.thread_time_ns() - began) / 1000

    def look_later() -> float:
        time.sleep(1.5 * TABLES_AGE_S)
        return look()

    try:
        first = look()
        return first, [look() for _ in range(rounds)], [look_later() for _ in range(rounds)]
    finally:
        reader.close()


@contextlib.contextmanager
def _crowd() -> Iterator[int]:
    process = spawn([sys.executable, "-c", _CROWD], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        end(process)


def _many_jobs(jobs: int) -> Figure:
    """Stubborn stand-ins, each with a job that goes by evidence up to its SIGKILL."""
    figure = Figure(f"{jobs} running jobs (stubborn stand-ins named {QEMU})")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        with contextlib.ExitStack() as stack:
            bus = stack.enter_context(private_bus())
            running = stack.enter_context(daemon(bus, config=lab_config("StallSec=10")))
            client = stack.enter_context(bus.client())
            client.subscribe("type='signal',sender='org.qkilld1',member='JobRemoved'")
            guests = [stack.enter_context(fake_qemu(stubborn=True)) for _ in range(jobs)]
            paths = []
            began = time.monotonic()
            for number, guest in enumerate(guests):
                progress.show(f"{jobs} jobs: starting {number + 1}")
                grace = {"grace_usec": ("t", GRACE_S * 1_000_000)}
                paths.append(client.terminate(guest.pid, FORCE, **grace))
            started = time.monotonic() - began
            time.sleep(8)  # past the close looks at first
            before, since = Spent.of(running.pid), time.monotonic()
            time.sleep(10)
            share = (Spent.of(running.pid) - before).processor_ms / (time.monotonic() - since) / 10
            resident = resident_mb(running.pid)
            progress.show(f"{jobs} jobs: waiting for their SIGKILL")
            for _ in paths:
                client.signal("JobRemoved", timeout=GRACE_S + 60)
            late = [_late_ms(client.wait(path)[1]) for path in paths]
        figure.rows += [
            Row("processor time, share of one core", "%", [share]),
            Row("resident (VmRSS)", "MB", [resident]),
            Row("SIGKILL after its deadline", "ms", late),
            Row("starting them, one after the other", "ms each", [started * 1000 / jobs]),
        ]
        figure.targets += [
            at_most("share of one core", share, 15, "%"),
            at_most("resident", resident, 64, "MB"),
            at_most("latest SIGKILL", max(late), 50, "ms"),
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    return figure


def _late_ms(receipt: dict[str, Any]) -> float:
    (_, _, term), (_, _, kill) = receipt["rungs"]
    return float(kill - term) / 1000 - GRACE_S * 1000
