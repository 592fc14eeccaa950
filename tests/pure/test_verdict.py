"""The verdict on two samples, as a table. The samples are as measured with real guests."""

from __future__ import annotations

from dataclasses import replace
from signal import SIGABRT, SIGKILL, SIGTERM
from typing import Any

import pytest

from qkilld.decision.risk import risks_of_death, risks_of_exit, risks_of_kill
from qkilld.decision.verdict import SLACK, Assessment, assess
from qkilld.model.constants import Verdict
from qkilld.model.sample import (
    Cgroup,
    Device,
    Io,
    Memory,
    Mount,
    Node,
    Peer,
    Sample,
    Socket,
    Thread,
)

S = 1_000_000
NO_IO = Io(1_000, 1_000, 10, 10, 0, 5_000_000, 0)
IDLE = Sample(
    at=0,
    state="S",
    term_pending=False,
    tracer=0,
    cpu=0,
    switches=100,
    io=NO_IO,
    threads=(),
    rings=0,
    direct=False,
    devices=(Device("8:0", "sda", 1_000, 80_000, 500, 0),),
    mounts=(),
    sockets=(),
    cgroup=None,
    host=Memory(90_000_000, 1_000_000),
    running=0,
    nodes=(),
    formatted=0,
    pluggable=False,
)
DISK = ("8:0",)
FDATASYNC = Thread(
    tid=7,
    name="worker",
    state="D",
    syscall=75,
    io_call=True,
    wchan="folio_wait_bit",
    call="fdatasync",
    descriptor=11,
    target="disk",
    disks=DISK,
    switches=5,
)
ON_MOUNT = replace(
    FDATASYNC, state="S", wchan="request_wait", target="mount", disks=(), mount="0:9"
)
KILLED = replace(
    ON_MOUNT,
    tid=8,
    state="D",
    call="futex",
    io_call=False,
    descriptor=None,
    target="",
    mount="",
    wchan="request_wait_answer",
)
CLOSING = replace(ON_MOUNT, call="close", target="", mount="")
SUBMIT = replace(
    ON_MOUNT,
    call="io_submit",
    descriptor=None,
    target="",
    mount="",
    wchan="request_wait_answer",
)
ON_RING = replace(FDATASYNC, call="io_uring_enter", descriptor=None, target="", disks=())
FULL_PIPE = replace(ON_MOUNT, call="write", io_call=False, descriptor=2, target="pipe", mount="")
FUSE = Mount("fuse", None, None, "0:9")
NFS = Mount("nfs4", 10, 0, "0:9")
NBD = Node("disk1", "nbd")
ISCSI = Node("lun", "iscsi")
UNIX = Socket(11, "unix", True, 0, 0, role="storage", node="disk1")
TCP = Socket(12, "tcp", True, 0, 0, unacked=0, acked=1_000, received=500, role="storage")
OF_NBD, OF_ISCSI = replace(TCP, node="disk1"), replace(TCP, node="lun")
STREAM = replace(TCP, inode=14, role="other")
STRANGER = replace(TCP, inode=15, role="unknown")
QMP = Socket(13, "unix", client=False, send_queue=0, receive_queue=0, role="other")
OWN_DIRTY = 1_000_000
OWN = Cgroup(True, OWN_DIRTY, 50_000, 7_000, 70, False)
TOP = Device("7:0", "loop0", 10, 0, 0, 0, depth=0)
BELOW = Device("8:0", "sda", 100, 0, 0, 3, depth=1)
UNDER_TOP = replace(BELOW, above=("7:0",))
HUNG = Device("7:4", "loop4", 10, 0, 0, 1)
QUIET = replace(HUNG, in_flight=0)
ON_HUNG = replace(FDATASYNC, disks=("7:4",))
NOWHERE = replace(FDATASYNC, call="unlink", descriptor=None, target="", disks=())
BESIDE = Device("254:0", "vda", 100, 0, 0, 2)
ON_TOP = replace(FDATASYNC, disks=("7:0", "8:0"))
BUSY_DISK = (Device("8:0", "sda", 1_900, 99_000, 900, 4),)
SERVER = Peer(90, "nbdkit", (), 1_000, NO_IO, (Device("7:1", "loop1", 5, 0, 0, 0),), shared=False)
WRITING = replace(FDATASYNC, tid=91, disks=("7:1",))
SHARED = replace(SERVER, shared=True)
ON_LAYERS = replace(FDATASYNC, tid=93, disks=("253:0", "8:0"))
UPPER, LOWER = Device("253:0", "dm-0", 5, 0, 0, 0), Device("8:0", "sda", 100, 0, 0, 3, depth=1)
UPPER_BUSY, LOWER_WROTE = replace(UPPER, in_flight=1), replace(LOWER, writes=900)
SERVED_DISK = (Device("7:1", "loop1", 9, 0, 0, 1),)
WROTE = replace(NO_IO, write_bytes=9_000_000)
ALSO_ON_MOUNT = replace(ON_MOUNT, tid=92)
HOLDS = replace(SHARED, threads=(ON_MOUNT,), place=("0:9",))
TWO_DISKS = (*(SERVER.devices or ()), Device("7:2", "loop2", 5, 0, 0, 0))
HELD = replace(FULL_PIPE, state="t", call="", descriptor=None, target="", wchan="ptrace_stop")
BEHIND = replace(SERVER, pid=95, command="qemu-nbd")
STUCK_SERVER = replace(SERVER, threads=(WRITING,))
PROXY = replace(SERVER, pid=98)
UNREAD = replace(SERVER, pid=97, unread=28)
BLIND_SERVERS = [
    replace(SERVER, threads=None, shared=shared, place=place)
    for shared, place in ((False, ()), (True, ()), (True, ("7:1",)))
]


def served(peer: Peer) -> dict[str, Any]:
    return {"nodes": (NBD,), "sockets": (replace(UNIX, peer=peer),)}


def beside(peer: Peer) -> dict[str, Any]:
    """Two connections of unknown use: to `peer`, and to an unshared server whose call hangs."""
    stuck = replace(UNIX, inode=98, node="", role="unknown", peer=replace(STUCK_SERVER, pid=96))
    return {"sockets": (replace(UNIX, node="", role="unknown", peer=peer), stuck)}


def two_nodes(peer: Peer, other: Peer) -> dict[str, Any]:
    """Two disks on NBD, on these servers."""
    return {
        "nodes": (NBD, replace(NBD, name="disk2")),
        "sockets": (
            replace(UNIX, peer=peer),
            replace(UNIX, inode=97, node="disk2", peer=other),
        ),
    }


def verdict(before: dict[str, Any], now: dict[str, Any], seconds: float = 1) -> Verdict:
    first = assess(None, replace(IDLE, **before))
    return assess(first, replace(IDLE, at=int(seconds * S), **{**before, **now})).verdict


