"""The signs of a wait: numbers whose change shows progress. Pure.

The numbers count the work of a connection, of the server at its other end, of the process, of its
control group, or of a disk that a thread waits for. waits.py assigns signs to waits; open_wait.py
compares their values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Final

from qkilld.decision.connections import BREAKS
from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.sample import FLUSH_CALLS, Device, Io, Mount, Peer, Sample, Socket, Thread

WINDOW: Final = 6 * USEC_PER_SEC
"""The time (µs) over which traffic is counted. Disks write data back in bursts that are up to 5 s
apart."""
KEEPALIVE: Final = 512
"""Fewer bytes than this in a WINDOW show no progress: they may be keepalives. iSCSI sends 48 bytes
each way every 5 s."""
SERVES: Final = 3
"""If an NBD server has this many context switches in a WINDOW, it may be serving requests, even if
nothing shows a reply."""
HANDSHAKE: Final = 16 * 1024
"""If fewer bytes than this were acknowledged on a connection, data from the server does not count
as a reply, because it may belong to the handshake."""
TALK: Final = 256
"""QEMU's threads exchange at least this many bytes in a WINDOW only if replies arrive. Without
replies, they exchange 8 to 16 bytes a second."""
PEER_NOISE: Final = 16 * 1024
"""Fewer bytes than this, read or written by a server in a WINDOW, show no progress: they may be for
its log."""
CACHE_NOISE: Final = 16 * 1024
"""A page cache that shrinks by fewer bytes than this shows no progress: they may be a page of a
log."""
OWN_IO: Final = 512
"""Fewer bytes than this, read or written by the process itself, show no progress."""

KEEPALIVE_PROTOCOLS: Final = frozenset({"iscsi", "ssh", "rbd", "gluster", "sheepdog", "nfs", ""})
"""Protocols that send messages even if no request makes progress; "" stands for an unknown
protocol."""
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
_SERVER: Final = "peer:"
"""The prefix of the names of all signs of servers."""
_RUNS: Final = "serves"
"""The suffix of the names of signs that show only that a server runs."""
_EXCHANGED: Final = ":exchanged"
"""The suffix of the names of signs for the bytes that a server exchanges with its own servers."""
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
    sent: int | None = None
    """For a sign that moves only if the process has sent nothing since the mark: the bytes that it
    has sent; None for other signs. Keepalives go both ways, but replies only one way."""
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


def _is_on_unknown_mount(thread: Thread) -> bool:
    return not thread.target and sleeps_without_disk(thread)


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


def works(peer: Peer | None) -> bool:
    """Return whether a server without other clients, or a server behind it, still has a request to
    work on."""
    if peer is None or peer.shared is not False:
        return False
    behind = any(
        other.certain and ((other.unread and _may_store(other)) or works(other))
        for other in peer.behind
    )
    return behind or any(map(waits_for_storage, peer.threads or ()))


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
            kind=SignKind.COUNT if _counts(device, listed) else SignKind.QUIET,
            value=device.writes + device.reads,
            text=f"the disk {device.name} completes requests",
            sure=_is_passed_on(device, listed, writing),
        )
        for device in listed
    ]


def _counts(device: Device, devices: Iterable[Device]) -> bool:
    """Return whether completed requests of the device count as the guest's.

    Requests of a lower layer count only if the guest's own device above it (depth 0) may have
    requests in flight. Otherwise, other users of the lower layer may have made the requests.
    """
    return device.depth == 0 or any(
        top.depth == 0 and _may_work(top) and (not device.above or top.number in device.above)
        for top in devices
    )


def _is_passed_on(device: Device, devices: Sequence[Device], writing: bool) -> bool:
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


def mount_signs(
    mounts: Iterable[Mount], wanted: set[str] | None, earlier: Iterable[Mount]
) -> list[Sign]:
    """Return the signs of mounts. `wanted`: the numbers of the relevant mounts; None for all.

    `earlier`: the mounts in the last sample.
    """
    before = {
        server.pid: server
        for mount in earlier
        for server in (mount.servers or ())
        if wanted is None or mount.number in wanted
    }
    signs: dict[str, Sign] = {}
    for place, mount in enumerate(mounts):
        if wanted is not None and mount.number not in wanted:
            continue
        if mount.operations is not None:
            text = f"a mount of type {mount.kind} answers"
            sign = Sign(f"mount:{mount.number or place}", SignKind.COUNT, mount.operations, text)
            signs[sign.name] = sign
        if mount.waiting is not None:
            # Only replies make this number fall, so only a decrease shows progress. The sign is
            # doubtful, because others may use the mount, too.
            text = f"a mount of type {mount.kind} answers requests"
            sign = Sign(f"waiting:{mount.number}", SignKind.COUNT, -mount.waiting, text, sure=False)
            signs[sign.name] = sign
        for server in mount.servers or ():
            for sign in peer_signs(server, before.get(server.pid), ""):
                signs.setdefault(sign.name, replace(sign, sure=sign.sure and mount.certain))
    return list(signs.values())


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


def socket_signs(socket: Socket, protocol: str, before: Peer | None) -> list[Sign]:
    """Return the signs of a connection. `before`: its server in the last sample."""
    chatty = protocol in KEEPALIVE_PROTOCOLS
    signs = []
    if socket.received == 0:
        # Nothing was ever received, so the connection has no sign: the kernel accepts connections
        # and requests even for a hanging server.
        pass
    elif socket.acked is not None and socket.received is not None:
        # Data in the receive queue does not count, because QEMU may never read it: after SIGTERM,
        # QEMU stops reading from consoles.
        read, inode = socket.received - socket.receive_queue, socket.inode
        kind = SignKind.TRAFFIC if chatty else SignKind.COUNT
        name, text = f"bytes:{inode}", "bytes went to or came from the server"
        signs.append(Sign(name, kind, socket.acked + read, text, KEEPALIVE if chatty else 1))
        if socket.acked >= HANDSHAKE:
            signs.append(
                Sign(
                    f"replies:{inode}",
                    kind,
                    read,
                    "the server answered",
                    KEEPALIVE if chatty else 1,
                    is_reply=True,
                )
            )
            if chatty:
                # Other programs than storage send by themselves, too.
                is_storage = protocol != ""
                signs.append(
                    Sign(
                        f"answers:{inode}",
                        SignKind.COUNT,
                        read,
                        "the server answered earlier requests",
                        sure=is_storage,
                        is_reply=is_storage,
                        sent=socket.acked + socket.send_queue,
                    )
                )
    elif socket.family == "unix" or not chatty:
        name, text = f"queue:{socket.inode}", "the queue to the server changed"
        signs.append(Sign(name, SignKind.CHANGE, socket.send_queue, text))
        # Only a shorter queue shows progress: a queue grows even if QEMU reads nothing, because the
        # client of a console or monitor may continue to send.
        name, text = f"unread:{socket.inode}", "it read from the server"
        signs.append(Sign(name, SignKind.COUNT, -socket.receive_queue, text))
    if socket.peer is not None:
        for sign in peer_signs(socket.peer, before, protocol):
            # A server of unknown use may exchange other data, such as the guest's packets.
            is_doubtful = not protocol and sign.name.endswith(_EXCHANGED)
            signs.append(replace(sign, sure=sign.sure and not is_doubtful))
    return signs


def peer_signs(peer: Peer, before: Peer | None, protocol: str) -> list[Sign]:
    """Return the signs of a server, and of the servers that it uses itself."""
    if peer.shared is False:
        signs = _own_server_signs(peer, before)
    else:
        signs = _shared_server_signs(peer, before)
    if protocol == "nbd" and (runs := runs_sign(peer)):
        signs.append(runs)
    earlier = {other.pid: other for other in (before and before.behind) or ()}
    awaited = _awaited_mounts(peer)
    for other in peer.behind:
        of_other = peer_signs(other, earlier.get(other.pid), "")
        if other.serves and awaited is not None and awaited.isdisjoint(other.serves):
            # No call waits for this file system. Perhaps the kernel is just writing cached pages
            # back, which shows nothing about the guest's requests.
            of_other = [replace(sign, kind=SignKind.QUIET) for sign in of_other]
        # If `peer` has other clients, it may use `other` for them, unless `other` stores the
        # guest's image. If it is unknown whether `peer` has other clients, as for a FUSE server,
        # the signs of `other` stay sure: a kill would be worse than a long wait.
        certain = other.certain and not (peer.shared and {*peer.place}.isdisjoint(other.serves))
        signs += [replace(sign, sure=sign.sure and certain) for sign in of_other]
        if not peer.shared and other.certain and not other.serves:
            signs += _reply_sign(peer, other)
    return signs


def runs_sign(peer: Peer) -> Sign | None:
    """Return the sign that an NBD server runs; None if calls show what it does, or if this is
    unknown. NBD has no keepalives, so a server that runs may serve requests, even if no sample
    finds it in a call. This also shows the replies on unix sockets, which have no counters."""
    if peer.threads != () or peer.switches is None:
        return None
    text = f"{_server_title(peer)} serves requests"
    return Sign(f"{_of(peer)}{_RUNS}", SignKind.TRAFFIC, peer.switches, text)


def _reply_sign(peer: Peer, behind: Peer) -> list[Sign]:
    """Return a sign for the replies of a server to another one that uses it, as in replies.py. It
    is needed for unix sockets, and doubtful, because both may also run without a reply."""
    runs = runs_sign(behind)
    if peer.threads != () or peer.switches is None or runs is None:
        return []
    name = f"{_of(peer)}reply:{behind.pid}"
    text = f"{_server_title(behind)} may have answered {peer.command}"
    return [replace(runs, name=name, text=text, sure=False, switches=peer.switches)]


def _awaited_mounts(peer: Peer) -> set[str] | None:
    """Return the file systems for which calls of the server wait; None if they may wait for any."""
    if peer.threads is None or peer.unseen_requests is not False:
        return None
    working = [thread for thread in peer.threads if waits_for_storage(thread)]
    return None if any(not thread.target for thread in working) else {t.mount for t in working}


def _own_server_signs(peer: Peer, before: Peer | None) -> list[Sign]:
    """Return the signs of a server without other clients: bytes that it reads, writes and exchanges
    with its own servers, completed writes of the disks that its calls wait for, and the return of
    its calls on mounts."""
    working = [thread for thread in peer.threads or () if waits_for_storage(thread)]
    # If one of the server's calls is stuck, the server's reads and writes may be its own work,
    # such as a backup job.
    is_stuck = _may_be_stuck(working, before)
    signs = [replace(sign, sure=sign.sure and not is_stuck) for sign in _served_signs(peer)]
    signs += _server_disk_signs(peer, working, awake=not is_stuck)
    if answers := [t for t in working if t.target == "mount" or _is_on_unknown_mount(t)]:
        signs.append(_answers(peer, answers, before))
    if _may_wait_behind(peer, before):
        # The same is true if a server behind this one is stuck.
        signs = [replace(sign, sure=False) for sign in signs]
    return signs


def only_runs(sign: Sign) -> bool:
    """Return whether the sign shows only that a server runs, perhaps for other clients, or to
    repeat a request that fails."""
    return sign.name.startswith(_SERVER) and sign.name.endswith(f":{_RUNS}")


def _shared_server_signs(peer: Peer, before: Peer | None) -> list[Sign]:
    """Return the signs of a server that may have other clients. Only its calls on the storage of
    the guest's image are sure signs, because all other work may be for other clients."""
    working = [thread for thread in peer.threads or () if waits_for_storage(thread)]
    if not peer.place:
        # Nothing shows which calls of the server are for this guest, so no sign is sure.
        signs = [*_served_signs(peer), *_server_disk_signs(peer, working), *_copied_signs(peer)]
        if peer.threads is not None:
            signs.append(_answers(peer, working, before))
        return [replace(sign, sure=False) for sign in signs]
    own_threads = [thread for thread in working if _place(thread) == peer.place]
    is_stuck = _may_be_stuck(own_threads, before)
    # If a call on the image's storage is stuck, assume that it is for this guest, and ignore other
    # work.
    kind = SignKind.QUIET if is_stuck else SignKind.TRAFFIC
    served = [replace(sign, kind=kind, sure=False) for sign in _served_signs(peer)]
    answers = (
        [replace(_answers(peer, own_threads, before), sure=not is_stuck)] if own_threads else []
    )
    unplaced = _server_disk_signs(peer, [thread for thread in working if not thread.target])
    known = _server_disk_signs(peer, own_threads)
    names = {sign.name for sign in known}
    others = [replace(sign, sure=False) for sign in unplaced if sign.name not in names]
    return [*served, *answers, *known, *others]


