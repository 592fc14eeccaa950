"""List what a process waits for, and the signs of progress of each wait. Pure.

A QEMU that received SIGTERM exits within milliseconds unless it waits for something. `open_waits`
lists the waits in one sample, each with its own signs (signs.py). Only a wait's own signs show its
progress: timers, other guests on other disks, and traffic on a console do not.

An unreadable source counts as a wait, too, of the kind UNSEEN, so it never makes a process look
idle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Final

from qkilld.decision.node_groups import NodeGroup, groups_of
from qkilld.decision.replies import possible_replies, reply_signs, runs_without_replies
from qkilld.decision.request_signs import (
    call_signs,
    diskless_requests,
    doubtful,
    request_signs,
    stuck_disks,
    unlocated_signs,
    writes_output,
)
from qkilld.decision.server_signs import is_of, mount_signs, only_runs, socket_signs, works
from qkilld.decision.signs import (
    TALK,
    Sign,
    SignKind,
    disk_signs,
    group_signs,
    io_signs,
    waits_for_storage,
)
from qkilld.model.dataclass import dataclass
from qkilld.model.sample import Peer, Sample, Socket, Thread

CONNECTED: Final = "connected"
"""The name of the sign that counts the connections of a node. Its Mark.at (open_wait.py) is the
time when the number last changed."""


_NONE: Final = frozenset[int]()


class WaitKind(StrEnum):
    STORAGE = "storage"
    """The process waits for storage, or for a server that may be storage."""
    EXIT = "exit"
    """The process waits for the kernel, which frees its memory or writes a core dump."""
    CALL = "call"
    """The process waits in a system call that is not for storage (a full pipe, a lock, a device),
    or does not take SIGTERM."""
    PROCESSOR = "processor"
    """The process gets hardly any processor time, or spins."""
    UNSEEN = "unseen"
    """The process may be waiting, but nothing readable shows whether it is."""


@dataclass(frozen=True, slots=True)
class Wait:
    key: str
    """The wait's name, which stays the same from sample to sample."""
    kind: WaitKind
    text: str
    """A printable description."""
    signs: tuple[Sign, ...] = ()
    watched: int = 0
    """How many servers between the process and the storage were sampled: for example, 2 for a proxy
    and the server behind it."""
    certain: bool = False
    """Whether it is certain that the process cannot exit before the wait ends, because a request is
    in flight or a call has not returned."""
    holds_sigterm: bool = False
    """Whether the process's first thread is in this wait and so cannot take SIGTERM. While the wait
    lasts, the guest continues to run, and may keep using other disks."""
    connections: frozenset[int] = _NONE
    """The inodes of the node's connections. If these change, a connection broke, and the process is
    perhaps only repeating its requests (connections.py)."""
    threads: tuple[Thread, ...] = ()
    """The threads in this wait; () if it is not a wait in a call."""


def open_waits(sample: Sample, previous: Sample | None) -> tuple[Wait, ...]:
    """List everything that the process waits for, the most certain first.

    `previous` is the last usable sample. Waits for a processor need two samples.
    """
    waits = [
        *_exit_wait(sample),
        *_call_waits(sample, previous),
        *_ring_waits(sample, previous),
        *_connection_waits(sample, previous),
        *_processor_wait(sample, previous),
        *(_unseen_wait(source, sample, previous) for source in blind_to(sample)),
        *_added_storage(sample),
    ]
    return tuple(waits)


def blind_to(sample: Sample) -> list[str]:
    """List the unreadable sources that would show a wait."""
    return [
        name
        for name, value in (
            ("io", sample.io),
            ("threads", sample.threads),
            ("sockets", sample.sockets),
            ("io_urings", sample.rings),
            ("Linux AIO", sample.direct),
            ("command line", sample.nodes),
            ("pending signals", sample.term_pending),
        )
        if value is None
    ]


