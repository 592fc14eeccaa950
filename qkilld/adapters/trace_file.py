"""Write traces to disk: a file for each job, in one directory.

A separate thread writes, because writing to a disk can block, and qkilld is needed when disks
stall. If too many records wait, the trace ends with a note. No failure here affects a job.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qkilld.adapters.background import BackgroundWriter
from qkilld.debug_log import ignore
from qkilld.model.text import printable
from qkilld.model.trace import MAX_BYTES, CutRecord, Header, Record, header_line, record_line

QUEUE_LENGTH: Final = 4096
"""The maximum number of records waiting to be written, over all jobs."""
_RESERVE: Final = 512
"""Bytes reserved for the line that says that a trace has reached its limit."""
_MAX_TWINS: Final = 100
"""The number of file names to try for a job. A file with the same job number, process id and start
time may exist, because a daemon that has lost its state counts jobs from 1 again."""


class TraceDirectory:
    """Implements engine.ports.Traces."""

    def __init__(
        self, path: Path, on_error: Callable[[str], None], max_bytes: int = MAX_BYTES
    ) -> None:
        """`on_error` is called in the writing thread after a failure, but not again until another
        trace has begun.

        Raises OSError if `path` is not a directory in which files can be created.
        """
        self._printable_path = printable(str(path), 4096)
        self._directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=self._directory, effective_ids=True):
            os.close(self._directory)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self._printable_path)
        self._max_bytes = max_bytes
        self._on_error = on_error
        self._is_error_reported = False
        self._open: set[TraceFile] = set()
        self._writer = BackgroundWriter("traces", self._write, QUEUE_LENGTH)

    def begin(self, header: Header) -> TraceFile:
        return TraceFile(header, self._put)

    def close(self) -> None:
        """Write all queued items (time limit: background.FLUSH_TIMEOUT_S). Can be called again."""
        if not self._writer.close() or self._directory < 0:
            return
        for file in self._open:
            file.end()
        os.close(self._directory)
        self._directory = -1

    def _put(self, file: TraceFile, record: Record | None) -> bool:
        """Queue a record; return False if the queue is full. The end of a trace is always
        queued."""
        always = record is None or isinstance(record, CutRecord)
        return self._writer.put((file, record), always=always)

    def _write(self, item: tuple[TraceFile, Record | None]) -> None:
        file, record = item
        try:
            if record is None:
                self._open.discard(file)
                file.end()
                return
            if file.create(self._directory):
                self._open.add(file)
                self._is_error_reported = False
            file.write(record, self._max_bytes)
        except OSError as error:
            file.end()
            self._open.discard(file)
            self._tell(f"{error.strerror or error}")

    def _tell(self, what: str) -> None:
        if not self._is_error_reported:
            self._is_error_reported = True
            self._on_error(f"Traces cannot be written to {self._printable_path}: {what}")


class TraceFile:
    """Implements engine.ports.Recorder: a job calls `record` and `close`. All other methods run in
    the writing thread, or after its end."""

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
            self._put(self, CutRecord(record.at, "the disk with the traces is too slow"))

    def close(self) -> None:
        self._put(self, None)

    def create(self, directory: int) -> bool:
        """Create the file with its header. Return False if it was already created, or if the
        trace has ended. Raises OSError."""
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
        if self._size + len(line) + _RESERVE > max_bytes and not isinstance(record, CutRecord):
            record = CutRecord(record.at, f"it has reached its limit of {max_bytes} bytes")
            line = record_line(self._header, record)
        self._append(line)
        if isinstance(record, CutRecord):
            self.end()

    def end(self) -> None:
        self._ended = True
        if self._fd is not None:
            with ignore("closing a trace", OSError):
                os.close(self._fd)
            self._fd = None

    def _append(self, line: str) -> None:
        assert self._fd is not None
        data = line.encode("ascii")
        self._size += len(data)
        while data:
            data = data[os.write(self._fd, data) :]


def _create(directory: int, header: Header) -> int:
    """Create a file. No part of its name comes from a guest."""
    stem = f"job{header.job}-pid{header.pid}-start{header.start_time}"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for number in range(1, _MAX_TWINS):
        name = f"{stem}.jsonl" if number == 1 else f"{stem}.{number}.jsonl"
        with contextlib.suppress(FileExistsError):
            return os.open(name, flags, 0o600, dir_fd=directory)
    raise FileExistsError(f"there are {_MAX_TWINS - 1} traces {stem} already")