MORE = {
    "wrote": {"io": replace(NO_IO, write_bytes=5_065_536)},
    "read": {"io": replace(NO_IO, read_bytes=4_096)},
    "write(2)": {"io": replace(NO_IO, wchar=66_536)},
    "eventfd": {"io": replace(NO_IO, wchar=1_016, syscw=12)},
}


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        # Nothing outstanding
        ({}, {}, Verdict.IDLE),
        ({}, {"switches": 5_000}, Verdict.IDLE),
        ({}, MORE["eventfd"], Verdict.IDLE),
        ({}, MORE["wrote"], Verdict.FLUSHING),
        # A line of 104 bytes in QEMU's log, about a connection that it gave up
        ({}, {"io": replace(NO_IO, write_bytes=5_004_096, wchar=1_104)}, Verdict.IDLE),
        ({}, {"io": replace(NO_IO, write_bytes=5_004_096, wchar=5_096)}, Verdict.FLUSHING),
        # wchar does not count a write through an io_uring
        ({}, {"io": replace(NO_IO, write_bytes=5_004_096, wchar=1_016)}, Verdict.FLUSHING),
        ({}, MORE["read"], Verdict.FLUSHING),
        ({}, MORE["write(2)"], Verdict.FLUSHING),
        ({"nodes": (NBD,), "sockets": (UNIX,)}, MORE["write(2)"], Verdict.STORAGE_WAIT),
        ({"sockets": (QMP,)}, {"switches": 200}, Verdict.IDLE),
        # fdatasync of a full page cache: only the disk moves
        ({"threads": (FDATASYNC,)}, {}, Verdict.STORAGE_WAIT),
        ({"threads": (FDATASYNC,)}, {"devices": BUSY_DISK}, Verdict.FLUSHING),
        ({"threads": (FDATASYNC,)}, {"threads": ()}, Verdict.FLUSHING),
        ({"threads": (FDATASYNC,)}, {"threads": (replace(FDATASYNC, tid=8),)}, Verdict.FLUSHING),
        # The host's page cache includes pages of all other processes
        ({"threads": (FDATASYNC,)}, {"host": Memory(80_000_000, 0)}, Verdict.STORAGE_WAIT),
        (
            {"threads": (ON_MOUNT,), "mounts": (NFS,)},
            {"mounts": (replace(NFS, operations=11),)},
            Verdict.FLUSHING,
        ),
        # The mount of another image shows nothing about this image
        (
            {"threads": (ON_MOUNT,), "mounts": (FUSE, replace(NFS, number="0:8"))},
            {"mounts": (FUSE, replace(NFS, number="0:8", operations=11))},
            Verdict.STORAGE_WAIT,
        ),
        # FUSE has no counters, but only a reply wakes the thread
        ({"threads": (ON_MOUNT,), "mounts": (FUSE,)}, {}, Verdict.STORAGE_WAIT),
        # The guest's writes to another disk do not matter
        ({"threads": (ON_MOUNT,), "mounts": (FUSE,)}, MORE["wrote"], Verdict.STORAGE_WAIT),
        (
            {"threads": (ON_MOUNT,), "mounts": (FUSE,)},
            {"threads": (replace(ON_MOUNT, switches=6),)},
            Verdict.FLUSHING,
        ),
        ({"threads": (CLOSING,), "mounts": (FUSE,), "devices": ()}, {}, Verdict.STORAGE_WAIT),
        # A call without a descriptor sleeps in FUSE. The disk belongs to another image
        (
            {"threads": (SUBMIT,), "mounts": (FUSE,)},
            {"devices": BUSY_DISK},
            Verdict.STORAGE_WAIT,
        ),
        (
            {"threads": (SUBMIT,), "mounts": (FUSE,)},
            {"threads": (replace(SUBMIT, switches=6),)},
            Verdict.FLUSHING,
        ),
        # A disk has a request in flight, so writes to another disk do not matter. If no request is
        # in flight, one may wait in a layer above the disk, or the disk may have no counters
        ({"threads": (ON_HUNG,), "devices": (HUNG,)}, MORE["wrote"], Verdict.STORAGE_WAIT),
        (
            {"threads": (ON_HUNG,), "devices": (HUNG,), "cgroup": OWN},
            {"cgroup": replace(OWN, written=8_000)},
            Verdict.STORAGE_WAIT,
        ),
        ({"threads": (ON_HUNG,), "devices": (QUIET,)}, MORE["wrote"], Verdict.FLUSHING),
        (
            {"threads": (ON_HUNG,), "devices": (replace(QUIET, accounting=True),)},
            MORE["wrote"],
            Verdict.UNKNOWN,
        ),
        # The thread waits until the page cache has room, perhaps on all disks
        (
            {"threads": (replace(ON_HUNG, wchan="balance_dirty_pages"),), "devices": (HUNG,)},
            MORE["wrote"],
            Verdict.FLUSHING,
        ),
        ({"rings": 1, "devices": (HUNG,)}, MORE["wrote"], Verdict.UNKNOWN),
        ({"direct": True, "devices": (HUNG,), "completions": 7}, MORE["wrote"], Verdict.UNKNOWN),
        ({"direct": True, "devices": (QUIET,), "completions": 7}, MORE["wrote"], Verdict.FLUSHING),
        # The file of a call is unknown, so the call may wait for any of several disks
        ({"threads": (NOWHERE,)}, {"devices": BUSY_DISK}, Verdict.FLUSHING),
        (
            {"threads": (NOWHERE,), "devices": (QUIET, BESIDE)},
            {"devices": (QUIET, replace(BESIDE, writes=900))},
            Verdict.UNKNOWN,
        ),
        (
            {"threads": (NOWHERE,), "mounts": (FUSE,)},
            {"devices": BUSY_DISK},
            Verdict.UNKNOWN,
        ),
        ({"threads": (NOWHERE,), "devices": (QUIET, UPPER)}, MORE["wrote"], Verdict.FLUSHING),
        ({"threads": (NOWHERE,), "devices": (HUNG, BESIDE)}, MORE["wrote"], Verdict.UNKNOWN),
        # One image hangs. Another, healthy image is on a disk to which neighbours write
        (
            {"threads": (ON_MOUNT,), "mounts": (FUSE,)},
            {"devices": BUSY_DISK, "switches": 300},
            Verdict.STORAGE_WAIT,
        ),
        # Writes of a neighbour do not matter if the guest does not wait for the disk
        ({}, {"devices": BUSY_DISK}, Verdict.IDLE),
        ({}, {"host": Memory(10_000_000, 0)}, Verdict.IDLE),
        ({"nodes": (NBD,), "sockets": (UNIX,)}, {"devices": BUSY_DISK}, Verdict.STORAGE_WAIT),
        # The guest's writes may be counted elsewhere, so a standstill of its control group's
        # counters proves nothing
        (
            {"threads": (FDATASYNC,), "cgroup": OWN},
            {"devices": BUSY_DISK},
            Verdict.FLUSHING,
        ),
        (
            {"threads": (FDATASYNC,), "cgroup": OWN},
            {"cgroup": replace(OWN, written=8_000)},
            Verdict.FLUSHING,
        ),
        (
            {"threads": (FDATASYNC,), "cgroup": OWN},
            {"cgroup": replace(OWN, dirty=900_000)},
            Verdict.FLUSHING,
        ),
        (
            {"cgroup": replace(OWN, own=False)},
            {"cgroup": replace(OWN, own=False, written=9_000)},
            Verdict.IDLE,
        ),
        # A disk is stuck. A page of QEMU's log and the end of a pool thread are not progress
        (
            {"threads": (FDATASYNC,), "cgroup": replace(OWN, written=None)},
            {"cgroup": replace(OWN, written=None, dirty=OWN_DIRTY - 4096), "switches": 101},
            Verdict.STORAGE_WAIT,
        ),
        # NBD: a node may wait for a reply, connected or not
        ({"nodes": (NBD,), "sockets": (UNIX,)}, {}, Verdict.STORAGE_WAIT),
        ({"nodes": (NBD,)}, {}, Verdict.STORAGE_WAIT),
        ({"nodes": (NBD,), "sockets": None}, {}, Verdict.STORAGE_WAIT),
        # Other wake-ups and transfers are not replies
        ({"nodes": (NBD,), "sockets": (UNIX,)}, {"switches": 900}, Verdict.STORAGE_WAIT),
        (
            {"nodes": (NBD,), "sockets": (UNIX, STREAM)},
            {"sockets": (UNIX, replace(STREAM, received=90_000))},
            Verdict.STORAGE_WAIT,
        ),
        (
            {"nodes": (NBD,), "sockets": (replace(UNIX, send_queue=67_840),)},
            {"sockets": (replace(UNIX, send_queue=100),)},
            Verdict.FLUSHING,
        ),
        (
            {"nodes": (NBD,), "sockets": (OF_NBD,)},
            {"sockets": (replace(OF_NBD, received=516),)},
            Verdict.FLUSHING,
        ),
        (
            {"nodes": (NBD,), "sockets": (OF_NBD,)},
            {"sockets": (replace(OF_NBD, received=516, receive_queue=16),)},
            Verdict.STORAGE_WAIT,
        ),
        # The return of a server counts as progress once, before QEMU reconnects
        (
            {"nodes": (replace(NBD, served=False),)},
            {"nodes": (replace(NBD, served=True),)},
            Verdict.FLUSHING,
        ),
        (
            {"nodes": (replace(NBD, served=True),)},
            {"nodes": (replace(NBD, served=False),)},
            Verdict.STORAGE_WAIT,
        ),
        # iSCSI answers keepalives although its storage is dead
        (
            {"nodes": (ISCSI,), "sockets": (OF_ISCSI,)},
            {"sockets": (replace(OF_ISCSI, acked=1_048, received=548),)},
            Verdict.STORAGE_WAIT,
        ),
        (
            {"nodes": (ISCSI,), "sockets": (OF_ISCSI,)},
            {"sockets": (replace(OF_ISCSI, acked=5_144),)},
            Verdict.FLUSHING,
        ),
        # A connection of unknown purpose may be storage
        ({"sockets": (STRANGER,)}, {}, Verdict.STORAGE_WAIT),
        (
            {"sockets": (STRANGER,)},
            {"sockets": (replace(STRANGER, acked=9_000),)},
            Verdict.FLUSHING,
        ),
        # The calls, the disks and the work of the server at the other end
        (served(STUCK_SERVER), {}, Verdict.STORAGE_WAIT),
        (served(STUCK_SERVER), served(replace(STUCK_SERVER, switches=9_000)), Verdict.STORAGE_WAIT),
        (
            served(STUCK_SERVER),
            served(replace(STUCK_SERVER, devices=(Device("7:1", "loop1", 6, 0, 0, 0),))),
            Verdict.FLUSHING,
        ),
        (
            {**served(SERVER), "switches": 100},
            {**served(replace(SERVER, switches=1_009)), "switches": 101},
            Verdict.FLUSHING,
        ),
        # A worker of an io_uring waits for a file that is not shown
        (
            served(replace(SERVER, threads=(ON_RING,))),
            served(replace(SERVER, threads=(ON_RING,), devices=SERVED_DISK)),
            Verdict.FLUSHING,
        ),
        (
            served(replace(SERVER, threads=(ON_RING,))),
            served(replace(SERVER, threads=(ON_RING,))),
            Verdict.STORAGE_WAIT,
        ),
        (
            served(replace(SERVER, threads=(ON_RING,), devices=(*TWO_DISKS,))),
            served(replace(SERVER, threads=(ON_RING,), devices=(*SERVED_DISK, TWO_DISKS[1]))),
            Verdict.UNKNOWN,
        ),
        (
            served(replace(HOLDS, threads=(ON_RING,), place=("7:1",))),
            served(replace(HOLDS, threads=(ON_RING,), place=("7:1",), devices=SERVED_DISK)),
            Verdict.UNKNOWN,
        ),
        (
            served(replace(SERVER, threads=(replace(ON_RING, wchan="request_wait_answer"),))),
            served(
                replace(
                    SERVER,
                    threads=(replace(ON_RING, wchan="request_wait_answer", switches=6),),
                )
            ),
            Verdict.FLUSHING,
        ),
        # A call of the server hangs, and the server writes something of its own
        (
            served(replace(SERVER, threads=(ON_MOUNT,))),
            served(replace(SERVER, threads=(ON_MOUNT,), io=WROTE)),
            Verdict.UNKNOWN,
        ),
        # A server that does not reply may only repeat failing requests, like nbdkit's filter retry
        (served(SERVER), served(replace(SERVER, switches=1_009)), Verdict.UNKNOWN),
        (served(SERVER), served(replace(SERVER, switches=1_001)), Verdict.STORAGE_WAIT),
        (
            served(SERVER),
            served(replace(SERVER, io=replace(NO_IO, write_bytes=5_100_000))),
            Verdict.FLUSHING,
        ),
        # A server's log, and its work for others, are not progress for us
        (
            served(SERVER),
            served(replace(SERVER, io=replace(NO_IO, write_bytes=5_004_096))),
            Verdict.STORAGE_WAIT,
        ),
        # Writes of a shared server may be for this guest
        (served(SHARED), served(replace(SHARED, switches=9_000)), Verdict.STORAGE_WAIT),
        (served(SHARED), served(replace(SHARED, io=WROTE)), Verdict.UNKNOWN),
        (
            served(replace(SHARED, threads=(WRITING,))),
            served(replace(SHARED, threads=(WRITING,), devices=SERVED_DISK)),
            Verdict.UNKNOWN,
        ),
        # They are not for this guest if the storage of its image is known and a call on this
        # storage is stuck
        (served(HOLDS), served(replace(HOLDS, io=WROTE)), Verdict.STORAGE_WAIT),
        (
            served(replace(HOLDS, place=("0:8",))),
            served(replace(HOLDS, place=("0:8",), io=WROTE)),
            Verdict.UNKNOWN,
        ),
        # One of two such calls returns. It may be for another client
        (
            served(replace(HOLDS, threads=(ON_MOUNT, ALSO_ON_MOUNT))),
            served(replace(HOLDS, threads=(ON_MOUNT,))),
            Verdict.UNKNOWN,
        ),
        (served(HOLDS), served(replace(HOLDS, threads=(ALSO_ON_MOUNT,))), Verdict.FLUSHING),
        # Such a call does not explain a request in flight elsewhere
        (
            {**served(SHARED), "threads": (ON_MOUNT,), "mounts": (FUSE,)},
            served(replace(SHARED, io=WROTE)),
            Verdict.STORAGE_WAIT,
        ),
        # The server's call waits for the upper disk, which has passed no request to the lower one
        (
            served(replace(SERVER, threads=(ON_LAYERS,), devices=(UPPER, LOWER))),
            served(replace(SERVER, threads=(ON_LAYERS,), devices=(UPPER, LOWER_WROTE))),
            Verdict.STORAGE_WAIT,
        ),
        (
            served(replace(SERVER, threads=(ON_LAYERS,), devices=(UPPER_BUSY, LOWER))),
            served(replace(SERVER, threads=(ON_LAYERS,), devices=(UPPER_BUSY, LOWER_WROTE))),
            Verdict.FLUSHING,
        ),
        # The work of a shared server for others does not explain why a disk does not complete
        # requests
        (
            {**served(SHARED), "direct": True, "devices": (HUNG,)},
            served(replace(SHARED, io=WROTE)),
            Verdict.STORAGE_WAIT,
        ),
        (
            {**served(SHARED), "direct": True, "devices": (replace(HUNG, in_flight=0),)},
            served(replace(SHARED, io=WROTE)),
            Verdict.UNKNOWN,
        ),
        ({**served(SHARED), "rings": 1}, served(replace(SHARED, io=WROTE)), Verdict.STORAGE_WAIT),
        # A timer does not keep QEMU from exiting
        (
            {**served(SHARED), "rings": 1, "timers": 1},
            served(replace(SHARED, io=WROTE)),
            Verdict.UNKNOWN,
        ),
        # A server's progress does not explain why another server does not read its request. The
        # same is true if a proxy without other clients has passed the request on to that server
        (
            two_nodes(SHARED, UNREAD),
            two_nodes(replace(SHARED, io=WROTE), UNREAD),
            Verdict.STORAGE_WAIT,
        ),
        (
            two_nodes(SHARED, replace(PROXY, behind=(UNREAD,))),
            two_nodes(replace(SHARED, io=WROTE), replace(PROXY, behind=(UNREAD,))),
            Verdict.STORAGE_WAIT,
        ),
        (
            two_nodes(SHARED, replace(PROXY, behind=(replace(STUCK_SERVER, pid=97),))),
            two_nodes(
                replace(SHARED, io=WROTE), replace(PROXY, behind=(replace(STUCK_SERVER, pid=97),))
            ),
            Verdict.STORAGE_WAIT,
        ),
        (
            two_nodes(SHARED, PROXY),
            two_nodes(replace(SHARED, io=WROTE), PROXY),
            Verdict.UNKNOWN,
        ),
        (
            two_nodes(SHARED, replace(PROXY, behind=(replace(UNREAD, unread=0),))),
            two_nodes(
                replace(SHARED, io=WROTE), replace(PROXY, behind=(replace(UNREAD, unread=0),))
            ),
            Verdict.UNKNOWN,
        ),
        (
            two_nodes(SHARED, replace(PROXY, behind=(replace(UNREAD, certain=False),))),
            two_nodes(
                replace(SHARED, io=WROTE), replace(PROXY, behind=(replace(UNREAD, certain=False),))
            ),
            Verdict.UNKNOWN,
        ),
        (
            two_nodes(SHARED, replace(PROXY, shared=True, behind=(UNREAD,))),
            two_nodes(replace(SHARED, io=WROTE), replace(PROXY, shared=True, behind=(UNREAD,))),
            Verdict.UNKNOWN,
        ),
        # It is unknown whether the server behind has run since it got the request
        *(
            (
                served(replace(PROXY, behind=(replace(UNREAD, switches=before),))),
                served(replace(PROXY, behind=(replace(UNREAD, switches=now),), io=WROTE)),
                Verdict.UNKNOWN if now else Verdict.FLUSHING,
            )
            for before, now in ((None, None), (1_000, 1_000))
        ),
        # A server's progress does not explain a pipe that nobody reads
        (
            {**served(SHARED), "threads": (FULL_PIPE,)},
            served(replace(SHARED, io=WROTE)),
            Verdict.STORAGE_WAIT,
        ),
        # A server's progress does not explain why the call of an unshared server does not return
        (beside(SHARED), beside(replace(SHARED, io=WROTE)), Verdict.STORAGE_WAIT),
        # An unshared server, whose file system has no counters
        (
            served(replace(SERVER, threads=(ON_MOUNT,))),
            served(replace(SERVER, threads=(replace(ON_MOUNT, switches=6),))),
            Verdict.FLUSHING,
        ),
        (
            served(replace(SERVER, threads=(ON_MOUNT,))),
            served(replace(SERVER, threads=(ON_MOUNT,), switches=9_000)),
            Verdict.STORAGE_WAIT,
        ),
        # A server forwards to another one, which writes
        (
            served(replace(SERVER, behind=(BEHIND,))),
            served(replace(SERVER, behind=(replace(BEHIND, io=WROTE),))),
            Verdict.FLUSHING,
        ),
        (
            served(replace(SERVER, behind=(replace(BEHIND, shared=True),))),
            served(replace(SERVER, behind=(replace(BEHIND, shared=True, io=WROTE),))),
            Verdict.UNKNOWN,
        ),
        # The first server may forward requests of others, unless the second one has the file system
        # of the guest's image
        *(
            (
                served(replace(HOLDS, behind=(other,))),
                served(replace(HOLDS, behind=(replace(other, io=WROTE),))),
                expected,
            )
            for other, expected in (
                (BEHIND, Verdict.UNKNOWN),
                (replace(BEHIND, serves=("0:8",)), Verdict.UNKNOWN),
                (replace(BEHIND, serves=("0:9",)), Verdict.FLUSHING),
            )
        ),
        # A new connection that only the server's kernel has accepted
        (
            {"nodes": (ISCSI,), "sockets": (replace(OF_ISCSI, acked=0, received=0),)},
            {"sockets": (replace(OF_ISCSI, acked=900, received=0),)},
            Verdict.STORAGE_WAIT,
        ),
        # If the server is in another network namespace, only transfers between its threads are
        # visible
        (
            {"nodes": (NBD,), "sockets": None},
            {"io": replace(NO_IO, wchar=1_300)},
            Verdict.FLUSHING,
        ),
        (
            {"nodes": (NBD,), "sockets": None},
            {"io": replace(NO_IO, wchar=1_016)},
            Verdict.STORAGE_WAIT,
        ),
        # QEMU may wait for storage that was added through the monitor, and nothing shows this
        ({"pluggable": True}, {}, Verdict.UNKNOWN),
        ({"pluggable": True, "state": "T"}, {}, Verdict.STOPPED),
        # Layers: lower disks count while the top disk has requests in flight
        (
            {"threads": (ON_TOP,), "devices": (TOP, BELOW)},
            {"devices": (TOP, replace(BELOW, writes=200))},
            Verdict.STORAGE_WAIT,
        ),
        (
            {"threads": (ON_TOP,), "devices": (replace(TOP, in_flight=1), BELOW)},
            {"devices": (replace(TOP, in_flight=1), replace(BELOW, writes=200))},
            Verdict.FLUSHING,
        ),
        (
            {"threads": (ON_TOP,), "devices": (TOP, BELOW)},
            {"devices": (replace(TOP, writes=11), BELOW)},
            Verdict.FLUSHING,
        ),
        # Asynchronous I/O
        ({"rings": 3}, {}, Verdict.STORAGE_WAIT),
        ({"rings": 3}, {"switches": 101}, Verdict.STORAGE_WAIT),
        ({"rings": 3}, {"rings": 2}, Verdict.FLUSHING),
        ({"rings": 3}, {"rings": 4}, Verdict.STORAGE_WAIT),
        ({"rings": 3}, {"devices": BUSY_DISK}, Verdict.FLUSHING),
        ({"rings": 3, "timers": 1}, {"devices": BUSY_DISK}, Verdict.FLUSHING),
        # The requests may be timers. Completions of a disk show nothing about timers
        ({"rings": 1, "timers": 1}, {"devices": BUSY_DISK}, Verdict.UNKNOWN),
        ({"rings": 1, "timers": 1}, {}, Verdict.UNKNOWN),
        ({"rings": 1, "timers": 1}, {"io": WROTE}, Verdict.FLUSHING),
        ({"rings": 2, "timers": 2}, {"rings": 1, "timers": 1}, Verdict.FLUSHING),
        ({"rings": 1, "timers": 1, "devices": (HUNG,)}, {}, Verdict.STORAGE_WAIT),
        # A disk has a request in flight and completes none. Completions of the other disk are those
        # of a neighbour
        (
            {"rings": 1, "devices": (HUNG, BESIDE)},
            {"devices": (HUNG, replace(BESIDE, writes=900))},
            Verdict.STORAGE_WAIT,
        ),
        (
            {"rings": 1, "devices": (HUNG, BESIDE)},
            {"devices": (replace(HUNG, writes=11), replace(BESIDE, in_flight=0))},
            Verdict.FLUSHING,
        ),
        # The same is true of completions of a disk whose images do not use io_uring
        (
            {"rings": 1, "devices": (BESIDE,), "ringless": (BESIDE.number,)},
            {"devices": (replace(BESIDE, writes=900),)},
            Verdict.STORAGE_WAIT,
        ),
        (
            {"rings": 1, "devices": (HUNG, BESIDE), "ringless": (HUNG.number,)},
            {"devices": (HUNG, replace(BESIDE, writes=900))},
            Verdict.FLUSHING,
        ),
        # The same is true of a disk below another image. But a disk that is also below the disk
        # with the request may be completing this request
        (
            {"rings": 1, "devices": (HUNG, TOP, UNDER_TOP)},
            {"devices": (HUNG, TOP, replace(UNDER_TOP, writes=900))},
            Verdict.STORAGE_WAIT,
        ),
        (
            {"rings": 1, "devices": (HUNG, TOP, replace(UNDER_TOP, above=("7:0", "7:4")))},
            {"devices": (HUNG, TOP, replace(UNDER_TOP, above=("7:0", "7:4"), writes=900))},
            Verdict.FLUSHING,
        ),
        (
            {"rings": 1, "devices": (TOP, UPPER_BUSY, UNDER_TOP)},
            {"devices": (TOP, UPPER_BUSY, replace(UNDER_TOP, writes=900))},
            Verdict.STORAGE_WAIT,
        ),
        # If rings are unreadable but something moves, the process makes progress
        ({"rings": None, "nodes": (NBD,)}, MORE["wrote"], Verdict.FLUSHING),
        # For AIO, qkilld can read only the tail of the ring and whether requests are possible
        ({"direct": True}, {}, Verdict.STORAGE_WAIT),
        ({"direct": True}, {"switches": 101}, Verdict.STORAGE_WAIT),
        ({"direct": True}, {"devices": BUSY_DISK}, Verdict.STORAGE_WAIT),
        ({"direct": True, "completions": 7}, {"completions": 8}, Verdict.FLUSHING),
        ({"direct": True, "completions": 7}, {"completions": 2}, Verdict.FLUSHING),
        # The process is stopped
        ({"state": "T"}, MORE["wrote"], Verdict.STOPPED),
        ({"state": "T", "term_pending": True}, {}, Verdict.STOPPED),
        ({"state": "t", "tracer": 9}, {}, Verdict.STOPPED),
        ({"cgroup": replace(OWN, frozen=True)}, {}, Verdict.STOPPED),
        # The process is dead, but a debugger keeps its parent from reaping it
        ({"state": "Z"}, {}, Verdict.ZOMBIE),
        ({"state": "Z", "threads": (FDATASYNC,)}, {}, Verdict.STORAGE_WAIT),
        # The process is exiting. With much memory, this takes long, and no signal makes it faster
        ({}, {"exiting": True}, Verdict.FLUSHING),
        # The process is exiting, but one of its threads waits for storage, as after SIGKILL
        (
            {"threads": (ON_MOUNT,), "mounts": (FUSE,)},
            {"state": "Z", "exiting": True, "threads": (KILLED,)},
            Verdict.STORAGE_WAIT,
        ),
        (
            {"state": "Z", "exiting": True, "threads": (KILLED,), "mounts": (FUSE,)},
            {"threads": (replace(KILLED, switches=6),)},
            Verdict.FLUSHING,
        ),
        ({"state": "Z", "exiting": True, "cpu": 100}, {"cpu": 101}, Verdict.FLUSHING),
        ({"state": "Z", "exiting": True}, {"exiting": False}, Verdict.ZOMBIE),
        ({"cpu": 100}, {"cpu": 101}, Verdict.IDLE),
        ({"dumping": True, "cpu": 100}, {"cpu": 101}, Verdict.FLUSHING),
        # The thread waits in a call that is not for storage
        ({"threads": (FULL_PIPE,)}, {}, Verdict.BLOCKED),
        ({"threads": (FULL_PIPE,)}, {"devices": BUSY_DISK, "switches": 200}, Verdict.BLOCKED),
        # Only the reader of the pipe wakes the thread
        (
            {"threads": (FULL_PIPE,)},
            {"threads": (replace(FULL_PIPE, switches=6),)},
            Verdict.FLUSHING,
        ),
        # A debugger holds one thread
        (
            {"threads": (HELD,)},
            {"threads": (replace(HELD, switches=6),), "devices": BUSY_DISK},
            Verdict.BLOCKED,
        ),
        # The guest's qcow2 image may have a backing file on a server that was lost
        ({"formatted": 1}, {}, Verdict.UNKNOWN),
        ({"formatted": 1, "state": "T"}, {}, Verdict.STOPPED),
        ({"threads": (Thread(7, "qemu", "D", 1, False, "usb_kill_urb"),)}, {}, Verdict.BLOCKED),
        ({"term_pending": True}, {}, Verdict.BLOCKED),
        # The process wants a processor
        ({"running": 1, "cpu": 100}, {"cpu": 200}, Verdict.UNKNOWN),
        ({"running": 1, "cpu": 100}, {}, Verdict.UNKNOWN),
        # Unreadable
        ({"io": None}, {}, Verdict.UNKNOWN),
        ({"threads": None}, {}, Verdict.UNKNOWN),
        ({"threads": None}, {"devices": BUSY_DISK}, Verdict.UNKNOWN),
        ({"sockets": None}, {}, Verdict.UNKNOWN),
        ({"rings": None}, {}, Verdict.UNKNOWN),
        ({"nodes": None}, {}, Verdict.UNKNOWN),
        ({"sockets": None}, MORE["wrote"], Verdict.FLUSHING),
        ({"io": None, "threads": (FDATASYNC,)}, {}, Verdict.STORAGE_WAIT),
        ({"devices": None, "host": None, "cgroup": None, "mounts": None}, {}, Verdict.IDLE),
    ],
)
def test_verdicts(before: dict[str, Any], now: dict[str, Any], expected: Verdict) -> None:
    assert verdict(before, now) is expected


