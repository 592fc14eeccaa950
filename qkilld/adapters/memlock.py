"""Keep this program in memory with mlockall(2), because its pages may be on a disk that hangs.

When locking begins, pages of mapped files and pages in swap are read from the disk. Other memory is
locked page by page, when each page is first used, so unused parts of stacks and of the heap take no
memory. Memory stays locked after its first use, so use little.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

STACK_BYTES: Final = 256 * 1024
"""The size of the stack of each new thread, instead of the usual 8 MiB. Before Linux 5.14, the
whole stacks of all existing threads are locked."""

_M_ARENA_MAX: Final = -8
"""From malloc.h of glibc."""
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_MADV_POPULATE_READ: Final = 22
"""Since Linux 5.14. For memory that was never used, this advice maps the shared page of zeros."""
_CAP_IPC_LOCK: Final = 1 << 14


def share_heap() -> None:
    """Let all threads allocate from one heap. Call this before the first thread starts.

    By default, glibc uses up to eight heaps for each processor, and does not give back the memory
    that a thread once needed. After 200,000 hostile calls, a dozen heaps took 9 MB, of which 5 MB
    were free. Sharing one heap costs no time, because only one Python thread runs at a time. Other
    C libraries have only one heap.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


class MemoryLock:
    """Locks memory in threads of its own, because locking takes long if pages must first be read
    from a disk."""

    def __init__(self, on_error: Callable[[str], None]) -> None:
        """`on_error` is called at most once, in a separate thread."""
        self._on_error = on_error
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._lock = threading.Lock()
        self._is_wanted = self._is_locked = self._has_failed = False

    def set(self, wanted: bool) -> None:
        """Lock or unlock the memory soon, without blocking."""
        if self._is_wanted != wanted and not self._has_failed:
            self._is_wanted = wanted
            threading.Thread(target=self._work, name="memory", daemon=True).start()

    def _work(self) -> None:
        with self._lock:
            if self._is_wanted == self._is_locked:
                return
            if not self._is_wanted:
                self._libc.munlockall()
                self._is_locked = False
            elif problem := self._try():
                self._has_failed = True
                self._on_error(problem)
            else:
                self._is_locked = True

    def _try(self) -> str:
        """Lock the memory. Return "", or the reason for a failure."""
        # If there is a limit, lock nothing, because later allocations would fail.
        if not _unlimited():
            return "the limit for locked memory is not infinity (LimitMEMLOCK=)"
        calls = [_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT]
        if not (can_populate := self._populate(0, 0)):
            calls = [_MCL_CURRENT, _MCL_FUTURE | _MCL_ONFAULT]
        for flags in calls:
            if self._libc.mlockall(flags) != 0:
                return os.strerror(ctypes.get_errno())
        if can_populate:
            for start, end in _mappings():
                self._populate(start, end)
        return ""

    def _populate(self, start: int, end: int) -> bool:
        """Read the pages of a mapping. Return False if that is impossible, for example because the
        mapping is not readable."""
        address, size = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        result: int = self._libc.madvise(address, size, _MADV_POPULATE_READ)
        return result == 0


def _mappings() -> list[tuple[int, int]]:
    """Return the start and the end of each mapping of this program."""
    with Path("/proc/self/maps").open("rb") as file:
        ranges = [line.partition(b" ")[0].split(b"-") for line in file]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def _unlimited() -> bool:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return True
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) & _CAP_IPC_LOCK)
    return False
