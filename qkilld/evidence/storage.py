"""Find the storage under a process's images: from open files to disks and network mounts.

    descriptors (files) → mounts (mountinfo) → block devices (devices) and network mounts (mounts)

An image may lie on a partition, a logical volume, a loop device, or a file system in a file on
another file system. All layers are returned, with their depth, because each layer shows something
different. An upper layer has fewer users than a lower one: a logical volume may be used by one
guest, and the disk below it by all. A lower layer may be active while the counters of an upper
layer do not change: a loop device does not count a flush, but its disk does.

Costs were measured on two cores of a 2020s Xeon; see each method.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Container, Set
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import Filesystem, Mounts, unescape
from qkilld.debug_log import note_once
from qkilld.evidence import devices, files, mounts
from qkilld.evidence.backing import NAMESPACES, Backing, BackingFinder
from qkilld.evidence.files import Descriptors
from qkilld.model.dataclass import dataclass
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.sample import Device, Mount
from qkilld.model.text import printable

PROC: Final = Path("/proc")
SYS: Final = Path("/sys")
MAX_DEVICES: Final = 256
"""If more devices than this are under a process's images, its storage counts as unknown."""
MAX_DEPTH: Final = 16
_NONE: Final[Set[int]] = frozenset()
_STANDARD_ERROR: Final = 2
"""A file with this descriptor or a lower one may be a log."""

