"""A dead disk, a client that QEMU serves all the time and, in some cases, a healthy disk.

While a healthy disk makes progress, there is no SIGKILL, whatever the client does. Work that QEMU
does only for the client delays SIGKILL for a limited time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import pytest

from qkilld.decision.ladder import DOUBT, Action, JobFacts, Promise, decide
from qkilld.decision.verdict import STUCK, Assessment, assess
from qkilld.model.constants import Flag
from qkilld.model.policy import Policy
from qkilld.model.sample import Device, Node, Sample, Socket, Thread
from tests.pure.test_verdict import (
    CLIENT,
    FDATASYNC,
    IDLE,
    NBD,
    NO_IO,
    SERVER,
    TCP,
    UNIX,
    S,
)

POLICY: Final = Policy()
LONGEST: Final = STUCK + DOUBT * POLICY.storage_stall
MIB: Final = 1 << 20
DEAD: Final = replace(UNIX, peer=replace(SERVER, unread=100))
HEALTHY: Final = Device("8:0", "sda", 1_000, 80_000, 500, 2)
FAR: Final = Node("far", "nbd")
TO_FAR: Final = replace(TCP, inode=21, node="far")
PREAD: Final = replace(FDATASYNC, call="pread64")
PWRITE: Final = replace(FDATASYNC, call="pwrite64")
WORKER: Final = replace(
    FDATASYNC, name="iou-wrk-1", call="", io_call=None, target="", disks=(), descriptor=None
)
SERVES: Final = replace(SERVER, pid=99)
BEHIND: Final = replace(UNIX, inode=22, node="far", peer=SERVES)


def reader(second: int) -> Socket:
    return replace(CLIENT, acked=second * MIB, received=second * 112 + 300)


def writer(second: int) -> Socket:
    return replace(CLIENT, acked=second * 64 + 300, received=second * MIB)


def unix(second: int) -> Socket:
    """A client on a unix socket. The kernel does not count the bytes of such a socket."""
    return replace(CLIENT, family="unix", acked=None, received=None, send_queue=second)


def calls(thread: Thread, second: int, *, writes: int = 0, reads: int = 0) -> dict[str, Any]:
    """Every sample shows a pending call, but not necessarily the same one."""
    device = replace(HEALTHY, writes=1_000 + writes * second, reads=500 + reads * second)
    return {"threads": (replace(thread, switches=second),), "devices": (device,)}


def flush(second: int) -> dict[str, Any]:
    return calls(FDATASYNC, second, writes=40)


def flush_beside_reads(second: int) -> dict[str, Any]:
    moved = calls(FDATASYNC, second, writes=40, reads=900)
    return {**moved, "threads": (*moved["threads"], replace(PREAD, tid=100 + second))}


def flush_on_mount(second: int) -> dict[str, Any]:
    sleeps = replace(FDATASYNC, disks=(), target="mount", mount="0:9", wchan="rpc_wait")
    return {"threads": (replace(sleeps, switches=second),), "devices": ()}


def flush_of_server(second: int) -> dict[str, Any]:
    disk = Device("7:1", "loop1", 40 * second, 0, 0, 1)
    busy = replace(FDATASYNC, tid=91, disks=("7:1",), switches=second)
    return far(replace(BEHIND, peer=replace(SERVES, threads=(busy,), devices=(disk,))))


def syncfs_of_server(second: int) -> dict[str, Any]:
    return with_call(flush_of_server(second), call="syncfs")


def sync_of_server(second: int) -> dict[str, Any]:
    """The call has no descriptor, so it may wait for any disk."""
    moved = flush_of_server(second)
    return with_call(moved, call="sync", descriptor=None, target="", disks=())


def with_call(moved: dict[str, Any], **call: object) -> dict[str, Any]:
    """Replace fields of the thread of the server."""
    *others, socket = moved["sockets"]
    (thread,) = socket.peer.threads
    threads = (replace(thread, **call),)
    return {
        **moved,
        "sockets": (*others, replace(socket, peer=replace(socket.peer, threads=threads))),
    }


def worker_of_server(second: int) -> dict[str, Any]:
    """A thread of the kernel may be flushing one of the server's disks."""
    disks = (Device("7:1", "loop1", 40 * second, 0, 0, 1), Device("7:2", "loop2", 5, 0, 0, 0))
    worker = replace(WORKER, tid=91, switches=second)
    return far(replace(BEHIND, peer=replace(SERVES, threads=(worker,), devices=disks)))


def stuck_worker(second: int) -> dict[str, Any]:
    """The server writes to a disk, but the guest waits for another one."""
    moved = worker_of_server(second)
    (socket,) = moved["sockets"]
    stuck = replace(socket.peer, threads=(replace(WORKER, tid=91, switches=5),))
    return far(replace(socket, peer=stuck))


