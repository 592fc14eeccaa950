"""Verdicts: what two samples mean, as a table of what was measured of real guests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qkilld.judgement.verdict import assess
from qkilld.model.evidence import Cgroup, Device, Io, Memory, Mount, Sample, Socket, Thread
from qkilld.model.words import Verdict

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
)
FDATASYNC = Thread(7, "worker", "D", 75, True, "folio_wait_bit")
UNIX = Socket(11, "unix", client=True, send_queue=0, receive_queue=0)
TCP = Socket(12, "tcp", True, 0, 0, unacked=0, acked=1_000, received=500)
QMP = Socket(13, "unix", client=False, send_queue=0, receive_queue=0)
OWN_DIRTY = 1_000_000
OWN = Cgroup(True, OWN_DIRTY, 50_000, 7_000, 70, False)
TOP = Device("7:0", "loop0", 10, 0, 0, 0, depth=0)
BELOW = Device("8:0", "sda", 100, 0, 0, 3, depth=1)
BUSY_DISK = (Device("8:0", "sda", 1_900, 99_000, 900, 4),)


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
        ({}, MORE["read"], Verdict.FLUSHING),
        ({}, MORE["write(2)"], Verdict.FLUSHING),
        ({"sockets": (QMP,)}, {"switches": 200}, Verdict.IDLE),
        # fdatasync of a full page cache: only the disk moves
        ({"threads": (FDATASYNC,)}, {}, Verdict.STORAGE_WAIT),
        ({"threads": (FDATASYNC,)}, {"devices": BUSY_DISK}, Verdict.FLUSHING),
        (
            {"threads": (FDATASYNC,), "devices": ()},
            {"host": Memory(80_000_000, 0)},
            Verdict.FLUSHING,
        ),
        (
            {"threads": (FDATASYNC,), "mounts": (Mount("nfs4", 10, 0),)},
            {"mounts": (Mount("nfs4", 11, 0),)},
            Verdict.FLUSHING,
        ),
        # A neighbour on the disk says nothing of a guest that does not wait for it
        ({}, {"devices": BUSY_DISK}, Verdict.IDLE),
        ({}, {"host": Memory(10_000_000, 0)}, Verdict.IDLE),
        ({"sockets": (UNIX,)}, {"devices": BUSY_DISK}, Verdict.STORAGE_WAIT),
        # nor where its own control group knows better
        (
            {"threads": (FDATASYNC,), "cgroup": OWN},
            {"devices": BUSY_DISK},
            Verdict.STORAGE_WAIT,
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
        # NBD: a slow server wakes its threads, a frozen one does nothing at all
        ({"sockets": (UNIX,)}, {"switches": 101}, Verdict.FLUSHING),
        ({"sockets": (UNIX,)}, {}, Verdict.STORAGE_WAIT),
        ({"sockets": (replace(UNIX, send_queue=67_840),)}, {}, Verdict.STORAGE_WAIT),
        (
            {"sockets": (replace(UNIX, send_queue=67_840),)},
            {"sockets": (replace(UNIX, send_queue=100),)},
            Verdict.FLUSHING,
        ),
        ({"sockets": (TCP,)}, {"sockets": (replace(TCP, acked=2_000),)}, Verdict.FLUSHING),
        ({"sockets": (TCP,)}, {"sockets": (replace(TCP, received=600),)}, Verdict.FLUSHING),
        ({"sockets": (replace(TCP, unacked=3),)}, {}, Verdict.STORAGE_WAIT),
        # A page of some log, and some thread of its pool, are no progress of a disk that stands
        (
            {"threads": (FDATASYNC,), "cgroup": replace(OWN, written=None)},
            {"cgroup": replace(OWN, written=None, dirty=OWN_DIRTY - 4096), "switches": 101},
            Verdict.STORAGE_WAIT,
        ),
        ({"threads": (FDATASYNC,), "devices": ()}, {"switches": 101}, Verdict.FLUSHING),
        (
            {"threads": (FDATASYNC,), "mounts": (Mount("fuse", None, None),)},
            {"switches": 101},
            Verdict.FLUSHING,
        ),
        # Layers: those below work for it while the one on top has handed something down
        (
            {"threads": (FDATASYNC,), "devices": (TOP, BELOW)},
            {"devices": (TOP, replace(BELOW, writes=200))},
            Verdict.STORAGE_WAIT,
        ),
        (
            {"threads": (FDATASYNC,), "devices": (replace(TOP, in_flight=1), BELOW)},
            {"devices": (replace(TOP, in_flight=1), replace(BELOW, writes=200))},
            Verdict.FLUSHING,
        ),
        (
            {"threads": (FDATASYNC,), "devices": (TOP, BELOW)},
            {"devices": (replace(TOP, writes=11), BELOW)},
            Verdict.FLUSHING,
        ),
        # Asynchronous I/O
        ({"rings": 3}, {}, Verdict.STORAGE_WAIT),
        ({"rings": 3}, {"switches": 101}, Verdict.FLUSHING),
        # of AIO nothing shows but that there may be some
        ({"direct": True}, {}, Verdict.STORAGE_WAIT),
        ({"direct": True}, {"switches": 101}, Verdict.FLUSHING),
        ({"direct": True}, {"devices": BUSY_DISK}, Verdict.STORAGE_WAIT),
        # Held
        ({"state": "T"}, MORE["wrote"], Verdict.STOPPED),
        ({"state": "t", "tracer": 9}, {}, Verdict.STOPPED),
        ({"cgroup": replace(OWN, frozen=True)}, {}, Verdict.STOPPED),
        # Dead, and held by a debugger that does not collect it
        ({"state": "Z"}, {}, Verdict.ZOMBIE),
        ({"state": "Z", "threads": (FDATASYNC,)}, {}, Verdict.STORAGE_WAIT),
        # Exiting, which may take long with much memory, and which a signal does not shorten
        ({}, {"exiting": True}, Verdict.FLUSHING),
        ({"state": "Z", "exiting": True, "cpu": 100}, {"cpu": 101}, Verdict.FLUSHING),
        ({"state": "Z", "exiting": True}, {"exiting": False}, Verdict.ZOMBIE),
        ({"cpu": 100}, {"cpu": 101}, Verdict.IDLE),
        # In uninterruptible sleep, not for storage
        ({"threads": (Thread(7, "qemu", "D", 1, False, "usb_kill_urb"),)}, {}, Verdict.BLOCKED),
        # Not to be seen
        ({"io": None}, {}, Verdict.UNKNOWN),
        ({"threads": None}, {}, Verdict.UNKNOWN),
        ({"sockets": None}, {}, Verdict.UNKNOWN),
        ({"rings": None}, {}, Verdict.UNKNOWN),
        ({"switches": None}, {}, Verdict.UNKNOWN),
        ({"sockets": None}, MORE["wrote"], Verdict.FLUSHING),
        ({"io": None, "threads": (FDATASYNC,)}, {}, Verdict.STORAGE_WAIT),
        ({"devices": None, "host": None, "cgroup": None, "mounts": None}, {}, Verdict.IDLE),
    ],
)
def test_verdicts(before: dict[str, Any], now: dict[str, Any], expected: Verdict) -> None:
    assert verdict(before, now) is expected


def test_one_look_is_none() -> None:
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
    assert (now.outstanding, now.outstanding_at) == (None, 3 * S)


def test_a_look_that_did_not_come_back_hides_no_progress() -> None:
    """On a host that is so slow that every other look comes too late."""
    now = assess(None, replace(IDLE, threads=(FDATASYNC,)))
    for second in range(1, 20):
        now = assess(now, Sample(second * S - 1, "?"))
        io = replace(NO_IO, write_bytes=5_000_000 + second)
        now = assess(now, replace(IDLE, at=second * S, threads=(FDATASYNC,), io=io))
        assert (now.verdict, now.progress_at) == (Verdict.FLUSHING, second * S)


def test_bytes_and_rate() -> None:
    first = assess(None, replace(IDLE, cgroup=OWN))
    later = replace(OWN, written=4_007_000, dirty=500_000, writeback=0)
    now = assess(first, replace(IDLE, at=2 * S, cgroup=later))
    assert (now.written, now.rate, now.pending) == (4_000_000, 2_000_000, 500_000)
    # Its own counter, then what servers acknowledged besides.
    first = assess(None, replace(IDLE, sockets=(TCP,)))
    now = assess(
        first,
        replace(
            IDLE,
            at=1 * S,
            io=replace(NO_IO, write_bytes=5_000_100),
            sockets=(replace(TCP, acked=1_050, send_queue=30),),
        ),
    )
    assert (now.written, now.pending) == (150, 30)


def test_a_counter_that_began_anew_is_no_progress() -> None:
    assert (
        verdict({"sockets": (TCP,)}, {"sockets": (replace(TCP, acked=0),)}) is Verdict.STORAGE_WAIT
    )


def test_an_exit_that_comes_to_no_end_waits_for_storage() -> None:
    """What else the kernel would wait for: the last requests, a network file system."""
    evidence = None
    for second in range(10):
        sample = replace(IDLE, at=second * S, state="Z", exiting=True)
        evidence = assess(evidence, sample)
    assert evidence is not None
    assert evidence.progress_at == 0
    assert (evidence.verdict, evidence.outstanding) == (Verdict.STORAGE_WAIT, True)
