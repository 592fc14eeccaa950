"""Read the control groups of a process: unwritten page cache, bytes written, the freezer.

    v2   memory.stat, io.stat, cgroup.freeze, cgroup.events (kernel admin-guide/cgroup-v2.rst)
    v1   memory.stat, blkio.throttle.*, freezer.state (kernel admin-guide/cgroup-v1/)

Both versions are read if the host has both. If a controller is not enabled for the process's group,
the nearest ancestor group that has it is read. Needs no rights.

Cost, measured on kernel 6.18: 30 µs a read. Listing the group's other processes costs 0.2 ms. This
is done every REFRESH_S, and after the process has moved to another group.

Limits of v1: blkio counts writeback only for the root group. Since Linux 6.10, blkio ignores
disks on which no limit was ever set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qkilld.debug_log import note_once
from qkilld.evidence.hierarchies import Group, Hierarchies, hierarchies_of
from qkilld.evidence.kept_file import KeptFile, number_after, open_directory
from qkilld.model.sample import Cgroup

REFRESH_S: Final = 30.0
SHARED_AGE_S: Final = 5.0
"""The maximum age of cached figures of groups that several processes share."""
_MAX_SHARED: Final = 256

_Pair = tuple[int | None, int | None]
_UNKNOWN: Final[_Pair] = (None, None)
_CACHE_V1: Final = (b"\ntotal_dirty ", b"\ntotal_writeback ")
_CACHE_V2: Final = (b"\nfile_dirty ", b"\nfile_writeback ")


class SharedGroups:
    """Cached figures of groups that several processes share.

    The figures are displayed, but not used for verdicts, so they may be a few seconds old.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cache: dict[str, tuple[float, _Pair]] = {}

    def read(self, reader: _MemoryStat | _IoStat) -> _Pair:
        """Return the figures of the reader's file, at most SHARED_AGE_S old."""
        now = self._clock()
        path = reader.path
        if (cached := self._cache.get(path)) is not None and now - cached[0] < SHARED_AGE_S:
            return cached[1]
        if len(self._cache) >= _MAX_SHARED:
            self._cache.clear()
        values = reader.read()
        self._cache[path] = now, values
        return values


class CgroupReader:
    """Reads one process's groups. Not thread-safe."""

    __slots__ = (
        "_clock", "_directory", "_freezers", "_freezers_known", "_hierarchies", "_io",
        "_io_own", "_last_cgroup", "_membership", "_memory", "_memory_own", "_owns_directory",
        "_pid", "_refresh_at", "_shared", "_text",
    )  # fmt: skip

    def __init__(
        self,
        pid: int,
        proc: Path = Path("/proc"),
        hierarchies: Hierarchies | None = None,
        clock: Callable[[], float] = time.monotonic,
        shared: SharedGroups | None = None,
        directory: int | None = None,
    ) -> None:
        """Read the process that has this pid now, and never one that reuses the pid.

        If `hierarchies` is None, those of this host are used. Without `shared`, figures of shared
        groups are not cached. `directory`: a descriptor of /proc/PID, which the caller closes; None
        to open one.
        """
        self._pid = pid
        self._shared = shared
        self._clock = clock
        self._hierarchies = hierarchies or hierarchies_of(proc)
        self._directory = -1 if directory is None else directory
        self._owns_directory = directory is None
        if directory is None:
            try:
                self._directory = open_directory(proc / str(pid))
            except OSError as error:
                note_once("opening /proc/PID", error)
        self._membership = KeptFile("cgroup", self._directory)
        self._text: int | None = None
        """The hash of /proc/PID/cgroup at the last read. A hash takes less memory than the text."""
        self._refresh_at = 0.0
        self._memory: _MemoryStat | None = None
        self._io: _IoStat | None = None
        self._freezers: list[_FreezerV1 | _FreezerV2] = []
        self._freezers_known = False
        self._memory_own = self._io_own = False
        self._last_cgroup: Cgroup | None = None

    def read(self) -> Cgroup | None:
        """Read the groups; None if they are unknown.

        Cgroup.own applies to all figures. So if only the memory group or only the I/O group is the
        guest's own, the figures of the other group are None.
        """
        if self._directory < 0 or not (text := self._membership.read_or_none()):
            return None
        if hash(text) != self._text:
            self._locate(text)
        if self._clock() >= self._refresh_at:
            self._refresh_at = self._clock() + REFRESH_S
            self._find_owners()
        is_own = self._memory_own or self._io_own
        dirty, writeback = written, writes = _UNKNOWN
        if self._memory is not None and self._memory_own == is_own:
            dirty, writeback = self._figures(self._memory, is_own)
        if self._io is not None and self._io_own == is_own:
            written, writes = self._figures(self._io, is_own)
        cgroup = Cgroup(is_own, dirty, writeback, written, writes, self._frozen())
        # Return the old object if nothing changed: callers compare it, and comparing identical
        # objects is cheap.
        if cgroup != self._last_cgroup:
            self._last_cgroup = cgroup
        return self._last_cgroup

    def _figures(self, reader: _MemoryStat | _IoStat, own: bool) -> _Pair:
        return reader.read() if own or self._shared is None else self._shared.read(reader)

    def close(self) -> None:
        """May be called again."""
        self._forget_groups()
        self._membership.close()
        if self._owns_directory and self._directory >= 0:
            os.close(self._directory)
        self._directory = -1

    def close_files(self) -> None:
        """Close files; the next read opens them again."""
        self._membership.close()
        for reader in (self._memory, self._io, *self._freezers):
            if reader is not None:
                reader.close()

    def _forget_groups(self) -> None:
        self.close_files()
        self._memory = self._io = None
        self._freezers = []

    def _locate(self, text: bytes) -> None:
        self._forget_groups()
        self._text, self._refresh_at = hash(text), 0.0
        groups = self._hierarchies.groups(text)
        unified = groups.get("")
        memory, io = groups.get("memory", unified), groups.get("blkio", unified)
        if memory is not None and (directory := _nearest(memory, "memory.stat")) is not None:
            self._memory = _MemoryStat(memory, directory)
        if io is not None:
            name = "io.stat" if io.v2 else "blkio.throttle.io_service_bytes"
            if (directory := _nearest(io, name)) is not None:
                self._io = _IoStat(io, directory)
        frozen_by = [group for name in ("freezer", "") if (group := groups.get(name)) is not None]
        # Leave out the root group of a hierarchy, because it cannot be frozen. If no mount shows a
        # group, the state of its freezer is unknown.
        below = [group for group in frozen_by if not group.is_root]
        self._freezers_known = bool(frozen_by) and all(group.ways for group in below)
        self._freezers = [
            _FreezerV2(group) if group.v2 else _FreezerV1(group) for group in below if group.ways
        ]

    def _find_owners(self) -> None:
        self._memory_own, self._io_own = (
            reader is not None
            and self._hierarchies.is_alone(reader.group, reader.directory, self._pid)
            for reader in (self._memory, self._io)
        )

    def _frozen(self) -> bool | None:
        states = [freezer.frozen() for freezer in self._freezers]
        if True in states:
            return True
        return False if self._freezers_known and None not in states else None