def may_be_hidden(key: str, sample: Sample) -> bool:
    """Return whether the sample may lack a wait (Wait.key) only because the source that shows such
    waits is unreadable."""
    match key.partition(":")[0]:
        case "call":
            return sample.threads is None
        case "io_uring" | "timers":
            return sample.rings is None
        case "aio":
            return sample.direct is None
        case "node":
            return sample.nodes is None
        case "socket":
            return sample.sockets is None
        case _:
            return False


def tells_nothing(sample: Sample) -> bool:
    """Return whether the sample is useless: reading it timed out, or was not permitted."""
    return sample.io is None and sample.threads is None and sample.sockets is None


def _exit_wait(sample: Sample) -> list[Wait]:
    if not (sample.exiting or sample.dumping):
        return []
    signs = [Sign("cpu", SignKind.COUNT, sample.cpu or 0, "the kernel frees its memory")]
    signs += io_signs(sample.io, "it")
    # The signs of disks are doubtful: other processes may use one disk while this process writes
    # to another.
    disks = disk_signs([d for d in sample.devices or () if d.writable])
    signs += [replace(sign, sure=False) for sign in disks]
    text = "it is exiting, which no signal makes faster"
    if sample.dumping:
        text = "the kernel writes a core dump of it"
    return [Wait("exit", WaitKind.EXIT, text, tuple(signs))]


def _call_waits(sample: Sample, previous: Sample | None) -> list[Wait]:
    """Return a wait for each disk, mount or call that threads wait for."""
    frozen = sample.cgroup is not None and sample.cgroup.frozen
    earlier = _groups_of((previous and previous.threads) or ())
    groups = {
        (kind, place): threads
        for (kind, place), threads in _groups_of(sample.threads or ()).items()
        # Not a wait: the freezer of cgroup v1 puts every thread into state D.
        if not (kind is WaitKind.CALL and frozen)
    }
    return [
        Wait(
            key=f"call:{kind.value}:{','.join(place)}",
            kind=kind,
            text=_shown(threads),
            signs=tuple(
                call_signs(
                    sample,
                    previous,
                    threads,
                    earlier.get((kind, place), ()),
                    for_storage=kind is WaitKind.STORAGE,
                )
            ),
            watched=_watched_on_mounts(sample, threads) if kind is WaitKind.STORAGE else 0,
            certain=kind is WaitKind.STORAGE or writes_output(threads),
            holds_sigterm=bool(sample.term_pending) and any(thread.first for thread in threads),
            threads=tuple(threads),
        )
        for (kind, place), threads in groups.items()
    ]


def _groups_of(threads: Sequence[Thread]) -> dict[tuple[WaitKind, tuple[str, ...]], list[Thread]]:
    """Group the threads by what they wait for."""
    groups: dict[tuple[WaitKind, tuple[str, ...]], list[Thread]] = {}
    for thread in threads:
        kind = WaitKind.STORAGE if waits_for_storage(thread) else WaitKind.CALL
        place = (*thread.disks, thread.mount) if thread.target in ("disk", "mount") else ()
        if kind is WaitKind.CALL:
            place = (thread.call, thread.target)
        groups.setdefault((kind, place), []).append(thread)
    return groups


def _watched_on_mounts(sample: Sample, threads: Sequence[Thread]) -> int:
    """Return Wait.watched for the calls of these threads on file systems."""
    numbers = {thread.mount for thread in threads if thread.target in ("disk", "mount")}
    return max(
        (
            server_depth(server)
            for mount in sample.mounts or ()
            if not numbers or mount.number in numbers
            for server in mount.servers or ()
        ),
        default=0,
    )


