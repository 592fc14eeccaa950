"""Read the threads of a process: /proc/PID/task/TID/{schedstat,status,syscall,wchan}.

Cost, measured on kernel 6.18: 2 µs for a thread that has not run since the last read, 40 µs for one
that has. 64 threads cost 3 ms at the first read; after that, 0.14 ms if all slept, and 2.7 ms if
all ran. Rights: schedstat and status need none; syscall and wchan need the ptrace right (proc(5):
PTRACE_MODE_ATTACH_FSCREDS and PTRACE_MODE_READ_FSCREDS). No read here takes the process's memory
lock, so none waits for a thread that holds it.

schedstat (kernel Documentation/scheduler/sched-stats.rst) shows how long (ns) the thread has run,
and how often it was put on a processor. If a thread slept at the last read and its schedstat has
not changed, it has not run and still sleeps in the same call. Only threads whose schedstat has
changed are read in full.
"""

from __future__ import annotations

import os
import signal
from typing import Final

from qkilld.adapters.procfs import Stat, parse_stat
from qkilld.debug_log import note_once
from qkilld.evidence.kept_file import (
    EXITED,
    KeptFile,
    number_after,
    open_directory,
    read_once,
)
from qkilld.evidence.syscalls import Call, describe_call
from qkilld.model.sample import Thread
from qkilld.model.text import printable

MAX_THREADS: Final = 512
"""A process with more threads than this is not examined."""
_IDLE_WORKERS: Final = ("io_wq_worker", "io_wqe_worker", "vhost_task_fn")
"""The functions in which idle kernel workers of the process sleep: io_wq_worker for io_uring
(io_wqe_worker in Linux 6.1), and vhost_task_fn for vhost."""
_RING_WORK: Final = Call(
    "", waits=False, reads=False, submits=True, of_files=False, descriptor=None
)
"""Stands for the call of an io_uring kernel worker that executes a request."""
STOPPED: Final = ("T", "t")
"""The states of a stopped thread. SIGSTOP stops all threads; a debugger may stop only some."""
_KILL: Final = 1 << signal.SIGKILL - 1
MAX_KEPT: Final = 128
"""The maximum number of threads whose schedstat stays open. For other threads, schedstat is opened
for each read."""


class _ThreadEntry:
    """A thread as it was when it was last read in full."""

    __slots__ = (
        "alive",
        "last_schedstat",
        "may_have_run",
        "schedstat",
        "state",
        "switches",
        "thread",
        "tid",
        "wait_known",
    )

    def __init__(self, tid: str, directory: int) -> None:
        self.tid = tid
        self.schedstat = KeptFile(f"task/{tid}/schedstat", directory)
        self.last_schedstat = b""
        self.may_have_run = True
        """The thread may have run since it was last read in full."""
        self.switches = 0
        self.alive = True
        """Not a zombie."""
        self.state = "?"
        self.wait_known = False
        """It is known whether the thread waits, and for what."""
        self.thread: Thread | None = None


