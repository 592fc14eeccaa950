"""The order in which calls are served."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from qkilld.engine import fair_queue
from qkilld.engine.fair_queue import (
    CALLS_PER_TURN,
    CROWD,
    MAX_BYTES,
    MAX_CALLS,
    SPARE,
    SPARE_BYTES,
    FairQueue,
)

ROOT, ALICE, BOB = 0, 1000, 1001


def put(queue: FairQueue[str], calls: str, uid: int | None) -> list[bool]:
    """`calls` are words like a1: connection and number."""
    return [queue.put(call[0], uid, call, 10) for call in calls.split()]


def turns(queue: FairQueue[str]) -> list[str]:
    found = []
    while queue:
        calls = queue.turn()
        found.append(f"{calls[0][0]}: {' '.join(call for _, call in calls)}")
    return found


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([("a1 a2", ALICE)], ["1000: a1 a2"]),
        ([("a1 a2 a3 a4 a5", ALICE)], ["1000: a1 a2 a3 a4", "1000: a5"]),
        # Users take turns, regardless of who came first and how many calls wait.
        (
            [("a1 a2 a3 a4 a5", ALICE), ("b1", BOB), ("r1", ROOT)],
            ["1000: a1 a2 a3 a4", "1001: b1", "0: r1", "1000: a5"],
        ),
        # The connections of a user share a turn, and each keeps its order.
        (
            [("a1 a2 a3 c1 c2 d1", ALICE), ("b1 b2", BOB)],
            ["1000: a1 c1 d1 a2", "1001: b1 b2", "1000: c2 a3"],
        ),
    ],
)
def test_turns(calls: list[tuple[str, int]], expected: list[str]) -> None:
    queue: FairQueue[str] = FairQueue()
    for words, uid in calls:
        assert all(put(queue, words, uid))
    assert turns(queue) == expected


def test_a_stranger_has_no_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    put(queue, "s1 s2 t1", None)
    assert not queue
    queue.introduce("s", ALICE)
    put(queue, "s3", ALICE)
    assert turns(queue) == ["1000: s1 s2 s3"]
    queue.introduce("t", ALICE)
    queue.introduce("nobody", ALICE)
    assert turns(queue) == ["1000: t1"]


def test_calls_of_a_closed_connection_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    put(queue, "a1 a2 c1", ALICE)
    put(queue, "s1", None)
    assert queue.forget("a", ALICE) == ["a1", "a2"]
    assert queue.forget("s", None) == ["s1"]
    assert queue.forget("x", None) == queue.forget("x", BOB) == []
    assert turns(queue) == ["1000: c1"]
    put(queue, "a1", ALICE)
    assert queue.forget("a", ALICE) == ["a1"]
    assert not queue


@pytest.mark.parametrize("uid", [ALICE, None])
def test_a_limit_for_a_user_and_for_a_stranger(uid: int | None) -> None:
    queue: FairQueue[str] = FairQueue()
    assert all(queue.put("a", uid, "x", 0) for _ in range(MAX_CALLS))
    assert not queue.put("a", uid, "x", 0)
    # The limit is for all connections of a user, and does not affect other users.
    assert queue.put("b", uid, "x", 0) is (uid is None)
    assert queue.put("c", BOB, "x", 0)
    queue.forget("a", uid)
    assert queue.put("a", uid, "x", MAX_BYTES)
    assert not queue.put("a", uid, "x", 1)


def test_root_has_no_limit() -> None:
    queue: FairQueue[str] = FairQueue(frozenset({ROOT}))
    assert all(queue.put("r", ROOT, "x", MAX_BYTES) for _ in range(2 * fair_queue.MAX_TOTAL))
    # Root's calls leave room for others.
    assert all(queue.put("a", ALICE, "x", 0) for _ in range(MAX_CALLS))


def test_a_limit_for_all_together_leaves_everybody_a_few() -> None:
    queue: FairQueue[str] = FairQueue()
    for uid in range(1, 10):
        for _ in range(MAX_CALLS):
            queue.put(f"u{uid}", uid, "x", 0)
    assert queue._count <= fair_queue.MAX_TOTAL + 10 * SPARE
    accepted = [queue.put("late", 77, "x", 0) for _ in range(100)]
    assert accepted == [True] * SPARE + [False] * (100 - SPARE)


@pytest.mark.parametrize("size", [100, SPARE_BYTES // 2, SPARE_BYTES])
def test_calls_of_many_users_and_strangers_have_a_limit_in_bytes(size: int) -> None:
    """The limit holds even if each connection belongs to another user."""
    queue: FairQueue[str] = FairQueue(frozenset({ROOT}))
    count = 2048
    for number in range(count):
        name, uid = f"n{number}", None if number % 2 else number + 1
        accepted = [queue.put(name, uid, "x", size) for _ in range(SPARE)]
        # Each connection may have at least one waiting call, even one of the maximum length.
        assert accepted[0]
    assert queue._size <= fair_queue.MAX_TOTAL_BYTES + count * SPARE_BYTES


def test_a_connection_with_many_calls_gets_one_at_a_time() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(CROWD + 1):
        queue.put("a", ALICE, "x", 0)
    assert queue.crowded
    queue.put("b", BOB, "y", 0)
    assert not queue.crowded
    assert queue.turn() == [(ALICE, "x")]
    assert queue.turn() == [(BOB, "y")]
    assert queue.turn() == [(ALICE, "x")] * CALLS_PER_TURN


def test_nothing_is_lost_or_doubled_or_kept() -> None:
    source = random.Random(1)
    queue: FairQueue[int] = FairQueue()
    uids: dict[str, int | None] = {}
    waiting: dict[str, list[int]] = {}
    served: Counter[int] = Counter()
    for number in range(20_000):
        name = f"n{source.randrange(20)}"
        match source.randrange(10):
            case 0:
                gone = queue.forget(name, uids.pop(name, None))
                assert gone == waiting.pop(name, [])
            case 1 if uids.get(name) is None:
                uids[name] = source.randrange(4)
                queue.introduce(name, uids[name] or 0)
            case 2 | 3 if queue:
                for uid, item in queue.turn():
                    (owner,) = [one for one, items in waiting.items() if item in items]
                    assert uids[owner] == uid
                    assert waiting[owner].pop(0) == item
                    served[item] += 1
            case _:
                if queue.put(name, uids.get(name), number, number % 100):
                    waiting.setdefault(name, []).append(number)
    assert served and max(served.values()) == 1
    for name, known in uids.items():
        assert queue.forget(name, known) == waiting.pop(name, [])
    for name, items in waiting.items():
        assert queue.forget(name, None) == items
    assert (queue._count, queue._size, bool(queue._strangers), bool(queue)) == (0, 0, False, False)
    assert not queue._uids


def test_subordinate_uids_share_the_turn_of_their_user(subordinate_uids: None) -> None:
    """Only the turn is shared: access is decided for the subordinate uid itself."""
    queue: FairQueue[str] = FairQueue()
    for number in range(6):
        queue.put(f"n{number}", 100_000 + number, f"s{number}", 10)
    queue.put("stranger", None, "s6", 10)
    queue.introduce("stranger", 100_006)
    put(queue, "a1", ALICE)
    put(queue, "b1", BOB)
    assert queue.turn() == [(100_000 + number, f"s{number}") for number in range(4)]
    assert queue.turn() == [(BOB, "b1")]
    assert queue.turn() == [(100_004, "s4"), (100_005, "s5"), (100_006, "s6"), (ALICE, "a1")]
    assert not queue and not queue._uids


def test_calls_of_subordinate_uids_of_a_user_without_limit_are_counted(
    subordinate_uids: None,
) -> None:
    queue: FairQueue[str] = FairQueue(frozenset({ROOT, ALICE}))
    for uid in (100_000, ALICE):
        for number in range(6):
            queue.put(f"n{uid}-{number}", uid, "call", 10)
    assert (queue._count, queue._size) == (6, 60)
    queue.forget("n100000-5", 100_000)
    queue.forget(f"n{ALICE}-5", ALICE)
    while queue:
        queue.turn()
    assert (queue._count, queue._size) == (0, 0)


def test_long_calls_are_one_a_turn() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(4):
        assert queue.put(":1.1", 1000, number, 16 << 10)
    assert [queue.turn() for _ in range(4)] == [[(1000, number)] for number in range(4)]
