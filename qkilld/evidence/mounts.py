"""Read counters of file systems without a block device: NFS, from /proc/PID/mountstats.

Sources: the code of nfsstat(8) and mountstats(8), kernel fs/nfs/super.c (nfs_show_stats) and
net/sunrpc/stats.c (rpc_clnt_show_stats). The kernel answers from memory; no server is asked. Types
other than NFS (FUSE, 9p, Ceph, SMB, ZFS) have no readable counters, so their values are None.

Needs the ptrace right for another user's process. Cost: 10 µs, and 20 µs for each NFS mount.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import Filesystem, read_bounded
from qkilld.model.sample import Mount
from qkilld.model.text import printable

MAX_BYTES: Final = 4 << 20
"""A mountstats file that is longer than this (about 500 NFS mounts) counts as unreadable."""
KINDS: Final = frozenset({"nfs", "nfs4"})
"""The types of file systems that have counters."""

_BYTES: Final = re.compile(rb"^\tbytes:\t([\d ]+)$", re.MULTILINE)
_OPERATION: Final = re.compile(rb"^\t *[A-Z0-9_]+: ([\d ]+)$", re.MULTILINE)


class MountStatistics:
    """The mountstats files of any number of processes, each read once."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._texts: dict[str, bytes | None] = {}
        self._cache: dict[Filesystem, Mount] = {}

    def of(self, filesystem: Filesystem) -> Mount:
        """Return a mount with its counters. A missing or unreadable counter is None."""
        cached = self._cache.get(filesystem)
        if cached is None:
            operations = bytes_written = None
            if filesystem.kind in KINDS:
                operations, bytes_written = self._counters(filesystem)
            cached = Mount(printable(filesystem.kind), operations, bytes_written, filesystem.number)
            self._cache[filesystem] = cached
        return cached

    def _counters(self, filesystem: Filesystem) -> tuple[int | None, int | None]:
        pid = filesystem.pid
        if pid not in self._texts:
            self._texts[pid] = read_bounded(f"{self._proc}/{pid}/mountstats", MAX_BYTES)
        text = self._texts[pid]
        if text is None:
            return None, None
        # mountinfo and mountstats use the same escapes, so their strings can be compared.
        head = b"device %b mounted on %b with fstype %b " % (
            *(filesystem.source, filesystem.point),
            filesystem.kind.encode(),
        )
        text = b"\n" + text
        start = text.find(b"\n" + head)
        # Two mounts stacked at one place cannot be distinguished, so their counters are unknown.
        if start < 0 or text.find(b"\n" + head, start + 1) >= 0:
            return None, None
        end = text.find(b"\ndevice ", start + 1)
        return _parse(text[start : end if end >= 0 else len(text)])


def _parse(section: bytes) -> tuple[int | None, int | None]:
    """Return the number of operations and the written bytes from one mount's section.

    Only operations that the server answered with success are counted, because only they show
    progress. The kernel's first number includes operations that the kernel gave up (soft mounts),
    so the operations that ended in an error (the ninth number, since Linux 5.3) are subtracted.
    """
    _, separator, operations = section.partition(b"\tper-op statistics\n")
    counts = [line.split() for line in _OPERATION.findall(operations)]
    answered = sum(int(c[0]) - (int(c[8]) if len(c) > 8 else 0) for c in counts)
    numbers = match[1].split() if (match := _BYTES.search(section)) else []
    # The sixth number is the bytes written to the server. The five numbers before it are the bytes
    # read and written by normal calls, read and written by direct I/O, and read from the server.
    bytes_written = int(numbers[5]) if len(numbers) > 5 else None
    return answered if separator and counts else None, bytes_written
