"""Verdicts of a process that waits for a disk with layers below it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qkilld.decision.verdict import assess
from qkilld.model.codec import from_json, to_json
from qkilld.model.constants import Verdict
from qkilld.model.sample import FLUSH_CALLS, Device, Peer, Thread
from tests.pure.test_verdict import FDATASYNC, IDLE, NO_IO, S, served, verdict

UPPER = Device("7:0", "loop0", 10, 0, 500, 1, depth=0, accounting=True)
LOWER = Device("8:0", "sda", 100, 0, 0, 3, depth=1, above=("7:0",), accounting=True)
READ_BY_OTHERS = replace(UPPER, only_reads=True)
WRITES = replace(FDATASYNC, disks=("7:0", "8:0"))
READS = replace(WRITES, tid=8, syscall=17, call="pread64")
SILENT = replace(UPPER, writes=0, reads=0, in_flight=0, accounting=False)


@pytest.mark.parametrize(
    ("threads", "upper", "expected"),
    [
        # A flush of the upper device
        ([WRITES], UPPER, Verdict.FLUSHING),
        # The upper device's file system is frozen, and another process reads from the device
        ([WRITES], READ_BY_OTHERS, Verdict.UNKNOWN),
        # The process itself reads, too
        ([READS], READ_BY_OTHERS, Verdict.FLUSHING),
        ([WRITES, READS], READ_BY_OTHERS, Verdict.FLUSHING),
        # The kernel may hide a flush
        ([WRITES], replace(READ_BY_OTHERS, hides_flush=True), Verdict.UNKNOWN),
        ([WRITES], replace(UPPER, in_flight=0, hides_flush=True), Verdict.UNKNOWN),
        ([WRITES], replace(UPPER, in_flight=0), Verdict.STORAGE_WAIT),
        # The upper device has no counters, so those of the device below are used
        ([WRITES], SILENT, Verdict.FLUSHING),
        ([READS], SILENT, Verdict.FLUSHING),
        # It is unknown whether the upper device has counters
        ([WRITES], replace(SILENT, accounting=None), Verdict.STORAGE_WAIT),
    ],
)
def test_writes_below(threads: list[Thread], upper: Device, expected: Verdict) -> None:
    before = {"threads": tuple(threads), "devices": (upper, LOWER)}
    assert verdict(before, {"devices": (upper, replace(LOWER, writes=900))}) is expected


def test_a_silent_device_between_two_that_count() -> None:
    lowest = Device("254:0", "vda", 100, 0, 0, 2, depth=2, above=("7:0",))
    between = replace(LOWER, writes=0, in_flight=0, accounting=False)
    thread = replace(WRITES, disks=("7:0", "8:0", "254:0"))
    before = {"threads": (thread,), "devices": (UPPER, between, lowest)}
    now = {"devices": (UPPER, between, replace(lowest, writes=900))}
    assert verdict(before, now) is Verdict.FLUSHING


def test_reads_of_others_are_no_writes_of_a_server() -> None:
    """The file system of the server's file is frozen."""

    def peer(writes: int) -> Peer:
        devices = (READ_BY_OTHERS, replace(LOWER, writes=writes))
        return Peer(90, "nbdkit", (WRITES,), 1_000, NO_IO, devices, shared=False)

    assert verdict(served(peer(100)), served(peer(900))) is Verdict.UNKNOWN


def test_reads_never_excuse_a_frozen_file_system_for_ever() -> None:
    """Other programs read from the device, and write to the disk below it."""
    now = None
    for second in range(60):
        upper = replace(READ_BY_OTHERS, reads=500 + second)
        lower = replace(LOWER, writes=100 + second, reads=second)
        now = assess(now, replace(IDLE, at=second * S, threads=(WRITES,), devices=(upper, lower)))
    assert now is not None
    assert (now.verdict, now.progress_at) == (Verdict.UNKNOWN, None)


def test_a_read_that_looks_like_a_flush_once() -> None:
    before = {"threads": (WRITES,), "devices": (READ_BY_OTHERS, LOWER)}
    now = {"devices": (UPPER, replace(LOWER, writes=900))}
    assert verdict(before, now) is Verdict.UNKNOWN


def test_an_older_trace_does_not_tell_whether_a_device_counts() -> None:
    document = to_json(UPPER)
    for new in ("accounting", "only_reads", "hides_flush"):
        del document[new]
    device = from_json(Device, {**document, "counts": False}, "a device")
    assert (device.accounting, device.only_reads, device.hides_flush) == (None, False, False)


@pytest.mark.parametrize("call", sorted(FLUSH_CALLS))
def test_reads_of_others_are_no_progress_of_a_flush(call: str) -> None:
    now = None
    for second in range(30):
        device = Device("8:0", "sda", 100, 0, 9 * second, 1, accounting=True)
        thread = replace(WRITES, call=call, disks=("8:0",))
        now = assess(now, replace(IDLE, at=second * S, threads=(thread,), devices=(device,)))
    assert now is not None and now.progress_at is None
