"""Read files of /proc/PID with a short timeout, because the process itself can block the reads.

Reading most files of /proc/PID takes the process's exec_update_lock (Linux 6.18.44): stat, io,
maps, exe, cwd, root, fd and ns, and the files stat, io, syscall, wchan and stack of each thread.
execve(2) holds this lock while it closes the O_CLOEXEC files of the process. If one of these files
is on a FUSE mount whose server does not answer, execve(2) never ends. Any user can mount FUSE.
Reading status, cgroup, cmdline, comm, mountinfo, net, sched or the list of threads does not take
this lock.

So a thread reads, and the caller waits PATIENCE_S for the thread. While a read is blocked, no other
read of that process begins. This module imports little: see stop.main.
"""

from __future__ import annotations

import _thread
import errno
import os
import time

from qkilld.engine.fair_shares import FairShares

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, TypeVar

    T = TypeVar("T")

PATIENCE_S = 0.02
"""How long a caller waits for a read, which usually takes 10 to 30 µs."""
SHORT_PATIENCE_S = 0.001
"""After a timeout, this is used instead of PATIENCE_S for SHORT_FOR_S seconds. Otherwise, somebody
who blocks and unblocks processes all the time could block the event loop for much of the time."""
SHORT_FOR_S = 1.0
MAX_WAIT_S = 0.5
"""How long to wait for a read that the process does not block. The read may be delayed because its
thread waits for the interpreter."""
MAX_THREADS = 64
MAX_OF_ROOT = 16
MAX_SHARED = 24
"""See FairShares. Only blocked threads count."""
MAX_OF_SEARCHES = 40
MAX_SHARED_OF_SEARCHES = 12
"""These two limits are for searches (`each`), which read the processes of all users. Of the threads
for users other than root, searches can use only half; the rest is left for reads of a single
process, such as those before a signal."""
MAX_IDLE = 2


class Unanswered(TimeoutError):
    """The process cannot be read at the moment, because it blocks the reads."""

    def __init__(self) -> None:
        super().__init__(
            errno.ETIMEDOUT,
            "the kernel does not show it, perhaps because it executes a program and waits for a "
            "file system that does not answer",
        )


class _Batch:
    """The reads for one caller. One thread makes them in order."""

    __slots__ = (
        "blocked_on",
        "directories",
        "done",
        "finished",
        "is_search",
        "outcomes",
        "read",
        "uid",
    )

    def __init__(
        self, directories: Sequence[str], read: Callable[[str], Any], *, is_search: bool
    ) -> None:
        self.directories, self.read, self.is_search = directories, read, is_search
        self.outcomes: list[Any] = []
        """For each directory, what `read` returned, or the exception that it raised."""
        self.finished = False
        self.blocked_on: str | None = None
        """The directory whose read has timed out. The thread must not begin another read."""
        self.uid = -1
        """The user to whom FairShares charges the blocked thread."""
        self.done = _thread.allocate_lock()
        self.done.acquire()