def _may_be_stuck(threads: Collection[Thread], before: Peer | None) -> bool:
    """Return whether one of a server's threads may not have run since `before`, the server in the
    last sample. If that sample lacks the server, any of the threads may not have run."""
    if before is None:
        return bool(threads)
    earlier = {(thread.tid, thread.switches) for thread in before.threads or ()}
    now = ((thread.tid, thread.switches) for thread in threads if thread.switches is not None)
    return not earlier.isdisjoint(now)


def _may_wait_behind(peer: Peer, before: Peer | None) -> bool:
    """Return whether a server behind this one may not have worked on its requests since `before`,
    this server in the last sample."""
    earlier = {other.pid: other for other in (before and before.behind) or () if other.certain}
    if peer.behind_unknown and earlier.keys() - {other.pid for other in peer.behind}:
        return True
    return any(other.certain and _may_hang(other, earlier.get(other.pid)) for other in peer.behind)


def _may_hang(peer: Peer, before: Peer | None) -> bool:
    """Return whether the server may not have worked on its requests since `before`, the server in
    the last sample."""
    if peer.unread and _may_store(peer):
        now = (peer.unread, peer.switches)
        if before is None or (None not in now and now == (before.unread, before.switches)):
            return True
    if peer.shared is not False:
        # Its calls may be for other clients.
        return False
    working = [thread for thread in peer.threads or () if waits_for_storage(thread)]
    return _may_be_stuck(working, before) or _may_wait_behind(peer, before)


