"""Where the control groups of a process are: from /proc/PID/cgroup and the mounts to directories.

Source: cgroups(7), proc_pid_mountinfo(5). A process is in one group of each hierarchy: of v2, or of
several of v1, or of both kinds.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from qkilld.adapters.evidence.keptfile import read_once

_RELOAD_S: Final = 60.0
_MAX_MOUNTINFO: Final = 4 << 20
_MAX_DEPTH: Final = 32
_MAX_GROUPS: Final = 64
_MAX_PROCESSES: Final = 64
_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")
_MACHINE: Final = re.compile(r"/machine\.slice/(?:[^/]+\.slice/)*machine-[^/]+\.scope(?:/|$)")
"""systemd-machined gives every machine a scope of its own, and libvirt puts helpers of QEMU in."""


class Group(NamedTuple):
    v2: bool
    path: str
    """Inside of its hierarchy, as /proc/PID/cgroup has it."""
    ways: tuple[Path, ...]
    """Its directory and those above it, the nearest first, as far as they can be reached. Without
    the root group, but for a process that is in that. () where it is mounted nowhere here."""

    @property
    def is_root(self) -> bool:
        return self.path == "/"


class Hierarchies:
    """The cgroup file systems mounted here, looked up once a minute."""

    def __init__(
        self,
        proc: Path = Path("/proc"),
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`root`: the directory that the mount points are taken to be below."""
        self._mountinfo = proc / "self/mountinfo"
        self._root = root
        self._clock = clock
        self._reload_at = 0.0
        self._mounts: list[tuple[frozenset[str], str, Path]] = []

    def groups(self, membership: bytes) -> dict[str, Group]:
        """By controller ("memory", "blkio", "name=systemd"); "" for that of v2.

        `membership`: the text of /proc/PID/cgroup.
        """
        if self._clock() >= self._reload_at:
            self._reload_at = self._clock() + _RELOAD_S
            self._mounts = self._load()
        found: dict[str, Group] = {}
        for line in os.fsdecode(membership).splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if not path.startswith("/"):
                continue
            names = frozenset(controllers.split(","))
            group = Group("" in names, path, self._ways(names, path))
            found.update(dict.fromkeys(names, group))
        return found

    def _ways(self, names: frozenset[str], path: str) -> tuple[Path, ...]:
        for controllers, mounted, point in self._mounts:
            if controllers.isdisjoint(names):
                continue
            # In a container the mount may show only a part of the hierarchy, and the path may lead
            # out of what we see ("/../..").
            parts = [part for part in os.path.relpath(path, mounted).split("/") if part != "."]
            if ".." in parts or len(parts) > _MAX_DEPTH:
                continue
            if not parts:
                return (point,)
            return tuple(point.joinpath(*parts[:depth]) for depth in range(len(parts), 0, -1))
        return ()

    def _load(self) -> list[tuple[frozenset[str], str, Path]]:
        """(controllers, the group that is mounted, where) of each cgroup mount."""
        found = []
        try:
            with self._mountinfo.open("rb") as file:
                lines = file.read(_MAX_MOUNTINFO).splitlines()
        except OSError:
            return []
        for line in lines:
            before, _, after = line.partition(b" - ")
            fields, kind = before.split(b" "), after.split(b" ")
            if kind[0] not in (b"cgroup", b"cgroup2") or len(fields) < 5 or len(kind) < 3:
                continue
            # The options of v2 are no controllers.
            names = [""] if kind[0] == b"cgroup2" else os.fsdecode(kind[2]).split(",")
            point = self._root / _unescaped(fields[4]).lstrip("/")
            found.append((frozenset(names), _unescaped(fields[3]), point))
        return found


@functools.lru_cache(maxsize=4)
def hierarchies_of(proc: Path) -> Hierarchies:
    """One for all that look at this /proc."""
    return Hierarchies(proc)


def is_alone(group: Group, directory: Path, pid: int, proc: Path) -> bool:
    """Whether nothing but this process and its descendants is in `directory`, one of group.ways.

    Costs 10 µs a group and 10 µs a process. With more groups or processes than any guest has, no.
    """
    if group.is_root:
        return False
    if _MACHINE.search(f"/{directory.relative_to(group.ways[-1].parent)}"):
        return True
    members: set[int] = set()
    for seen, (path, _, files) in enumerate(os.walk(directory)):
        if seen >= _MAX_GROUPS:
            return False
        if "cgroup.procs" not in files:
            return False
        try:
            members.update(map(int, read_once(Path(path, "cgroup.procs")).split()))
        except (OSError, ValueError):
            # A threaded group of v2: its processes are told by the one above it.
            if Path(path) == directory:
                return False
        if len(members) > _MAX_PROCESSES:
            return False
    return pid in members and all(_descends(member, pid, proc) for member in members)


def _descends(pid: int, ancestor: int, proc: Path) -> bool:
    for _ in range(_MAX_DEPTH):
        if pid == ancestor:
            return True
        if pid <= 1:
            return False
        try:
            pid = int(read_once(proc / str(pid) / "stat").rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
    return False


def _unescaped(text: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), text))