def _ring_waits(sample: Sample, previous: Sample | None) -> list[Wait]:
    waits = []
    if sample.rings:
        signs = [Sign("low", SignKind.LOW, sample.rings, "requests on its io_urings completed")]
        on_disks = sample.rings - diskless_requests(sample)
        has_stuck_disk = bool(stuck_disks(sample, previous) - set(sample.ringless))
        if on_disks > 0:
            sure = on_disks > sample.timers or has_stuck_disk
            signs += request_signs(sample, previous, sure=sure)
        if sample.rings > sample.timers or has_stuck_disk:
            text = f"{sample.rings} requests are in flight on its io_urings"
            waits.append(Wait("io_uring", WaitKind.STORAGE, text, tuple(signs), certain=True))
        else:
            text = "whether its io_urings have requests or timers"
            waits.append(Wait("timers", WaitKind.UNSEEN, text, tuple(signs)))
    if sample.direct:
        # The kernel reports AIO requests only when they are complete, so some may be in flight at
        # any time.
        stuck = bool(stuck_disks(sample, previous))
        signs = _aio_signs(sample, previous)
        if stuck:
            signs = doubtful(signs)
        if sample.completions is not None:
            text = "its asynchronous requests completed"
            signs.append(Sign("tail", SignKind.CHANGE, sample.completions, text))
        else:
            signs += disk_signs(d for d in sample.devices or () if d.writable and d.own)
        text = "it has, or may have, asynchronous requests to a disk"
        # If a disk is stuck, its requests are most likely the process's own. Even if others made
        # them, the process cannot exit without that disk.
        waits.append(Wait("aio", WaitKind.STORAGE, text, tuple(signs), certain=stuck))
    return waits


def _aio_signs(sample: Sample, previous: Sample | None) -> list[Sign]:
    """Return the signs of asynchronous requests that do not depend on their completions."""
    # It is unknown which file system the requests are for, so the signs of all mounts are doubtful.
    earlier = (previous and previous.mounts) or ()
    mounts = doubtful(mount_signs(sample.mounts or (), None, earlier))
    return [*io_signs(sample.io, "it"), *group_signs(sample), *mounts]


def _hidden_signs(sample: Sample, signs: Sequence[Sign]) -> list[Sign]:
    """Return the signs of requests if it is unknown whether the process has any. Completed writes
    are sure only for disks that the process itself has opened, because it is their only user."""
    own = {f"disk:{device.number}" for device in sample.devices or () if device.own}
    return [
        replace(sign, sure=sign.sure and (not sign.name.startswith("disk:") or sign.name in own))
        for sign in signs
    ]


def _added_storage(sample: Sample) -> list[Wait]:
    """Return a wait for storage that the command line does not name: a monitor may have added it,
    or it may be the backing file of an image. Nothing shows whether this storage has lost its
    server, so the process may be waiting for it at any time."""
    if is_held_still(sample):
        return []
    if sample.pluggable:
        return [Wait("added", WaitKind.UNSEEN, "storage that a monitor may have added")]
    if sample.formatted:
        return [Wait("backing", WaitKind.UNSEEN, "storage below an image that is not raw")]
    return []


def is_held_still(sample: Sample) -> bool:
    """Return whether the process cannot do anything, because it is stopped, traced or frozen."""
    frozen = sample.cgroup is not None and bool(sample.cgroup.frozen)
    return frozen or sample.state in ("T", "t")


def _unseen_wait(what: str, sample: Sample, previous: Sample | None) -> Wait:
    """Return the wait that an unreadable source may hide, with the wait's readable signs."""
    signs = []
    if what == "io_urings":
        signs = _hidden_signs(sample, request_signs(sample, previous))
    elif what == "Linux AIO":
        disks = disk_signs(device for device in sample.devices or () if device.writable)
        signs = [*doubtful(_aio_signs(sample, previous)), *_hidden_signs(sample, disks)]
    elif what == "threads":
        # The unreadable threads may wait for any file of the process. The signs of its disks are
        # doubtful, because other processes may use these disks, too.
        signs = doubtful(unlocated_signs(sample, previous, dirties=False))
    elif what == "sockets":
        # If an unreadable socket is a connection to storage, QEMU's threads write to each other at
        # each reply, but timers and consoles also make them write a little.
        signs = [replace(sign, sure=False) for sign in _talk_signs(sample)]
    return Wait(f"unseen:{what}", WaitKind.UNSEEN, what, tuple(signs))