def test_one_sample_gives_no_verdict_of_an_idle_process() -> None:
    first = assess(None, IDLE)
    assert first.verdict is Verdict.UNKNOWN
    assert first.outstanding is False
    assert assess(None, replace(IDLE, threads=(FDATASYNC,))).verdict is Verdict.STORAGE_WAIT


def test_bursts_five_seconds_apart_are_one_flush() -> None:
    now = assess(None, replace(IDLE, threads=(FDATASYNC,)))
    for second in range(1, 31):
        writes = 1_000 + second // 5
        devices = (Device("8:0", "sda", writes, 80_000, 500, 1),)
        now = assess(now, replace(IDLE, at=second * S, threads=(FDATASYNC,), devices=devices))
        if second >= 5:
            assert now.verdict is Verdict.FLUSHING
    for second in range(31, 40):
        now = assess(now, replace(now.last, at=second * S))
    assert now.verdict is Verdict.STORAGE_WAIT
    assert now.progress_at == 30 * S


def test_when_something_was_outstanding_last() -> None:
    now = assess(None, replace(IDLE, threads=(FDATASYNC,)))
    now = assess(now, replace(IDLE, at=1 * S, threads=(FDATASYNC,)))
    now = assess(now, replace(IDLE, at=2 * S))
    assert (now.outstanding, now.outstanding_at) == (False, 1 * S)
    now = assess(now, replace(IDLE, at=3 * S, threads=None))
    assert (now.outstanding, now.outstanding_at) == (None, 1 * S)
    now = assess(now, replace(IDLE, at=4 * S, threads=None))
    assert (now.outstanding, now.outstanding_at) == (None, 4 * S)


