"""The signs of connections, of file systems, and of the servers behind them. Pure.

A server's work shows progress only as far as it may be for this process. So it matters whether the
server has other clients, and whether one of its own calls or servers is stuck.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Final

from qkilld.decision.connections import BREAKS
from qkilld.decision.signs import (
    Sign,
    SignKind,
    counts,
    is_passed_on,
    only_writes,
    sleeps_without_disk,
    waits_for_storage,
    woken_sign,
)
from qkilld.model.sample import Mount, Peer, Socket, Thread

SERVES: Final = 3
"""If an NBD server has this many context switches in a WINDOW, it may be serving requests, even if
nothing shows a reply."""
HANDSHAKE: Final = 16 * 1024
"""If fewer bytes than this were acknowledged on a connection, data from the server does not count
as a reply, because it may belong to the handshake."""
KEEPALIVE: Final = 512
"""Fewer bytes than this in a WINDOW show no progress: they may be keepalives. iSCSI sends 48 bytes
each way every 5 s."""
PEER_NOISE: Final = 16 * 1024
"""Fewer bytes than this, read or written by a server in a WINDOW, show no progress: they may be for
its log."""
KEEPALIVE_PROTOCOLS: Final = frozenset({"iscsi", "ssh", "rbd", "gluster", "sheepdog", "nfs", ""})
"""Protocols that send messages even if no request makes progress; "" stands for an unknown
protocol."""
_SERVER: Final = "peer:"
"""The prefix of the names of all signs of servers."""
_RUNS: Final = "serves"
"""The suffix of the names of signs that show only that a server runs."""
_EXCHANGED: Final = ":exchanged"
"""The suffix of the names of signs for the bytes that a server exchanges with its own servers."""


def _is_on_unknown_mount(thread: Thread) -> bool:
    return not thread.target and sleeps_without_disk(thread)


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
                # A keepalive goes both ways, and a reply to an earlier request goes one way.
                # But the server may send by itself, too, except over iSCSI and NFS.
                is_known = protocol in ("iscsi", "nfs")
                signs.append(
                    Sign(
                        f"answers:{inode}",
                        SignKind.FALL,
                        socket.acked + socket.send_queue - read,
                        "the server answered earlier requests",
                        sure=is_known,
                        is_reply=is_known,
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


def is_own_work(sign: Sign) -> bool:
    """Return whether the sign shows work of a server, which need not be for this process."""
    return sign.name.startswith(_SERVER) and not only_runs(sign)


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
        counted |= {device.number for device in writable if counts(device, writable)}
    for thread in working:
        under = [device for device in peer.devices or () if device.number in thread.disks]
        if is_anywhere := not thread.target and not sleeps_without_disk(thread):
            under = writable
        writing = only_writes(thread)
        used |= {device.number for device in under}
        counted |= {device.number for device in under if counts(device, under)}
        if is_only or awake or not is_anywhere:
            sure |= {device.number for device in under if is_passed_on(device, under, writing)}
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
