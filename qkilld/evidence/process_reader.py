"""Read the process itself: /proc/PID/stat, status and io; with detail, also its threads and rings.

Sources: proc_pid_stat(5), proc_pid_status(5), kernel Documentation/filesystems/proc.rst. Rights:
stat and status need none; io needs the ptrace right and, for another user's process,
CAP_DAC_OVERRIDE. Cost, measured on kernel 6.18: 22 µs for QEMU with three threads, 6 µs if none of
them has run since the last read. If the process's storage hangs, its memory lock may be held all
the time. This module takes the lock only through rings.py, in a separate thread. A process in
execve(2) can block most other reads (adapters/blockable.py), so samples are taken in threads that
may stay blocked (workers.py).

The processor clock of a process (clock_getcpuclockid(3)) counts the nanoseconds that its threads
ran. If the clock has not advanced, no thread has run, so values that only the threads can change
are not read again. Values that others can change (a pending signal, a debugger, requests on rings)
are read each time. While a thread runs, the clock may not include this run yet, so a change may be
noticed one sample later.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from qkilld.adapters.procfs import parse_stat
from qkilld.debug_log import note_once
from qkilld.evidence.faults import FaultGuard
from qkilld.evidence.kept_file import KeptFile, number_after, open_directory
from qkilld.evidence.rings import RingReader
from qkilld.evidence.threads import MAX_KEPT, STOPPED, ThreadReader
from qkilld.model.sample import Io

_TERM: Final = 1 << (signal.SIGTERM - 1)
_IO_LABELS: Final = tuple(f"{name}:".encode() for name in Io.__slots__)
_PROC: Final = Path("/proc")
_COARSE: Final = 1_000_000
"""1 ms in ns. A processor time that is a multiple of 1 ms counts as unknown, because it may come
from a coarse clock, which misses short runs."""


class ProcessReader:
    """Reads one process. Not thread-safe."""

    __slots__ = (
        "_clock_id", "_cpu_time", "_directory", "_guard", "_io", "_last_values", "_rings",
        "_stat", "_status", "_text", "_threads", "start_time",
    )  # fmt: skip

    def __init__(
        self,
        pid: int,
        proc: Path = Path("/proc"),
        clock: Callable[[], float] = time.monotonic,
        guard: FaultGuard | None = None,
        most_kept: int = MAX_KEPT,
    ) -> None:
        """Open the process that has this pid now, and never read one that reuses the pid.

        The caller must open a pidfd of the process before this call, and check afterwards that the
        process still exists: otherwise, another process may have been opened. Raises no exception:
        if the process is gone, all fields are unknown. `clock` returns monotonic time in seconds.
        Without a guard, exceptions of a read are raised. `most_kept`: for at most this many
        threads, schedstat stays open between reads (see threads.MAX_KEPT).
        """
        self._guard = guard or FaultGuard()
        self._clock_id = ~pid << 3 | 2 if proc == _PROC else None
        """MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED), linux/posix-timers.h."""
        self._cpu_time: int | None = None
        self._text: int | None = None
        """The hash of /proc/PID/status at the last read. The texts of thousands of processes would
        take megabytes."""
        self._last_values: tuple[Any, ...] | None = None
        """The results of the last read, in the order of _WHOLE; None unless that read was complete
        and all threads slept."""
        self.start_time: int | None = None
        """The start of the process in clock ticks since boot; None before it was read."""
        try:
            self._directory = open_directory(proc / str(pid))
        except OSError as error:
            note_once("opening /proc/PID", error)
            self._directory = -1
            return
        self._stat = KeptFile("stat", self._directory)
        self._status = KeptFile("status", self._directory)
        self._io = KeptFile("io", self._directory)
        self._threads = ThreadReader(self._directory, most_kept)
        self._rings = RingReader(self._directory, proc, clock)

    @property
    def directory(self) -> int:
        """A descriptor of /proc/PID, which `close` closes; -1 if there is none."""
        return self._directory

    @property
    def open_files(self) -> int:
        """The number of descriptors that are open between reads, including that of /proc/PID."""
        if self._directory < 0:
            return 0
        files = sum(file.is_open for file in (self._stat, self._status, self._io))
        return 1 + files + self._threads.open_files

    def has_run(self) -> bool:
        """Return whether everything must be read again, because a thread may have run since the
        last call, or the last read was incomplete."""
        before, self._cpu_time = self._cpu_time, self._time_run()
        return self._last_values is None or self._cpu_time is None or self._cpu_time != before

    def read(
        self,
        into: dict[str, Any],
        *,
        detail: bool = True,
        opened: int | None = None,
        has_run: bool | None = None,
    ) -> None:
        """Put values of fields of model.sample.Sample into `into`.

        The fields are state, cpu, term_pending, tracer, dumping and io; with `detail` also
        switches, threads, running, exiting, rings, timers and direct. Unreadable values are None,
        except that `timers` is 0 and `state` is not set. Whatever the process does, this raises no
        exception.

        `has_run`: a result of has_run(), if the caller has just called it.
        """
        if has_run is None:
            has_run = self.has_run()
        into.update(_NOTHING)
        if detail:
            into.update(_NO_DETAIL)
        if self._directory < 0:
            return
        call = self._guard.call
        known = None if has_run or not detail else self._last_values
        if known and call("reading /proc/PID/status", self._is_status, self._text):
            into.update(zip(_WHOLE, known, strict=True))
            call("reading rings", self._read_rings, into, opened, False)
            return
        self._last_values = self._text = None
        threads, exiting = call("reading /proc/PID/stat", self._read_stat, into) or (None, False)
        call("reading /proc/PID/status", self._read_status, into)
        into["io"] = call("reading /proc/PID/io", self._read_io)
        if detail:
            if threads is not None:
                call("reading threads", self._read_threads, into, threads, exiting)
            self._remember(into)
            call("reading rings", self._read_rings, into, opened, True)

    def read_completions(self) -> int | None:
        """See RingReader. May block briefly."""
        return None if self._directory < 0 else self._rings.read_completions()

    def close(self) -> None:
        """May be called twice."""
        if self._directory < 0:
            return
        self.close_files()
        self._threads.close()
        os.close(self._directory)
        self._directory = -1

    def close_files(self) -> None:
        """Close files; the next read opens them again."""
        if self._directory < 0:
            return
        for file in (self._stat, self._status, self._io):
            file.close()
        self._threads.close_files()

    def _read_stat(self, into: dict[str, Any]) -> tuple[int | None, bool]:
        """Read stat. Return the number of threads, and whether the first thread is exiting."""
        try:
            stat = parse_stat(self._stat.read())
        except OSError as error:
            note_once("reading stat", error)
            return None, False
        into["state"], into["cpu"] = stat.state, stat.cpu
        self.start_time = stat.start_time
        return stat.threads, stat.exiting

    def _read_io(self) -> Io | None:
        return _io(self._io.read_or_none())

    def _read_threads(self, into: dict[str, Any], threads: int, exiting: bool) -> None:
        into["switches"], waiting = self._threads.read(threads)
        if waiting and into.get("state") in STOPPED:
            waiting = tuple(thread for thread in waiting if thread.state not in STOPPED)
        into["threads"] = waiting
        into["running"] = self._threads.running
        into["exiting"] = exiting and self._threads.alive
        if exiting and (living := self._threads.living()) is not None:
            # The first thread has exited, but other threads still run: report the state of one of
            # them.
            into["state"], into["exiting"] = living.state, False

    def _read_rings(self, into: dict[str, Any], opened: int | None, has_run: bool) -> None:
        requests, into["direct"] = self._rings.read(opened, has_run)
        if requests is not None:
            into["rings"], into["timers"] = requests.in_flight, requests.timers

    def _time_run(self) -> int | None:
        """Return how long all threads together have run (ns); None if unknown or too inaccurate."""
        if self._clock_id is None:
            return None
        try:
            ran = time.clock_gettime_ns(self._clock_id)
        except OSError as error:
            note_once("reading the processor clock", error)
            return None
        return ran if ran % _COARSE else None

    def _is_status(self, text: int | None) -> bool:
        """Return whether the text of status still has this hash."""
        now = self._status.read_or_none()
        return now is not None and hash(now) == text

    def _remember(self, values: dict[str, Any]) -> None:
        whole = self._text is not None and all(values.get(name) is not None for name in _WHOLE)
        sleeps = (
            values.get("state") in ("S", "D")
            and not values.get("exiting")
            and self._threads.all_sleep
        )
        if whole and sleeps:
            self._last_values = tuple(values[name] for name in _WHOLE)

    def _read_status(self, into: dict[str, Any]) -> None:
        text = self._status.read_or_none()
        self._text = None if text is None else hash(text)
        status = text or b""
        into["tracer"] = number_after(status, b"\nTracerPid:\t")
        dumping = number_after(status, b"\nCoreDumping:\t")
        into["dumping"] = None if dumping is None else bool(dumping)
        pending = number_after(status, b"\nShdPnd:\t", 16)
        into["term_pending"] = None if pending is None else bool(pending & _TERM)


_NOTHING: Final = dict.fromkeys(("cpu", "term_pending", "tracer", "dumping", "io"))
_NO_DETAIL: Final = dict.fromkeys(("switches", "threads", "running", "exiting", "rings", "direct"))
_WHOLE: Final = (
    "state",
    *_NOTHING,
    *(name for name in _NO_DETAIL if name not in ("rings", "direct")),
)


def _io(text: bytes | None) -> Io | None:
    words = (text or b"").split()
    if tuple(words[::2]) != _IO_LABELS:
        return None
    try:
        return Io(*map(int, words[1::2]))
    except ValueError:
        return None