def _may_store(peer: Peer) -> bool:
    """Return whether unread data of the process shows a request. A process without disks may be a
    client that never reads from the server's monitor."""
    return bool(peer.devices or peer.behind)


def _served_signs(peer: Peer) -> list[Sign]:
    """Return signs for the bytes that the server reads, writes, and exchanges with its own
    servers."""
    title, signs = _server_title(peer), list[Sign]()
    if peer.io is not None:
        for what, value in (("written", peer.io.write_bytes), ("read", peer.io.read_bytes)):
            name, text = f"{_of(peer)}{what}", f"{title} has {what}"
            signs.append(Sign(name, SignKind.TRAFFIC, value, text, PEER_NOISE))
    if peer.exchanged:
        name, text = (
            f"{_SERVER}{peer.pid}{_EXCHANGED}",
            f"{title} exchanges bytes with another server",
        )
        # If its connections end again and again, it may send the same requests over each of them.
        sure = peer.ended < BREAKS
        signs.append(Sign(name, SignKind.TRAFFIC, peer.exchanged, text, KEEPALIVE, sure))
    return signs


def _copied_signs(peer: Peer) -> list[Sign]:
    """Return a sign for all bytes that the server's calls read and wrote. Unlike _served_signs, it
    includes bytes in cached pages that were already dirty."""
    if peer.io is None:
        return []
    text = f"{_server_title(peer)} copies bytes"
    copied = peer.io.rchar + peer.io.wchar
    return [Sign(f"{_of(peer)}copied", SignKind.TRAFFIC, copied, text, PEER_NOISE)]


