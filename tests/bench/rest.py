"""The daemon at rest: whether anything wakes it, and how much memory it uses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.bench import progress
from tests.bench.figures import Figure, Row, at_most, none_of
from tests.bench.processor_usage import ProcessorUsage, threads
from tests.lab import needs
from tests.lab.bus import Daemon, daemon, private_bus
from tests.lab.guest import fake_qemu
from tests.lab.log import Log
from tests.lab.process import end, spawn
from tests.lab.scratch import scratch

RESIDENT_MB: Final = 35
_SETTLE_S: Final = 1.0
"""Time for the daemon to finish its start, and for strace to attach."""


def measure(seconds: int, jobs: int) -> list[Figure]:
    """Record the wake-ups of an idle daemon for `seconds`. Then measure its memory, and again after
    `jobs` jobs."""
    with private_bus() as bus, daemon(bus) as running:
        watched = _wakeups(running, seconds)
        return [watched, _memory(running, jobs)]


def _wakeups(running: Daemon, seconds: int) -> Figure:
    figure = Figure(f"At rest with no job, for {seconds} s")
    with contextlib.ExitStack() as stack:
        trace = None
        try:
            trace = stack.enter_context(_strace(running.pid))
        except (needs.Missing, AssertionError) as error:
            figure.not_measured = f"system calls: {error}"
        time.sleep(_SETTLE_S)
        traced_before = len(trace.lines()) if trace else 0
        before = ProcessorUsage.of(running.pid)
        for passed in range(seconds):
            progress.show(f"at rest: {passed} of {seconds} s")
            time.sleep(1)
        spent = ProcessorUsage.of(running.pid) - before
        if trace:
            calls = len(trace.lines()) - traced_before
            # To prove that strace works, make a call that must be in the log.
            seen = len(trace.text())
            with running.bus.client() as client:
                client.properties()
            trace.wait_for(r"\(", 10, since=seen)
            figure.rows.append(Row("system calls of all threads (strace -f)", "", [calls]))
            figure.targets.append(none_of("system calls", calls))
    figure.rows += [
        Row("context switches of all threads", "", [spent.switches]),
        Row("processor time", "ms", [spent.processor_ms]),
        Row("threads", "", [len(threads(running.pid))]),
    ]
    figure.targets.append(none_of("wake-ups (context switches)", spent.switches))
    return figure


def _memory(running: Daemon, jobs: int) -> Figure:
    figure = Figure("Memory, and the processor time of a job (polite stand-ins for QEMU)")
    at_rest = resident(running.pid)
    figure.rows += _memory_rows(running.pid, "with no job since its start")
    before = ProcessorUsage.of(running.pid)
    with running.bus.client() as client:
        for number in range(jobs):
            progress.show(f"memory: job {number + 1} of {jobs}")
            with fake_qemu() as guest:
                result, _ = client.wait(client.terminate(guest.pid))
                assert result == "exited", result
    spent = ProcessorUsage.of(running.pid) - before
    figure.rows += _memory_rows(running.pid, f"after {jobs} jobs in a row")
    figure.rows.append(Row("processor time for one job", "ms", [spent.processor_ms / jobs]))
    figure.targets.append(at_most("resident at rest (VmRSS)", at_rest, RESIDENT_MB, "MB"))
    return figure


def _memory_rows(pid: int, when: str) -> list[Row]:
    return [
        Row(f"resident (VmRSS) {when}", "MB", [resident(pid)]),
        Row(f"its share (Pss) {when}", "MB", [_kilobytes(pid, "smaps_rollup", "Pss")]),
    ]


def resident(pid: int) -> float:
    """VmRSS in MB."""
    return _kilobytes(pid, "status", "VmRSS")


def _kilobytes(pid: int, file: str, name: str) -> float:
    """Read a line of /proc/PID/FILE; convert its kB (1024 bytes) to MB (10^6 bytes)."""
    text = Path(f"/proc/{pid}/{file}").read_text()
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert match, text
    return int(match[1]) * 1024 / 1e6


@contextlib.contextmanager
def _strace(pid: int) -> Iterator[Log]:
    """Log every system call of a process's threads from now on, one per line.

    Raises needs.Missing if strace is missing, AssertionError if strace may not trace the process.
    """
    strace = needs.program("strace", "strace")
    with scratch("s") as directory, (directory / "stderr").open("wb") as stderr:
        calls, said = Log(directory / "calls"), Log(directory / "stderr")
        process = spawn([strace, "-f", "-p", str(pid), "-o", calls.path], stderr=stderr)
        pidfd = os.pidfd_open(process.pid)
        try:
            said.wait_for("attached", 10, pidfd=pidfd)
            yield calls
        finally:
            # At SIGTERM, strace detaches from the process. At SIGKILL, the kernel detaches it.
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            os.close(pidfd)
            end(process)
