"""Jobs in files of the runtime directory (RUNTIME_DIRECTORY, systemd.exec(5)): one file each.

/run is a tmpfs, but whoever fills it or holds its locks must not hold up a job. So a thread of its
own writes, the newest state of each job only; a failure is said once, and the jobs go on.

What is read was written by an earlier life of this program, or by nobody knows whom: a file that is
not whole and our own is set aside, as NAME.bad, and named.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from qkilld.engine.snapshot import Snapshot, SnapshotError, decode

MAX_BYTES: Final = 4 << 20
"""Of a file. A job has a few KiB."""
MAX_BAD: Final = 16
"""Files that are kept aside; further ones are removed."""
RESERVE: Final = 16
"""Numbers of jobs that are taken in advance: a job whose file was not written before a crash has
used one nevertheless."""
FLUSH_TIMEOUT_S: Final = 2.0

_JOB: Final = re.compile(r"job-([1-9][0-9]{0,8})\.json")
_NUMBERS: Final = "numbers.json"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Bad(NamedTuple):
    """A file that was set aside."""

    name: str
    why: str


class StateDirectory:
    """Call `load` once, before anything else."""

    def __init__(self, directory: Path, on_error: Callable[[str], None]) -> None:
        """Raises OSError where there is no such directory, and PermissionError where others may
        write there."""
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        status = os.fstat(self._directory)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            os.close(self._directory)
            raise PermissionError(f"{directory} is not this user's alone to write to")
        self._boot = _BOOT_ID.read_text().strip()
        self._on_error = on_error
        self._told = False
        self._reserved = 0
        self._pending: dict[int, Snapshot | None] = {}
        """The newest state of each job that is not yet written; None for one that is forgotten."""
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="state", daemon=True)
        self._thread.start()

    def load(self) -> tuple[list[Snapshot], int, list[Bad]]:
        """The jobs in the order of their numbers, the highest number that may have been given, and
        what was set aside. Jobs of another boot are removed.

        Raises OSError where the directory cannot be read. One that cannot be written to, full as it
        may be, is told like any failure: what is in it is read all the same.
        """
        found, bad = [], []
        last = 0
        for name in self._names():
            if name.startswith(".") and name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._directory)
            elif name == _NUMBERS or _JOB.fullmatch(name):
                try:
                    document = self._read(name)
                    if document["boot"] != self._boot:
                        os.unlink(name, dir_fd=self._directory)
                    elif name == _NUMBERS:
                        last = _number(document)
                    else:
                        found.append(_job(name, document))
                except (SnapshotError, OSError) as error:
                    bad.append(Bad(name, _why(error)))
                    self.set_aside(name)
        last = max([last, *(snapshot.number for snapshot in found)])
        try:
            self._reserve(last)
        except OSError as error:
            self._reserved = last  # so that the next job tries again
            self._failed(error)
        return sorted(found, key=lambda snapshot: snapshot.number), last, bad

    def save(self, snapshot: Snapshot) -> None:
        """Write it soon. Never blocks and never raises."""
        if snapshot.number + RESERVE // 2 > self._reserved:
            self._reserved = snapshot.number + RESERVE
            self._queue.put(0)
        self._put(snapshot.number, snapshot)

    def forget(self, number: int) -> None:
        """Remove it soon."""
        self._put(number, None)

    def set_aside(self, name: str) -> None:
        """Move a file out of the way."""
        with contextlib.suppress(OSError):
            kept = [other for other in self._names() if other.endswith(".bad")]
            if len(kept) < MAX_BAD or f"{name}.bad" in kept:
                self._rename(name, f"{name}.bad")
            else:
                os.unlink(name, dir_fd=self._directory)

    def close(self, last: int) -> None:
        """Write what is queued, for at most FLUSH_TIMEOUT_S. `last` is the last number given.

        May be called twice.
        """
        if self._directory < 0:
            return
        self._reserved = last
        self._queue.put(0)
        self._queue.put(None)
        self._thread.join(FLUSH_TIMEOUT_S)
        if not self._thread.is_alive():
            os.close(self._directory)
            self._directory = -1

    def _put(self, number: int, snapshot: Snapshot | None) -> None:
        # Queued each time: whether the thread has just taken the one before cannot be known.
        self._pending[number] = snapshot
        self._queue.put(number)

    def _work(self) -> None:
        while (number := self._queue.get()) is not None:
            try:
                if number == 0:
                    self._reserve(self._reserved - RESERVE)
                elif number not in self._pending:
                    continue  # written with an earlier one
                elif (snapshot := self._pending.pop(number)) is not None:
                    self._write(_name(number), {"job": snapshot.to_json()})
                else:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(_name(number), dir_fd=self._directory)
                self._told = False
            except OSError as error:
                self._failed(error)

    def _failed(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            self._on_error(_why(error))

    def _reserve(self, last: int) -> None:
        self._reserved = last + RESERVE
        self._write(_NUMBERS, {"last": self._reserved})

    def _write(self, name: str, document: dict[str, Any]) -> None:
        """Whole or not at all. Raises OSError."""
        temporary = f".{name}.tmp"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self._directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        text = json.dumps({"boot": self._boot, **document}, separators=(",", ":"))
        with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=self._directory), "wb") as file:
            file.write(text.encode("ascii"))
        self._rename(temporary, name)

    def _read(self, name: str) -> dict[str, Any]:
        """Raises SnapshotError and OSError."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=self._directory)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise SnapshotError("it is no ordinary file")
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise SnapshotError("others own it or may use it")
            if status.st_size > MAX_BYTES:
                raise SnapshotError("it is too long")
            text = os.read(fd, MAX_BYTES)
        finally:
            os.close(fd)
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise SnapshotError("it is not whole") from None
        if not isinstance(document, dict) or not isinstance(document.get("boot"), str):
            raise SnapshotError("it does not say of which boot it is")
        return document

    def _names(self) -> list[str]:
        with os.scandir(self._directory) as entries:
            return sorted(entry.name for entry in entries)

    def _rename(self, name: str, to: str) -> None:
        os.rename(name, to, src_dir_fd=self._directory, dst_dir_fd=self._directory)


def _name(number: int) -> str:
    return f"job-{number}.json"


def _job(name: str, document: dict[str, Any]) -> Snapshot:
    snapshot = decode(document.get("job"))
    if name != _name(snapshot.number):
        raise SnapshotError("it is of a job of another number")
    return snapshot


def _number(document: dict[str, Any]) -> int:
    last = document.get("last")
    if type(last) is not int or not 0 <= last < 10**9:
        raise SnapshotError("the number in it cannot be")
    return last


def _why(error: Exception) -> str:
    return error.strerror or "" if isinstance(error, OSError) else str(error)
