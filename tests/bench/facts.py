"""The cost of reading a fact with our reader and with psutil."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from qkilld.adapters.procfs import read_command_line, read_stat
from qkilld.evidence.devices import Block, describe, read_counters
from qkilld.evidence.files import read_descriptors
from qkilld.evidence.meminfo import read_memory
from qkilld.evidence.process_reader import ProcessReader
from qkilld.evidence.sockets import SocketReader, SocketTable
from tests.bench import progress
from tests.bench.figures import Figure, Row
from tests.lab.guest import start_qemu


def measure(rounds: int) -> Figure:
    figure = Figure("A fact of a small QEMU read by us, and below it by psutil (processor time)")
    with start_qemu() as guest:
        process = psutil.Process(guest.pid)
        reader = ProcessReader(guest.pid)
        sockets = SocketReader(guest.pid)
        sockets.refresh()
        try:
            for label, ours, theirs in _facts(guest.pid, process, reader, sockets):
                progress.show(f"facts: {label}")
                mine, others = [], []
                for _ in range(rounds):
                    mine.append(_processor_usec(ours))
                    others.append(_processor_usec(theirs))
                ratio = statistics.median(mine) / statistics.median(others)
                figure.rows += [
                    Row(label, "µs", mine),
                    Row(f"  psutil; ours costs {ratio:.0%}", "µs", others),
                ]
        finally:
            reader.close()
            sockets.close()
    figure.notes += [
        "We keep our own readers if they are faster, or if psutil does not report the same fact:",
        "psutil reports start times in float seconds (identity needs ticks) and the switches of",
        "one thread, but no call that a thread waits in, no queue of a socket, no pending signal,",
        "and no debugger. Our command line is read once for each job, and limited in size.",
    ]
    return figure


def _facts(
    pid: int, process: psutil.Process, reader: ProcessReader, sockets: SocketReader
) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    disk = _any_disk()
    facts: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        (
            "state and start time",
            lambda: read_stat(pid),
            lambda: (psutil.Process(pid).status(), psutil.Process(pid).create_time()),
        ),
        (
            "state, processor time, I/O (ours: signals, debugger too)",
            lambda: reader.read({"state": "?"}, detail=False),
            lambda: (process.status(), process.cpu_times(), process.io_counters()),
        ),
        (
            "threads and context switches (ours: calls, rings too)",
            lambda: reader.read({"state": "?"}, has_run=True),
            lambda: (process.threads(), process.num_ctx_switches()),
        ),
        ("open files", lambda: read_descriptors(pid), process.open_files),
        ("command line", lambda: read_command_line(pid), process.cmdline),
        (
            "connections (ours: queues, ends too)",
            lambda: sockets.read(SocketTable()),
            lambda: process.connections(kind="all"),
        ),
        ("the host's page cache", read_memory, psutil.virtual_memory),
    ]
    if disk is not None:
        block, name = disk
        facts.append(
            (
                "counters of a disk",
                lambda: read_counters(block.stats),
                lambda: psutil.disk_io_counters(perdisk=True)[name],
            )
        )
    return facts


def _any_disk() -> tuple[Block, str] | None:
    for name in psutil.disk_io_counters(perdisk=True):
        block = describe(Path(f"/sys/class/block/{name}/dev").read_text().strip())
        if block is not None:
            return block, name
    return None


def _processor_usec(read: Callable[[], object]) -> float:
    began = time.thread_time_ns()
    read()
    return (time.thread_time_ns() - began) / 1000
