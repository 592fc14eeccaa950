"""The limits of concurrent calls of one user."""

from __future__ import annotations

import resource

import pytest

from qkilld.engine.call_limits import CallLimits, Cost
from qkilld.model.errors import Busy

ROOT, ALICE, BOB = 0, 1000, 1001


@pytest.mark.parametrize(
    ("cost", "most", "named"),
    [(Cost.WAIT, 1024, "1024"), (Cost.READ, 8, "8"), (Cost.OTHER, 64, "64")],
)
def test_limits(cost: Cost, most: int, named: str) -> None:
    limits = CallLimits(frozenset({ROOT}))
    for _ in range(most):
        limits.begin(ALICE, cost)
    with pytest.raises(Busy, match=rf"Uid 1000 has {named} calls"):
        limits.begin(ALICE, cost)
    limits.begin(BOB, cost)
    for _ in range(most * 2):
        limits.begin(ROOT, cost)
    limits.end(ALICE, cost)
    limits.begin(ALICE, cost)
    with pytest.raises(Busy):
        limits.begin(ALICE, cost)


@pytest.mark.parametrize(
    ("cost", "most", "named"),
    [
        (Cost.WAIT, 32_768, "32768 calls of Wait"),
        (Cost.READ, 256, "256 calls of Inspect"),
        (Cost.OTHER, 2048, "2048 calls"),
    ],
)
def test_users_together_have_a_limit_and_root_has_a_reserve(
    cost: Cost, most: int, named: str
) -> None:
    """One user may have thousands of uids."""
    limits = CallLimits(frozenset({ROOT}))
    for number in range(most):
        limits.begin(1000 + number % 64, cost)
    limits.begin(ROOT, cost)
    with pytest.raises(Busy, match=named):
        limits.begin(2000, cost)
    limits.begin(ROOT, cost)
    limits.end(ROOT, cost)
    with pytest.raises(Busy, match=named):
        limits.begin(2000, cost)
    limits.end(1000, cost)
    limits.begin(2000, cost)


def test_looks_count_as_requests_and_waits_do_not() -> None:
    limits = CallLimits(frozenset({ROOT}))
    for _ in range(100):
        limits.begin(ALICE, Cost.WAIT)
    for _ in range(8):
        limits.begin(ALICE, Cost.READ)
    for _ in range(56):
        limits.begin(ALICE, Cost.OTHER)
    with pytest.raises(Busy):
        limits.begin(ALICE, Cost.OTHER)
    limits.begin(ALICE, Cost.WAIT)


def test_nothing_is_kept_of_those_that_have_ended() -> None:
    limits = CallLimits(frozenset({ROOT}))
    for uid in range(1000):
        limits.begin(uid, Cost.READ)
        limits.end(uid, Cost.READ)
    assert not limits._running


def test_a_reserve_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = CallLimits(frozenset({ROOT}))
    limits.check_descriptors(ALICE)
    # More than three quarters of this limit are in use.
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))
    with pytest.raises(Busy, match="file descriptors"):
        limits.check_descriptors(ALICE)
    limits.check_descriptors(ROOT)


def test_subordinate_uids_count_for_their_user(subordinate_uids: None) -> None:
    limits = CallLimits(frozenset({ROOT}))
    for number in range(64):
        limits.begin(100_000 + number, Cost.OTHER)
    for uid in (1000, 100_000):
        with pytest.raises(Busy, match="Uid 1000 has 64 calls"):
            limits.begin(uid, Cost.OTHER)
    limits.begin(200_000, Cost.OTHER)
    limits.end(100_000, Cost.OTHER)
    limits.begin(1000, Cost.OTHER)
