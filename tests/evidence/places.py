"""Find directories on real disks of this host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from qkilld.adapters.procfs import Mounts
from tests.lab.storage import slow_disk


def number_of(path: Path) -> str:
    """Return MAJOR:MINOR of its file system. On btrfs, stat returns another number for files."""
    filesystem = Mounts("self").of_path(bytes(path.resolve()))
    assert filesystem is not None
    return filesystem.number


@contextlib.contextmanager
def on_a_disk(directory: Path) -> Iterator[Path]:
    """Provide this directory if it is on a block device. Otherwise (tmpfs, overlay), provide
    another directory that is on one.

    Raises needs.Missing.
    """
    if not number_of(directory).startswith("0:"):
        yield directory
        return
    with slow_disk(mebibytes=16) as disk:
        assert disk.directory is not None
        yield disk.directory
