"""One scratch directory for each run, with short paths. Later runs remove leftovers."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PREFIX: Final = "qkl-"
# The path of a unix socket has at most 107 bytes, and the lab's files need about 40 of them.
_LONGEST_BASE: Final = 40


def _base() -> Path:
    base = tempfile.gettempdir()
    return Path(base if len(os.fsencode(base)) <= _LONGEST_BASE else "/tmp")


@functools.cache
def run_directory() -> Path:
    """Return this process's own directory. The first call makes it.

    Tests connect as other users, so everyone may traverse the directory, but only we may write to
    it. The process has a lock on the directory. A directory without a lock is a leftover.
    """
    sweep()
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_base()))
        # Another run may remove the directory before the lock is taken.
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            path.chmod(0o755)
            return path
        os.close(lock)


def remove_run_directory() -> None:
    """Remove the directory, if there is one. Call this at the end of the process."""
    if run_directory.cache_info().currsize:
        shutil.rmtree(run_directory(), ignore_errors=True)


def sweep() -> None:
    """Remove this user's scratch directories whose process is gone."""
    for path in _base().glob(_PREFIX + "*"):
        try:
            if path.is_symlink() or path.stat().st_uid != os.geteuid():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


@contextlib.contextmanager
def scratch(kind: str = "d") -> Iterator[Path]:
    """Make an empty directory with a short path and mode 0755; remove it afterwards."""
    path = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=run_directory()))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
