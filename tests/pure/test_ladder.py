"""The fixed clock, as a table: what is done at which moment."""

from __future__ import annotations

import pytest

from qkilld.judgement.ladder import FIXED_POLICY, Action, Decision, Standing, decide, policy_for
from qkilld.model.policy import Policy
from qkilld.model.words import INFINITY, Flag

S = 1_000_000
NONE, FORCE, NOWAIT, FIXED = Flag(0), Flag.FORCE, Flag.NOWAIT, Flag.FIXED
T0 = 1_000 * S


def wait(seconds: float) -> Decision:
    return Decision(Action.WAIT, T0 + int(seconds * S))


@pytest.mark.parametrize(
    ("flags", "term", "kill", "now", "expected"),
    [
        # Nothing sent yet
        (NONE, None, None, 0, Decision(Action.TERMINATE)),
        (FORCE, None, None, 0, Decision(Action.TERMINATE)),
        (NOWAIT, None, None, 0, Decision(Action.TERMINATE)),
        (FORCE | NOWAIT, None, None, 0, Decision(Action.KILL)),
        # SIGTERM sent, not forced: 15 s in all and never a SIGKILL
        (NONE, 0, None, 0, wait(15)),
        (NONE, 0, None, 14.999999, wait(15)),
        (NONE, 0, None, 15, Decision(Action.GIVE_UP)),
        (NONE, 0, None, 1e6, Decision(Action.GIVE_UP)),
        # SIGTERM sent, forced: SIGKILL at 10 s
        (FORCE, 0, None, 0, wait(10)),
        (FORCE, 0, None, 9.999999, wait(10)),
        (FORCE, 0, None, 10, Decision(Action.KILL)),
        (FORCE, 0, None, 12.5, Decision(Action.KILL)),
        # SIGKILL sent: 5 s more
        (FORCE, 0, 10, 10, wait(15)),
        (FORCE, 0, 10, 14.999999, wait(15)),
        (FORCE, 0, 10, 15, Decision(Action.GIVE_UP)),
        (FORCE, 0, 12.5, 15, wait(17.5)),
        # One signal and no more
        (NOWAIT, 0, None, 0, Decision(Action.LEAVE)),
        (FORCE | NOWAIT, None, 0, 0, Decision(Action.LEAVE)),
    ],
)
@pytest.mark.parametrize("fixed", [NONE, FIXED])
def test_fixed_clock(
    flags: Flag,
    fixed: Flag,
    term: float | None,
    kill: float | None,
    now: float,
    expected: Decision,
) -> None:
    standing = Standing(
        flags | fixed,
        FIXED_POLICY,
        term_at=None if term is None else T0 + int(term * S),
        kill_at=None if kill is None else T0 + int(kill * S),
    )
    assert decide(standing, T0 + int(now * S)) == expected


def test_infinite_grace_never_kills_and_never_gives_up() -> None:
    policy = Policy(grace=INFINITY)
    for flags in (NONE, FORCE):
        decision = decide(Standing(flags, policy, term_at=T0), T0 + 10**15)
        assert decision == Decision(Action.WAIT, INFINITY)


def test_grace_near_infinity_does_not_overflow_the_bus_type() -> None:
    decision = decide(Standing(FORCE, Policy(grace=INFINITY - 1), term_at=T0), T0)
    assert decision == Decision(Action.WAIT, INFINITY)


def test_max_caps_the_grace() -> None:
    policy = Policy(grace=60 * S, max=20 * S)
    assert decide(Standing(FORCE, policy, term_at=T0), T0) == wait(20)


CONFIGURED = Policy(grace=30 * S, reap=7 * S, max=90 * S)


@pytest.mark.parametrize(
    ("flags", "grace", "expected"),
    [
        (NONE, None, CONFIGURED),
        (FIXED, None, FIXED_POLICY),
        (NONE, 2 * S, Policy(grace=2 * S, reap=7 * S, max=90 * S)),
        (FIXED, 2 * S, Policy(grace=2 * S, reap=5 * S)),
    ],
)
def test_policy_of_a_job(flags: Flag, grace: int | None, expected: Policy) -> None:
    assert policy_for(flags, CONFIGURED, grace) == expected
