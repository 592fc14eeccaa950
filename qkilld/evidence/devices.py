"""Read block devices from sysfs: their lower devices and their counters.

Sources: kernel Documentation/ABI/stable/sysfs-block (partitions, slaves), ABI/testing/sysfs-block-
loop, Documentation/block/stat.rst. The kernel answers from memory, whatever state a disk is in.
Needs no rights. Cost: 30 to 100 µs to describe a device, 15 µs to read its counters.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from sys import maxsize
from typing import Final

from qkilld.adapters.procfs import read_bounded, unescape
from qkilld.debug_log import note_once
from qkilld.model.named_tuple import NamedTuple

SYS: Final = Path("/sys")
_MAX_ATTRIBUTE: Final = 1 << 16

_SECTOR: Final = 512
_ATTEMPTS: Final = 8

_NUMBER: Final = re.compile(r"\d+:\d+")
_NVME: Final = re.compile(r"nvme(\d+)n(\d+)")


class Block(NamedTuple):
    number: str
    name: str
    """The kernel's name, unchecked."""
    below: tuple[str, ...]
    """MAJOR:MINOR of each device directly below this device (partition, dm, md, bcache)."""
    backing: bytes | None
    """For a loop device, the path of its backing file, as the kernel shows it; else None."""
    backing_sizes: range
    """The possible sizes of the backing file in bytes, given the size of the device."""
    stats: tuple[str, ...]
    """The files with the device's counters. A multipath NVMe disk has one file for each path,
    because older kernels do not count requests to the disk itself."""


class Counters(NamedTuple):
    """The counters of one block device, or the sum of several."""

    reads: int
    writes: int
    sectors_written: int
    in_flight: int
    only_reads: bool = False
    """As in model.sample.Device; False if not read."""


def _counts_flushes(release: str) -> bool:
    """Return whether the kernel (since 6.16) includes flushes of stacked devices, such as logical
    volumes, in the number of requests in flight."""
    major, _, rest = release.partition(".")
    minor = re.match(r"\d*", rest)
    assert minor is not None
    return (int(major), int(minor[0] or 0)) >= (6, 16)


COUNTS_FLUSHES: Final = _counts_flushes(os.uname().release)


def describe(number: str, sys: Path = SYS) -> Block | None:
    """Describe a device; None if it does not exist or its lower devices cannot be read."""
    if not _NUMBER.fullmatch(number):
        return None
    path = f"{sys}/dev/block/{number}"
    try:
        link = os.readlink(path)  # noqa: PTH115 - half the cost
        slaves = _list(f"{path}/slaves")
        below = [_number_of(f"{path}/slaves/{slave}/dev") for slave in slaves]
        if read_bounded(f"{path}/partition", _MAX_ATTRIBUTE) is not None:
            below.append(_number_of(f"{path}/../dev"))
        name = link.rpartition("/")[2]
        stats = [f"{path}/stat"]
        if "/nvme-subsystem/" in link and (nvme := _NVME.fullmatch(name)):
            part = re.compile(rf"nvme{nvme[1]}c\d+n{nvme[2]}")
            nvme_paths = filter(part.fullmatch, _list(f"{sys}/block"))
            stats = [f"{sys}/block/{nvme_path}/stat" for nvme_path in nvme_paths] or stats
    except OSError as error:
        note_once(f"looking at block device {number}", error)
        return None
    backing = read_bounded(f"{path}/loop/backing_file", _MAX_ATTRIBUTE)
    sizes = _backing_sizes(path) if backing else range(0)
    return Block(
        number=number,
        name=name,
        below=tuple(below),
        backing=backing.removesuffix(b"\n").removesuffix(b" (deleted)") if backing else None,
        backing_sizes=sizes,
        stats=tuple(stats),
    )


def counts_requests(block: Block) -> bool | None:
    """Return whether the kernel counts the requests of a device; None if unknown. Costs 10 µs."""
    directories = [path.removesuffix("stat") for path in block.stats]
    texts = [
        # A partition uses its disk's queue.
        read_bounded(f"{directory}queue/iostats", _MAX_ATTRIBUTE)
        or read_bounded(f"{directory}../queue/iostats", _MAX_ATTRIBUTE)
        for directory in directories
    ]
    values = {(text or b"").strip() for text in texts}
    if b"0" in values:
        return False
    return True if values == {b"1"} else None


