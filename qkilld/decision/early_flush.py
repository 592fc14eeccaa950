"""Plan which disks to flush before QEMU asks a file system that may hang. Pure.

When QEMU (7.2 to 11.1) gets query-block or query-named-block-nodes, its main thread asks the file
system of each image for the image's size. If a file system does not answer, the main thread and the
monitor hang, and no disk can be flushed any more. In a measurement with a hanging image on FUSE, a
local disk lost 201 of 300 records. Only a file system without a block device, such as NFS or FUSE,
can hang like this. So if an image may lie on such a file system, disks that lie elsewhere are
flushed first. The names of these disks come from query-blockstats, which asks no file system.

The command line and the open files of the process show which disks lie on a file system without a
block device. Both may be wrong, so they decide only which disks are flushed, and in which order.
Only QEMU's replies decide which disks count as flushed.
"""

from __future__ import annotations

from typing import Final

from qkilld.decision.flush_plan import (
    INACTIVE,
    list_titles,
    sorted_by_risk,
    standing_waits,
    stuck_disks,
)
from qkilld.decision.open_wait import OpenWait
from qkilld.decision.verdict import Assessment
from qkilld.model.block_state import BlockState, GuestDisk
from qkilld.model.dataclass import dataclass
from qkilld.model.sample import ImagePlace, Sample

_CALL: Final = "call:storage:"
"""This prefix, followed by the numbers of the disks and mounts, is the key of a wait in a call to
storage."""


@dataclass(frozen=True, slots=True)
class EarlyFlush:
    healthy: tuple[GuestDisk, ...]
    """The disks to flush first: local disks that certainly lie on block devices."""
    others: tuple[GuestDisk, ...]
    """The disks to flush after the healthy ones, because their flush may hang."""
    hang_reason: str
    """Why query-block would hang; "" if nothing indicates that it would."""


def may_hang(sample: Sample) -> bool:
    """Return whether an image may lie on a file system without a block device."""
    return sample.mounts is None or bool(sample.mounts)


def needs_second_reading(state: BlockState, evidence: Assessment) -> bool:
    """Return whether requests are in flight. Only another reading, OLD µs later, can show whether
    they are stuck."""
    return any(queue.in_flight for queue in state.queues or ()) or bool(_mount_calls(evidence))


def plan_early_flush(
    first: BlockState, second: BlockState | None, evidence: Assessment
) -> EarlyFlush:
    """Plan the flush. `first` and `second` contain only statistics. `second` was read OLD µs after
    `first`; it is None if no request was in flight. `evidence` is from samples at the same
    times."""
    state, images = second or first, evidence.last.images
    stuck = stuck_disks(first, second)
    usable = [disk for disk in state.disks if disk not in stuck]
    if state.runstate in INACTIVE:
        usable = []
    local = [disk for disk in usable if not disk.network]
    doubtful = [disk for disk in local if _lies(disk, images, on_mount=True)]
    all_placed = images is not None and all(
        any(_is_of(disk, image) for disk in state.disks) for image in images if image.mount
    )
    healthy = [
        disk
        for disk in local
        if disk not in doubtful and (all_placed or _lies(disk, images, on_mount=False))
    ]
    others = [disk for disk in local if disk not in doubtful and disk not in healthy]
    hang_reason = _hung_call(evidence) if second else ""
    unanswered = [
        disk for disk in stuck if not disk.network and not _lies(disk, images, on_mount=False)
    ]
    if not hang_reason and unanswered:
        hang_reason = f"requests of {list_titles(unanswered)} have not been answered for 1 s"
    if hang_reason:
        # query-block would hang, so this is the only flush: include the disks on a network.
        others += [disk for disk in usable if disk.network]
    if unanswered:
        # Also try the stuck disks that lie on block devices: some may be healthy, but share a
        # controller's queues with disks that do not answer.
        others += [disk for disk in stuck if _lies(disk, images, on_mount=False)]
    return EarlyFlush(sorted_by_risk(healthy), tuple(others), hang_reason)


def _lies(disk: GuestDisk, images: tuple[ImagePlace, ...] | None, *, on_mount: bool) -> bool:
    """Return whether an image of the disk is known to lie on a file system without a block device
    (`on_mount`) or on a block device (not `on_mount`)."""
    return any(bool(image.mount) == on_mount and _is_of(disk, image) for image in images or ())


def _is_of(disk: GuestDisk, image: ImagePlace) -> bool:
    return not set(image.names).isdisjoint(disk.names)


def _hung_call(evidence: Assessment) -> str:
    """Describe a stuck call to a file system without a block device; "" if there is none."""
    calls = _mount_calls(evidence)
    hung = [wait for wait in standing_waits(evidence) if wait in calls]
    return f"a request may be stuck: {hung[0].text}" if hung else ""


def _mount_calls(evidence: Assessment) -> list[OpenWait]:
    """Return the waits for calls to file systems without a block device."""
    mounts = {mount.number for mount in evidence.seen.mounts or ()}
    calls = [wait for wait in evidence.waits if wait.key.startswith(_CALL)]
    return [
        wait for wait in calls if not mounts.isdisjoint(wait.key.removeprefix(_CALL).split(","))
    ]


CACHE_UNSAFE_UNKNOWN: Final = (
    "an image lies on a file system that may not answer, so QEMU was not asked for disks that are"
    " never flushed (cache=unsafe)"
)
"""A note in the reply to Plan."""
