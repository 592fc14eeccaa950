"""Block devices: what a device is made of, and its counters.

Sources: kernel Documentation/ABI/stable/sysfs-block (partitions, slaves), ABI/testing/sysfs-block-
loop, Documentation/block/stat.rst. sysfs answers from memory, whatever state a disk is in. Needs
no rights. Cost: 30 to 100 µs to describe a device, 15 µs to read its counters.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from qkilld.adapters.evidence.mountinfo import read_bounded, unescaped

SYS: Final = Path("/sys")
_MAX_ATTRIBUTE: Final = 1 << 16

_NUMBER: Final = re.compile(r"\d+:\d+")
_NVME: Final = re.compile(r"nvme(\d+)n(\d+)")


class Block(NamedTuple):
    """One block device as sysfs shows it."""

    number: str
    name: str
    """The kernel's, as it is."""
    below: tuple[str, ...]
    """The devices that it is made of (partition, dm, md, bcache), MAJOR:MINOR."""
    backing: bytes | None
    """The path of the file that it is made of (loop), as the kernel tells it to us."""
    stats: tuple[str, ...]
    """The files that count what it does: the paths' of a multipath NVMe, which older kernels do not
    count for the disk itself."""


class Counters(NamedTuple):
    """Of one block device or the sum of several."""

    reads: int
    writes: int
    sectors_written: int
    in_flight: int


def describe(number: str, sys: Path = SYS) -> Block | None:
    """None where there is no such device, or where what it is made of cannot be read."""
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
    except OSError:
        return None
    backing = read_bounded(f"{path}/loop/backing_file", _MAX_ATTRIBUTE)
    return Block(
        number=number,
        name=name,
        below=tuple(below),
        backing=backing.removesuffix(b"\n").removesuffix(b" (deleted)") if backing else None,
        stats=tuple(stats),
    )


def read_counters(stats: tuple[str, ...]) -> Counters:
    """Of a Block's `stats`. Raises OSError (FileNotFoundError, ENODEV: unplugged), ValueError."""
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
        # Since Linux 4.18 and 5.5: discards, flushes.
        writes += sum(map(int, fields[11:12] + fields[15:16]))
    return Counters(reads, writes, sectors, in_flight)


def of_btrfs(source: bytes, sys: Path = SYS) -> tuple[str, ...] | None:
    """The devices (MAJOR:MINOR) of the btrfs that mountinfo names by one of them. None: not found.

    Files on btrfs have a device number of no device (kernel Documentation/ABI/testing/sysfs-fs-
    btrfs).
    """
    wanted = os.fsdecode(unescaped(source))
    top = f"{sys}/fs/btrfs"
    try:
        every = ((uuid, _list(f"{top}/{uuid}/devices")) for uuid in _list(top))
        found = {uuid: names for uuid, names in every if names}
        for uuid, names in found.items():
            for name in names:
                mapped = read_bounded(f"{top}/{uuid}/devices/{name}/dm/name", _MAX_ATTRIBUTE) or b""
                known = {f"/dev/{name.replace('!', '/')}"}
                known |= {f"/dev/mapper/{os.fsdecode(mapped.strip())}"} if mapped else set()
                if wanted in known or len(found) == 1:
                    return tuple(_number_of(f"{top}/{uuid}/devices/{n}/dev") for n in names)
    except OSError:
        pass
    return None


def _list(path: str) -> list[str]:
    """Sorted; empty where there is no such directory. Raises OSError otherwise."""
    try:
        return sorted(os.listdir(path))  # noqa: PTH208 - half the cost
    except FileNotFoundError:
        return []


def _number_of(path: str) -> str:
    """Raises OSError."""
    text = (read_bounded(path, _MAX_ATTRIBUTE) or b"").decode("ascii", "replace").strip()
    if not _NUMBER.fullmatch(text):
        raise OSError(f"{path} does not tell a device number: {text!r}")
    return text
