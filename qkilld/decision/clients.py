"""Distinguish QEMU's own work from work that it does for a client, such as a backup program. Pure.

While QEMU's main loop waits for a dead disk, an export in an iothread continues to serve its
client, perhaps forever. A client that only reads causes no writes. A client that writes may also
cause flushes. But QEMU's own flush may take many minutes, so movement in a flush always counts as
QEMU's own. Movement of unknown cause counts as QEMU's own, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from qkilld.decision.server_signs import HANDSHAKE, KEEPALIVE
from qkilld.decision.signs import only_writes, sleeps_without_disk, waits_for_storage
from qkilld.decision.waits import Wait, WaitKind
from qkilld.model.sample import FLUSH_CALLS, Device, Peer, Sample, Socket, Thread

_READS_SHARE: Final = 16
"""A client that only reads gets more than this many bytes for each byte that it sends: an NBD read
request has 28 bytes, and its reply at least 528."""


def has_client(sample: Sample) -> bool:
    """Return whether the process may be serving a client."""
    return not sample.exiting and bool(_clients(sample))


def is_own(wait: Wait, sample: Sample, previous: Sample) -> bool:
    """Return whether a wait may have moved since the sample `previous` because of QEMU's own work,
    not only because of a client's requests."""
    if wait.kind is WaitKind.CALL:
        return True
    devices, earlier = sample.devices or (), previous.devices or ()
    # If a client may write, assume that it caused all writes, except those of a flush.
    writes = any(map(_sends_data, _clients(sample)))
    if wait.threads:
        return _calls_write(wait.threads, devices, earlier, writes=writes)
    sockets = [
        one
        for one in sample.sockets or ()
        if one.inode in wait.connections or wait.key == f"socket:{one.inode}"
    ]
    if not sockets:
        return not writes and _has_written(devices, earlier)
    before = {one.inode: one for one in previous.sockets or ()}
    return any(
        _has_stored(one, before[one.inode], writes=writes) for one in sockets if one.inode in before
    )


def _clients(sample: Sample) -> list[Socket]:
    return [one for one in sample.sockets or () if one.accepted and one.role == "unknown"]


def _sends_data(client: Socket) -> bool:
    """Return whether the client has sent more bytes than a client that only reads would."""
    received, sent = client.received or 0, client.acked or 0
    return received > max(HANDSHAKE, sent // _READS_SHARE)


def _calls_write(
    threads: Iterable[Thread],
    devices: Iterable[Device],
    before: Iterable[Device],
    *,
    writes: bool,
) -> bool:
    """Return whether one of the threads may be writing, and its disks may have completed a write.

    `writes`: a client may write, so only calls that flush count.
    """
    calls = [
        thread
        for thread in threads
        if thread.call in FLUSH_CALLS or (not writes and (only_writes(thread) or not thread.target))
    ]
    return any(
        sleeps_without_disk(thread)
        or thread.target == "mount"
        or _has_written(
            [one for one in devices if one.number in thread.disks or not thread.disks], before
        )
        for thread in calls
    )


def _has_written(devices: Iterable[Device], before: Iterable[Device]) -> bool:
    """Return whether a device has completed writes since `before`; True if no device counts its
    writes."""
    earlier = {device.number: device.writes for device in before}
    counting = [one for one in devices if one.writable and one.accounting is not False]
    return not counting or any(one.writes > earlier.get(one.number, one.writes) for one in counting)


def _has_stored(socket: Socket, before: Socket, *, writes: bool) -> bool:
    """Return whether the server at the other end may have received or written data."""
    if socket.peer is not None and before.peer is not None:
        return _is_writing(socket.peer, before.peer, writes=writes)
    if socket.acked is None or socket.received is None:
        return True
    return not writes and _surplus(socket) - _surplus(before) >= KEEPALIVE


def _surplus(socket: Socket) -> int:
    """Return how many more bytes were sent than received. A request to read makes this number
    smaller, because its reply is longer."""
    return (socket.acked or 0) - (socket.received or 0)


def _is_writing(peer: Peer, before: Peer, *, writes: bool) -> bool:
    """Return whether the server, or a server behind it, may have written."""
    working = [thread for thread in peer.threads or () if waits_for_storage(thread)]
    if _calls_write(working, peer.devices or (), before.devices or (), writes=writes):
        return True
    if peer.io is None or before.io is None:
        return True
    if not writes and peer.io.write_bytes > before.io.write_bytes:
        return True
    earlier = {other.pid: other for other in before.behind}
    return any(
        _is_writing(other, earlier[other.pid], writes=writes)
        for other in peer.behind
        if other.pid in earlier
    )
