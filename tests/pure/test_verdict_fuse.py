"""Verdicts of a process that waits for a FUSE file system whose server runs on this host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qkilld.decision.verdict import assess
from qkilld.model.constants import Verdict
from qkilld.model.sample import Device, Mount, Peer
from tests.pure.test_verdict import (
    FDATASYNC,
    FUSE,
    IDLE,
    NO_IO,
    ON_MOUNT,
    SUBMIT,
    WORKER,
    S,
    verdict,
)
from tests.pure.test_verdict import (
    served as connected_to,
)

SLOW = Device("7:1", "loop1", 5, 0, 0, 1)
WROTE = replace(SLOW, writes=9)
SYNCING = replace(FDATASYNC, tid=91, disks=("7:1",))
SERVER = Peer(90, "bindfs", (SYNCING,), 1_000, NO_IO, (SLOW,), place=("7:1",))
COPIED = replace(NO_IO, rchar=900_000, wchar=900_000)
REMOTE = Peer(90, "sshfs", (), 1_000, NO_IO, ())


def served(*servers: Peer, certain: bool = True, waiting: int | None = None) -> Mount:
    return replace(FUSE, servers=servers, certain=certain, waiting=waiting)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (served(SERVER), served(SERVER), Verdict.STORAGE_WAIT),
        (served(SERVER), served(replace(SERVER, devices=(WROTE,))), Verdict.FLUSHING),
        # A call of the server returned.
        (
            served(SERVER),
            served(replace(SERVER, threads=(replace(SYNCING, switches=6),))),
            Verdict.FLUSHING,
        ),
        # Others use the server's disk, and none of the server's calls waits for it.
        (
            served(replace(SERVER, threads=())),
            served(replace(SERVER, threads=(), devices=(WROTE,))),
            Verdict.STORAGE_WAIT,
        ),
        # The process may not be the server, or may work for others.
        (
            served(SERVER, certain=False),
            served(replace(SERVER, devices=(WROTE,)), certain=False),
            Verdict.UNKNOWN,
        ),
        (
            served(SERVER, replace(SERVER, pid=92), certain=False),
            served(SERVER, replace(SERVER, pid=92, devices=(WROTE,)), certain=False),
            Verdict.UNKNOWN,
        ),
        (served(REMOTE), served(replace(REMOTE, io=COPIED)), Verdict.UNKNOWN),
        # The server answers requests, but these may be requests of others.
        (served(waiting=3), served(waiting=2), Verdict.UNKNOWN),
        (served(waiting=3), served(waiting=3), Verdict.STORAGE_WAIT),
        (served(waiting=3), served(waiting=4), Verdict.STORAGE_WAIT),
        # The server of another mount shows nothing.
        (
            replace(served(SERVER), number="0:8"),
            replace(served(replace(SERVER, devices=(WROTE,))), number="0:8"),
            Verdict.STORAGE_WAIT,
        ),
    ],
)
@pytest.mark.parametrize("thread", [ON_MOUNT, replace(FDATASYNC, disks=("7:9",), mount="0:9")])
def test_a_call_on_fuse(before: Mount, now: Mount, expected: Verdict, thread: Any) -> None:
    """The image is on the mount, or on a loop device whose file is on the mount."""
    assert verdict({"threads": (thread,), "mounts": (before,)}, {"mounts": (now,)}) is expected


@pytest.mark.parametrize("thread", [SUBMIT, WORKER])
def test_a_call_without_a_descriptor(thread: Any) -> None:
    moved = served(replace(SERVER, devices=(WROTE,)))
    before = {"threads": (thread,), "mounts": (served(SERVER),)}
    assert verdict(before, {"mounts": (moved,)}) is Verdict.FLUSHING


def test_asynchronous_requests_may_be_for_the_file_system() -> None:
    moved = served(replace(SERVER, devices=(WROTE,)))
    before = {"direct": True, "completions": 7, "mounts": (served(SERVER),)}
    assert verdict(before, {"mounts": (moved,)}) is Verdict.UNKNOWN


def test_the_activity_of_a_server_before_it_was_found_is_unknown() -> None:
    waiting = replace(IDLE, threads=(ON_MOUNT,), mounts=(FUSE,))
    now = assess(assess(None, waiting), replace(waiting, at=S))
    for second in range(2, 9):
        now = assess(now, replace(waiting, at=second * S))
    assert now.unsampled == 0
    now = assess(now, replace(waiting, at=9 * S, mounts=(served(SERVER),)))
    assert now.unsampled == 9 * S


FRONT = Peer(80, "tgtd", (), 1_000, NO_IO, (), shared=False, unseen_requests=False)
"""A server that has its files on FUSE."""
CALLING = replace(FRONT, threads=(ON_MOUNT,))


def behind(front: Peer, server: Peer, *, certain: bool = True) -> dict[str, Any]:
    return connected_to(replace(front, behind=(replace(server, serves=("0:9",), certain=certain),)))


@pytest.mark.parametrize(
    ("front", "certain", "expected"),
    [
        (CALLING, True, Verdict.FLUSHING),
        # Another process may be the server.
        (CALLING, False, Verdict.UNKNOWN),
        # No thread of the server waits for FUSE, because the kernel writes back earlier data.
        (FRONT, True, Verdict.STORAGE_WAIT),
        (replace(FRONT, threads=(replace(ON_MOUNT, mount="0:8"),)), True, Verdict.STORAGE_WAIT),
        # The server may have requests for which none of its threads waits in a call.
        (replace(FRONT, unseen_requests=True), True, Verdict.FLUSHING),
        (replace(FRONT, unseen_requests=None), True, Verdict.FLUSHING),
        (replace(FRONT, threads=None), True, Verdict.FLUSHING),
        # The server's call may be for any of its files.
        (replace(FRONT, threads=(SUBMIT,)), True, Verdict.FLUSHING),
    ],
)
def test_a_server_on_fuse(front: Peer, certain: bool, expected: Verdict) -> None:
    before = behind(front, SERVER, certain=certain)
    now = behind(front, replace(SERVER, devices=(WROTE,)), certain=certain)
    assert verdict(before, now) is expected