BLIND = {"io": None, "threads": None, "sockets": None}
ON_NBD = {"nodes": (NBD,), "sockets": (UNIX,)}


@pytest.mark.parametrize("unread", [BLIND, {"sockets": None}])
@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        # One unreadable sample proves as little as a longer interval between samples.
        ("idle unread idle", None),
        ("wait idle unread idle", 0),
        ("idle unread idle unread idle", None),
        # While samples were unreadable, an earlier wait may have ended, or a new one may have begun
        # and ended.
        ("wait unread idle", 1),
        ("idle unread unread idle", 2),
        ("idle starved starved idle", 2),
        ("unread idle", 0),
    ],
)
def test_when_a_wait_may_have_ended(
    shown: str, expected: int | None, unread: dict[str, Any]
) -> None:
    kinds = {"idle": {}, "wait": ON_NBD, "unread": unread, "starved": {"running": 1}}
    now = None
    for second, word in enumerate(shown.split()):
        now = assess(now, replace(IDLE, at=second * S, **kinds[word]))
    assert now is not None and now.outstanding is False
    assert now.outstanding_at == (None if expected is None else expected * S)


def test_a_look_that_did_not_come_back_hides_no_progress() -> None:
    """The host is so slow that every second sample is late."""
    now = assess(None, replace(IDLE, threads=(FDATASYNC,)))
    for second in range(1, 20):
        now = assess(now, Sample(second * S - 1, "?"))
        io = replace(NO_IO, write_bytes=5_000_000 + second * 4096)
        now = assess(now, replace(IDLE, at=second * S, threads=(FDATASYNC,), io=io))
        assert (now.verdict, now.progress_at) == (Verdict.FLUSHING, second * S)


