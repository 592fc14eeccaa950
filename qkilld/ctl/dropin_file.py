"""Write and remove our drop-in files atomically, without touching any other file.

The drop-in directory is opened once and then used through its descriptor. No symbolic link below
the base directory is followed, so no link can redirect a write.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qkilld.ctl.session import NeedsRoot
from qkilld.debug_log import ignore
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import Failed, QkilldError
from qkilld.unitcheck.dropin import FILE_NAME, is_ours, is_unchanged

MAX_BYTES: Final = 1 << 20
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class DropIn:
    """Our file for one unit. Methods raise NeedsRoot or Failed."""

    base: Path
    """A directory of the manager, such as /etc/systemd/system."""
    unit: str

    @property
    def directory(self) -> Path:
        return self.base / f"{self.unit}.d"

    @property
    def path(self) -> Path:
        return self.directory / FILE_NAME

    def read(self) -> str:
        """Return the text of our file; "" if there is none."""
        with self._errors(), self._open() as directory:
            return "" if directory is None else self._read(directory)

    def write(self, text: str) -> None:
        """Write our file, replacing an older one; mode 0644."""
        with self._errors():
            if not self.base.is_dir():
                self.base.mkdir(parents=True)
            is_new = not self.directory.exists()
            with contextlib.suppress(FileExistsError):
                self.directory.mkdir(mode=0o755)
            try:
                with self._open() as directory:
                    if directory is None:
                        raise Failed(f"{self.directory} was removed in the meantime")
                    self._write(directory, text)
            except BaseException:
                if is_new:
                    self._remove_directory()
                raise

    def remove(self) -> bool:
        """Remove our file, and its directory if that is empty; return whether there was a file."""
        with self._errors(), self._open() as directory:
            if directory is None or not self._read(directory):
                return False
            os.unlink(FILE_NAME, dir_fd=directory)
            self._remove_directory()
            return True

    def _remove_directory(self) -> None:
        with ignore(f"removing {self.directory}, which may not be empty", OSError):
            self.directory.rmdir()

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
                # Use link() instead of rename(), because link() fails if somebody has created the
                # file meanwhile.
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
                raise Failed(
                    f"{self.path} is a symbolic link that adopt did not create: remove it"
                ) from None
            raise
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            raw = file.read(MAX_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
        text = raw.decode(errors="surrogateescape")
        if not is_ours(text) or status.st_uid not in (0, os.geteuid()):
            raise Failed(f"adopt did not write {self.path}, so it was left alone. Rename it first")
        if not is_unchanged(text):
            raise Failed(
                f"{self.path} was edited since adopt wrote it, so it was left alone. Move your "
                "changes to a file with another name, and remove this one"
            )
        return text

    @contextlib.contextmanager
    def _open(self) -> Iterator[int | None]:
        """Open the directory; None if there is none."""
        try:
            descriptor = os.open(self.directory, _DIRECTORY)
        except FileNotFoundError:
            yield None
            return
        try:
            status = os.fstat(descriptor)
            if status.st_uid not in (0, os.geteuid()) or is_writable_by_others(status):
                raise Failed(
                    f"other users can write to {self.directory}: correct its owner and mode first"
                )
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate system errors."""
        try:
            yield
        except QkilldError:
            raise
        except PermissionError:
            raise NeedsRoot(
                f"{self.path} cannot be written: run this as root, or with --user for your own"
                " units"
            ) from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Failed(
                    f"{self.directory} is a link or not a directory: replace it by a directory"
                ) from None
            raise Failed(f"{self.path}: {os.strerror(error.errno or 0)}") from None


def all_drop_ins(base: Path) -> list[DropIn]:
    """Return all our drop-ins below a directory, even edited ones. Symbolic links named FILE_NAME
    are returned too, for the administrator to check."""
    drop_ins = []
    for path in sorted(base.glob(f"*.d/{FILE_NAME}")):
        with ignore(f"reading {path}, which may not be ours to read", OSError):
            if path.is_symlink() or (path.is_file() and is_ours(_text(path))):
                drop_ins.append(DropIn(base, path.parent.name.removesuffix(".d")))
    return drop_ins


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_BYTES).decode(errors="surrogateescape")


def is_writable_by_others(status: os.stat_result) -> bool:
    """Members of a user's own group do not count as other users: on many systems, each user has a
    private group, and the user's files are group-writable."""
    own_group = os.geteuid() != 0 and status.st_gid == os.getegid()
    return bool(status.st_mode & (0o002 if own_group else 0o022))