def _backing_sizes(path: str) -> range:
    """Return the possible sizes of the backing file. The result is a range, because the loop device
    has only whole sectors of the file, and may be limited to a part of the file."""
    fields = ("size", "loop/offset", "loop/sizelimit")
    try:
        size, offset, limit = (int(read_bounded(f"{path}/{f}", 64) or b"") for f in fields)
    except ValueError as error:
        note_once(f"reading the size of {path}", error)
        return range(0)
    least = offset + size * _SECTOR
    return range(least, maxsize if limit else least + _SECTOR)


def read_counters(stats: tuple[str, ...], *, layered: bool = False) -> Counters:
    """Sum up the counters in the files `stats` (Block.stats). Raises ValueError or OSError;
    FileNotFoundError or ENODEV means that the device was unplugged.

    `layered`: also read Counters.only_reads. This costs 10 to 100 µs if requests are in flight.
    """
    counters = _read_stats(stats)
    if not counters.in_flight or not layered:
        return counters
    return counters._replace(only_reads=_only_reads(stats))


def _only_reads(stats: tuple[str, ...]) -> bool:
    """Return whether reads are in flight, but no writes.

    Requests come and go, so the files are read several times. If neither a read nor a write shows
    up, the request in flight is a flush, which only the file `stat` counts (measured on Linux
    6.18).
    """
    for _ in range(_ATTEMPTS):
        counts = [_in_flight(path) for path in stats]
        if any(writes for _, writes in counts):
            return False
        if any(reads for reads, _ in counts):
            return True
    return False


def _in_flight(stat: str) -> tuple[int, int]:
    """Return the numbers of reads and writes in flight; zeros if unreadable. Raises ValueError."""
    text = read_bounded(f"{stat.removesuffix('stat')}inflight", _MAX_ATTRIBUTE)
    reads, _, writes = (text or b"").strip().partition(b" ")
    return int(reads or 0), int(writes or 0)


def _read_stats(stats: tuple[str, ...]) -> Counters:
    """Raises OSError, ValueError."""
    reads = writes = sectors = in_flight = 0
    for path in stats:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fields = os.read(fd, 4096).split()
        finally:
            os.close(fd)
        if len(fields) < 11:
            raise ValueError(f"{path} does not look like a block device's counters: {fields}")
        reads += int(fields[0])
        writes += int(fields[4])
        sectors += int(fields[6])
        in_flight += int(fields[8])
        # Discards (since Linux 4.18) and flushes (since 5.5) count as writes.
        writes += sum(map(int, fields[11:12] + fields[15:16]))
    return Counters(reads, writes, sectors, in_flight)


def of_btrfs(source: bytes, sys: Path = SYS) -> tuple[str, ...] | None:
    """Return all devices (MAJOR:MINOR) of the btrfs that contains the device `source` (a path from
    mountinfo). If the host has only one btrfs, return its devices. None if not found.

    This reads sysfs, because st_dev of files on btrfs is not the number of a device (kernel
    Documentation/ABI/testing/sysfs-fs-btrfs).
    """
    device = os.fsdecode(unescape(source))
    top = f"{sys}/fs/btrfs"
    try:
        every = ((uuid, _list(f"{top}/{uuid}/devices")) for uuid in _list(top))
        members = {uuid: names for uuid, names in every if names}
        for uuid, names in members.items():
            for name in names:
                mapped = read_bounded(f"{top}/{uuid}/devices/{name}/dm/name", _MAX_ATTRIBUTE) or b""
                paths = {f"/dev/{name.replace('!', '/')}"}
                paths |= {f"/dev/mapper/{os.fsdecode(mapped.strip())}"} if mapped else set()
                if device in paths or len(members) == 1:
                    return tuple(_number_of(f"{top}/{uuid}/devices/{n}/dev") for n in names)
    except OSError as error:
        note_once("looking for the devices of a btrfs", error)
    return None


def _list(path: str) -> list[str]:
    """List a directory, sorted; empty if it does not exist. Raises OSError otherwise."""
    try:
        return sorted(os.listdir(path))  # noqa: PTH208 - half the cost
    except FileNotFoundError:
        return []


def _number_of(path: str) -> str:
    """Raises OSError."""
    text = (read_bounded(path, _MAX_ATTRIBUTE) or b"").decode("ascii", "replace").strip()
    if not _NUMBER.fullmatch(text):
        raise OSError(f"{path} does not contain a device number: {text!r}")
    return text