def test_writes_of_a_server_on_a_unix_socket_are_progress() -> None:
    """The socket has no counter, and the server is sampled rarely."""

    def serving(written: int | None, *, shared: bool = False, pid: int = 90) -> dict[str, Any]:
        if written is None:
            return {"nodes": (NBD,), "sockets": (UNIX,)}
        io = replace(NO_IO, write_bytes=written)
        return served(replace(SERVER, pid=pid, io=io, shared=shared))

    now = assess(None, replace(IDLE, **serving(None)))
    seen = []
    for second, written in enumerate((9_000, 10_000, None, 14_000, 14_500), 1):
        now = assess(now, replace(IDLE, at=second * S, **serving(written)))
        seen.append(now.written)
    assert seen == [0, 1_000, 1_000, 5_000, 5_500]
    assert now.rate == 5_500 // 5
    # Writes for others do not count. Neither do earlier writes of another server.
    now = assess(now, replace(IDLE, at=6 * S, **serving(90_000, shared=True)))
    now = assess(now, replace(IDLE, at=7 * S, **serving(50_000, pid=91)))
    assert now.written == 5_500
    # QEMU's own control group writes to no disk, but the server's writes count.
    first = assess(None, replace(IDLE, cgroup=OWN, **serving(10_000)))
    now = assess(first, replace(IDLE, at=S, cgroup=OWN, **serving(14_000)))
    assert now.written == 4_000


def test_the_rate_is_that_of_the_last_seconds() -> None:
    now = assess(None, replace(IDLE, io=NO_IO))
    for second in range(1, 31):
        written = NO_IO.write_bytes + min(second, 10) * 1_000_000
        now = assess(now, replace(IDLE, at=second * S, io=replace(NO_IO, write_bytes=written)))
        if second == 10:
            assert now.rate == 1_000_000
    assert now.rate == 0
    assert len(now.amounts.points) <= 6


def test_bytes_and_rate() -> None:
    first = assess(None, replace(IDLE, cgroup=OWN))
    later = replace(OWN, written=4_007_000, dirty=500_000, writeback=0)
    now = assess(first, replace(IDLE, at=2 * S, cgroup=later))
    assert (now.written, now.rate, now.pending) == (4_000_000, 2_000_000, 500_000)
    # The amount is QEMU's own counter, plus the bytes that servers have acknowledged.
    first = assess(None, replace(IDLE, nodes=(NBD,), sockets=(OF_NBD,)))
    now = assess(
        first,
        replace(
            IDLE,
            at=1 * S,
            io=replace(NO_IO, write_bytes=5_000_100),
            sockets=(replace(OF_NBD, acked=1_050, send_queue=30),),
        ),
    )
    assert (now.written, now.pending) == (150, 30)


def test_a_counter_that_began_again_is_no_progress() -> None:
    before = {"nodes": (NBD,), "sockets": (OF_NBD,)}
    assert verdict(before, {"sockets": (replace(OF_NBD, acked=0),)}) is Verdict.STORAGE_WAIT


def test_an_exit_that_comes_to_no_end_waits_for_storage() -> None:
    """The kernel may wait for the last requests, or for a network file system."""
    evidence = None
    for second in range(10):
        sample = replace(IDLE, at=second * S, state="Z", exiting=True)
        evidence = assess(evidence, sample)
    assert evidence is not None
    assert evidence.progress_at == 0
    assert (evidence.verdict, evidence.outstanding) == (Verdict.STORAGE_WAIT, True)


# ---- waits over time ----


def follow(samples: list[Sample]) -> Assessment:
    evidence = None
    for sample in samples:
        evidence = assess(evidence, sample)
    assert evidence is not None
    return evidence


