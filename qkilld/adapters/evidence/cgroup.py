"""The control groups of a process: what they have still to write, what they wrote, the freezer.

    v2   memory.stat, io.stat, cgroup.freeze, cgroup.events (kernel admin-guide/cgroup-v2.rst)
    v1   memory.stat, blkio.throttle.*, freezer.state (kernel admin-guide/cgroup-v1/)

Both where a machine has both. Rights: none. Cost, measured on kernel 6.18: 30 µs a read; 0.2 ms
more when the process changes its group, and every REFRESH_S to see who else is in it. Where a
controller does not reach down to the group of the process, the nearest one above it is read.

What v1 counts: no writeback of a group but the root group's in blkio, and since 6.10 only disks for
which a limit was ever set.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qkilld.adapters.evidence.hierarchies import Group, Hierarchies, hierarchies_of, is_alone
from qkilld.adapters.evidence.keptfile import KeptFile, number_after, open_directory
from qkilld.model.evidence import Cgroup

REFRESH_S: Final = 30.0

_Pair = tuple[int | None, int | None]
_UNKNOWN: Final[_Pair] = (None, None)


class CgroupReader:
    """What is read of one process's groups. For one thread at a time."""

    def __init__(
        self,
        pid: int,
        proc: Path = Path("/proc"),
        hierarchies: Hierarchies | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """As for ProcessReader: of the process that has this number now, and no other.

        `hierarchies`: where others than this process's are meant.
        """
        self._pid = pid
        self._proc = proc
        self._clock = clock
        self._hierarchies = hierarchies or hierarchies_of(proc)
        self._directory = -1
        with contextlib.suppress(OSError):
            self._directory = open_directory(proc / str(pid))
        self._membership = KeptFile("cgroup", self._directory)
        self._text = b""
        self._refresh_at = 0.0
        self._memory: _Memory | None = None
        self._io: _Io | None = None
        self._freezers: list[_FreezerV1 | _FreezerV2] = []
        self._freezers_known = False
        self._memory_own = self._io_own = False

    def read(self) -> Cgroup | None:
        """None where it is not known which groups these are.

        Where one of the groups that are read is the guest's own, only those tell and the figures of
        shared ones are None: they would be others' too.
        """
        if self._directory < 0 or not (text := self._membership.read_or_none()):
            return None
        if text != self._text:
            self._locate(text)
        if self._clock() >= self._refresh_at:
            self._refresh_at = self._clock() + REFRESH_S
            self._find_owners()
        own = self._memory_own or self._io_own
        dirty, writeback = written, writes = _UNKNOWN
        if self._memory is not None and self._memory_own == own:
            dirty, writeback = self._memory.read()
        if self._io is not None and self._io_own == own:
            written, writes = self._io.read()
        return Cgroup(own, dirty, writeback, written, writes, self._frozen())

    def close(self) -> None:
        """May be called again."""
        self._membership.close()
        self._close_files()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def _close_files(self) -> None:
        for reader in (self._memory, self._io, *self._freezers):
            if reader is not None:
                reader.close()
        self._memory = self._io = None
        self._freezers = []

    def _locate(self, text: bytes) -> None:
        self._close_files()
        self._text, self._refresh_at = text, 0.0
        groups = self._hierarchies.groups(text)
        unified = groups.get("")
        memory, io = groups.get("memory", unified), groups.get("blkio", unified)
        if memory is not None and (directory := _nearest(memory, "memory.stat")) is not None:
            self._memory = _Memory(memory, directory)
        if io is not None:
            name = "io.stat" if io.v2 else "blkio.throttle.io_service_bytes"
            if (directory := _nearest(io, name)) is not None:
                self._io = _Io(io, directory)
        frozen_by = [group for name in ("freezer", "") if (group := groups.get(name)) is not None]
        # The root group of a hierarchy cannot be frozen; of one that is mounted nowhere here
        # nothing is known.
        below = [group for group in frozen_by if not group.is_root]
        self._freezers_known = bool(frozen_by) and all(group.ways for group in below)
        self._freezers = [
            _FreezerV2(group) if group.v2 else _FreezerV1(group) for group in below if group.ways
        ]

    def _find_owners(self) -> None:
        self._memory_own, self._io_own = (
            reader is not None and is_alone(reader.group, reader.directory, self._pid, self._proc)
            for reader in (self._memory, self._io)
        )

    def _frozen(self) -> bool | None:
        states = [freezer.frozen() for freezer in self._freezers]
        if True in states:
            return True
        return False if self._freezers_known and None not in states else None


def _nearest(group: Group, name: str) -> Path | None:
    for directory in group.ways:
        if (directory / name).exists():
            return directory
    return None


class _Memory:
    """Page cache of a group and those below it."""

    def __init__(self, group: Group, directory: Path) -> None:
        self.group, self.directory = group, directory
        self._stat = KeptFile(directory / "memory.stat")
        kinds = (
            (b"file_dirty", b"file_writeback") if group.v2 else (b"total_dirty", b"total_writeback")
        )
        self._labels = [b"\n" + kind + b" " for kind in kinds]

    def read(self) -> _Pair:
        text = self._stat.read_or_none() or b""
        dirty, writeback = (number_after(text, label) for label in self._labels)
        return dirty, writeback

    def close(self) -> None:
        self._stat.close()


class _Io:
    """Bytes written to all disks, and in how many writes: a disk on a disk counts on both."""

    def __init__(self, group: Group, directory: Path) -> None:
        self.group, self.directory = group, directory
        names = ["io.stat"]
        if not group.v2:
            names = ["blkio.throttle.io_service_bytes", "blkio.throttle.io_serviced"]
            # With those of the groups below it, since 5.3.
            if (directory / f"{names[0]}_recursive").exists():
                names = [f"{name}_recursive" for name in names]
        self._files = [KeptFile(directory / name) for name in names]

    def read(self) -> _Pair:
        texts = [file.read_or_none() for file in self._files]
        if self.group.v2:
            return _sum_v2(texts[0], b"wbytes="), _sum_v2(texts[0], b"wios=")
        return _sum_v1(texts[0]), _sum_v1(texts[1])

    def close(self) -> None:
        for file in self._files:
            file.close()


def _sum_v2(text: bytes | None, label: bytes) -> int | None:
    """Of lines like "8:0 rbytes=1 wbytes=2 rios=3 …". Without one: nothing was written."""
    if text is None:
        return None
    try:
        return sum(int(word[len(label) :]) for word in text.split() if word.startswith(label))
    except ValueError:
        return None


def _sum_v1(text: bytes | None) -> int | None:
    """Of lines like "8:0 Write 2". Without one: the kernel has not counted."""
    words = (text or b"").split()
    try:
        found = [int(words[at + 1]) for at, word in enumerate(words) if word == b"Write"]
    except (ValueError, IndexError):
        return None
    return sum(found) if found else None


class _FreezerV2:
    """Frozen, or told to be: what sleeps uninterruptibly holds up the news of it."""

    def __init__(self, group: Group) -> None:
        self._events = KeptFile(group.ways[0] / "cgroup.events")
        self._freeze = [KeptFile(directory / "cgroup.freeze") for directory in group.ways]

    def frozen(self) -> bool | None:
        frozen = number_after(b"\n" + (self._events.read_or_none() or b""), b"\nfrozen ")
        if frozen:
            return True
        told = [file.read_or_none() for file in self._freeze]
        if any(text is not None and text.strip() == b"1" for text in told):
            return True
        # Those above it that are out of reach show in its own events.
        return None if frozen is None or None in told else False

    def close(self) -> None:
        for file in (self._events, *self._freeze):
            file.close()


class _FreezerV1:
    """The state of a group is FREEZING or FROZEN also where it is one above it that is frozen."""

    def __init__(self, group: Group) -> None:
        self._state = KeptFile(group.ways[0] / "freezer.state")

    def frozen(self) -> bool | None:
        state = self._state.read_or_none()
        return None if state is None else state.strip() in (b"FREEZING", b"FROZEN")

    def close(self) -> None:
        self._state.close()
