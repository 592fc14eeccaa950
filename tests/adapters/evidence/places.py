"""Where images lie on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from qkilld.adapters.evidence.mountinfo import Mounts
from tests.lab.storage import slow_disk


def number_of(path: Path) -> str:
    """MAJOR:MINOR of its file system. Not of stat: a file of btrfs has another than its mount."""
    filesystem = Mounts("self").of_path(bytes(path.resolve()))
    assert filesystem is not None
    return filesystem.number


@contextlib.contextmanager
def on_a_disk(directory: Path) -> Iterator[Path]:
    """This directory or, where it lies on no block device (tmpfs, overlay), one that does.

    Raises needs.Missing.
    """
    if not number_of(directory).startswith("0:"):
        yield directory
        return
    with slow_disk(mebibytes=16) as disk:
        assert disk.directory is not None
        yield disk.directory