def test_keepalives_never_add_up_to_progress() -> None:
    """iSCSI sends keepalives of 48 bytes each way every 5 s, forever."""
    now = follow(
        [
            replace(
                IDLE,
                at=second * S,
                nodes=(ISCSI,),
                sockets=(
                    replace(OF_ISCSI, acked=1_000 + second // 5 * 48, received=second // 5 * 48),
                ),
            )
            for second in range(120)
        ]
    )
    assert (now.verdict, now.progress_at) == (Verdict.STORAGE_WAIT, None)


@pytest.mark.parametrize(("seconds", "is_progress"), [(5, True), (1, True), (0, False)])
def test_replies_to_earlier_requests_are_progress_over_iscsi(
    seconds: int, is_progress: bool
) -> None:
    """QEMU has sent 40 writes at once. Each reply of 48 bytes goes one way only, but a keepalive
    goes both ways."""
    received = [second // seconds * 48 if seconds else 0 for second in range(60)]
    now = follow(
        [
            replace(
                IDLE,
                at=second * S,
                nodes=(ISCSI,),
                sockets=(
                    replace(
                        OF_ISCSI,
                        # The second half of each keepalive comes a second later.
                        acked=200_000 + (second + 1) // 7 * 48,
                        received=500 + received[second] + second // 7 * 48,
                    ),
                ),
            )
            for second in range(60)
        ]
    )
    assert (now.verdict is Verdict.FLUSHING) is is_progress
    assert (now.progress_at is not None) is is_progress
    # If the connection's use is unknown, the peer may send by itself.
    late = replace(STRANGER, acked=200_000, received=600)
    unknown = follow(
        [
            replace(IDLE, at=at * S, sockets=(replace(late, received=600 + at // 5 * 16),))
            for at in range(60)
        ]
    )
    assert (unknown.verdict, unknown.progress_at) == (Verdict.STORAGE_WAIT, None)
    assert unknown.doubt_at == 55 * S


def test_a_server_of_unknown_use_that_runs_may_have_replied() -> None:
    """It may be an NBD server that was added later. It answers every 5 s."""
    shown = [
        replace(
            IDLE,
            at=at * S,
            switches=100 + at // 5,
            sockets=(
                replace(UNIX, node="", role="unknown", peer=replace(SERVER, switches=at // 5)),
            ),
        )
        for at in range(60)
    ]
    now = follow(shown)
    assert (now.progress_at, now.doubt_at) == (None, 55 * S)
    # A program without disks is no server.
    idle = [
        replace(
            one, sockets=(replace(UNIX, node="", role="unknown", peer=replace(SERVER, devices=())),)
        )
        for one in shown
    ]
    assert follow(idle).doubt_at is None


@pytest.mark.parametrize("role", ["unknown", "storage"])
def test_the_own_work_of_a_server_does_not_excuse_a_request_that_stands_for_ever(role: str) -> None:
    """A program writes a log of its own, or copies a disk, while an NBD server is frozen."""
    logger = replace(SERVER, pid=95, command="conserver")
    now = follow(
        [
            replace(
                IDLE,
                at=at * S,
                nodes=(NBD, replace(NBD, name="disk2")),
                sockets=(
                    replace(UNIX, send_queue=700),
                    replace(
                        UNIX,
                        inode=16,
                        node="disk2" if role == "storage" else "",
                        role=role,
                        peer=replace(logger, io=replace(NO_IO, write_bytes=at << 16)),
                    ),
                ),
            )
            for at in range(120)
        ]
    )
    assert now.progress_at is not None and now.progress_at < 40 * S
    assert now.doubt_at == 119 * S


def test_small_writes_one_by_one_are_progress_over_iscsi() -> None:
    now = follow(
        [
            replace(
                IDLE,
                at=second * S,
                nodes=(ISCSI,),
                sockets=(replace(OF_ISCSI, acked=1_000 + second // 5 * 560),),
            )
            for second in range(31)
        ]
    )
    assert (now.verdict, now.progress_at) == (Verdict.FLUSHING, 30 * S)


def test_a_ring_that_timers_fill_and_empty_is_no_progress() -> None:
    now = follow([replace(IDLE, at=s * S, rings=3 + s % 2) for s in range(60)])
    assert (now.verdict, now.progress_at) == (Verdict.STORAGE_WAIT, None)


def test_two_waits_each_with_its_own_signs() -> None:
    """The healthy disk flushes for 20 s. From then on, the dead disk decides."""
    hung = replace(ON_MOUNT, tid=99)
    slow = [
        replace(
            IDLE,
            at=second * S,
            threads=(FDATASYNC, hung) if second < 20 else (hung,),
            mounts=(FUSE,),
            devices=(Device("8:0", "sda", 1_000 + second, 80_000, 500, 1),),
        )
        for second in range(60)
    ]
    now = follow(slow)
    assert (now.verdict, now.progress_at) == (Verdict.STORAGE_WAIT, 20 * S)
    assert [wait.kind for wait in now.waits] == ["storage"]


def test_time_in_which_nobody_looked_is_told_apart() -> None:
    now = follow([replace(IDLE, at=second * S, threads=(FDATASYNC,)) for second in range(5)])
    assert now.unsampled == 0
    now = assess(now, replace(IDLE, at=34 * S, threads=(FDATASYNC,)))
    assert now.unsampled == 30 * S - S - SLACK
    moved = replace(IDLE, at=35 * S, threads=(FDATASYNC,), devices=BUSY_DISK)
    now = assess(now, moved)
    assert (now.progress_at, now.progress_from) == (35 * S, 35 * S)
    now = assess(now, replace(moved, at=46 * S))
    assert now.progress_from == 35 * S + 11 * S - S - SLACK


def test_a_server_that_is_missing_in_one_look_loses_no_mark() -> None:
    looks = [served(SERVER), {"nodes": (NBD,), "sockets": (UNIX,)}]
    later = served(replace(SERVER, io=replace(NO_IO, write_bytes=9_000_000)))
    now = follow([replace(IDLE, at=s * S, **what) for s, what in enumerate([*looks, later])])
    assert now.verdict is Verdict.FLUSHING


UNSERVED = {"nodes": (NBD,), "sockets": (UNIX,)}


@pytest.mark.parametrize(("found", "late"), [(1, 0), (4, 4 * S), (None, 0)])
def test_activity_of_a_server_before_it_was_found_is_unknown(found: int | None, late: int) -> None:
    """On a busy host, the search for the server takes a while."""
    whats = [
        served(SERVER) if found is not None and second >= found else UNSERVED for second in range(8)
    ]
    now = follow([replace(IDLE, at=s * S, **what) for s, what in enumerate(whats)])
    assert now.verdict is Verdict.STORAGE_WAIT
    assert now.unsampled == late


@pytest.mark.parametrize(("found", "late"), [(0, 0), (1, 0), (4, 4 * S), (9, 0)])
def test_activity_of_a_server_behind_a_proxy_before_it_was_found_is_unknown(
    found: int, late: int
) -> None:
    proxy = replace(SERVER, behind=(BEHIND,))
    whats = [served(proxy if second >= found else SERVER) for second in range(8)]
    now = follow([replace(IDLE, at=s * S, **what) for s, what in enumerate(whats)])
    assert now.verdict is Verdict.STORAGE_WAIT
    assert now.unsampled == late


def test_a_small_share_of_a_processor_may_be_spent_in_a_loop() -> None:
    now = assess(None, replace(IDLE, running=1))
    for s in range(1, 30):
        now = assess(now, replace(IDLE, at=s * S, running=1, cpu=5 * s))
    assert (now.verdict, now.outstanding) == (Verdict.UNKNOWN, None)
    assert (now.progress_at, now.doubt_at) == (None, 29 * S)
    written = replace(IDLE, at=30 * S, running=1, cpu=150, io=WROTE)
    assert assess(now, written).progress_at == 30 * S


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_client_that_connects_to_others_hides_no_activity(shared_memory: bool) -> None:
    """For example, a backup program to which QEMU exports a disk may connect to other servers."""
    looks = [SERVER] * 4 + [replace(SERVER, behind=(BEHIND,))] * 4
    sockets = [(replace(BACKEND, peer=peer),) for peer in looks]
    samples = [
        replace(IDLE, at=s * S, sockets=found, shared_memory=shared_memory)
        for s, found in enumerate(sockets)
    ]
    assert follow(samples).unsampled == 0


def test_only_the_time_since_progress_was_unseen() -> None:
    moving = {"nodes": (NBD,), "sockets": (replace(UNIX, send_queue=9),)}
    whats = [UNSERVED, UNSERVED, moving, moving, moving, served(SERVER), served(SERVER)]
    now = follow([replace(IDLE, at=s * S, **what) for s, what in enumerate(whats)])
    # When a server is newly found, its queue changes, too.
    assert (now.progress_at, now.unsampled) == (5 * S, 3 * S)


def test_servers_found_one_after_the_other_count_no_time_twice() -> None:
    other = replace(UNIX, inode=21, node="disk2")
    nodes = (NBD, replace(NBD, name="disk2"))
    samples = []
    for second in range(10):
        sockets = [
            replace(socket, peer=SERVER if second >= found else None)
            for socket, found in ((UNIX, 4), (other, 8))
        ]
        samples.append(replace(IDLE, at=second * S, nodes=nodes, sockets=tuple(sockets)))
    assert follow(samples).unsampled == 8 * S


def test_reasons_name_the_wait_and_who_moved_it_last() -> None:
    later = replace(STUCK_SERVER, threads=(replace(WRITING, switches=6),))
    busy = [served(STUCK_SERVER), served(replace(later, io=replace(NO_IO, read_bytes=90_000)))]
    now = follow([replace(IDLE, at=s * 4 * S, **busy[min(s, 1)]) for s in range(5)])
    assert now.verdict is Verdict.STORAGE_WAIT
    (why,) = now.reasons
    assert why.startswith("nbd node disk1 may owe it a reply from nbdkit (process 90)")
    assert why.endswith("the server nbdkit (process 90) has read, 12 s ago")


# ---- what SIGKILL puts at risk ----


@pytest.mark.parametrize(
    ("now", "codes"),
    [
        ({}, []),
        ({"term_pending": True}, ["unknown", "killed-io"]),
        ({"term_pending": None}, ["unknown", "unknown"]),
        ({"state": "T", "term_pending": True}, ["unknown"]),
        ({"formatted": 2}, ["unknown", "qcow2-open"]),
        ({"formatted": None}, ["unknown"]),
        ({"threads": (FDATASYNC,)}, ["killed-io"]),
        ({"threads": (FULL_PIPE,)}, ["killed-io"]),
        ({"nodes": (NBD,), "formatted": 1}, ["killed-io", "unknown", "qcow2-open"]),
        ({"threads": None}, ["unknown"]),
        ({"io": None, "threads": None, "sockets": None}, ["unknown"]),
        ({"running": 1}, ["unknown"]),
    ],
)
def test_data_at_risk_is_false_only_if_proven(now: dict[str, Any], codes: list[str]) -> None:
    samples = [replace(IDLE, at=at * S, **now) for at in range(2)]
    assert [risk.code for risk in risks_of_kill(follow(samples))] == codes


GONE = {"nodes": (replace(NBD, served=False),), "sockets": ()}
CLOSED = {"nodes": (replace(NBD, served=True),), "sockets": ()}
FAR = {"nodes": (NBD,), "sockets": ()}
VHOST = {"nodes": (replace(NBD, protocol="vhost-user", served=False),), "sockets": ()}


@pytest.mark.parametrize(
    ("looks", "codes"),
    [
        ([{}, {}], []),
        ([UNSERVED] * 6, []),
        # QEMU closes its connections before it exits.
        ([UNSERVED, UNSERVED, GONE], []),
        # QEMU gave up the server (reconnect-delay), and exits silently.
        ([UNSERVED, *[GONE] * 5], ["unknown"]),
        ([UNSERVED, *[GONE] * 5, UNSERVED], []),
        # QEMU closed this disk and still waits for another one; or the server is on another host
        ([UNSERVED, *[CLOSED] * 5], []),
        ([UNSERVED, *[FAR] * 5], []),
        ([VHOST] * 6, []),
        ([{"nodes": (NBD,), "sockets": None}] * 6, []),
    ],
)
def test_an_exit_puts_data_at_risk_whose_server_was_gone(
    looks: list[dict[str, Any]], codes: list[str]
) -> None:
    evidence = follow([replace(IDLE, at=s * S, **look) for s, look in enumerate(looks)])
    assert [risk.code for risk in risks_of_exit(evidence)] == codes
    assert risks_of_exit(evidence, flushed=True) == ()
    assert risks_of_exit(None) == ()


GROUP = (replace(NBD, group=NBD.name), replace(NBD, name="disk2", group=NBD.name))
LEFT = replace(UNIX, inode=16)
BOTH: dict[str, Any] = {"nodes": GROUP, "sockets": (UNIX, LEFT)}
UNSERVED_GROUP = tuple(replace(node, served=False) for node in GROUP)
ONE_GONE = {"nodes": UNSERVED_GROUP, "sockets": (LEFT,)}
BOTH_GONE = {"nodes": UNSERVED_GROUP, "sockets": ()}


@pytest.mark.parametrize(
    ("looks", "texts"),
    [
        ([BOTH] * 6, []),
        ([BOTH, *[ONE_GONE] * 5], ["one of the nbd nodes disk1, disk2"]),
        ([BOTH, *[BOTH_GONE] * 5], ["one of the nbd nodes disk1, disk2"]),
        ([*[BOTH] * 4, ONE_GONE, BOTH_GONE], []),
    ],
)
def test_an_exit_puts_data_at_risk_if_one_of_a_group_of_nodes_had_no_server(
    looks: list[dict[str, Any]], texts: list[str]
) -> None:
    evidence = follow([replace(IDLE, at=s * S, **look) for s, look in enumerate(looks)])
    risks = [risk.text for risk in risks_of_exit(evidence)]
    assert risks == [f"it exited while {text} had no server" for text in texts]


def test_nodes_with_the_same_server_have_one_wait() -> None:
    """Its signs are those of all connections, and no node seems to have lost its server."""
    moving = [replace(LEFT, family="tcp", acked=at, received=9) for at in range(3)]
    shared = replace(IDLE, nodes=GROUP)
    now = follow([replace(shared, at=s * S, sockets=(UNIX, left)) for s, left in enumerate(moving)])
    (wait,) = now.waits
    assert wait.text == "one of the nbd nodes disk1, disk2 may owe it a reply from its server"
    assert (wait.moved_at, now.verdict) == (2 * S, Verdict.FLUSHING)
    lost = assess(None, replace(IDLE, nodes=GROUP, sockets=(UNIX,)))
    assert "has no connection to its server" in lost.waits[0].text


HELD_BACK = {"nodes": (replace(NBD, served=False, reconnect=30),), "sockets": ()}


@pytest.mark.parametrize(
    ("looks", "started", "ended", "codes"),
    [
        # The delay counts from the last time at which QEMU was certainly connected.
        ([UNSERVED, *[HELD_BACK] * 5], -1000, 29, []),
        ([UNSERVED, *[HELD_BACK] * 5], -1000, 31, ["unknown"]),
        # QEMU had lost its server before the first sample.
        ([HELD_BACK] * 5, -1000, 6, ["unknown"]),
        ([HELD_BACK] * 5, -20, 6, []),
        ([HELD_BACK] * 5, -20, 11, ["unknown"]),
        # Without a delay, QEMU has given up already.
        ([UNSERVED, *[GONE] * 5], -1000, 6, ["unknown"]),
    ],
)
def test_an_exit_before_the_delay_of_a_server_is_over_lost_nothing(
    looks: list[dict[str, Any]], started: int, ended: int, codes: list[str]
) -> None:
    evidence = follow([replace(IDLE, at=s * S, **look) for s, look in enumerate(looks)])
    risks = risks_of_exit(evidence, started=started * S, ended=ended * S)
    assert [risk.code for risk in risks] == codes


@pytest.mark.parametrize(
    ("status", "now", "options", "codes"),
    [
        (0, {"formatted": 1}, {}, []),
        (SIGKILL, {}, {}, []),
        (SIGKILL, {"formatted": 1}, {}, ["unknown", "unknown", "qcow2-open"]),
        (SIGABRT, {"threads": (FDATASYNC,)}, {}, ["unknown", "killed-io"]),
        (SIGKILL, {"formatted": 1}, {"flushed": True}, []),
        # Without SIGTERM, the guest may have written until the end.
        (SIGKILL, {}, {"terminated": False}, ["unknown"]),
        # QEMU had not begun to handle signals.
        (SIGTERM, {"formatted": 1}, {}, []),
        (99, {"formatted": 1}, {}, ["unknown", "unknown", "qcow2-open"]),
        # A crash with a core dump, and an exit after an error
        (SIGABRT | 0x80, {"formatted": 1}, {}, ["unknown", "unknown", "qcow2-open"]),
        (1 << 8, {"formatted": 1}, {}, ["unknown", "unknown", "qcow2-open"]),
        (SIGTERM << 8, {"formatted": 1}, {}, ["unknown", "unknown", "qcow2-open"]),
        (1 << 8, {}, {}, []),
    ],
)
def test_an_end_by_signal_or_error_puts_at_risk_what_sigkill_would(
    status: int, now: dict[str, Any], options: dict[str, bool], codes: list[str]
) -> None:
    evidence = follow([replace(IDLE, at=at * S, **now) for at in range(2)])
    risks = risks_of_death(status, evidence, **{"terminated": True, **options})
    assert [risk.code for risk in risks] == codes


def test_without_any_look_everything_is_at_risk() -> None:
    assert [risk.code for risk in risks_of_kill(None)] == ["unknown"]


OOM = replace(FULL_PIPE, state="D", call="", descriptor=None, target="")
OOM = replace(OOM, wchan="mem_cgroup_oom_synchronize")
THREE = (replace(TOP, in_flight=3), replace(BELOW, name="loop1", in_flight=0))
READS = replace(HUNG, reads=90)
READING = replace(ON_HUNG, tid=8, syscall=17, call="pread64")
DEEPEST = Device("254:0", "vda", 100, 0, 0, 2, depth=2)
ON_THREE = replace(FDATASYNC, disks=("7:0", "8:0", "254:0"))
WORKER = replace(SUBMIT, name="iou-wrk-4711", call="io_uring_enter")
CLIENT = replace(STRANGER, client=False, accepted=True)
BACKEND = replace(UNIX, node="", role="unknown", client=False, accepted=True, peer=SERVER)
BACKEND_WROTE = replace(BACKEND, peer=replace(SERVER, io=WROTE))
BEHIND_WROTE = replace(BEHIND, io=WROTE)
STUCK_NBD = {"nodes": (NBD,), "sockets": (replace(UNIX, send_queue=28),)}
TALKER = replace(UNIX, node="", role="unknown", client=False, receive_queue=100)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        # A neighbour uses the lowest disk, and the middle disk has nothing to do.
        (
            {"threads": (ON_THREE,), "devices": (*THREE, DEEPEST)},
            {"devices": (*THREE, replace(DEEPEST, writes=900))},
            Verdict.UNKNOWN,
        ),
        (
            {"threads": (ON_THREE,), "devices": (*THREE[:1], BELOW, DEEPEST)},
            {"devices": (*THREE[:1], BELOW, replace(DEEPEST, writes=900))},
            Verdict.FLUSHING,
        ),
        # If a file system is frozen, others may still read from its disk.
        ({"threads": (ON_HUNG,), "devices": (HUNG,)}, {"devices": (READS,)}, Verdict.UNKNOWN),
        ({"threads": (READING,), "devices": (HUNG,)}, {"devices": (READS,)}, Verdict.FLUSHING),
        (
            {"threads": (ON_HUNG, READING), "devices": (HUNG,)},
            {"devices": (READS,)},
            Verdict.FLUSHING,
        ),
        ({"threads": (OOM,)}, {"devices": BUSY_DISK}, Verdict.BLOCKED),
        ({"dumping": True}, {"devices": BUSY_DISK}, Verdict.UNKNOWN),
        ({"dumping": True}, {"io": WROTE}, Verdict.FLUSHING),
        # The request is on FUSE, and a neighbour uses the disk
        ({"rings": 1, "threads": (WORKER,)}, {"devices": BUSY_DISK}, Verdict.STORAGE_WAIT),
        ({"rings": 2, "threads": (WORKER,)}, {"devices": BUSY_DISK}, Verdict.FLUSHING),
        (
            {"rings": 2, "timers": 1, "threads": (WORKER,)},
            {"devices": BUSY_DISK},
            Verdict.STORAGE_WAIT,
        ),
        # A client that QEMU serves, such as a backup, or a vhost-user backend
        ({"rings": 1, "timers": 1, "sockets": (CLIENT,)}, {"io": WROTE}, Verdict.UNKNOWN),
        (
            {"sockets": (CLIENT,)},
            {"sockets": (replace(CLIENT, acked=90_000, received=9_000),)},
            Verdict.UNKNOWN,
        ),
        (
            {**STUCK_NBD, "sockets": (*STUCK_NBD["sockets"], CLIENT)},
            {"sockets": (*STUCK_NBD["sockets"], replace(CLIENT, acked=90_000))},
            Verdict.STORAGE_WAIT,
        ),
        ({"sockets": (BACKEND,)}, {"sockets": (BACKEND_WROTE,)}, Verdict.FLUSHING),
        (
            {"sockets": (BACKEND,), "shared_memory": False},
            {"sockets": (BACKEND_WROTE,)},
            Verdict.UNKNOWN,
        ),
        # This is not vhost-user, which needs a unix socket; and a client may use another guest,
        # too.
        (
            {"sockets": (replace(CLIENT, peer=SERVER),)},
            {"sockets": (replace(CLIENT, peer=BACKEND_WROTE.peer),)},
            Verdict.UNKNOWN,
        ),
        (
            {"sockets": (replace(BACKEND, peer=replace(SERVER, behind=(BEHIND,))),)},
            {"sockets": (replace(BACKEND, peer=replace(SERVER, behind=(BEHIND_WROTE,))),)},
            Verdict.UNKNOWN,
        ),
        # The server's threads cannot be read, for example because it has hundreds.
        *(
            (served(blind), served(replace(blind, devices=SERVED_DISK)), Verdict.UNKNOWN)
            for blind in BLIND_SERVERS
        ),
        # A pair of sockets may be NBD.
        (
            {"sockets": (replace(UNIX, node="", role="unknown", client=False, send_queue=9),)},
            {"sockets": (replace(UNIX, node="", role="unknown", client=False),)},
            Verdict.FLUSHING,
        ),
        # A hung QEMU does not read what a console sends.
        (
            {"sockets": (TALKER,)},
            {"sockets": (replace(TALKER, receive_queue=120),)},
            Verdict.STORAGE_WAIT,
        ),
        (
            {"sockets": (TALKER,)},
            {"sockets": (replace(TALKER, receive_queue=20),)},
            Verdict.FLUSHING,
        ),
    ],
)
def test_what_others_do_is_no_certain_progress(
    before: dict[str, Any], now: dict[str, Any], expected: Verdict
) -> None:
    assert verdict(before, now) is expected


def test_what_it_does_between_two_standstills_is_progress() -> None:
    """The process is frozen most of the time, and runs only when no sample is taken."""
    frozen = replace(IDLE, threads=(ON_MOUNT,), cgroup=replace(OWN, frozen=True))
    wrote = [replace(NO_IO, write_bytes=second // 5 * 4096) for second in range(20)]
    now = follow([replace(frozen, at=second * S, io=io) for second, io in enumerate(wrote)])
    assert (now.verdict, now.progress_at) == (Verdict.STOPPED, 15 * S)


def test_while_it_is_held_still_nothing_that_others_do_is_progress() -> None:
    looks = [served(SERVER), served(replace(SERVER, switches=9_000))] * 10
    now = follow([replace(IDLE, at=s * S, state="T", **what) for s, what in enumerate(looks)])
    assert (now.verdict, now.progress_at) == (Verdict.STOPPED, None)


CLIENT = replace(TCP, inode=16, client=False, role="unknown", accepted=True)


@pytest.mark.parametrize(
    ("sockets", "last"),
    [((), Verdict.FLUSHING), ((CLIENT,), Verdict.UNKNOWN)],
)
def test_what_it_does_for_a_client_is_no_progress_of_a_stuck_wait(
    sockets: tuple[Socket, ...], last: Verdict
) -> None:
    """While QEMU's main loop waits for a dead disk, QEMU's export still serves its client."""
    dead = replace(UNIX, peer=replace(SERVER, unread=100))
    samples = [
        replace(
            IDLE,
            at=second * S,
            nodes=(NBD,),
            sockets=(dead, *sockets),
            threads=(replace(FDATASYNC, tid=7 + second),),
        )
        for second in range(40)
    ]
    assert follow(samples[:20]).verdict is Verdict.FLUSHING
    assert follow(samples).verdict is last


def test_of_the_first_sample_only_its_counts_are_kept() -> None:
    first = replace(IDLE, devices=BUSY_DISK, io=NO_IO, cgroup=None)
    assessment = assess(None, first)
    assert assessment.first is first
    wrote = replace(NO_IO, write_bytes=NO_IO.write_bytes + 512)
    for number in (1, 2):
        assessment = assess(assessment, replace(first, at=number * S, io=wrote))
        assert assessment.first == replace(
            first, threads=None, devices=None, mounts=None, host=None, rings=None
        )
        assert assessment.written == 512
        assert assessment.seen.devices == BUSY_DISK


def test_a_disk_that_a_thread_may_wait_for_delays_sigkill_if_no_thread_can_be_read() -> None:
    """QEMU has so many threads (for example iothreads) that qkilld does not read them."""
    blind = replace(IDLE, threads=None, ringless=("8:0",))
    still = follow([replace(blind, at=second * S) for second in range(9)])
    (device,) = blind.devices or ()
    moving = follow(
        [
            replace(blind, at=second * S, devices=(replace(device, writes=1_000 + second),))
            for second in range(9)
        ]
    )
    assert (still.doubt_at, still.progress_at) == (None, None)
    assert (moving.doubt_at, moving.progress_at) == (8 * S, None)