# File systems without storage, or without storage that a guest waits for.
# fmt: off
_NO_STORAGE: Final = frozenset({
    "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts",
    "devtmpfs", "efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs",
    "resctrl", "rpc_pipefs", "securityfs", "selinuxfs", "sysfs", "tmpfs", "tracefs",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class _Disk:
    block: devices.Block
    depth: int
    own: bool
    writable: bool
    above: tuple[str, ...] = ()
    """MAJOR:MINOR of the devices with depth 0 that lie on this device, as in
    model.sample.Device."""
    accounting: bool | None = None
    """As in model.sample.Device."""


class FilePlace(NamedTuple):
    """The storage under an open file."""

    disks: tuple[str, ...]
    """MAJOR:MINOR of each block device, in every layer."""
    mount: str
    """MAJOR:MINOR of the file system, if it has no block device; else ""."""


class StorageTable:
    """The counters of disks and mounts in one round of samples, each read once.

    Many guests share few disks, so pass one table to all readers, in any thread.
    """

    def __init__(self, proc: Path = PROC, sys: Path = SYS) -> None:
        self.mounts = mounts.MountStatistics(proc)
        self._counters: dict[tuple[str, ...], devices.Counters | None] = {}

    def counters(self, block: devices.Block) -> devices.Counters | None:
        """Return the counters; None if the device is gone. Raises OSError, ValueError."""
        if block.stats not in self._counters:
            try:
                layered = bool(block.below or block.backing)
                counters = devices.read_counters(block.stats, layered=layered)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
                    raise
                counters = None
            self._counters[block.stats] = counters
        return self._counters[block.stats]


class StorageReader:
    """Reads the storage under one process's images. Not thread-safe. Keeps no descriptors open.

    A device is kept when its image disappears from /proc/PID/fd, because close(2) may still wait
    for the storage after that.
    """

    __slots__ = (
        "_disks", "_filesystems", "_finder", "_images", "_known", "_outputs", "_pid", "_places",
        "_proc", "_sys", "names",
    )  # fmt: skip

    def __init__(self, pid: int, proc: Path = PROC, sys: Path = SYS) -> None:
        self._pid, self._proc, self._sys = pid, proc, sys
        self._disks: dict[str, _Disk] = {}
        self._filesystems: dict[Filesystem, None] = {}
        self._places: dict[int, FilePlace] = {}
        self._images: dict[int, files.Image] = {}
        self._outputs: Set[int] = _NONE
        """The descriptors of files that are not images but for which threads have waited, for
        example a dump of the guest's memory."""
        self.names: Container[str] | None = None
        """The file names of the images, according to the command line; None if unknown."""
        self._known = False
        self._finder = BackingFinder(proc)

    def refresh(
        self,
        descriptors: Descriptors | None = None,
        waited_for: int | None = None,
        *,
        synced: bool = False,
    ) -> None:
        """List the open files again. Never raises. May wait briefly (backing.TIMEOUT_S).

        `waited_for`: the descriptor of a file for which a thread waits, even if the file is not an
        image. A standard stream counts as a log, unless the thread waits for a flush (`synced`):
        programs do not flush logs to disk, but dd may flush its output, descriptor 1.
        `descriptors`: the result of files.read_descriptors, if the caller has just called it. Costs
        0.2 ms for a small QEMU, 3 ms for one with 100 descriptors and 16 block devices.
        """
        if descriptors is None:
            descriptors = files.read_descriptors(self._pid, self._proc)
        if descriptors is None or not descriptors.count:
            # The process is exiting. Keep the list, because the process may still wait for these
            # files.
            return
        if descriptors.too_many:
            self._known = False
            return
        if waited_for is not None and (synced or waited_for > _STANDARD_ERROR):
            self._outputs |= {waited_for}
        images = files.read_images(self._pid, descriptors, self._proc, self._outputs)
        if images is None:
            return
        stack = _Stack(self._pid, self._proc, self._sys, self._finder)
        stacks = {image: stack.add(image) for image in set(images.values())}
        self._places |= {number: stacks[image] for number, image in images.items()}
        self._images = images
        self._keep(stack.placed_disks())
        self._filesystems |= stack.filesystems
        self._known = True

    def place_of(self, descriptor: int) -> FilePlace | None:
        """Return the storage of the file that has this descriptor, or had it last; None if
        unknown."""
        return self._places.get(descriptor)

    @property
    def writable(self) -> list[str] | None:
        """Return the paths of images open for writing; None before a successful refresh()."""
        if not self._known:
            return None
        return [image.path for number, image in self._images.items() if self._may_write(number)]

    @property
    def writable_mounts(self) -> dict[str, str] | None:
        """Return FilePlace.mount of each image open for writing, keyed by its path; None before a
        successful refresh()."""
        if not self._known:
            return None
        return {path: place.mount for path, place in self.writable_places.items()}

    @property
    def writable_places(self) -> dict[str, FilePlace]:
        """Return the storage of each image open for writing, keyed by its path."""
        return {
            image.path: self._places[number]
            for number, image in self._images.items()
            if self._may_write(number)
        }

    def _may_write(self, number: int) -> bool:
        """Return whether the file is open for writing and is not a log. An inherited standard
        stream is a log if the command line is known and no image in it has the stream's file name.
        Other files are never logs, because the command line may name them by a symbolic link."""
        image = self._images[number]
        if number > _STANDARD_ERROR or self.names is None or not image.inherited:
            return image.writable
        name = os.path.basename(image.path.removesuffix(" (deleted)"))  # noqa: PTH119
        return image.writable and name in self.names

    def read(
        self, table: StorageTable | None = None
    ) -> tuple[tuple[Device, ...] | None, tuple[Mount, ...] | None]:
        """Read the counters. Return (None, None) before a successful refresh(), or if there are too
        many devices. The order does not change; new devices come last.

        Costs 15 to 25 µs for each device (2 µs if `table` has its counters already), in addition to
        the cost of mounts.py.
        """
        table = table or StorageTable(self._proc, self._sys)
        if not self._known or len(self._disks) + len(self._filesystems) > MAX_DEVICES:
            if self._known:
                note_once("reading storage", f"there are more than {MAX_DEVICES} devices")
            return None, None
        try:
            devices_read = tuple(
                Device(
                    number=disk.block.number,
                    name=printable(disk.block.name),
                    writes=counters.writes,
                    sectors_written=counters.sectors_written,
                    reads=counters.reads,
                    in_flight=counters.in_flight,
                    depth=disk.depth,
                    own=disk.own,
                    writable=disk.writable,
                    above=disk.above,
                    accounting=_accounting(disk, counters),
                    only_reads=counters.only_reads,
                    hides_flush=disk.block.backing is not None and not devices.COUNTS_FLUSHES,
                )
                for disk in self._disks.values()
                if (counters := table.counters(disk.block)) is not None
            )
        except (OSError, ValueError) as error:
            note_once("reading the counters of disks", error)
            devices_read = None
        return devices_read, tuple(table.mounts.of(filesystem) for filesystem in self._filesystems)

    def _keep(self, disks: dict[str, _Disk]) -> None:
        """Add these devices. Keep devices that are no longer in use, unless they were unplugged.
        For each new device, read whether the kernel counts its requests.

        A device that was writable stays writable: an exiting QEMU opens its images again for
        reading, but still flushes them after that.
        """
        for number, disk in list(self._disks.items()):
            if number in disks:
                writable = disk.writable or disks[number].writable
                disks[number] = dataclasses.replace(
                    disks[number], writable=writable, accounting=disk.accounting
                )
            elif devices.describe(number, self._sys) is None:
                del self._disks[number]
        for number in disks.keys() - self._disks.keys():
            accounting = devices.counts_requests(disks[number].block)
            disks[number] = dataclasses.replace(disks[number], accounting=accounting)
        self._disks |= disks

    def close(self) -> None:
        self._disks, self._filesystems, self._known = {}, {}, False
        self._places, self._images = {}, {}


def _accounting(disk: _Disk, counters: devices.Counters) -> bool | None:
    # Some drivers count no requests at all, not even the reads when the image was opened.
    if not (counters.reads or counters.writes or counters.in_flight):
        return False
    return disk.accounting


class _Stack:
    """Finds the layers of storage from images down to disks. Created for each refresh."""

    def __init__(self, pid: int, proc: Path, sys: Path, finder: BackingFinder) -> None:
        self._proc, self._sys = proc, sys
        self._pid, self._finder = pid, finder
        self._mounts: dict[str, Mounts] = {}
        self._blocks: dict[str, devices.Block | None] = {}
        self._edges: dict[str, set[str]] = {}
        self._trail = [""]
        self._overlays: set[str] = set()
        """MAJOR:MINOR of the overlays that are being walked."""
        self._mount = ""
        self.disks: dict[str, _Disk] = {}
        self.filesystems: dict[Filesystem, None] = {}

    def add(self, image: files.Image) -> FilePlace:
        """Add an image's disks and file systems, and return its storage."""
        self._edges[""], self._mount = set(), ""
        if image.device:
            self._device(image.device, 0, image.writable, own=True)
        elif image.filesystem is None:
            self._unseen("unknown")
        else:
            self._filesystem(image.filesystem, 0, image.writable)
        return FilePlace(self._with_lower(self._edges[""]), self._mount)

    def placed_disks(self) -> dict[str, _Disk]:
        """Return the disks of all images added so far, with `above` set."""
        above: dict[str, list[str]] = {}
        for top in sorted(number for number, disk in self.disks.items() if disk.depth == 0):
            for number in self._with_lower({top}):
                above.setdefault(number, []).append(top)
        return {
            number: dataclasses.replace(disk, above=tuple(above.get(number, ())))
            if disk.depth
            else disk
            for number, disk in self.disks.items()
        }

    def _with_lower(self, numbers: set[str]) -> tuple[str, ...]:
        """Return these devices and all devices below them."""
        below, disks = list(numbers), dict.fromkeys(sorted(numbers))
        while below:
            new = self._edges.get(below.pop(), set()) - disks.keys()
            disks.update(dict.fromkeys(sorted(new)))
            below += new
        return tuple(disks)

    def _filesystem(self, filesystem: Filesystem, depth: int, writable: bool) -> None:
        kind = filesystem.kind
        if kind in _NO_STORAGE:
            return
        if not filesystem.number.startswith("0:"):
            self._device(filesystem.number, depth, writable)
        elif kind == "btrfs" and (numbers := devices.of_btrfs(filesystem.source, self._sys)):
            for number in numbers:
                self._device(number, depth, writable)
        elif kind == "overlay" and writable and filesystem.number not in self._overlays:
            # A file that is open for writing lies in the upper directory, because the kernel has
            # copied it there. The overlay itself is not returned as a layer, because it has no
            # counters.
            upper = _option(filesystem, b"upperdir") or b""
            self._overlays.add(filesystem.number)
            self._path(Backing(upper, None), kind, depth, writable)
            self._overlays.discard(filesystem.number)
        elif kind in mounts.KINDS:
            # Prefer the same file system in our own mounts, because those stay readable after the
            # process has exited.
            own = self._table("self").every()
            same = (f for f in own if (f.number, f.kind) == (filesystem.number, kind))
            self.filesystems[next(same, filesystem)] = None
            self._mount = filesystem.number
        else:
            self._unseen(kind, filesystem.number)

    def _path(self, backing: Backing, kind: str, depth: int, writable: bool) -> None:
        """Add the storage under a path whose mount namespace the kernel does not report."""
        path = None
        if depth <= MAX_DEPTH:
            tables = {pid: self._table(pid) for pid in NAMESPACES}
            path = self._finder.find(backing, tables)
        if path is None:
            self._unseen(kind)
        elif path.device:
            self._device(path.device, depth, writable)
        elif path.filesystem is not None:
            self._filesystem(path.filesystem, depth, writable)

    def _device(self, number: str, depth: int, writable: bool, *, own: bool = False) -> None:
        self._edges.setdefault(self._trail[-1], set()).add(number)
        if number not in self._blocks:
            self._blocks[number] = devices.describe(number, self._sys)
        block = self._blocks[number]
        if block is None:
            self._unseen("block device")
            return
        before = self.disks.get(number)
        disk = _Disk(block, depth, own, writable)
        if before is not None:
            disk = _Disk(
                block,
                min(depth, before.depth),
                own or before.own,
                writable or before.writable,
            )
        # `disk == before` also ends cycles, because a second visit changes nothing.
        if disk == before or depth > MAX_DEPTH or len(self.disks) > MAX_DEVICES:
            return
        self.disks[number] = disk
        self._trail.append(number)
        for lower in block.below:
            self._device(lower, depth + 1, writable)
        if block.backing is not None:
            backing = Backing(block.backing, block.backing_sizes)
            self._path(backing, "loop", depth + 1, writable)
        self._trail.pop()

    def _unseen(self, kind: str, number: str = "0:0") -> None:
        """Add storage without readable counters."""
        self._mount = self._mount or number
        nowhere = Filesystem(
            pid="",
            id=0,
            parent=0,
            number=number,
            root=b"",
            point=b"",
            kind=kind,
            source=b"",
            options=b"",
        )
        self.filesystems[nowhere] = None

    def _table(self, pid: str) -> Mounts:
        if pid not in self._mounts:
            self._mounts[pid] = Mounts(pid, self._proc)
        return self._mounts[pid]


def _option(filesystem: Filesystem, name: bytes) -> bytes | None:
    for option in filesystem.options.split(b","):
        key, equals, value = option.partition(b"=")
        if key == name and equals:
            return unescape(value)
    return None
