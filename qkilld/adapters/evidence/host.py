"""What the whole host has still to write: /proc/meminfo.

Source: kernel Documentation/filesystems/proc.rst. Rights: none. Cost: 14 µs. Everybody's: read it
once for all that are sampled at one moment.
"""

from __future__ import annotations

from pathlib import Path

from qkilld.adapters.evidence.keptfile import read_once
from qkilld.model.evidence import Memory


def read_memory(proc: Path = Path("/proc")) -> Memory | None:
    """None where it cannot be read.

    On their way are also the pages that FUSE copied and, before 5.8, those that an NFS server has
    but not on its disk.
    """
    try:
        text = b"\n" + read_once(proc / "meminfo")
    except OSError:
        return None
    dirty, writeback = _bytes(text, b"\nDirty:"), _bytes(text, b"\nWriteback:")
    if dirty is None or writeback is None:
        return None
    fuse, nfs = _bytes(text, b"\nWritebackTmp:"), _bytes(text, b"\nNFS_Unstable:")
    return Memory(dirty, writeback + (fuse or 0) + (nfs or 0))


def _bytes(text: bytes, label: bytes) -> int | None:
    at = text.find(label) + len(label)
    if at < len(label):
        return None
    try:
        return int(text[at : text.find(b" kB", at)]) << 10
    except ValueError:
        return None
