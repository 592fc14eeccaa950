"""What the lab needs of the machine, and how it says so where that is not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class Missing(Exception):
    """Something that the lab needs is not on this machine; the text says what, and what to do.

    A test that this reaches is skipped with that text, or fails with it where CI=true.
    """


def program(name: str, package: str) -> Path:
    """Where the program is. Raises Missing, with the Debian package that has it."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise Missing(f"{name} is not installed: apt-get install {package}, or `make setup`")
    return Path(path)


def root(what: str) -> None:
    """Raises Missing where this process is not root's. `what`: what it cannot do then."""
    if os.geteuid() != 0:
        raise Missing(f"{what} needs root")