def _talk_signs(sample: Sample) -> list[Sign]:
    """Return a sign for replies: for each reply, QEMU's threads write bytes to each other."""
    if sample.io is None:
        return []
    transferred = sample.io.wchar + sample.io.rchar
    return [Sign("said", SignKind.TRAFFIC, transferred, "its threads react to replies", TALK)]


def _connection_waits(sample: Sample, previous: Sample | None) -> list[Wait]:
    sockets = sample.sockets or ()
    before = {
        socket.inode: socket.peer
        for socket in (previous and previous.sockets) or ()
        if socket.peer is not None
    }
    runs_anyway = runs_without_replies(sample)
    waits = [
        _node_wait(group, sample, before, runs_anyway=runs_anyway)
        for group in groups_of(sample).values()
    ]
    waits += [
        _unknown_wait(socket, sample, before.get(socket.inode))
        for socket in sockets
        if socket.role == "unknown" or (socket.role == "storage" and not socket.node)
    ]
    return waits


def _unknown_wait(socket: Socket, sample: Sample, before: Peer | None) -> Wait:
    """Return the wait for a connection of unknown purpose. `before`: its server in the last
    sample."""
    # Unread data proves that a request is in flight only if the peer has disks. A peer without
    # disks may be a console, which may never read.
    stores = socket.peer is not None and bool(socket.peer.devices or socket.peer.behind)
    unread = socket.send_queue > 0 or _unread([socket]) > 0
    certain = (stores and unread) or works(socket.peer)
    signs = [*socket_signs(socket, "", before), *possible_replies(socket, sample.switches)]
    watched = server_depth(socket.peer)
    if socket.accepted:
        # The process is most likely a server itself, for example for a backup program. Of the
        # programs that connect to QEMU, only a vhost-user backend is storage, and it needs a unix
        # socket. A backend's data passes through the guest's memory, so only signs of the backend
        # itself are sure, not those of the connection. Signs of servers behind the client are
        # doubtful, because a backup program may also back up another guest.
        certain = False
        may_be_backend = socket.family == "unix" and sample.shared_memory is not False
        # Count only the backend itself as watched: earlier samples have not missed progress just
        # because they lack a new server behind the client.
        watched = min(watched, int(may_be_backend))
        signs = [
            replace(sign, sure=sign.sure and may_be_backend and is_of(sign, socket.peer))
            for sign in signs
        ]
    return Wait(
        key=f"socket:{socket.inode}",
        kind=WaitKind.STORAGE,
        text=f"a {socket.family} connection of unknown use is open and may owe it a reply",
        signs=tuple(signs),
        watched=watched,
        certain=certain,
    )


def _node_wait(
    group: NodeGroup, sample: Sample, before: Mapping[int, Peer], *, runs_anyway: bool
) -> Wait:
    """Return the wait for the server of a node, or for those of a group of nodes.

    `before`: the servers in the last sample, keyed by the inode of the connection. `runs_anyway`:
    whether the process may run although no server replies.
    """
    sockets, title = group.sockets, group.title
    signs: list[Sign] = []
    for socket in sockets:
        for sign in socket_signs(socket, group.protocol, before.get(socket.inode)):
            if only_runs(sign):
                signs += reply_signs(sign, socket.peer, sample.switches, sure=not runs_anyway)
            else:
                signs.append(sign)
    signs.append(Sign(CONNECTED, SignKind.QUIET, len(sockets), "it is connected"))
    if any(node.served is not None for node in group.nodes):
        # The return of a server counts as progress, because QEMU may need up to 16 s to reconnect.
        # But a return counts only once: a server that comes and goes makes no progress.
        gone = sum(node.served is False for node in group.nodes)
        signs.append(Sign("served", SignKind.LOW, gone, "its server is back"))
    if sample.sockets is None:
        # The connection is unreadable, for example because it is in another network namespace. Only
        # the bytes that QEMU's threads write to each other show replies.
        signs += _talk_signs(sample)
    queued = sum(socket.send_queue + (socket.unacked or 0) for socket in sockets)
    if sample.sockets is None:
        text = f"{title} may owe it a reply; its connection cannot be seen"
    elif group.has_lost:
        text = f"{title} has no connection to its server"
    elif queued:
        text = f"{title} has {queued} bytes or segments on the way to {_server(sockets)}"
    elif unread := _unread(sockets):
        text = f"{_server(sockets)} has not read {unread} bytes of {title}"
    else:
        text = f"{title} may owe it a reply from {_server(sockets)}"
    watched = max((server_depth(socket.peer) for socket in sockets), default=0)
    return Wait(
        key=group.wait_key,
        kind=WaitKind.STORAGE,
        text=text,
        signs=tuple(signs),
        watched=watched,
        certain=any(owes_reply(socket) or works(socket.peer) for socket in sockets),
        connections=frozenset(socket.inode for socket in sockets),
    )


