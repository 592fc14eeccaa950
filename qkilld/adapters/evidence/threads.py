"""What the threads of a process do: /proc/PID/task/TID/{schedstat,status,syscall,wchan}.

Cost, measured on kernel 6.18: 2 µs a thread that has not run since the last read, 40 µs one that
has (64 threads: 0.14 ms asleep, 2.7 ms if each was awake; 3 ms the first time). Rights: schedstat
and status none; syscall and wchan the ptrace right (proc(5): PTRACE_MODE_ATTACH_FSCREDS and
PTRACE_MODE_READ_FSCREDS). Nothing here takes the memory lock of the target: nothing blocks with it.

schedstat (kernel Documentation/scheduler/sched-stats.rst) has the nanoseconds that the thread ran
and how often it was put on a processor. As long as its text stays the same, a thread that slept
has not run, and so sleeps in the same call with the same count of switches: only threads whose
schedstat moved are read in full.
"""

from __future__ import annotations

import os
from typing import Final

from qkilld.adapters.evidence.keptfile import (
    GONE,
    KeptFile,
    number_after,
    open_directory,
    read_once,
)
from qkilld.adapters.evidence.syscalls import is_io_call
from qkilld.model.evidence import Thread
from qkilld.model.text import printable

MAX_THREADS: Final = 512
"""A process with more is not looked into."""
_MAX_KEPT: Final = 128
"""Threads whose schedstat is kept open; of the others it is opened each time."""


class _Seen:
    """One thread, as it was when it last ran."""

    __slots__ = ("alive", "known", "moved", "ran", "schedstat", "thread", "tid", "voluntary")

    def __init__(self, tid: str, directory: int) -> None:
        self.tid = tid
        self.schedstat = KeptFile(f"task/{tid}/schedstat", directory)
        self.ran = b""
        self.moved = True
        """It ran, or may have, after it was last read in full."""
        self.voluntary = 0
        self.alive = True
        """Not a zombie."""
        self.known = False
        """Whether it stands in an I/O call."""
        self.thread: Thread | None = None


class ThreadReader:
    def __init__(self, directory: int) -> None:
        """`directory`: a descriptor of /proc/PID, which stays the caller's."""
        self._directory = directory
        self._seen: dict[str, _Seen] = {}
        self._gone_switches = 0
        """Of threads that have ended: the sum never falls."""

    def read(self, count: int) -> tuple[int | None, tuple[Thread, ...] | None]:
        """Voluntary switches of all threads; those in an I/O call or in uninterruptible sleep.

        `count`: how many threads /proc/PID/stat says there are. Each is None where it is not known
        in full: more than MAX_THREADS, out of descriptors; without the ptrace right () is not
        known, but threads in uninterruptible sleep are. A thread that the freezer of cgroup v1
        holds may show as D too.
        """
        if count > MAX_THREADS:
            self.close()
            return None, None
        try:
            # A thread that replaced another in the same moment shows when the other is read.
            if len(self._seen) != count or not self._read_all():
                self._list()
                self._read_all()
        except OSError:
            return None, None
        seen = self._seen.values()
        if not seen or len(seen) > MAX_THREADS:
            return None, None
        threads = tuple(one.thread for one in seen if one.thread is not None)
        switches = self._gone_switches + sum([one.voluntary for one in seen])
        return switches, threads if threads or all(one.known for one in seen) else None

    @property
    def alive(self) -> bool:
        """Some thread was not yet a zombie at the last read; so it is taken where none was read."""
        return not self._seen or any(one.alive for one in self._seen.values())

    def close(self) -> None:
        for one in self._seen.values():
            one.schedstat.close()
        self._seen.clear()

    def _list(self) -> None:
        directory = open_directory("task", self._directory)
        try:
            tids = os.listdir(directory)  # noqa: PTH208 - of a descriptor
        finally:
            os.close(directory)
        for tid in self._seen.keys() - set(tids):
            self._drop(tid)
        if len(tids) <= MAX_THREADS:
            for tid in tids:
                if tid not in self._seen:
                    self._seen[tid] = _Seen(tid, self._directory)

    def _drop(self, tid: str) -> None:
        gone = self._seen.pop(tid)
        gone.schedstat.close()
        self._gone_switches += gone.voluntary

    def _read_all(self) -> bool:
        """False if one of them is gone. Raises OSError."""
        gone = []
        for place, one in enumerate(self._seen.values()):
            try:
                self._read(one, keep=place < _MAX_KEPT)
            except GONE:
                gone.append(one.tid)
        for tid in gone:
            self._drop(tid)
        return not gone

    def _read(self, one: _Seen, keep: bool) -> None:
        """Raises OSError."""
        try:
            ran = one.schedstat.read(128)
        except FileNotFoundError:  # gone, which status tells, or a kernel without it
            ran = b""
        if not keep:
            one.schedstat.close()
        # All zeros: a kernel that does not count (sched_info_on()).
        if ran == one.ran and not one.moved and ran and not ran.startswith(b"0 0 0"):
            return
        # Before the rest: what moves in between shows the next time.
        one.ran = ran
        status = read_once(f"task/{one.tid}/status", self._directory)
        voluntary = number_after(status, b"\nvoluntary_ctxt_switches:\t")
        if voluntary is None:
            raise OSError("/proc/PID/task/TID/status has no count of switches")
        one.voluntary = voluntary
        at = status.find(b"\nState:\t") + 8
        state = status[at : at + 1].decode("ascii", "replace")
        one.moved = state == "R"
        one.alive = state not in ("Z", "X")
        one.known, one.thread = True, None
        if state not in ("S", "D"):
            return
        syscall, arguments = self._syscall(one)
        io_call = None if syscall is None else is_io_call(syscall, arguments, state == "D")
        if state == "D" or io_call:
            wchan = self._wchan(one.tid)
            if state == "S" and wchan == "io_wq_worker":
                # An idle thread of io_uring: its system call is that of the thread that made it.
                return
            name = status[len(b"Name:\t") : status.find(b"\n")].decode("utf-8", "surrogateescape")
            one.thread = Thread(int(one.tid), printable(name), state, syscall, io_call, wchan)
        one.known = io_call is not None

    def _syscall(self, one: _Seen) -> tuple[int | None, list[int]]:
        try:
            words = read_once(f"task/{one.tid}/syscall", self._directory).split()
        except GONE:
            raise
        except OSError:
            return None, []
        if not words or words[0] == b"running":
            one.moved = True
            return -1, []
        try:
            # After the arguments come the stack pointer and the program counter.
            return int(words[0]), [int(word, 16) for word in words[1:-2]]
        except ValueError:
            return None, []

    def _wchan(self, tid: str) -> str | None:
        try:
            name = read_once(f"task/{tid}/wchan", self._directory)
        except GONE:
            raise
        except OSError:
            return None
        # "0" for a thread that sleeps: not shown to us, or the kernel does not know.
        return None if name == b"0" else printable(name.decode("utf-8", "surrogateescape"))