def _nearest(group: Group, name: str) -> str | None:
    for directory in group.ways:
        if os.access(f"{directory}/{name}", os.F_OK):
            return directory
    return None


class _MemoryStat:
    """Reads the page cache of a group and its descendants."""

    __slots__ = ("_stat", "directory", "group", "path")

    def __init__(self, group: Group, directory: str) -> None:
        self.group, self.directory = group, directory
        self.path = f"{directory}/memory.stat"
        self._stat = KeptFile(self.path)

    def read(self) -> _Pair:
        text = self._stat.read_or_none() or b""
        labels = _CACHE_V2 if self.group.v2 else _CACHE_V1
        dirty, writeback = (number_after(text, label) for label in labels)
        return dirty, writeback

    def close(self) -> None:
        self._stat.close()


class _IoStat:
    """Reads the written bytes and the writes, summed over all disks. If devices are stacked, a
    write may be counted once for each layer."""

    __slots__ = ("_files", "directory", "group", "path")

    def __init__(self, group: Group, directory: str) -> None:
        self.group, self.directory = group, directory
        names = ["io.stat"]
        if not group.v2:
            names = ["blkio.throttle.io_service_bytes", "blkio.throttle.io_serviced"]
            # Prefer the "recursive" files (since Linux 5.3), because they include descendants.
            if os.access(f"{directory}/{names[0]}_recursive", os.F_OK):
                names = [f"{name}_recursive" for name in names]
        paths = [f"{directory}/{name}" for name in names]
        self.path = paths[0]
        self._files = tuple(map(KeptFile, paths))

    def read(self) -> _Pair:
        texts = [file.read_or_none() for file in self._files]
        if self.group.v2:
            return _sum_v2(texts[0], b"wbytes="), _sum_v2(texts[0], b"wios=")
        return _sum_v1(texts[0]), _sum_v1(texts[1])

    def close(self) -> None:
        for file in self._files:
            file.close()


def _sum_v2(text: bytes | None, label: bytes) -> int | None:
    """Sum up lines like "8:0 rbytes=1 wbytes=2 rios=3 …". If there is no line, nothing was written:
    return 0."""
    if text is None:
        return None
    try:
        return sum(int(word[len(label) :]) for word in text.split() if word.startswith(label))
    except ValueError:
        return None


def _sum_v1(text: bytes | None) -> int | None:
    """Sum up lines like "8:0 Write 2". If there is no line, the kernel does not count writes:
    return None."""
    words = (text or b"").split()
    try:
        amounts = [int(words[at + 1]) for at, word in enumerate(words) if word == b"Write"]
    except (ValueError, IndexError):
        return None
    return sum(amounts) if amounts else None


class _FreezerV2:
    """Reports a group as frozen as soon as freezing begins. cgroup.events alone would report it too
    late: only after the last thread has left uninterruptible sleep."""

    def __init__(self, group: Group) -> None:
        self._events = KeptFile(f"{group.ways[0]}/cgroup.events")
        self._freeze = tuple(KeptFile(f"{directory}/cgroup.freeze") for directory in group.ways)

    def frozen(self) -> bool | None:
        frozen = number_after(b"\n" + (self._events.read_or_none() or b""), b"\nfrozen ")
        if frozen:
            return True
        states = [file.read_or_none() for file in self._freeze]
        if any(text is not None and text.strip() == b"1" for text in states):
            return True
        # Ancestors outside this mount need not be read: if one of them is frozen, cgroup.events of
        # this group reports the group as frozen, too.
        return None if frozen is None or None in states else False

    def close(self) -> None:
        for file in (self._events, *self._freeze):
            file.close()


class _FreezerV1:
    """Reads only the group itself: if a group above it is frozen, its own state is FREEZING or
    FROZEN, too."""

    def __init__(self, group: Group) -> None:
        self._state = KeptFile(f"{group.ways[0]}/freezer.state")

    def frozen(self) -> bool | None:
        state = self._state.read_or_none()
        return None if state is None else state.strip() in (b"FREEZING", b"FROZEN")

    def close(self) -> None:
        self._state.close()
