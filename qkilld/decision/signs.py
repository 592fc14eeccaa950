"""The signs of a wait: numbers whose change shows progress. Pure.

The numbers count the work of the process, of its control group, or of a disk that a thread waits
for; in server_signs.py, that of connections and servers. waits.py assigns signs to waits;
open_wait.py compares their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Final

from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.sample import FLUSH_CALLS, Device, Io, Sample, Thread

WINDOW: Final = 6 * USEC_PER_SEC
"""The time (µs) over which traffic is counted. Disks write data back in bursts that are up to 5 s
apart."""
RISE: Final = 512
"""See SignKind.FALL."""
TALK: Final = 256
"""QEMU's threads exchange at least this many bytes in a WINDOW only if replies arrive. Without
replies, they exchange 8 to 16 bytes a second."""
CACHE_NOISE: Final = 16 * 1024
"""A page cache that shrinks by fewer bytes than this shows no progress: they may be a page of a
log."""
OWN_IO: Final = 512
"""Fewer bytes than this, read or written by the process itself, show no progress."""

_STORAGE_WCHAN: Final = (
    *("folio", "page", "bio", "blk", "io_sched", "rq_qos", "wbt", "throttle", "balance_dirty"),
    *("jbd2", "ext4", "xfs", "btrfs", "nfs", "rpc", "fuse", "ceph", "cifs", "sync", "writeback"),
    *("inode", "submit", "dm_", "md_", "request", "get_tag", "loop", "nbd", "iomap", "bdev"),
)
"""Parts of names of kernel functions in which a thread waits for storage."""


_WRITES: Final = FLUSH_CALLS.union(
    ("write", "writev", "pwrite64", "pwritev", "pwritev2", "fallocate", "ftruncate", "close")
)
"""Calls that write, and seldom need to read from the storage."""
_NO_DISK_WCHAN: Final = ("request_wait_answer", "fuse", "nfs", "rpc", "ceph", "cifs", "p9_")
"""Parts of names of kernel functions in which a thread waits for a file system without a block
device."""


class SignKind(StrEnum):
    """How to recognise that a sign has moved."""

    COUNT = "count"
    """The sign has moved if its value has grown by `least`."""
    CHANGE = "change"
    """The sign has moved if its value has changed."""
    LOW = "low"
    """The sign has moved if its value is lower by `least` than ever before. A fall to an earlier
    value does not count: new requests may have filled the queue in between."""
    FALL = "fall"
    """Like LOW, but once the value has risen by RISE, only later values are compared."""
    TRAFFIC = "traffic"
    """The sign has moved if its value has grown by `least` within WINDOW."""
    QUIET = "quiet"
    """The sign does not move now, but its value is remembered for later."""


@dataclass(frozen=True, slots=True)
class Sign:
    name: str
    """Unique among the signs of a wait."""
    kind: SignKind
    value: int
    text: str
    """A description of the sign's movement."""
    least: int = 1
    sure: bool = True
    """False if the sign is doubtful: it may also move without progress, because of other processes
    or endless repetitions."""
    is_reply: bool = False
    """Whether the sign moves only if the server has answered a request. QEMU does not repeat an
    answered request over the next connection."""
    switches: int | None = None
    """For a sign that moves only if the process has run (each reply makes it run): the value of
    Sample.switches. If the sign is for the replies to a server: the server's context switches. None
    for other signs. Until the process runs, the sign is compared with the same earlier value, even
    if samples lack the sign in between."""


def sleeps_without_disk(thread: Thread) -> bool:
    """Return whether the thread's wait channel shows that it waits for a file system without a
    block device."""
    wchan = thread.wchan or ""
    return any(part in wchan for part in _NO_DISK_WCHAN)


def only_writes(thread: Thread) -> bool:
    """Return whether the thread is in a call that writes and does not read."""
    return thread.call in _WRITES


def waits_for_storage(thread: Thread) -> bool:
    """Return whether the thread's call, descriptor or wait channel shows that it waits for a file
    or disk."""
    if thread.target in ("pipe", "other"):
        return False
    if thread.io_call or thread.target in ("disk", "mount"):
        return True
    # "sync" must not match functions such as synchronize_rcu and mem_cgroup_oom_synchronize, which
    # do not wait for storage.
    wchan = (thread.wchan or "").replace("synchronize", "")
    return thread.state == "D" and any(part in wchan for part in _STORAGE_WCHAN)


