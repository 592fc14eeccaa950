"""Check what the lab needs from the host."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path


class Missing(Exception):
    """Something that the lab needs is missing. The text says what is missing, and what to do.

    A test that raises this exception is skipped with this text, or fails if CI=true.
    """


def program(name: str, package: str) -> Path:
    """Return the path of a program. Raises Missing with the name of the Debian package that
    contains the program."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise Missing(f"{name} is not installed: apt-get install {package}, or `make setup`")
    return Path(path)


def root(what: str) -> None:
    """Raise Missing if this process is not root. `what` is the action that needs root."""
    if os.geteuid() != 0:
        raise Missing(f"{what} needs root")


def readable_by_others(path: Path) -> None:
    """Raise Missing if other users cannot enter this directory."""
    for directory in (path, *path.parents):
        if not directory.stat().st_mode & stat.S_IXOTH:
            raise Missing(f"other users cannot enter {directory}: move this checkout elsewhere")