def server_depth(peer: Peer | None) -> int:
    """Return the length of the longest chain of servers that begins with this one."""
    return 0 if peer is None else 1 + max(map(server_depth, peer.behind), default=0)


def owes_reply(socket: Socket) -> bool:
    """Return whether a reply is certainly missing: data is on the way to the server, or the server
    has not read it."""
    return bool(socket.send_queue or socket.unacked or _unread([socket]))


def _unread(sockets: Sequence[Socket]) -> int:
    """Return how many bytes a server on this host has not read yet, perhaps because it is stopped.
    If there are several servers, return the largest number."""
    return max((s.peer.unread or 0 for s in sockets if s.peer is not None), default=0)


def _server(sockets: Sequence[Socket]) -> str:
    for socket in sockets:
        if socket.peer is not None:
            return f"{socket.peer.command} (process {socket.peer.pid})"
    return "its server"


def _processor_wait(sample: Sample, previous: Sample | None) -> list[Wait]:
    """Return the wait of a process that is starved, spins, or has not taken SIGTERM."""
    if is_held_still(sample):
        return []
    if previous is None or sample.cpu is None or previous.cpu is None or not sample.running:
        text = "it has not taken SIGTERM yet"
        pending = sample.term_pending and previous is not None
        return [Wait("sigterm", WaitKind.CALL, text)] if pending else []
    if not previous.running or sample.at - previous.at < _LEAST_GAP:
        return []
    # sample.cpu is in hundredths of a second (USER_HZ), so this is a percentage.
    share = (sample.cpu - previous.cpu) * 1_000_000 / (sample.at - previous.at)
    if share >= _SPINS:
        text = f"it spins: it uses {share:.0f} % of a processor and does nothing else"
        return [Wait("spin", WaitKind.PROCESSOR, text)]
    if share < _STARVES:
        # The sign is doubtful, because a process that spins with a small quota looks the same.
        text = "it wants to run, but gets hardly any processor time"
        got = "it got some processor time"
        sign = Sign("cpu", SignKind.COUNT, sample.cpu, got, sure=False)
        return [Wait("starved", WaitKind.PROCESSOR, text, (sign,))]
    return []


_LEAST_GAP: Final = 200_000
"""Over a shorter interval (µs), clock ticks do not give a useful processor share."""
_SPINS: Final = 50.0
"""A process that uses at least this percentage of a processor, and does nothing else, spins."""
_STARVES: Final = 10.0
"""A process that wants to run and gets less than this percentage of a processor is starved."""


def _shown(threads: Sequence[Thread]) -> str:
    first = threads[0]
    subject = f"thread {first.tid} ({first.name}) waits"
    if len(threads) > 1:
        subject = f"{len(threads)} threads wait"
    call = f" in {first.call}" if first.call else ""
    on = {"pipe": " to a pipe", "socket": " on a socket", "other": " on a descriptor"}
    if first.disks:
        place = f" on disk {first.disks[0]}"
    elif first.target == "mount":
        place = f" on file system {first.mount}"
    else:
        place = on.get(first.target, "")
    where = f" ({first.wchan})" if first.wchan else ""
    return f"{subject}{call}{place}{where}, state {first.state}"
