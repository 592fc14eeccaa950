"""Read the unwritten page cache of the whole host from /proc/meminfo.

Source: kernel Documentation/filesystems/proc.rst. Needs no rights. Cost: 14 µs. The values are
those of the whole host, so read them once for all samples that are taken together.
"""

from __future__ import annotations

from pathlib import Path

from qkilld.debug_log import note_once
from qkilld.evidence.kept_file import read_once
from qkilld.model.sample import Memory


def read_memory(proc: Path = Path("/proc")) -> Memory | None:
    """Read meminfo; None if it cannot be read.

    Writeback may be too high: it includes pages that FUSE has copied and, before Linux 5.8, pages
    that an NFS server has received but not written.
    """
    try:
        text = b"\n" + read_once(proc / "meminfo")
    except OSError as error:
        note_once("reading /proc/meminfo", error)
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
