"""The verdict if a source of evidence is unreadable in some samples."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qkilld.decision.ladder import JobFacts, kill_due
from qkilld.decision.risk import risks_of_kill
from qkilld.decision.verdict import Assessment, assess
from qkilld.model.constants import Flag
from qkilld.model.policy import Policy
from qkilld.model.sample import Sample
from tests.pure.test_verdict import (
    FDATASYNC,
    FUSE,
    IDLE,
    NBD,
    NFS,
    NO_IO,
    OF_NBD,
    ON_MOUNT,
    SERVER,
    STRANGER,
    UNIX,
    WRITING,
    S,
)

assert IDLE.devices
DISK = IDLE.devices[0]


def kill_time(samples: Callable[[int], Sample], until: int = 150) -> int | None:
    """Take a sample each second. Return the second at which SIGKILL is due; None if it is not due
    before `until`."""
    now: Assessment | None = None
    for second in range(until):
        now = assess(now, replace(samples(second), at=second * S))
        facts = JobFacts(flags=Flag.FORCE, policy=Policy(), assessment=now, started=0, term_at=0)
        if kill_due(facts) <= now.last.at:
            return second
    return None


def disk(second: int) -> dict[str, Any]:
    return {"devices": (replace(DISK, writes=1_000 + second),)}


def server(second: int) -> dict[str, Any]:
    assert SERVER.devices
    devices = (replace(SERVER.devices[0], writes=second),)
    peer = replace(SERVER, threads=(replace(WRITING, switches=second),), devices=devices)
    return {"sockets": (replace(UNIX, peer=peer),)}


def bytes_of(second: int) -> dict[str, Any]:
    return {"received": 500 + second * 4_000, "acked": 20_000 + second * 4_000}


MOVES: list[tuple[str, Callable[[int], dict[str, Any]]]] = [
    ("threads", lambda n: {"threads": (FDATASYNC,), **disk(n)}),
    (
        "threads",
        lambda n: {
            "threads": (ON_MOUNT,),
            "mounts": (replace(NFS, operations=n), replace(FUSE, number="0:33")),
        },
    ),
    ("rings", lambda n: {"rings": 4, **disk(n)}),
    ("rings", lambda n: {"rings": 1, "timers": 1, **disk(n)}),
    ("direct", lambda n: {"direct": True, "completions": n}),
    ("sockets", lambda n: {"sockets": (replace(STRANGER, **bytes_of(n)),)}),
    ("nodes", lambda n: {"nodes": (NBD,), "sockets": (replace(OF_NBD, **bytes_of(n)),)}),
    ("nodes", lambda n: {"nodes": (NBD,), **server(n)}),
]


@pytest.mark.parametrize(("source", "moves"), MOVES)
@pytest.mark.parametrize("share", [2, 3])
def test_movement_counts_although_its_source_is_often_unreadable(
    source: str, moves: Callable[[int], dict[str, Any]], share: int
) -> None:
    """The source is unreadable in all but one of `share` samples."""

    def shown(second: int) -> Sample:
        hidden = {source: None} if second % share else {}
        return replace(IDLE, **{**moves(second), **hidden})

    assert kill_time(shown) is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("source", "moves"), MOVES)
def test_a_source_that_is_often_unreadable_delays_no_sigkill(
    source: str, moves: Callable[[int], dict[str, Any]], seed: int
) -> None:
    """Nothing moves, but the source is unreadable in random samples."""
    draw = random.Random(seed)

    def shown(_second: int) -> Sample:
        hidden = {source: None} if draw.random() < 0.4 else {}
        return replace(IDLE, **{**moves(0), **hidden})

    assert kill_time(shown) in range(60, 63)


def test_a_wait_that_ended_while_its_source_was_unreadable_is_progress() -> None:
    first = assess(None, replace(IDLE, threads=(FDATASYNC,)))
    blind = assess(first, replace(IDLE, at=S, threads=None))
    assert (blind.progress_at, blind.outstanding) == (None, None)
    assert assess(blind, replace(IDLE, at=2 * S)).progress_at == 2 * S
    still = assess(blind, replace(IDLE, at=2 * S, threads=(FDATASYNC,)))
    assert (still.progress_at, still.waits[0].since) == (None, 0)
    assert not still.hidden


def test_servers_are_read_although_the_threads_are_often_unreadable() -> None:
    now = assess(None, replace(IDLE, threads=(FDATASYNC,)))
    for second in range(1, 6):
        threads = None if second % 2 else (FDATASYNC,)
        now = assess(now, replace(IDLE, at=second * S, threads=threads))
        assert now.wants_detail


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        (lambda n: {"devices": (replace(DISK, writes=n, own=True),)}, None),
        # Other processes may use the disk under an image file, or the mount.
        (disk, 300),
        (lambda n: {"mounts": (replace(NFS, operations=n),)}, 300),
        (lambda n: {"io": replace(NO_IO, write_bytes=n * 65_536)}, None),
        (lambda n: {}, 60),
        # It becomes known that there are no requests.
        (lambda n: {"direct": None if n < 10 else False}, 19),
    ],
)
def test_an_unknown_number_of_aio_requests_is_not_none(
    moves: Callable[[int], dict[str, Any]], expected: int | None
) -> None:
    """While /proc/PID/maps cannot be read, AIO requests may be in flight."""

    def shown(second: int) -> Sample:
        return replace(IDLE, **{"direct": None, **moves(second)})

    assert kill_time(shown, 310) == expected
    assert [risk.code for risk in risks_of_kill(assess(None, shown(0)))] == ["unknown"]


def test_unknown_pending_signals_do_not_look_idle() -> None:
    """SIGTERM may be pending, so QEMU may not have taken it yet."""
    assert kill_time(lambda _n: replace(IDLE, term_pending=None)) == 60


@pytest.mark.parametrize("shared", [True, None])
def test_unreadable_calls_of_a_server_are_not_calls_that_returned(shared: bool | None) -> None:
    def shown(second: int) -> Sample:
        peer = replace(SERVER, shared=shared, threads=(WRITING,) if second % 2 else None)
        return replace(IDLE, nodes=(NBD,), sockets=(replace(UNIX, peer=peer),))

    assert kill_time(shown) in range(60, 63)