class ThreadReader:
    __slots__ = ("_directory", "_entries", "_has_ended", "_last_sum", "_most_kept", "_offset")

    def __init__(self, directory: int, most_kept: int = MAX_KEPT) -> None:
        """`directory`: a descriptor of /proc/PID, which the caller closes. `most_kept`: as
        MAX_KEPT."""
        self._directory, self._most_kept = directory, most_kept
        self._entries: dict[str, _ThreadEntry] = {}
        self._offset = 0
        """This number is added to the context switches of the present threads, so that their sum
        does not fall when a thread ends."""
        self._last_sum = 0
        self._has_ended = False
        """A thread has ended since the last complete read."""

    def read(self, count: int) -> tuple[int | None, tuple[Thread, ...] | None]:
        """Return two values: the sum of the voluntary context switches of all threads; and the
        threads that wait in a call, are in state D, or are stopped.

        If a thread has ended since the last read, the switches since then are not counted, because
        they need not be work: an idle thread of QEMU's pool ends after 10 s, and its end wakes
        another thread.

        `count`: the number of threads in /proc/PID/stat. A value is None if it is incomplete, for
        example if there are more than MAX_THREADS threads, or if no descriptor is free. Without the
        ptrace right, only threads in state D are known; if there are none, the second value is
        None. The freezer of cgroup v1 may also put threads into state D.
        """
        if count > MAX_THREADS:
            note_once("reading threads", f"there are more than {MAX_THREADS}")
            self.close()
            return None, None
        try:
            # List the threads again if their number has changed, or if a thread has exited, because
            # another thread may have replaced it.
            if len(self._entries) != count or not self._read_all():
                self._list()
                self._read_all()
        except OSError as error:
            note_once("reading threads", error)
            return None, None
        entries = self._entries.values()
        if not entries or len(entries) > MAX_THREADS:
            return None, None
        threads = tuple(entry.thread for entry in entries if entry.thread is not None)
        return self._sum(), threads if threads or all(
            entry.wait_known for entry in entries
        ) else None

    def _sum(self) -> int:
        total = sum([entry.switches for entry in self._entries.values()])
        if self._has_ended:
            self._offset, self._has_ended = self._last_sum - total, False
        self._last_sum = self._offset + total
        return self._last_sum

    @property
    def alive(self) -> bool:
        """Return whether a thread may be alive: the last read found one that is not a zombie, or
        could not read any thread."""
        return not self._entries or any(entry.alive for entry in self._entries.values())

    def living(self) -> Stat | None:
        """Return the stat of a thread that continues; None if all threads are exiting.

        exit_group(2) sends SIGKILL to all other threads, but a thread may finish a system call
        first. QEMU 11 frees the guest's memory in its RCU thread, whose munmap(2) takes 0.1 s for
        each GiB.
        """
        for entry in self._entries.values():
            if entry.alive:
                try:
                    # First read status: a thread that has taken SIGKILL since then is exiting.
                    status = read_once(f"task/{entry.tid}/status", self._directory)
                    if (number_after(status, b"\nSigPnd:\t", 16) or 0) & _KILL:
                        continue
                    stat = parse_stat(read_once(f"task/{entry.tid}/stat", self._directory))
                except OSError as error:
                    note_once("reading the stat of a thread", error)
                    continue
                if not stat.exiting and stat.state not in ("Z", "X"):
                    return stat
        return None

    @property
    def running(self) -> int:
        """Return the number of threads that were running or runnable at the last read."""
        return sum(entry.state == "R" for entry in self._entries.values())

    @property
    def all_sleep(self) -> bool:
        """Return whether no thread ran at the last read, and the calls of all threads are known."""
        return all(entry.wait_known and not entry.may_have_run for entry in self._entries.values())

    @property
    def open_files(self) -> int:
        return sum(entry.schedstat.is_open for entry in self._entries.values())

    def close_files(self) -> None:
        """Close files; the next read opens them again."""
        for entry in self._entries.values():
            entry.schedstat.close()

    def close(self) -> None:
        self.close_files()
        self._entries.clear()

    def _list(self) -> None:
        directory = open_directory("task", self._directory)
        try:
            tids = os.listdir(directory)  # noqa: PTH208 - of a descriptor
        finally:
            os.close(directory)
        for tid in self._entries.keys() - set(tids):
            self._drop(tid)
        if len(tids) <= MAX_THREADS:
            for tid in tids:
                if tid not in self._entries:
                    self._entries[tid] = _ThreadEntry(tid, self._directory)

    def _drop(self, tid: str) -> None:
        thread = self._entries.pop(tid)
        thread.schedstat.close()
        self._has_ended = True

    def _read_all(self) -> bool:
        """Read all threads. Return False if a thread has exited. Raises OSError."""
        exited = []
        for place, entry in enumerate(self._entries.values()):
            try:
                self._read(entry, keep=place < self._most_kept)
            except EXITED:
                exited.append(entry.tid)
        for tid in exited:
            self._drop(tid)
        return not exited

    def _read(self, entry: _ThreadEntry, keep: bool) -> None:
        """Raises OSError."""
        try:
            schedstat = entry.schedstat.read(128)
        except FileNotFoundError:  # The thread has exited, or the kernel has no schedstat.
            schedstat = b""
        if not keep:
            entry.schedstat.close()
        # If all numbers are zero, schedstat is turned off (sched_info_on()), so the thread may
        # have run.
        if (
            schedstat == entry.last_schedstat
            and not entry.may_have_run
            and schedstat
            and not schedstat.startswith(b"0 0 0")
        ):
            return
        # schedstat was read before the other files. So if the thread runs between these reads, the
        # next read will find other values in schedstat.
        entry.last_schedstat = schedstat
        status = read_once(f"task/{entry.tid}/status", self._directory)
        switches = number_after(status, b"\nvoluntary_ctxt_switches:\t")
        if switches is None:
            raise OSError("/proc/PID/task/TID/status has no count of switches")
        entry.switches = switches
        at = status.find(b"\nState:\t") + 8
        state = status[at : at + 1].decode("ascii", "replace")
        entry.may_have_run = state == "R"
        entry.alive = state not in ("Z", "X")
        entry.state = state
        entry.wait_known, entry.thread = True, None
        if state in STOPPED:
            entry.thread = self._waiting(entry, status, state, None, None)
        if state not in ("S", "D"):
            return
        number, arguments = self._syscall(entry)
        call = None if number is None else describe_call(number, arguments)
        if number == -1 and status.startswith(b"Name:\tiou-wrk-"):
            call = _RING_WORK
        if call is None:
            entry.wait_known = False
        if state == "D" or (call is not None and (call.waits or call.reads or call.submits)):
            entry.thread = self._waiting(entry, status, state, number, call)

    def _waiting(
        self, entry: _ThreadEntry, status: bytes, state: str, number: int | None, call: Call | None
    ) -> Thread | None:
        """Return the thread; None if it waits only for events of a ring, or is an idle kernel
        worker. An idle worker is recognized by its wait channel."""
        wchan = self._wchan(entry.tid)
        if state == "S" and wchan in _IDLE_WORKERS:
            return None
        submits = call is not None and call.submits
        if state == "S" and submits and (wchan is None or "cqring" in wchan):
            return None
        name = status[len(b"Name:\t") : status.find(b"\n")].decode("utf-8", "surrogateescape")
        return Thread(
            tid=int(entry.tid),
            name=printable(name),
            state=state,
            syscall=number,
            io_call=None if call is None else call.of_files or submits,
            wchan=wchan,
            call=call.name if call is not None else "",
            descriptor=call.descriptor if call is not None else None,
            switches=entry.switches,
        )

    def _syscall(self, entry: _ThreadEntry) -> tuple[int | None, list[int]]:
        try:
            words = read_once(f"task/{entry.tid}/syscall", self._directory).split()
        except EXITED:
            raise
        except OSError as error:
            note_once("reading the syscall of a thread", error)
            return None, []
        if not words or words[0] == b"running":
            entry.may_have_run = True
            return -1, []
        # The last two words are the stack pointer and the program counter. A kernel worker has
        # neither, and the kernel shows the call of its creator instead.
        if words[-2:] == [b"0x0", b"0x0"]:
            return -1, []
        try:
            return int(words[0]), [int(word, 16) for word in words[1:-2]]
        except ValueError:
            return None, []

    def _wchan(self, tid: str) -> str | None:
        try:
            name = read_once(f"task/{tid}/wchan", self._directory)
        except EXITED:
            raise
        except OSError as error:
            note_once("reading the wchan of a thread", error)
            return None
        # For a sleeping thread, "0" means that the function is hidden from us, or that the kernel
        # does not know it.
        return None if name == b"0" else printable(name.decode("utf-8", "surrogateescape"))
