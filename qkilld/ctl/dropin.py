"""The drop-in files of units, as files: written whole or not at all, and only our own touched.

The directory of the unit's drop-ins is opened once and everything is done in it by descriptor, so
that no link can lead elsewhere; nothing follows a link but the way to the base directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qkilld.ctl.session import NeedsRoot
from qkilld.judgement.adoption import FILE_NAME, is_ours, is_unchanged
from qkilld.model.errors import Failed, QkilldError

MAX_BYTES: Final = 1 << 20
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class DropIn:
    """Our file for one unit. Methods raise NeedsRoot, and Failed with what is in the way."""

    base: Path
    """/etc/systemd/system or another of the manager's directories."""
    unit: str

    @property
    def directory(self) -> Path:
        return self.base / f"{self.unit}.d"

    @property
    def path(self) -> Path:
        return self.directory / FILE_NAME

    def read(self) -> str:
        """The text of our file, "" where there is none."""
        with self._told(), self._open() as directory:
            return "" if directory is None else self._read(directory)

    def write(self, text: str) -> None:
        """In place of our own file, if there is one; mode 0644."""
        with self._told():
            if not self.base.is_dir():
                self.base.mkdir(parents=True)
            with contextlib.suppress(FileExistsError):
                self.directory.mkdir(mode=0o755)
            with self._open() as directory:
                if directory is None:
                    raise Failed(f"{self.directory} was removed meanwhile")
                self._write(directory, text)

    def remove(self) -> bool:
        """Our file and, where it is empty then, the directory; False where there is no file."""
        with self._told(), self._open() as directory:
            if directory is None or not self._read(directory):
                return False
            os.unlink(FILE_NAME, dir_fd=directory)
            with contextlib.suppress(OSError):
                self.directory.rmdir()
            return True

    def _write(self, directory: int, text: str) -> None:
        replaces = bool(self._read(directory))
        temporary = f".{FILE_NAME}.{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600, dir_fd=directory)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode(errors="surrogateescape"))
                os.fchmod(file.fileno(), 0o644)
                file.flush()
                os.fsync(file.fileno())
            if replaces:
                os.rename(temporary, FILE_NAME, src_dir_fd=directory, dst_dir_fd=directory)
            else:
                # Unlike rename this fails where somebody else has been quicker.
                os.link(temporary, FILE_NAME, src_dir_fd=directory, dst_dir_fd=directory)
            os.fsync(directory)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)

    def _read(self, directory: int) -> str:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(FILE_NAME, flags, dir_fd=directory)
        except FileNotFoundError:
            return ""
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Failed(f"{self.path} is a symbolic link and not ours: remove it") from None
            raise
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            raw = file.read(MAX_BYTES + 1) if stat.S_ISREG(found.st_mode) else b""
        text = raw.decode(errors="surrogateescape")
        if not is_ours(text) or found.st_uid not in (0, os.geteuid()):
            raise Failed(f"{self.path} is not ours: it was left alone. Give it another name first")
        if not is_unchanged(text):
            raise Failed(
                f"{self.path} was edited since it was written: it was left alone. Keep what you"
                " added in a file of another name, and remove this one"
            )
        return text

    @contextlib.contextmanager
    def _open(self) -> Iterator[int | None]:
        """The directory, None where there is none."""
        try:
            descriptor = os.open(self.directory, _DIRECTORY)
        except FileNotFoundError:
            yield None
            return
        try:
            found = os.fstat(descriptor)
            if found.st_uid not in (0, os.geteuid()) or is_writable_by_others(found):
                raise Failed(f"{self.directory} can be written to by others: see to that first")
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """System errors in words."""
        try:
            yield
        except QkilldError:
            raise
        except PermissionError:
            raise NeedsRoot(
                f"{self.path} cannot be written: run this as root, or with --user for a unit of"
                " your own"
            ) from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Failed(f"{self.directory} is a link or no directory: see to it") from None
            raise Failed(f"{self.path}: {os.strerror(error.errno or 0)}") from None


def is_writable_by_others(found: os.stat_result) -> bool:
    """A user's own group, which on many systems may write to all that they make, is no other."""
    own_group = os.geteuid() != 0 and found.st_gid == os.getegid()
    return bool(found.st_mode & (0o002 if own_group else 0o022))