def _server_disk_signs(peer: Peer, working: Sequence[Thread], *, awake: bool = False) -> list[Sign]:
    """Return the signs of the disks for which these threads wait. If a thread's file is unknown, as
    for a worker of an io_uring, the thread may wait for any of the server's disks. The signs of
    several disks are then sure only with `awake`, because a thread that has run was woken by its
    disk.

    `awake`: whether all of these threads have run since the last sample.
    """
    used: set[str] = set()
    counted: set[str] = set()
    sure: set[str] = set()
    writable = [device for device in peer.devices or () if device.writable]
    is_only = sum(device.depth == 0 for device in writable) == 1
    if peer.threads is None:
        # The server's threads may wait for any of these disks, but others may use the disks, too.
        used |= {device.number for device in writable}
        counted |= {device.number for device in writable if _counts(device, writable)}
    for thread in working:
        under = [device for device in peer.devices or () if device.number in thread.disks]
        if is_anywhere := not thread.target and not sleeps_without_disk(thread):
            under = writable
        writing = only_writes(thread)
        used |= {device.number for device in under}
        counted |= {device.number for device in under if _counts(device, under)}
        if is_only or awake or not is_anywhere:
            sure |= {device.number for device in under if _is_passed_on(device, under, writing)}
    return [
        Sign(
            name=f"{_of(peer)}{device.number}",
            kind=SignKind.COUNT if device.number in counted else SignKind.QUIET,
            value=device.writes,
            text=f"the disk {device.name} completes writes of {_server_title(peer)}",
            sure=device.number in sure,
        )
        for device in peer.devices or ()
        if device.number in used
    ]


def _answers(peer: Peer, working: Sequence[Thread], before: Peer | None) -> Sign:
    """Return a sign that moves if one of these waiting threads was woken, or waits no longer."""
    tids = {thread.tid for thread in working}
    places = {_place(thread) for thread in working}
    earlier = None
    if before is not None and before.threads is not None:
        earlier = [
            thread
            for thread in before.threads
            if waits_for_storage(thread) and (thread.tid in tids or _place(thread) in places)
        ]
    text = f"calls of {_server_title(peer)} return"
    return woken_sign(f"{_of(peer)}calls", working, earlier, text)


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


def _place(thread: Thread) -> tuple[str, ...]:
    return thread.disks or ((thread.mount,) if thread.mount else ())


def _server_title(peer: Peer) -> str:
    return f"the server {peer.command} (process {peer.pid})"


def is_of(sign: Sign, peer: Peer | None) -> bool:
    """Return whether the sign is of this server itself, not of the connection to it or of a server
    behind it."""
    return peer is not None and sign.name.startswith(_of(peer))


def _of(peer: Peer) -> str:
    return f"{_SERVER}{peer.pid}:"