class _ReadingThread:
    __slots__ = ("batch", "thread_id", "wake")

    def __init__(self) -> None:
        self.batch: _Batch | None = None
        self.thread_id = 0
        self.wake = _thread.allocate_lock()
        self.wake.acquire()

    def is_blocked(self) -> bool:
        """Return whether the thread waits for a lock in the kernel, and not only for a
        processor."""
        if not self.thread_id:
            return False
        try:
            fd = os.open(f"/proc/self/task/{self.thread_id}/stat", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.read(fd, 512).rpartition(b")")[2].split()[:1] == [b"D"]
            finally:
                os.close(fd)
        except OSError:
            # Perhaps no descriptor is free. Assume that the thread is blocked.
            return True


class BlockableReads:
    """Runs reads in threads. Thread-safe."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._idle: list[_ReadingThread] = []
        self._blocked: dict[str, int] = {}
        """The number of blocked reads of each directory. It is more than one if the reads began at
        the same time."""
        self._shares = FairShares(MAX_THREADS, of_root=MAX_OF_ROOT, shared=MAX_SHARED)
        self._of_searches = FairShares(
            MAX_OF_SEARCHES, of_root=MAX_OF_ROOT, shared=MAX_SHARED_OF_SEARCHES
        )
        self._short_until = 0.0
        self.may_block_caller = False
        """Whether to read in the caller's thread if the system allows no more threads. Set this
        only in a program in which a blocked read harms nobody else."""

    @property
    def blocked(self) -> int:
        """The number of blocked threads."""
        return self._shares.taken

    def each(self, directories: Sequence[str], read: Callable[[str], T]) -> Iterator[T | Exception]:
        """For each directory (/proc/PID), yield what `read` returns, or the exception that it
        raises. Yield Unanswered if the process blocks the read, or if too many threads are blocked
        already."""
        position = 0
        while position < len(directories):
            batch = _Batch(
                directories[position:] if position else directories, read, is_search=True
            )
            count = self._run(batch)
            yield from batch.outcomes[:count]
            position += count
            if position < len(directories):
                yield Unanswered()
                position += 1

    def one(self, directory: str, read: Callable[[str], T]) -> T:
        """Return what `read` returns for the directory. Raises Unanswered, and what `read`
        raises."""
        batch = _Batch((directory,), read, is_search=False)
        outcome: T | Exception = batch.outcomes.pop() if self._run(batch) else Unanswered()
        try:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        finally:
            del outcome  # Break the cycle of the exception and its traceback.

    def _run(self, batch: _Batch) -> int:
        """Run a batch; return the number of its outcomes. This number is less than that of the
        directories if a read is blocked, or if the system allows no more threads."""
        with self._lock:
            reader = self._idle.pop() if self._idle else _ReadingThread()
            reader.batch = batch
        reader.wake.release()
        if not reader.thread_id:
            try:
                _thread.start_new_thread(self._work, (reader,))
            except RuntimeError:  # The system allows no more threads.
                if not self.may_block_caller:
                    return 0
                batch.outcomes += [self._outcome(each, batch) for each in batch.directories]
                return len(batch.outcomes)
        return self._wait(reader, batch)

    def _wait(self, reader: _ReadingThread, batch: _Batch) -> int:
        count, began = 0, time.monotonic()
        while not batch.done.acquire(timeout=self._patience(began)):
            now = time.monotonic()
            if len(batch.outcomes) != count:
                count, began = len(batch.outcomes), now
            elif reader.is_blocked() or now - began > MAX_WAIT_S:
                with self._lock:
                    # While the lock is held, the thread cannot begin the next read.
                    is_same = len(batch.outcomes) == count < len(batch.directories)
                    if is_same and not batch.finished:
                        return self._give_up(batch)
        return len(batch.outcomes)

    def _patience(self, now: float) -> float:
        return SHORT_PATIENCE_S if now < self._short_until else PATIENCE_S

    def _give_up(self, batch: _Batch) -> int:
        """Abandon the thread; return the number of outcomes. The caller must hold the lock."""
        count = len(batch.outcomes)
        batch.blocked_on = directory = batch.directories[count]
        self._blocked[directory] = self._blocked.get(directory, 0) + 1
        batch.uid = _uid(directory)
        self._shares.take(batch.uid)
        if batch.is_search:
            self._of_searches.take(batch.uid)
        self._short_until = time.monotonic() + SHORT_FOR_S
        return count

    def _work(self, reader: _ReadingThread) -> None:
        reader.thread_id = _thread.get_native_id()
        while True:
            reader.wake.acquire()
            batch = reader.batch
            assert batch is not None
            for directory in batch.directories:
                with self._lock:
                    if batch.blocked_on is not None:
                        break
                batch.outcomes.append(self._outcome(directory, batch))
            with self._lock:
                batch.finished = True
                if batch.blocked_on is not None:
                    self._note_end(batch, batch.blocked_on)
                reader.batch = None
                lasts = len(self._idle) < MAX_IDLE
                if lasts:
                    self._idle.append(reader)
            batch.done.release()
            if not lasts:
                return

    def _note_end(self, batch: _Batch, directory: str) -> None:
        """Record that the blocked read of a batch has ended."""
        self._shares.give_back(batch.uid)
        if batch.is_search:
            self._of_searches.give_back(batch.uid)
        self._blocked[directory] -= 1
        if not self._blocked[directory]:
            del self._blocked[directory]

    def _outcome(self, directory: str, batch: _Batch) -> Any:
        """Return what `batch.read` returns, or the exception that it raises."""
        if self._blocked and not self._may_read(directory, batch.is_search):
            return Unanswered()
        try:
            return batch.read(directory)
        except Exception as error:
            return error

    def _may_read(self, directory: str, is_search: bool) -> bool:
        if directory in self._blocked:
            return False
        uid = _uid(directory)
        with self._lock:
            return self._shares.has_room(uid) and (not is_search or self._of_searches.has_room(uid))


def _uid(directory: str) -> int:
    """Return the real uid of the process; -1 if it is gone. Reading status does not block."""
    try:
        fd = os.open(f"{directory}/status", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(fd, 4096)
        finally:
            os.close(fd)
        return int(text.partition(b"\nUid:")[2].split(None, 1)[0])
    except (OSError, ValueError, IndexError):
        return -1


shared = BlockableReads()
"""The whole program uses this one object, because TasksMax= limits the sum of all threads of the
unit."""
