"""The signs of system calls and of asynchronous requests to storage. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qkilld.decision.server_signs import mount_signs
from qkilld.decision.signs import (
    Sign,
    SignKind,
    disk_signs,
    group_signs,
    io_signs,
    only_writes,
    sleeps_without_disk,
    woken_sign,
    write_signs,
)
from qkilld.model.sample import Device, Sample, Thread


def call_signs(
    sample: Sample,
    previous: Sample | None,
    threads: Sequence[Thread],
    before: Sequence[Thread],
    *,
    for_storage: bool,
) -> list[Sign]:
    """Return the signs of the threads that wait in one kind of call, or for one disk or mount.

    `before`: the threads that waited so in the previous sample.
    """
    tids = {thread.tid for thread in threads}
    # A thread that only joins the others shows no progress.
    joined = bool(before) and tids.issuperset(thread.tid for thread in before)
    kind = SignKind.QUIET if joined else SignKind.CHANGE
    signs = [Sign("threads", kind, hash(tuple(sorted(tids))), "one of its calls returned")]
    woken = woken_sign("woken", threads, before or None, "the storage answered its thread")
    if not for_storage:
        # Only the reader of a pipe or socket wakes a thread that writes to it.
        woken = replace(woken, text="its reader reads")
        return [*signs, woken] if writes_output(threads) else signs
    located = [thread for thread in threads if thread.target in ("disk", "mount")]
    disk_numbers = {number for thread in located for number in thread.disks}
    mounts = {thread.mount for thread in located if thread.mount}
    dirties = any("balance_dirty" in (thread.wchan or "") for thread in threads)
    # If the call has no descriptor (io_submit), only the wait channel shows whether the thread
    # waits for a disk.
    if not located and not all(sleeps_without_disk(thread) for thread in threads):
        signs += unlocated_signs(sample, previous, dirties)
        return signs if sample.devices or dirties else [*signs, woken]
    devices = [d for d in _steady(sample, previous) if d.number in disk_numbers]
    writing = all(only_writes(thread) for thread in threads)
    signs += write_signs(devices) if writing else disk_signs(devices)
    earlier = (previous and previous.mounts) or ()
    signs += mount_signs(sample.mounts or (), mounts if located else None, earlier)
    if devices and not dirties:
        signs += _own_work_signs(sample, devices)
    elif dirties or disk_numbers:
        signs += [*io_signs(sample.io, "it"), *(group_signs(sample) if devices else [])]
    if not devices and not dirties:
        signs.append(woken)
    return signs


def _steady(sample: Sample, previous: Sample | None) -> list[Device]:
    """Return the devices. If a device with requests in flight had only_reads in the previous
    sample, set it again: a read that is not dispatched yet looks like a flush."""
    earlier = {device.number: device for device in (previous and previous.devices) or ()}
    return [
        replace(device, only_reads=True)
        if device.in_flight and (before := earlier.get(device.number)) and before.only_reads
        else device
        for device in sample.devices or ()
    ]


def writes_output(threads: Sequence[Thread]) -> bool:
    """Return whether a thread writes to a pipe or socket, such as standard error. QEMU cannot exit
    before this call returns, whatever its storage does."""
    return any(
        thread.target in ("pipe", "socket") and thread.call in ("write", "writev")
        for thread in threads
    )


def _own_work_signs(sample: Sample, devices: Sequence[Device]) -> list[Sign]:
    """Return signs for the writes and reads of the process while calls wait for these devices.

    If one of the devices has a request in flight, return no signs: the calls wait for this request,
    but the process's reads and writes may go to other disks while the guest runs. If the devices
    count requests and have none in flight, the signs are doubtful, because a layer above the
    devices may hold a request back.
    """
    tops = [device for device in devices if device.depth == 0]
    if any(device.in_flight for device in tops):
        return []
    signs = [*io_signs(sample.io, "it"), *group_signs(sample)]
    sure = not (tops and all(device.accounting for device in tops))
    return [replace(sign, sure=sign.sure and sure) for sign in signs]


def unlocated_signs(sample: Sample, previous: Sample | None, dirties: bool) -> list[Sign]:
    """Return the signs of calls that wait for an unknown file.

    If there are several disks or mounts, their signs are doubtful, because the calls may wait for
    any of them. While a disk is stuck, the process's I/O is a doubtful sign, too, unless its writes
    are throttled (`dirties`).
    """
    devices = [device for device in sample.devices or () if device.writable]
    places = [device for device in devices if device.depth == 0]
    is_only = len(places) + len(sample.mounts or ()) <= 1
    earlier = (previous and previous.mounts) or ()
    signs = [*disk_signs(devices), *mount_signs(sample.mounts or (), None, earlier)]
    signs = [replace(sign, sure=sign.sure and is_only) for sign in signs]
    own_work = [*io_signs(sample.io, "it"), *(group_signs(sample) if devices else [])]
    if not dirties and stuck_disks(sample, previous):
        own_work = doubtful(own_work)
    return [*signs, *own_work]


def request_signs(sample: Sample, previous: Sample | None, *, sure: bool = True) -> list[Sign]:
    """Return signs for requests on the process's io_urings, which may be for any writable disk that
    is not in `ringless`.

    If one of these disks is stuck, assume that the process waits for this disk: only completions of
    this disk and of disks below it count, and the process's I/O is a doubtful sign.

    `sure`: whether the requests are certainly not timers. If they may be timers, the signs of disks
    are doubtful, because perhaps only other processes use the disks.
    """
    writable = [
        device
        for device in sample.devices or ()
        if device.writable and device.number not in sample.ringless
    ]
    stuck = stuck_disks(sample, previous) - set(sample.ringless)
    signs = disk_signs(writable)
    own_work = [*io_signs(sample.io, "it"), *group_signs(sample)]
    if not sure:
        signs = doubtful(signs)
        if any(socket.accepted for socket in sample.sockets or ()):
            # The process may write for a client, such as a backup program.
            own_work = doubtful(own_work)
    if stuck:
        others = {f"disk:{device.number}" for device in writable if not _carries(device, stuck)}
        signs = [
            replace(sign, kind=SignKind.QUIET) if sign.name in others else sign for sign in signs
        ]
        own_work = doubtful(own_work)
    return [*signs, *own_work]


def _carries(device: Device, stuck: set[str]) -> bool:
    """Return whether the device is one of `stuck`, or may lie below one of them."""
    if device.depth == 0:
        return device.number in stuck
    return not device.above or not stuck.isdisjoint(device.above)


def diskless_requests(sample: Sample) -> int:
    """Return how many requests on the process's io_urings wait for file systems without a block
    device. The kernel threads that handle these requests are listed as separate waits."""
    workers = [t for t in sample.threads or () if t.name.startswith("iou-wrk-")]
    return sum(map(sleeps_without_disk, workers))


def stuck_disks(sample: Sample, previous: Sample | None) -> set[str]:
    """Return the disks that had requests in flight and completed none since the last sample."""
    earlier = {device.number: device for device in (previous and previous.devices) or ()}
    return {
        device.number
        for device in sample.devices or ()
        if device.writable and device.depth == 0 and _stands(earlier.get(device.number), device)
    }


def _stands(before: Device | None, now: Device) -> bool:
    if before is None or not (before.in_flight and now.in_flight):
        return False
    return (before.writes, before.reads) == (now.writes, now.reads)


def doubtful(signs: Sequence[Sign]) -> list[Sign]:
    return [replace(sign, sure=False) for sign in signs]
