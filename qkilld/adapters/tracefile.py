"""Traces on disk: a file for each job, below one directory.

Writing to a disk can block, and qkilld works just when disks stall. So records go to a thread of
its own, and where too many wait, a trace ends with a word on that instead of holding anybody up.
Nothing that goes wrong here touches a job.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qkilld.model.text import printable
from qkilld.model.trace import MAX_BYTES, Cut, Header, Record, header_line, record_line

QUEUE_LENGTH: Final = 4096
"""Records of all jobs that may wait to be written."""
FLUSH_TIMEOUT_S: Final = 2.0
_RESERVE: Final = 512
"""Bytes that the line takes which says that a trace has reached its limit."""
_MAX_TWINS: Final = 100
"""Traces of one job number, process id and start time: of a process that outlives daemons."""


class TraceDirectory:
    """Implements engine.ports.Traces."""

    def __init__(
        self, path: Path, on_error: Callable[[str], None], max_bytes: int = MAX_BYTES
    ) -> None:
        """`on_error` is called in the writing thread, once for many failures with one cause.

        Raises OSError where `path` is not a directory in which files can be made.
        """
        self._shown = printable(str(path), 4096)
        self._directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=self._directory, effective_ids=True):
            os.close(self._directory)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self._shown)
        self._max_bytes = max_bytes
        self._on_error = on_error
        self._told = False
        self._queue: queue.SimpleQueue[tuple[TraceFile, Record | None] | None] = queue.SimpleQueue()
        self._open: set[TraceFile] = set()
        self._thread = threading.Thread(target=self._work, name="traces", daemon=True)
        self._thread.start()

    def begin(self, header: Header) -> TraceFile:
        return TraceFile(header, self._put)

    def close(self) -> None:
        """Write what is queued, for at most FLUSH_TIMEOUT_S."""
        self._queue.put(None)
        self._thread.join(FLUSH_TIMEOUT_S)

    def _put(self, file: TraceFile, record: Record | None) -> bool:
        """Whether there was room. The end of a file and a cut, one each, always have some."""
        full = self._queue.qsize() >= QUEUE_LENGTH
        if full and record is not None and not isinstance(record, Cut):
            return False
        self._queue.put((file, record))
        return True

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            file, record = item
            try:
                if record is None:
                    self._open.discard(file)
                    file.end()
                    continue
                if file.create(self._directory):
                    self._open.add(file)
                    self._told = False
                file.write(record, self._max_bytes)
            except OSError as error:
                file.end()
                self._open.discard(file)
                self._tell(f"{error.strerror or error}")
        for file in self._open:
            file.end()
        os.close(self._directory)

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            self._on_error(f"Traces cannot be written to {self._shown}: {what}")


class TraceFile:
    """Implements engine.ports.Recorder: `record` and `close`, the rest is for the thread."""

    def __init__(self, header: Header, put: Callable[[TraceFile, Record | None], bool]) -> None:
        self._header = header
        self._put = put
        self._cut = False
        self._fd: int | None = None
        self._ended = False
        self._size = 0

    def record(self, record: Record) -> None:
        if not self._cut and not self._put(self, record):
            self._cut = True
            self._put(self, Cut(record.at, "the disk that it is written to is too slow"))

    def close(self) -> None:
        self._put(self, None)

    def create(self, directory: int) -> bool:
        """Make the file and write its header; whether that was still to be done. Raises OSError."""
        if self._fd is not None or self._ended:
            return False
        self._fd = _create(directory, self._header)
        self._append(header_line(self._header))
        return True

    def write(self, record: Record, max_bytes: int) -> None:
        """Raises OSError."""
        if self._ended:
            return
        line = record_line(self._header, record)
        if self._size + len(line) + _RESERVE > max_bytes and not isinstance(record, Cut):
            record = Cut(record.at, f"it has reached its limit of {max_bytes} bytes")
            line = record_line(self._header, record)
        self._append(line)
        if isinstance(record, Cut):
            self.end()

    def end(self) -> None:
        self._ended = True
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None

    def _append(self, line: str) -> None:
        assert self._fd is not None
        left = line.encode("ascii")
        self._size += len(left)
        while left:
            left = left[os.write(self._fd, left) :]


def _create(directory: int, header: Header) -> int:
    """A new file. Its name has nothing in it that a guest could choose."""
    stem = f"job{header.job}-pid{header.pid}-start{header.start_time}"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for number in range(1, _MAX_TWINS):
        name = f"{stem}.jsonl" if number == 1 else f"{stem}.{number}.jsonl"
        with contextlib.suppress(FileExistsError):
            return os.open(name, flags, 0o600, dir_fd=directory)
    raise FileExistsError(f"there are {_MAX_TWINS - 1} traces {stem} already")
