"""How many places each user may take."""

from __future__ import annotations

import time

import pytest

from qkilld.engine.fair_shares import FairShares, set_subordinate_uids, user_of


@pytest.fixture
def shares() -> FairShares:
    return FairShares(12, of_root=2, shared=4)


def fill(shares: FairShares, uid: int) -> int:
    """Take all places that the user may have; return their number."""
    count = 0
    while shares.has_room(uid):
        shares.take(uid)
        count += 1
    return count


def test_the_first_user_takes_no_place_that_is_the_first_of_another(shares: FairShares) -> None:
    assert fill(shares, 1000) == 5
    assert [fill(shares, uid) for uid in range(1001, 1007)] == [1, 1, 1, 1, 1, 0]
    assert shares.taken == 10


def test_shares_shrink_with_the_number_of_users(shares: FairShares) -> None:
    for uid in (1000, 1001):
        shares.take(uid)
    assert fill(shares, 1000) == 2
    assert fill(shares, 1001) == 2
    assert fill(shares, 1002) == 1
    shares.give_back(1000)
    assert not shares.has_room(1000)
    shares.give_back(1000)
    shares.give_back(1002)
    assert fill(shares, 1002) == 2


@pytest.mark.parametrize("users", [0, 1, 20])
def test_root_has_places_of_its_own(shares: FairShares, users: int) -> None:
    taken = sum(fill(shares, uid) for uid in range(1000, 1000 + users))
    assert fill(shares, 0) == 12 - taken >= 2
    assert not shares.has_room(1) and not shares.has_room(0)


def test_root_does_not_count_as_a_user(shares: FairShares) -> None:
    assert fill(shares, 0) == 12
    for _ in range(10):
        shares.give_back(0)
    assert fill(shares, 1000) == 5


def test_subordinate_uids_leave_room_for_others(shares: FairShares) -> None:
    """One user may have 65,536 subordinate uids."""
    assert [fill(shares, uid) for uid in range(100_000, 100_004)] == [5, 1, 1, 0]
    assert not shares.has_room(65_536) and shares.has_room(65_535)
    assert [fill(shares, uid) for uid in range(1000, 1004)] == [1, 1, 1, 0]
    shares.give_back(100_001)
    assert shares.has_room(100_001) and shares.has_room(65_536)


def test_many_subordinate_uids_of_one_user_leave_room_for_others(shares: FairShares) -> None:
    for uid in range(100_000, 100_100):
        if shares.has_room(uid):
            shares.take(uid)
    assert shares.taken == 7
    assert [fill(shares, uid) for uid in range(1000, 1004)] == [1, 1, 1, 0]


def test_known_subordinate_uids_count_for_their_user(
    shares: FairShares, subordinate_uids: None
) -> None:
    """Known subordinate uids leave room for other users whose own uids are 65,536 or higher."""
    assert [fill(shares, uid) for uid in (100_000, 100_001, 1000)] == [5, 0, 0]
    assert [fill(shares, uid) for uid in (200_000, 200_001, 1001, 1002)] == [1, 1, 1, 1]
    assert user_of(0) == 0 and user_of(99_999) == 99_999 and user_of(165_536) == 165_536
    for _ in range(5):
        shares.give_back(165_535)
    assert shares.has_room(1000)


def test_a_place_may_be_taken_without_room(shares: FairShares) -> None:
    for _ in range(20):
        shares.take(1000)
    assert not shares.has_room(1001) and not shares.has_room(0)
    for _ in range(20):
        shares.give_back(1000)
    assert shares.taken == 0
    assert fill(shares, 1000) == 5


def test_ranges_of_many_users() -> None:
    """Each lookup must be quick, because a search of all processes needs thousands of them."""
    ranges = [(100_000 + n * 65_536, 165_535 + n * 65_536, 1000 + n) for n in range(30_000)]
    try:
        set_subordinate_uids([*reversed(ranges), (100_100, 100_199, 7), (90_000, 89_999, 8)])
        uids = [70_000, 99_999, 100_000, 100_099, 100_100, 100_199, 165_536, 89_999, 90_000]
        assert [*map(user_of, uids)] == [70_000, 99_999, 1000, 1000, 7, 7, 1001, 89_999, 90_000]
        assert user_of(100_200) == 100_200  # Only the range that begins later counts.
        assert user_of(ranges[-1][1]) == 30_999 and user_of(ranges[-1][1] + 1) == ranges[-1][1] + 1
        began = time.process_time()
        for _ in range(1000):
            user_of(99_999)
        assert time.process_time() - began < 0.5
    finally:
        set_subordinate_uids([])
