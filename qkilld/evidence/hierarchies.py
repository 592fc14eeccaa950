"""Find the directories of a process's control groups, from /proc/PID/cgroup and the mounts.

Source: cgroups(7), proc_pid_mountinfo(5). A process is in one group of each hierarchy. A host has
the one hierarchy of v2, several hierarchies of v1, or both.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qkilld.adapters import procfs
from qkilld.debug_log import note_once
from qkilld.evidence.kept_file import read_once
from qkilld.model.named_tuple import NamedTuple

_RELOAD_S: Final = 60.0
CROWDED_S: Final = 1.0
"""A group with too many processes is listed again only after this time. It may contain thousands
of guests, and would be listed for each of them."""
_MAX_CROWDED: Final = 256
_MAX_MOUNTINFO: Final = 4 << 20
_MAX_DEPTH: Final = 32
_MAX_GROUPS: Final = 64
_MAX_PROCESSES: Final = 64
_MAX_BYTES: Final = 8 * (_MAX_PROCESSES + 1)
"""How many bytes of cgroup.procs to read: enough for more than _MAX_PROCESSES ids of up to seven
digits. Longer files are not read to the end, because a group may have thousands of guests, and the
file is read for each of them."""
_MACHINE: Final = re.compile(r"/machine\.slice/(?:[^/]+\.slice/)*machine-[^/]+\.scope(?:/|$)")
"""The scope of a machine of systemd-machined. All processes in it count as the guest's: libvirt
also puts QEMU's helpers there."""


class Group(NamedTuple):
    v2: bool
    path: str
    """The path within its hierarchy, as in /proc/PID/cgroup."""
    ways: tuple[str, ...]
    """The directories of the group and of its ancestors, the nearest first, as far as the mounts of
    this system show them. The root group is included only if the process itself is in it. () if no
    mount shows the group."""

    @property
    def is_root(self) -> bool:
        return self.path == "/"


class Hierarchies:
    """The mounted cgroup file systems, read again once a minute."""

    def __init__(
        self,
        proc: Path = Path("/proc"),
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`root` is prepended to mount points."""
        self._proc = proc
        self._mountinfo = proc / "self/mountinfo"
        self._root = root
        self._clock = clock
        self._reload_at = 0.0
        self._mounts: list[tuple[frozenset[str], str, str]] = []
        self._crowded: dict[str, float] = {}
        """The time at which each group with too many processes may be listed again, keyed by the
        group's directory."""

    def groups(self, membership: bytes) -> dict[str, Group]:
        """Return groups by controller ("memory", "blkio", "name=systemd"); the key of v2 is "".

        `membership` is the text of /proc/PID/cgroup.
        """
        if self._clock() >= self._reload_at:
            self._reload_at = self._clock() + _RELOAD_S
            self._mounts = self._load()
        by_controller: dict[str, Group] = {}
        # Do not use splitlines(): a path may contain any line separator except a line feed.
        for line in os.fsdecode(membership).split("\n"):
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if not path.startswith("/"):
                continue
            names = frozenset(controllers.split(","))
            group = Group("" in names, path, self._ways(names, path))
            by_controller.update(dict.fromkeys(names, group))
        return by_controller

    def is_alone(self, group: Group, directory: str, pid: int) -> bool:
        """Return whether the group in `directory` (one of group.ways) contains only this process
        and its descendants, or is in the scope of a machine (_MACHINE). Return False if there are
        too many groups or processes. Costs 10 µs for each group and each process."""
        if group.is_root:
            return False
        if _MACHINE.search(directory.removeprefix(group.ways[-1].rpartition("/")[0])):
            return True
        if self._clock() < self._crowded.get(directory, 0.0):
            return False
        if (members := _members(directory)) is None:
            if len(self._crowded) >= _MAX_CROWDED:
                self._crowded.clear()
            self._crowded[directory] = self._clock() + CROWDED_S
            return False
        return pid in members and all(_descends(member, pid, self._proc) for member in members)

    def _ways(self, names: frozenset[str], path: str) -> tuple[str, ...]:
        for controllers, mounted, point in self._mounts:
            if controllers.isdisjoint(names):
                continue
            # In a container, the mount may show only a part of the hierarchy. A path that leads out
            # of this part ("/../..") names a group that is not visible.
            parts = [part for part in os.path.relpath(path, mounted).split("/") if part != "."]
            if ".." in parts or len(parts) > _MAX_DEPTH:
                continue
            if not parts:
                return (point,)
            return tuple("/".join((point, *parts[:depth])) for depth in range(len(parts), 0, -1))
        return ()

    def _load(self) -> list[tuple[frozenset[str], str, str]]:
        """Return the controllers, the mounted group and the directory of each cgroup mount."""
        mounts = []
        try:
            with self._mountinfo.open("rb") as file:
                lines = file.read(_MAX_MOUNTINFO).split(b"\n")
        except OSError as error:
            note_once("looking for cgroup mounts", error)
            return []
        for line in lines:
            mount = procfs.parse_mount(line, "self") if b" - cgroup" in line else None
            if mount is None or mount.kind not in ("cgroup", "cgroup2"):
                continue
            # The mount options name the controllers for v1, but not for v2.
            names = [""] if mount.kind == "cgroup2" else os.fsdecode(mount.options).split(",")
            mounted, point = (
                os.fsdecode(procfs.unescape(text)) for text in (mount.root, mount.point)
            )
            mounts.append((frozenset(names), mounted, str(self._root / point.lstrip("/"))))
        return mounts


@functools.lru_cache(maxsize=4)
def hierarchies_of(proc: Path) -> Hierarchies:
    """Return the hierarchies of this /proc, shared by all readers."""
    return Hierarchies(proc)


def _members(directory: str) -> set[int] | None:
    """Return the processes in a group and in the groups below it; None if there are too many groups
    or processes, or if the group is unreadable."""
    members: set[int] = set()
    for count, (path, _, files) in enumerate(os.walk(directory)):
        if count >= _MAX_GROUPS or "cgroup.procs" not in files:
            return None
        try:
            listed = read_once(Path(path, "cgroup.procs"), most=_MAX_BYTES)
            if len(listed) == _MAX_BYTES:
                return None
            members.update(map(int, listed.split()))
        except (OSError, ValueError):
            # cgroup.procs of a threaded v2 group cannot be read. Ignore the group, because the
            # group above it lists its processes, too.
            if path == directory:
                return None
        if len(members) > _MAX_PROCESSES:
            return None
    return members


def _descends(pid: int, ancestor: int, proc: Path) -> bool:
    for _ in range(_MAX_DEPTH):
        if pid == ancestor:
            return True
        if pid <= 1:
            return False
        try:
            pid = procfs.parse_stat(read_once(proc / str(pid) / "stat")).parent
        except OSError as error:
            note_once("listing the processes of a control group", error)
            return False
    return False
