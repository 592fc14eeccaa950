"""Store jobs in the runtime directory (RUNTIME_DIRECTORY, systemd.exec(5)), one file for each.

Writing must not delay a job, so a separate thread writes the newest state of each job. If writing
fails, for example because /run is full, jobs continue, and only the first of consecutive failures
is reported.

Files may come from an earlier run, or from anyone else. A file that is incomplete or not ours is
renamed to NAME.bad and reported. A file is reported and kept if it is of a newer version, or if
there are too few descriptors or too little memory to read it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qkilld.adapters.background import BackgroundWriter
from qkilld.debug_log import ignore
from qkilld.engine.snapshot import VERSION, Snapshot, SnapshotError, UnknownVersion, decode
from qkilld.model.named_tuple import NamedTuple

if TYPE_CHECKING:
    from qkilld.engine.ports import JobState

MAX_BYTES: Final = 4 << 20
"""The maximum size of a file in bytes. The state of a job takes a few KiB."""
MAX_BAD: Final = 16
"""The number of .bad files to keep. Further ones are removed."""
RESERVE: Final = 16
"""How many job numbers are reserved in advance. If the file of a job is lost in a crash, its number
is still reserved, so it is not used again."""

_JOB: Final = re.compile(r"job-([1-9][0-9]{0,8})\.json")
_NUMBERS: Final = "numbers.json"
_SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class BadFile(NamedTuple):
    name: str
    why: str


class StateDirectory:
    """Call `load` once, before anything else."""

    def __init__(self, directory: Path, on_error: Callable[[str], None]) -> None:
        """Raises OSError if there is no such directory, PermissionError if another user owns it or
        can write to it."""
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        status = os.fstat(self._directory)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            os.close(self._directory)
            raise PermissionError(f"Other users own {directory} or may write to it")
        self._boot = _BOOT_ID.read_text().strip()
        self._on_error = on_error
        self._is_error_reported = False
        self._reserved_number = 0
        self.outdated: set[int] = set()
        """The numbers of those jobs from `load` whose files were written by an earlier release."""
        self._pending: dict[int, JobState | None] = {}
        """The newest unwritten state of each job; None for a job that was forgotten."""
        self._lock = threading.Lock()
        """Protects _pending; never held during a write."""
        self._first: deque[tuple[int, Callable[[], None]]] = deque()
        """Jobs whose states are written before all others, each with a callback."""
        self._writer = BackgroundWriter("state", self._write_item, limit=None)

    def load(self) -> tuple[list[Snapshot], int, list[BadFile]]:
        """Return the jobs, sorted by number; the highest number that may have been used; and the
        unusable files. Remove files of another boot.

        Raises OSError if the directory cannot be read. If the directory cannot be written to, for
        example because it is full, report the error, and still read the files.
        """
        documents, bad = [], []
        last = 0
        for name in self._names():
            if name.startswith(".") and name.endswith(".tmp"):
                with ignore(f"removing {name}", OSError):
                    os.unlink(name, dir_fd=self._directory)
            elif name == _NUMBERS or _JOB.fullmatch(name):
                try:
                    document = self._read(name)
                    if document["boot"] != self._boot:
                        os.unlink(name, dir_fd=self._directory)
                    elif name == _NUMBERS:
                        last = max(last, _number(document))
                    else:
                        documents.append(_job(name, document))
                        if document["job"]["version"] != VERSION:
                            self.outdated.add(documents[-1].number)
                except (SnapshotError, OSError) as error:
                    bad.append(BadFile(name, _why(error)))
                    if not _is_usable_later(error):
                        self.set_aside(name)
                    elif job := _JOB.fullmatch(name):
                        last = max(last, int(job[1]))  # Do not reuse the job's number.
        last = max([last, *(snapshot.number for snapshot in documents)])
        try:
            self._reserve(last)
        except OSError as error:
            self._reserved_number = last  # The next job tries to reserve numbers again.
            self._failed(error)
        return sorted(documents, key=lambda snapshot: snapshot.number), last, bad

    def save(self, state: JobState) -> None:
        """Write a job's state soon. Never blocks and never raises."""
        if state.number + RESERVE // 2 > self._reserved_number:
            self._reserved_number = state.number + RESERVE
            self._writer.put(0)
        self._put(state.number, state)

    def forget(self, number: int) -> None:
        """Remove a job's file soon."""
        self._put(number, None)

    def when_written(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the writing thread when every state saved so far has been written, or
        could not be written."""
        self._writer.put(callback)

    def write_first(self, number: int, callback: Callable[[], None]) -> None:
        """Write the saved state of a job before the states of other jobs. Call `callback` in the
        writing thread when the state has been written, or could not be written."""
        self._first.append((number, callback))
        self._writer.put(_do_nothing)  # Wakes the thread, which reads _first at each item.

    def set_aside(self, name: str) -> None:
        """Rename a file to NAME.bad, or remove it if there are already MAX_BAD such files."""
        with ignore(f"setting {name} aside", OSError):
            names = [other for other in self._names() if other.endswith(".bad")]
            if len(names) < MAX_BAD or f"{name}.bad" in names:
                self._rename(name, f"{name}.bad")
            else:
                os.unlink(name, dir_fd=self._directory)

    def close(self, last: int) -> None:
        """Write all queued items (time limit: background.FLUSH_TIMEOUT_S). Can be called again.

        `last` is the highest job number so far.
        """
        if self._directory < 0:
            return
        self._reserved_number = last
        self._writer.put(0)
        if self._writer.close():
            os.close(self._directory)
            self._directory = -1

    def _put(self, number: int, state: JobState | None) -> None:
        with self._lock:
            waits = number in self._pending
            self._pending[number] = state
        if not waits:
            self._writer.put(number)

    def _write_item(self, item: int | Callable[[], None]) -> None:
        """First write the states for which `write_first` was called. Then, if `item` is a job's
        number, write the newest state of the job; if it is 0, write the reserved numbers; if it is
        a callback, call it."""
        while self._first:
            number, callback = self._first.popleft()
            self._try_to_write(number)
            callback()
        self._try_to_write(item)

    def _try_to_write(self, item: int | Callable[[], None]) -> None:
        try:
            if not isinstance(item, int):
                item()
                return
            if item == 0:
                self._reserve(self._reserved_number - RESERVE)
            elif item in self._pending:
                self._write_job(item)
            else:
                return  # `write_first` has written this state already.
            self._is_error_reported = False
        except OSError as error:
            self._failed(error)

    def _write_job(self, number: int) -> None:
        """Raises OSError."""
        with self._lock:
            state = self._pending.pop(number)
        if state is not None:
            name, job = _name(number), state.to_json()
            text = self._encoded({"job": job})
            if len(text) > MAX_BYTES:
                # Save the job without its assessment. The job is then resumed as if no sample had
                # been taken.
                text = self._encoded({"job": job | {"assessment": None}})
            try:
                self._write(name, text)
            except OSError:
                # The old file may lack a Cancel or Hold, so it must not be used any more.
                if not self._overwrite(name, text):
                    with contextlib.suppress(OSError):
                        os.unlink(name, dir_fd=self._directory)
                    raise
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_name(number), dir_fd=self._directory)

    def _failed(self, error: OSError) -> None:
        if not self._is_error_reported:
            self._is_error_reported = True
            self._on_error(_why(error))

    def _reserve(self, last: int) -> None:
        self._reserved_number = last + RESERVE
        self._write(_NUMBERS, self._encoded({"last": self._reserved_number}))

    def _write(self, name: str, text: bytes) -> None:
        """Write a file completely or not at all. Raises OSError."""
        temporary = f".{name}.tmp"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self._directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=self._directory), "wb") as file:
            file.write(text)
        self._rename(temporary, name)

    def _overwrite(self, name: str, text: bytes) -> bool:
        """Overwrite the existing file in place. This works on a full disk if the file is large
        enough. Return False on failure.

        A crash meanwhile leaves an incomplete file, from which no job is resumed.
        """
        try:
            fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError:
            return False
        try:
            # If the old text is longer, overwrite the rest of it with spaces, which JSON allows
            # after a document.
            text = text.ljust(os.fstat(fd).st_size)
            return os.pwrite(fd, text, 0) == len(text)
        except OSError:
            return False
        finally:
            os.close(fd)

    def _encoded(self, document: dict[str, Any]) -> bytes:
        return json.dumps({"boot": self._boot, **document}, separators=(",", ":")).encode("ascii")

    def _read(self, name: str) -> dict[str, Any]:
        """Raises SnapshotError and OSError."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=self._directory)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise SnapshotError("it is not a regular file with a single name")
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise SnapshotError("other users own it or have access to it")
            if status.st_size > MAX_BYTES:
                raise SnapshotError("it is too long")
            text = os.read(fd, MAX_BYTES)
        finally:
            os.close(fd)
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise SnapshotError("it is incomplete") from None
        if not isinstance(document, dict) or not isinstance(document.get("boot"), str):
            raise SnapshotError("it lacks the boot ID")
        return document

    def _names(self) -> list[str]:
        with os.scandir(self._directory) as entries:
            return sorted(entry.name for entry in entries)

    def _rename(self, name: str, to: str) -> None:
        os.rename(name, to, src_dir_fd=self._directory, dst_dir_fd=self._directory)


def _do_nothing() -> None:
    pass


def _name(number: int) -> str:
    return f"job-{number}.json"


def _job(name: str, document: dict[str, Any]) -> Snapshot:
    snapshot = decode(document.get("job"))
    if name != _name(snapshot.number):
        raise SnapshotError("it has the number of another job")
    return snapshot


def _number(document: dict[str, Any]) -> int:
    last = document.get("last")
    if type(last) is not int or not 0 <= last < 10**9:
        raise SnapshotError("it has no valid job number")
    return last


def _is_usable_later(error: Exception) -> bool:
    short = isinstance(error, OSError) and error.errno in _SHORTAGES
    return short or isinstance(error, UnknownVersion)


def _why(error: Exception) -> str:
    return error.strerror or "" if isinstance(error, OSError) else str(error)
