"""Plan the flush before SIGTERM, and decide what it proves. Pure.

A flush before SIGTERM shows errors that QEMU hides after SIGTERM. If the guest's processors are
stopped, the flush also proves that QEMU holds no data back. But the QMP command `stop`
waits for all requests of all disks: if one disk does not answer, `stop` blocks the monitor. So
`stop` is sent only if no request seems older than OLD. `stop` is not sent to a running guest that
has a vhost-user disk, or a network disk whose requests QEMU does not report. Without `stop`, the
disks that are expected to answer are flushed one by one, so that a later SIGKILL loses none of
their data.

QEMU reports requests in flight only for virtio disks. For other local disks (IDE, NVMe), evidence
from outside shows requests in flight: a thread waits, or a ring has requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Final

from qkilld.decision.open_wait import OpenWait
from qkilld.decision.verdict import Assessment
from qkilld.model.block_state import BackgroundJob, BlockState, FlushResult, GuestDisk, RequestQueue
from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.guest_state import POWERED_OFF, RUNNING
from qkilld.model.job import Risk

OLD: Final = USEC_PER_SEC
"""A request that has been in flight for this long (µs) may be stuck."""
INACTIVE: Final = frozenset({"inmigrate", "postmigrate", "finish-migrate", "colo"})
"""Runstates of a migration in which the disks belong to another host, or soon will."""
_SPAN_OF_INDEX: Final = 1 << 16
_REQUESTS: Final = (
    *("call:storage:", "io_uring", "aio"),
    *("unseen:threads", "unseen:io_urings", "unseen:Linux AIO"),
)
"""If a wait may be for a request of a local disk, its key (waits.py) begins with one of these."""


@dataclass(frozen=True, slots=True)
class FlushPlan:
    stop: bool
    """Whether to stop the processors if they run, and then flush over NBD, which reports errors. If
    False, disks are flushed without `stop`."""
    running: bool
    """The processors run now. If no signal follows a flush with stopped processors, they must be
    started again."""
    disks: tuple[GuestDisk, ...]
    incomplete_because: str
    """Why some disks are not flushed with `stop`; "" if all are."""
    before: tuple[GuestDisk, ...] = ()
    """The disks to flush before `stop`, if the processors run; local disks come first. This flush
    finds disks that do not answer, and leaves little data for `stop` to flush. Only the flush after
    `stop` shows errors."""
    stuck: tuple[GuestDisk, ...] = ()
    """The disks that do not answer."""


def wants_evidence(state: BlockState) -> bool:
    """Return whether the guest runs and has a local disk whose requests QEMU does not report: only
    evidence from outside shows them."""
    known = _queue_devices(state)
    unseen = any(not disk.network and not _device_of(disk, known) for disk in state.disks)
    return unseen and state.runstate == RUNNING


def needs_second_reading(state: BlockState, evidence: Assessment | None = None) -> bool:
    """Return whether requests are in flight. Only another reading (`is_second_reading`) can show
    whether they are stuck."""
    if any(queue.in_flight for queue in state.queues or ()):
        return True
    return evidence is not None and bool(_requests(evidence))


def is_second_reading(
    first: BlockState, state: BlockState, evidence: Assessment | None = None
) -> bool:
    """Return whether `state` shows which requests are stuck. It does if it was read OLD µs after
    `first`. It also does if no request is stuck: every queue with requests in flight has completed
    a request since `first`, and `evidence` has no wait for a request."""
    if state.at - first.at >= OLD:
        return True
    if evidence is not None and _requests(evidence):
        return False
    return not _stuck_devices(first.queues or (), state.queues or ())


def plan_flush(
    first: BlockState, second: BlockState | None = None, evidence: Assessment | None = None
) -> FlushPlan:
    """Plan the flush.

    `second`: a reading for which `is_second_reading` is true; None if no request was in flight.
    `evidence`: the assessment at the last reading, or None.
    """
    state = second or first
    running = state.runstate == RUNNING
    if state.runstate in INACTIVE:
        return FlushPlan(False, False, (), "its disks are not active on this host")
    queue_devices = _queue_devices(state)
    stuck = stuck_disks(first, second)
    unreported = [
        disk.title
        for disk in state.disks
        if disk.network and not _device_of(disk, queue_devices) and disk not in stuck
    ]
    if stuck:
        why = f"requests of {list_titles(stuck)} have not been answered for 1 s"
    elif state.foreign and running:
        why = f"nothing shows whether {state.foreign[0]} answers"
    elif unreported and running:
        why = f"nothing shows whether {unreported[0]}, which lies on a network, answers"
    elif running and second and evidence and (standing := standing_waits(evidence)):
        why = f"a request may be stuck: {standing[0].text}"
    else:
        in_order = sorted_by_risk(state.disks)
        return FlushPlan(True, running, state.disks, "", before=in_order if running else ())
    # Local disks come first: if a disk on a network hangs, the monitor hangs, too.
    healthy = [disk for disk in state.disks if disk not in stuck and disk.title not in unreported]
    return FlushPlan(False, running, sorted_by_risk(healthy), why, stuck=stuck)


def sorted_by_risk(disks: Sequence[GuestDisk]) -> tuple[GuestDisk, ...]:
    """Sort disks for a flush that ends at the first disk that hangs. Disks on a network come after
    local disks. In both groups, disks without a device come last, because flushing them waits for
    all other disks (QEMU 8 and later)."""
    return tuple(sorted(disks, key=lambda disk: (disk.network, not disk.qdev)))


def risks_of_state(state: BlockState) -> tuple[Risk, ...]:
    """Return the risks that remain even if all disks are flushed."""
    risks = []
    for disk in state.disks:
        if disk.failed:
            text = f"a request of the guest to {disk.title} failed, or its storage is full"
            risks.append(Risk("io-error", text))
        if disk.no_flush:
            risks.append(Risk("no-flush", f"{disk.title} has cache=unsafe: it is never flushed"))
    if state.runstate == "io-error" and not any(risk.code == "io-error" for risk in risks):
        risks.append(Risk("io-error", "QEMU has stopped the guest because of an I/O error"))
    for job in state.jobs:
        code = "migration-cancelled" if job.migration else "job-cancelled"
        risks.append(Risk(code, f"{job.title} was still {job.status}"))
    return tuple(risks)


HUMAN_MONITOR_ALONE: Final = (
    "its only monitor is a human one, so its disks are not flushed before SIGTERM and dead storage"
    " is not cut off; -qmp unix:PATH,server=on,wait=off allows both"
)
"""A note in the reply to Plan."""


def notes_of_plan(state: BlockState) -> tuple[str, ...]:
    notes = [
        f"{disk.title} has cache=unsafe: it is never flushed"
        for disk in state.disks
        if disk.no_flush
    ]
    notes += [
        f"{job.title} is {job.status}: SIGTERM waits while it makes progress, and then cancels it"
        for job in state.jobs
    ]
    return tuple(notes)


def risks_of_flush(results: Sequence[FlushResult]) -> tuple[Risk, ...]:
    """Return the risks of failed flushes. A flush that QEMU refused to try is not a risk, but
    proves nothing (`proves_all`)."""
    return tuple(
        Risk("flush-failed", f"{one.title}: {one.error}")
        for one in results
        if one.error and not one.refused
    )


def proves_all(plan: FlushPlan, state: BlockState, results: Sequence[FlushResult]) -> bool:
    """Return whether it is proven that QEMU holds no data of the guest: the guest cannot write, all
    images are flushed, and QEMU reports no risk."""
    if not plan.stop or state.foreign or state.unused or risks_of_state(state):
        return False
    flushed_nodes = {one.node for one in results if not one.error}
    return all(disk.node in flushed_nodes for disk in state.disks)


@dataclass(frozen=True, slots=True)
class JobsProgress:
    """The progress of backups, mirrors and a migration, tracked across readings."""

    progress: Mapping[str, int] = field(default_factory=dict)
    """The progress of each background job, keyed by its name. A mirror that is ready is left out:
    it never ends, so waiting for it is useless."""
    moved_at: int = 0
    """When a background job last made progress (µs, CLOCK_MONOTONIC)."""

    def after(self, jobs: Sequence[BackgroundJob], now: int) -> JobsProgress:
        """Return the progress after one more reading."""
        latest = {
            job.title.partition(" (")[0]: job.progress for job in jobs if job.status != "ready"
        }
        moved = any(progress != self.progress.get(name) for name, progress in latest.items())
        return JobsProgress(latest, now if moved else self.moved_at)

    def waited_for(self, now: int, stall: int) -> bool:
        """Return whether to wait for the background jobs: one of them has made progress within the
        last `stall` µs."""
        return bool(self.progress) and now - self.moved_at < stall


def is_powered_off(state: BlockState) -> bool:
    """Return whether the guest has powered off and QEMU waits for `quit`."""
    return state.runstate == POWERED_OFF


def stuck_disks(first: BlockState, second: BlockState | None) -> tuple[GuestDisk, ...]:
    """Return the disks that had requests in flight and completed none between the two readings."""
    if second is None:
        return ()
    stuck = _stuck_devices(first.queues or (), second.queues or ())
    return tuple(disk for disk in second.disks if _device_of(disk, stuck))


def _stuck_devices(first: Sequence[RequestQueue], second: Sequence[RequestQueue]) -> frozenset[str]:
    """Return the devices of the queues that had requests in flight and completed none between the
    two readings."""
    before = {(queue.device, queue.number): queue for queue in first}
    stuck = set()
    for queue in second:
        old = before.get((queue.device, queue.number))
        if old is None or not (old.in_flight and queue.in_flight):
            continue
        if (queue.completed - old.completed) % _SPAN_OF_INDEX == 0:
            stuck.add(queue.device)
    return frozenset(stuck)


def _requests(evidence: Assessment) -> list[OpenWait]:
    """Return the waits that may be for a request of a local disk."""
    return [wait for wait in evidence.waits if wait.key.startswith(_REQUESTS)]


def standing_waits(evidence: Assessment) -> list[OpenWait]:
    """Of the waits for requests of local disks, return those that have not moved for OLD µs."""
    # Use half of OLD: the two readings may be a little less than OLD apart.
    since = evidence.last.at - OLD // 2
    return [
        wait
        for wait in _requests(evidence)
        if (wait.since if wait.moved_at is None else wait.moved_at) < since
    ]


def _queue_devices(state: BlockState) -> frozenset[str]:
    return frozenset(queue.device for queue in state.queues or ())


def _device_of(disk: GuestDisk, devices: frozenset[str]) -> bool:
    """Return whether the disk's device, or its controller, is one of `devices`.

    The disks of a SCSI controller share its queues, so if one of them is stuck, all may be.
    """
    if disk.device is None:
        return False
    path = disk.device.removesuffix("/virtio-backend")
    stems = [device.removesuffix("/virtio-backend") for device in devices]
    return any(path == stem or path.startswith(f"{stem}/") for stem in stems)


def list_titles(disks: Sequence[GuestDisk]) -> str:
    titles = ", ".join(disk.title for disk in disks[:4])
    return f"{titles}, …" if len(disks) > 4 else titles
