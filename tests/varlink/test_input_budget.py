"""How much input of each user may wait."""

from __future__ import annotations

from qkilld.varlink.connection import MAX_FIRST, MAX_TOTAL, MAX_UNREAD, InputBudget


def fill(budget: InputBudget, uid: int, step: int = MAX_FIRST) -> int:
    """Take as much as the user may have; return how many bytes this is."""
    taken = 0
    while budget.take(uid, step):
        taken += step
    return taken


def test_users_with_much_input_leave_room_for_others() -> None:
    budget = InputBudget(frozenset({0}))
    assert fill(budget, 1000) == MAX_UNREAD
    flood = sum(fill(budget, uid) for uid in range(1001, 1100))
    assert MAX_TOTAL // 2 - MAX_UNREAD < flood < MAX_TOTAL - MAX_UNREAD
    assert budget.take(2000, MAX_FIRST) and not budget.take(2000, 1)
    assert budget.take(0, 2 * MAX_TOTAL)
    for uid in range(2001, 9000):
        budget.take(uid, MAX_FIRST)
    assert sum(budget._per_user.values()) == MAX_TOTAL


def test_what_is_handled_can_be_taken_again() -> None:
    budget = InputBudget(frozenset())
    for _ in range(3):
        taken = {uid: fill(budget, uid, 10_000) for uid in range(1000, 1100)}
        for uid, count in taken.items():
            budget.give(uid, count)
        assert not budget._per_user and not budget._further