def write_signs(devices: Iterable[Device]) -> list[Sign]:
    """For calls that only write, return two signs of each device: its completed writes, and its
    completed reads.

    Reads are doubtful, because such a call seldom needs reads, and other processes may read
    forever. Writes of a lower layer are doubtful, too, if a device above it may hide a flush and
    has no visible writes in flight.
    """
    listed = list(devices)
    hides = any(device.hides_flush for device in listed)
    signs = []
    for device, sign in zip(listed, disk_signs(listed, writing=True), strict=True):
        text = f"the disk {device.name} completes writes"
        if hides and sign.kind is SignKind.QUIET:
            sign = replace(sign, kind=SignKind.COUNT, sure=False)
        signs.append(replace(sign, name=f"writes:{device.number}", value=device.writes, text=text))
        name, text = f"reads:{device.number}", f"the disk {device.name} completes reads"
        signs.append(replace(sign, name=name, value=device.reads, text=text, sure=False))
    return signs


def disk_signs(devices: Iterable[Device], *, writing: bool = False) -> list[Sign]:
    """Return a sign for each device: its completed requests. The sign is QUIET if the requests do
    not count as the guest's.

    `writing`: the signs are for calls that only write.
    """
    listed = list(devices)
    return [
        Sign(
            name=f"disk:{device.number}",
            kind=SignKind.COUNT if counts(device, listed) else SignKind.QUIET,
            value=device.writes + device.reads,
            text=f"the disk {device.name} completes requests",
            sure=is_passed_on(device, listed, writing),
        )
        for device in listed
    ]


def counts(device: Device, devices: Iterable[Device]) -> bool:
    """Return whether completed requests of the device count as the guest's.

    Requests of a lower layer count only if the guest's own device above it (depth 0) may have
    requests in flight. Otherwise, other users of the lower layer may have made the requests.
    """
    return device.depth == 0 or any(
        top.depth == 0 and _may_work(top) and (not device.above or top.number in device.above)
        for top in devices
    )


def is_passed_on(device: Device, devices: Sequence[Device], writing: bool) -> bool:
    """Return whether each layer above the device may have requests in flight. If a layer has no
    requests, the device may be working for others. With `writing`, only writes count as
    requests."""
    tops = set(device.above)
    working = {
        upper.depth
        for upper in devices
        if _may_work(upper)
        and not (writing and upper.only_reads)
        and (not tops or tops.intersection((upper.number, *upper.above)))
    }
    return working.issuperset(range(device.depth))


def _may_work(device: Device) -> bool:
    """Return whether the device may have requests in flight: it has some, or the kernel does not
    count them. In the latter case, only the layer below shows movement."""
    return device.in_flight > 0 or device.accounting is False


def io_signs(io: Io | None, who: str) -> list[Sign]:
    if io is None:
        return []
    return [
        Sign("written", SignKind.COUNT, io.write_bytes, f"{who} writes", OWN_IO),
        Sign("read", SignKind.COUNT, io.read_bytes, f"{who} reads from disks", OWN_IO),
    ]


def group_signs(sample: Sample) -> list[Sign]:
    """Return the signs of the process's own control group. Signs that do not move prove nothing,
    because writes may be counted elsewhere."""
    group = sample.cgroup
    if group is None or not group.own:
        return []
    signs = []
    if group.written is not None:
        text = "its control group writes to disk"
        signs.append(Sign("group", SignKind.COUNT, group.written, text))
    if group.dirty is not None and group.writeback is not None:
        remaining = group.dirty + group.writeback
        text = "the page cache of its control group falls"
        signs.append(Sign("cache", SignKind.LOW, remaining, text, CACHE_NOISE))
    return signs


def woken_sign(
    name: str, threads: Sequence[Thread], earlier: Sequence[Thread] | None, text: str
) -> Sign:
    """Return a sign that moves if one of the threads that wait for a reply was woken, or waits no
    longer. Only a reply wakes such a thread. A thread that only joins the others shows nothing.

    `earlier`: the threads that waited so in the previous sample; None if unknown.
    """
    now = {(thread.tid, thread.switches or 0) for thread in threads}
    joined = earlier is not None and now.issuperset(
        (thread.tid, thread.switches or 0) for thread in earlier
    )
    kind = SignKind.QUIET if joined else SignKind.CHANGE
    return Sign(name, kind, hash(tuple(sorted(now))), text)
