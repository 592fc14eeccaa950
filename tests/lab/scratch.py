"""One scratch directory a run, with short paths, that a later run clears away if it was left."""

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
# A Unix socket's path has at most 107 bytes; what the lab puts below needs about 40 of them.
_LONGEST_BASE: Final = 40


def _base() -> Path:
    base = tempfile.gettempdir()
    return Path(base if len(os.fsencode(base)) <= _LONGEST_BASE else "/tmp")


@functools.cache
def run_directory() -> Path:
    """This process's own, made at the first call and removed by remove_run_directory().

    Anyone may pass through it (tests connect as other users), nobody else may write. A lock is held
    on it for as long as the process lives: a directory whose lock is free belongs to nobody.
    """
    sweep()
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_base()))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():  # a run that starts at this moment may have swept it before the lock
            path.chmod(0o755)
            return path
        os.close(lock)


def remove_run_directory() -> None:
    """At the end of the process; nothing happens where it was never made."""
    if run_directory.cache_info().currsize:
        shutil.rmtree(run_directory(), ignore_errors=True)


def sweep() -> None:
    """Removes the scratch directories of this user whose process is gone."""
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
    """An empty directory with a short path, mode 0755, that is gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=run_directory()))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
