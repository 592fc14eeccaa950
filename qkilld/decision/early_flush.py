"""Plan the flush of healthy disks that comes before any question to the file systems. Pure.

QEMU's main thread asks the file systems of all images for their sizes when a monitor asks for its
disks (query-block and query-named-block-nodes, 7.2 to 11.1). If one of them does not answer, the
thread hangs, and with it the monitor, so that no disk can be flushed any more: 201 of 300
records of a local disk were lost beside an image on FUSE (measured). Only a file system without a
block device can do that: NFS, FUSE. If there is one, the disks that do not lie on it are flushed
first, by their names, which query-blockstats tells without asking a file system.

Which disk lies on it is known from outside: the command line names the images, and the process has
them open. This decides only in which order the disks are flushed, never whether one was flushed.
"""

from __future__ import annotations

from typing import Final

from qkilld.decision.last_rungs import (
    INACTIVE,
    list_titles,
    sorted_by_risk,
    standing_waits,
    stuck_disks,
)
from qkilld.decision.verdict import Assessment, OpenWait
from qkilld.model.block_state import BlockState, GuestDisk
from qkilld.model.dataclass import dataclass
from qkilld.model.sample import ImagePlace, Sample

_CALL: Final = "call:storage:"
"""How the key of a wait for the storage of a file begins; its numbers follow (decision.waits)."""


@dataclass(frozen=True, slots=True)
class EarlyFlush:
    healthy: tuple[GuestDisk, ...]
    """The local disks that certainly do not lie on such a file system."""
    others: tuple[GuestDisk, ...]
    """The disks to flush after these, because it is not known where they lie."""
    hung: str
    """What shows that such a file system does not answer; "" if nothing does. It must not be asked
    then."""


def may_hang(sample: Sample) -> bool:
    """Return whether an image may lie on a file system without a block device."""
    return sample.mounts is None or bool(sample.mounts)


def needs_second_look(state: BlockState, evidence: Assessment) -> bool:
    """Return whether requests are in flight; a second look after OLD shows if they are stuck."""
    return any(queue.in_flight for queue in state.queues or ()) or bool(_mount_calls(evidence))


def plan_early_flush(
    first: BlockState, second: BlockState | None, evidence: Assessment
) -> EarlyFlush:
    """Plan the flush. The states are those of statistics alone; `second` is the look OLD later,
    None if nothing was in flight. `evidence` was seen from outside at the same times."""
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
    hung = _hung_call(evidence) if second else ""
    unanswered = [
        disk for disk in stuck if not disk.network and not _lies(disk, images, on_mount=False)
    ]
    if not hung and unanswered:
        hung = f"requests of {list_titles(unanswered)} have not been answered for 1 s"
    if hung:
        # No look at their state follows, which would tell more of those on a network.
        others += [disk for disk in usable if disk.network]
    if unanswered:
        # They share a controller with those that do not answer, and its queues.
        others += [disk for disk in stuck if _lies(disk, images, on_mount=False)]
    return EarlyFlush(sorted_by_risk(healthy), tuple(others), hung)


def _lies(disk: GuestDisk, images: tuple[ImagePlace, ...] | None, *, on_mount: bool) -> bool:
    """Return whether an image of the disk is known to lie there."""
    return any(bool(image.mount) == on_mount and _is_of(disk, image) for image in images or ())


def _is_of(disk: GuestDisk, image: ImagePlace) -> bool:
    return not set(image.names).isdisjoint(disk.names)


def _hung_call(evidence: Assessment) -> str:
    """Return, in words, a call to a file system without a block device that has not moved."""
    calls = _mount_calls(evidence)
    hung = [wait for wait in standing_waits(evidence) if wait in calls]
    return f"a request may be stuck: {hung[0].text}" if hung else ""


def _mount_calls(evidence: Assessment) -> list[OpenWait]:
    """Return the waits for calls to such a file system."""
    mounts = {mount.number for mount in evidence.last.mounts or ()}
    calls = [wait for wait in evidence.waits if wait.key.startswith(_CALL)]
    return [
        wait for wait in calls if not mounts.isdisjoint(wait.key.removeprefix(_CALL).split(","))
    ]


NOT_ASKED: Final = (
    "an image lies on a file system that may not answer, so QEMU was not asked whether one of its"
    " disks is never flushed (cache=unsafe)"
)
"""A note for a plan."""