def flush_uncounted(second: int) -> dict[str, Any]:
    """The disk has no counters. Only the writes of the process show the flush."""
    moved = calls(FDATASYNC, 0)
    device = replace(HEALTHY, in_flight=0, accounting=False)
    io = replace(NO_IO, write_bytes=second * MIB)
    return {**moved, "devices": (device,), "io": io}


def writes(second: int) -> dict[str, Any]:
    return calls(PWRITE, second, writes=40)


def ring_writes(second: int) -> dict[str, Any]:
    device = replace(HEALTHY, writes=1_000 + 40 * second)
    return {"rings": 2_000 - second, "devices": (device,)}


def worker_writes(second: int) -> dict[str, Any]:
    return calls(WORKER, second, writes=40)


def far_writes(second: int) -> dict[str, Any]:
    return far(replace(TO_FAR, acked=MIB * (second + 1), received=5_000 + 16 * second))


def reads(second: int) -> dict[str, Any]:
    return calls(replace(PREAD, tid=100 + second), second, reads=900)


def ring_reads(second: int) -> dict[str, Any]:
    device = replace(HEALTHY, reads=500 + 900 * second)
    return {"rings": 1 + second % 2, "devices": (device,)}


def far_reads(second: int) -> dict[str, Any]:
    sent = 20_000 + 112 * second
    return far(replace(TO_FAR, acked=sent, received=second * MIB))


def server_reads(second: int) -> dict[str, Any]:
    io = replace(NO_IO, read_bytes=second * MIB)
    return far(replace(BEHIND, peer=replace(SERVES, io=io)))


def far(socket: Socket) -> dict[str, Any]:
    return {"nodes": (NBD, FAR), "sockets": (socket,)}


def samples(
    seconds: int, work: Callable[[int], dict[str, Any]], client: Callable[[int], Socket]
) -> list[Sample]:
    listed = []
    for second in range(seconds):
        fields: dict[str, Any] = {"nodes": (NBD,), "sockets": (), **work(second)}
        fields["sockets"] = (DEAD, client(second), *fields["sockets"])
        listed.append(replace(IDLE, at=second * S, switches=100 + second, **fields))
    return listed


def killed_at(listed: Sequence[Sample]) -> int | None:
    """Return when a stop with FORCE sends SIGKILL, None for never. SIGTERM was sent at 0."""
    evidence: Assessment | None = None
    promise = Promise()
    for sample in listed:
        evidence = assess(evidence, sample)
        facts = JobFacts(flags=Flag.FORCE, policy=POLICY, term_at=0, assessment=evidence)
        decision = decide(replace(facts, promise=promise), sample.at)
        if decision.action is Action.KILL:
            return sample.at
        promise = decision.promise or promise
    return None


@pytest.mark.parametrize("client", [reader, writer, unix])
@pytest.mark.parametrize(
    "work",
    [
        *(flush, flush_beside_reads, flush_on_mount, flush_of_server, flush_uncounted),
        *(syncfs_of_server, sync_of_server),
    ],
)
def test_a_flush_of_a_healthy_disk_is_waited_for(
    work: Callable[[int], dict[str, Any]], client: Callable[[int], Socket]
) -> None:
    assert killed_at(samples(900, work, client)) is None


@pytest.mark.parametrize("client", [reader, unix])
@pytest.mark.parametrize("work", [writes, ring_writes, worker_writes, far_writes, worker_of_server])
def test_writes_are_waited_for_unless_the_client_writes(
    work: Callable[[int], dict[str, Any]], client: Callable[[int], Socket]
) -> None:
    assert killed_at(samples(900, work, client)) is None
    killed = killed_at(samples(900, work, writer))
    assert killed is not None and POLICY.storage_stall < killed <= LONGEST + 10 * S


@pytest.mark.parametrize("client", [reader, writer, unix])
@pytest.mark.parametrize("work", [reads, ring_reads, far_reads, server_reads])
def test_what_a_client_reads_ends(
    work: Callable[[int], dict[str, Any]], client: Callable[[int], Socket]
) -> None:
    killed = killed_at(samples(900, work, client))
    assert killed is not None and POLICY.storage_stall < killed <= LONGEST + 10 * S


def test_a_stuck_request_of_a_server_ends() -> None:
    listed = [replace(IDLE, at=second * S, **stuck_worker(second)) for second in range(900)]
    killed = killed_at(listed)
    assert killed is not None and killed <= LONGEST


@pytest.mark.parametrize("work", [flush, reads])
def test_the_end_of_the_dead_disk_ends_the_doubt(work: Callable[[int], dict[str, Any]]) -> None:
    listed = samples(900, work, reader)
    listed[200:] = [replace(one, nodes=(), sockets=(one.sockets or ())[1:]) for one in listed[200:]]
    assert killed_at(listed) is None
