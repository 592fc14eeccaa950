"""From samples to a verdict. Pure: what is known comes in, what it means goes out.

`assess` folds one sample after the other into an Assessment. The questions are three: does anything
of this process move, does anything of it wait for storage, and could everything be seen that would
tell. Unknown is not idle: only what was read can say that nothing is left to do.

Why no single counter will do, measured: an fdatasync of a full page cache moves no counter of the
process for half a minute, only the disk's; qcow2 metadata on its way to a slow NBD server moves
nothing but context switches; a frozen server moves nothing at all and is still no proof of a hang.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qkilld.model.evidence import Sample, Socket, Thread
from qkilld.model.words import USEC_PER_SEC, Verdict

FLUSHING_FOR: Final = 6 * USEC_PER_SEC
"""Progress so recent (µs) still counts as flushing: disks write back in bursts up to 5 s apart."""
NOISE: Final = 512
"""Bytes through read(2) and write(2) below which two samples are alike: the eventfds of an event
loop move 8 to 16 bytes a second."""

CACHE_NOISE: Final = 16 * 1024
"""Bytes by which a page cache may fall without telling anything: a page of some log, written."""

_STORAGE_WCHAN: Final = (
    *("folio", "page", "bio", "blk", "io_sched", "rq_qos", "wbt", "throttle", "balance_dirty"),
    *("jbd2", "ext4", "xfs", "btrfs", "nfs", "rpc", "fuse", "ceph", "cifs", "sync", "writeback"),
    *("inode", "submit", "dm_", "md_", "request", "get_tag", "loop", "nbd", "iomap", "bdev"),
)
"""Parts of the names of kernel functions in which one waits for storage."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """What the samples so far say. Times are CLOCK_MONOTONIC in µs, sizes in bytes."""

    first: Sample
    last: Sample
    seen: Sample
    """The newest that told anything: what comes next is compared with it."""
    verdict: Verdict
    reasons: tuple[str, ...]
    """In words, the strongest first."""
    progress_at: int | None
    """When progress was last seen; None for never."""
    outstanding: bool | None
    """Something of it waits for storage; None where that cannot be seen."""
    outstanding_at: int | None
    """When something was outstanding last, or could not be told."""
    pending: int | None
    """Not yet written, as far as can be told."""
    rate: int | None
    """Bytes a second lately."""

    @property
    def written(self) -> int | None:
        """Bytes since the first sample, from the best source there is."""
        return _difference(_written(self.first), _written(self.last))


def assess(before: Assessment | None, sample: Sample) -> Assessment:
    """What is known after one more sample; None stands for "nothing yet"."""
    waits = waiting(sample)
    moves = moving(before.seen, sample, bool(waits)) if before else _exits(None, sample)
    outstanding = bool(waits) or (None if blind_to(sample) else False)
    progress_at = sample.at if moves else before.progress_at if before else None
    outstanding_at = (
        before.outstanding_at
        if before and outstanding is False
        else None
        if outstanding is False
        else sample.at
    )
    verdict, reasons = _verdict(before, sample, moves, waits, progress_at)
    return Assessment(
        first=before.first if before else sample,
        last=sample,
        seen=before.seen if before and _tells_nothing(sample) else sample,
        verdict=verdict,
        reasons=tuple(reasons),
        progress_at=progress_at,
        outstanding=outstanding,
        outstanding_at=outstanding_at,
        pending=pending(sample),
        rate=_rate(before, sample),
    )


def _verdict(
    before: Assessment | None,
    sample: Sample,
    moves: list[str],
    waits: list[str],
    progress_at: int | None,
) -> tuple[Verdict, list[str]]:
    if is_dead(sample):
        return Verdict.ZOMBIE, ["it has exited, and only its debugger or parent still holds it"]
    if held := standstill(sample):
        return Verdict.STOPPED, [held]
    if moves:
        return Verdict.FLUSHING, moves + waits
    if waits and progress_at is not None and sample.at - progress_at <= FLUSHING_FOR:
        return Verdict.FLUSHING, ["it moved a moment ago", *waits]
    if waits:
        return Verdict.STORAGE_WAIT, waits
    if stuck := [_shown(thread) for thread in sample.threads or () if thread.state == "D"]:
        return Verdict.BLOCKED, stuck
    if unseen := blind_to(sample):
        return Verdict.UNKNOWN, [f"not to be seen: {', '.join(unseen)}"]
    if before is None:
        return Verdict.UNKNOWN, ["one look says nothing of what moves"]
    return Verdict.IDLE, ["nothing moves and nothing is outstanding"]


def is_dead(sample: Sample) -> bool:
    """It has exited, whatever its pidfd says: that waits for the last thread to be collected, and
    a debugger that sits at its prompt collects none."""
    return sample.state in ("Z", "X") and sample.threads == () and not sample.exiting


def standstill(sample: Sample) -> str:
    """Why the process cannot do anything at all; "" where it can."""
    if sample.cgroup is not None and sample.cgroup.frozen:
        return "its control group is frozen"
    if sample.state == "t" or (sample.state == "T" and sample.tracer):
        return f"a debugger holds it (process {sample.tracer})" if sample.tracer else "traced"
    return "it is stopped (SIGSTOP)" if sample.state == "T" else ""


def can_be_continued(sample: Sample) -> bool:
    """SIGCONT would set it going: nothing but a SIGSTOP holds it."""
    frozen = sample.cgroup is not None and sample.cgroup.frozen
    return sample.state == "T" and not sample.tracer and not frozen


def moving(before: Sample, now: Sample, waits: bool) -> list[str]:
    """What has moved for this process between two samples, in words."""
    found: list[str] = []
    if before.io is not None and now.io is not None:
        if written := now.io.write_bytes - before.io.write_bytes:
            found.append(f"it wrote {written} bytes")
        if read := now.io.read_bytes - before.io.read_bytes:
            found.append(f"it read {read} bytes from disks")
        if (chars := now.io.wchar - before.io.wchar) >= NOISE and not written:
            found.append(f"it passed {chars} bytes to write(2)")
        if (chars := now.io.rchar - before.io.rchar) >= NOISE and not read:
            found.append(f"it took {chars} bytes from read(2)")
    found += _exits(before, now)
    found += _socket_moves(before, now)
    found += _disk_moves(before, now)
    woken = _difference(before.switches, now.switches)
    if woken and waits and not found and not _all_on_disks(now):
        # Completions wake its threads. By itself that could be any timer of its own.
        found.append(f"its threads were woken {woken} times")
    return found


def _exits(before: Sample | None, now: Sample) -> list[str]:
    if not now.exiting:
        return []
    if before is None or not before.exiting:
        return ["it has begun to exit"]
    # With much memory that is many seconds: 0.26 s a GiB that is shared, measured.
    return ["the kernel takes its memory apart"] if _difference(before.cpu, now.cpu) else []


def _all_on_disks(sample: Sample) -> bool:
    """What it waits for are calls on disks whose counters are known, and nothing else: those would
    have moved, and a thread that was woken then is another one."""
    return (
        any(_waits_for_storage(thread) for thread in sample.threads or ())
        and any(device.depth == 0 and device.writable for device in sample.devices or ())
        and not (sample.mounts or sample.rings or sample.direct)
        and not any(socket.client for socket in sample.sockets or ())
    )


def _socket_moves(before: Sample, now: Sample) -> list[str]:
    if before.sockets is None or now.sockets is None:
        return []
    old = {socket.inode: socket for socket in before.sockets}
    found = []
    for socket in now.sockets:
        was = old.get(socket.inode)
        if was is None or not socket.client:
            continue
        if acked := _difference(was.acked, socket.acked):
            found.append(f"a server took {acked} bytes")
        elif received := _difference(was.received, socket.received):
            found.append(f"a server sent {received} bytes")
        elif socket.family == "unix" and (
            (socket.send_queue, socket.receive_queue) != (was.send_queue, was.receive_queue)
        ):
            found.append("the queue to a local server changed")
    return found


def _disk_moves(before: Sample, now: Sample) -> list[str]:
    """What the disks did for it. They are shared, so a source of its own comes first."""
    own, was = now.cgroup, before.cgroup
    if own is not None and was is not None and own.own and was.own:
        written = _difference(was.written, own.written)
        left, old = _sum(own.dirty, own.writeback), _sum(was.dirty, was.writeback)
        if written:
            return [f"its control group wrote {written} bytes to disk"]
        if left is not None and old is not None and old - left >= CACHE_NOISE:
            return [f"its control group's page cache fell by {old - left} bytes"]
        if written is not None:
            return []
    # Others' traffic says something of this process only while it waits for that disk itself.
    waits = any(_waits_for_storage(thread) for thread in now.threads or ())
    old_devices = {device.number: device for device in before.devices or ()}
    # A layer below works for it only while the one that its image lies on has handed something
    # down; else that is a neighbour. What a throttle holds back shows in none: then the top moves.
    handed_down = any(
        device.depth == 0 and device.writable and device.in_flight
        for device in (*(before.devices or ()), *(now.devices or ()))
    )
    for device in now.devices or ():
        old_device = old_devices.get(device.number)
        if not (old_device and device.writable and (waits or device.own)):
            continue
        if device.depth and not handed_down:
            continue
        if (done := device.writes - old_device.writes) > 0:
            return [f"the disk {device.name} completed {done} writes"]
    if not waits:
        return []
    if before.mounts and now.mounts and len(before.mounts) == len(now.mounts):
        for mount, old_mount in zip(now.mounts, before.mounts, strict=True):
            if answers := _difference(old_mount.operations, mount.operations):
                return [f"a mount of type {mount.kind} had {answers} answers"]
    if not now.devices and before.host is not None and now.host is not None:
        fell = (before.host.dirty + before.host.writeback) - (now.host.dirty + now.host.writeback)
        if fell > 0:
            return [f"the host's page cache fell by {fell} bytes"]
    return []


def waiting(sample: Sample) -> list[str]:
    """What of this process waits for storage, in words."""
    found = [_shown(thread) for thread in sample.threads or () if _waits_for_storage(thread)]
    if sample.rings:
        found.append(f"{sample.rings} requests are in flight on its io_urings")
    for socket in sample.sockets or ():
        if socket.client and (queued := socket.send_queue + (socket.unacked or 0)):
            found.append(f"{queued} bytes or segments wait on a {socket.family} connection")
    if sample.exiting:
        found.append("it is exiting, which no signal hurries")
    if sample.direct:
        # The kernel tells nobody how many; and those that a throttled control group holds back are
        # not even in flight on the disk.
        found.append("it has asynchronous requests to a disk, or may have them")
    if not found and any(socket.client for socket in sample.sockets or ()):
        # A request whose answer is awaited may leave no trace in any queue.
        found.append("a connection to a server is open, which may owe it an answer")
    return found


def pending(sample: Sample) -> int | None:
    """Bytes that are not yet where they belong, from the narrowest source that knows."""
    cgroup = sample.cgroup
    if cgroup is not None and cgroup.own and (left := _sum(cgroup.dirty, cgroup.writeback)):
        return left
    if queued := sum(s.send_queue for s in sample.sockets or () if s.client):
        return queued
    if sample.host is not None and any(_waits_for_storage(t) for t in sample.threads or ()):
        return sample.host.dirty + sample.host.writeback
    return None


def blind_to(sample: Sample) -> list[str]:
    """What could not be read of that which would show something outstanding."""
    return [
        name
        for name, value in (
            ("io", sample.io),
            ("threads", sample.threads),
            ("context switches", sample.switches),
            ("sockets", sample.sockets),
            ("io_urings", sample.rings),
        )
        if value is None
    ]


def _tells_nothing(sample: Sample) -> bool:
    """Of a look that did not come back, or that nobody was allowed."""
    return sample.io is None and sample.threads is None and sample.sockets is None


def _waits_for_storage(thread: Thread) -> bool:
    if thread.io_call:
        return True
    wchan = thread.wchan or ""
    return thread.state == "D" and any(part in wchan for part in _STORAGE_WCHAN)


def _shown(thread: Thread) -> str:
    where = f" in {thread.wchan}" if thread.wchan else ""
    return f"thread {thread.tid} ({thread.name}) is in state {thread.state}{where}"


def _written(sample: Sample) -> int | None:
    cgroup = sample.cgroup
    if cgroup is not None and cgroup.own and cgroup.written is not None:
        return cgroup.written
    acked = _client_bytes(sample.sockets)
    own = sample.io.write_bytes if sample.io is not None else None
    return _sum(own, acked) if acked is not None else own


def _client_bytes(sockets: tuple[Socket, ...] | None) -> int | None:
    found = [s.acked for s in sockets or () if s.client and s.acked is not None]
    return sum(found) if found else None


def _rate(before: Assessment | None, sample: Sample) -> int | None:
    """Over all that was seen since the last progress began: the mean since the first sample."""
    if before is None or sample.at <= before.first.at:
        return None
    written = _difference(_written(before.first), _written(sample))
    return None if written is None else written * USEC_PER_SEC // (sample.at - before.first.at)


def _difference(before: int | None, now: int | None) -> int | None:
    """Of a counter; a counter that fell began anew, which says nothing."""
    return None if before is None or now is None else max(0, now - before)


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other
