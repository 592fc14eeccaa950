"""The ladder, as tables: what is done at which moment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qkilld.judgement.ladder import (
    FIXED_POLICY,
    Action,
    Decision,
    Standing,
    decide,
    kill_due,
    lengthened,
    next_look,
    policy_for,
)
from qkilld.judgement.verdict import Assessment
from qkilld.model.evidence import Cgroup, Sample
from qkilld.model.job import Control
from qkilld.model.policy import Policy
from qkilld.model.words import INFINITY, Flag, Verdict

S = 1_000_000
NONE, FORCE, NOWAIT, FIXED = Flag(0), Flag.FORCE, Flag.NOWAIT, Flag.FIXED
T0 = 1_000 * S
FROZEN = Cgroup(True, 0, 0, 0, 0, frozen=True)


def wait(seconds: float) -> Decision:
    due = T0 + int(seconds * S)
    return Decision(Action.WAIT, due, due)


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
def test_fixed_clock(
    flags: Flag,
    term: float | None,
    kill: float | None,
    now: float,
    expected: Decision,
) -> None:
    standing = Standing(
        flags | FIXED,
        FIXED_POLICY,
        term_at=None if term is None else T0 + int(term * S),
        kill_at=None if kill is None else T0 + int(kill * S),
    )
    assert decide(standing, T0 + int(now * S)) == expected


@pytest.mark.parametrize("fixed", [NONE, FIXED])
def test_held_and_extended(fixed: Flag) -> None:
    late = T0 + 10**12
    for flags in (NONE, FORCE):
        held = Standing(flags | fixed, Policy(), term_at=T0, control=Control(held=True))
        assert decide(held, late).action in (Action.WAIT, Action.LOOK)
        assert decide(held, late).deadline == INFINITY
        extended = replace(held, control=Control(not_before=late))
        reap = 0 if flags else 5 * S
        assert decide(extended, T0).deadline == late + reap
    # What was sent is sent, and what is to be sent at once is sent at once.
    killed = replace(held, kill_at=T0)
    assert decide(killed, T0 + 5 * S).action is Action.GIVE_UP
    assert decide(replace(held, term_at=None), T0).action is Action.TERMINATE


@pytest.mark.parametrize("fixed", [NONE, FIXED])
def test_infinite_grace_never_kills_and_never_gives_up(fixed: Flag) -> None:
    policy = Policy(grace=INFINITY)
    for flags in (NONE, FORCE):
        decision = decide(Standing(flags | fixed, policy, term_at=T0), T0 + 10**15)
        assert decision.action in (Action.WAIT, Action.LOOK)
        assert decision.deadline == INFINITY


def test_grace_near_infinity_does_not_overflow_the_bus_type() -> None:
    decision = decide(Standing(FORCE | FIXED, Policy(grace=INFINITY - 1), term_at=T0), T0)
    assert decision == Decision(Action.WAIT, INFINITY, INFINITY)


def test_max_caps_the_grace() -> None:
    policy = Policy(grace=60 * S, max=20 * S)
    assert decide(Standing(FORCE | FIXED, policy, term_at=T0), T0) == wait(20)


CONFIGURED = Policy(grace=30 * S, reap=7 * S, max=90 * S)


@pytest.mark.parametrize(
    ("flags", "asked", "expected"),
    [
        (NONE, {}, CONFIGURED),
        (FIXED, {}, FIXED_POLICY),
        (NONE, {"grace": 2 * S}, Policy(grace=2 * S, reap=7 * S, max=90 * S)),
        (FIXED, {"grace": 2 * S}, Policy(grace=2 * S, reap=5 * S)),
    ],
)
def test_policy_of_a_job(flags: Flag, asked: dict[str, int], expected: Policy) -> None:
    assert policy_for(flags, CONFIGURED, asked) == expected


def test_spans_are_only_ever_lengthened() -> None:
    longer = lengthened(CONFIGURED, {"grace": 40 * S, "stall": 1})
    assert (longer.grace, longer.stall) == (40 * S, CONFIGURED.stall)


# ---- by evidence ----


def seen(
    at: float,
    *,
    outstanding: bool | None = False,
    progress: float | None = None,
    outstanding_at: float | None = None,
    state: str = "S",
) -> Assessment:
    """What is known at so many seconds after SIGTERM."""

    def point(seconds: float | None) -> int | None:
        return None if seconds is None else T0 + int(seconds * S)

    sample = Sample(T0 + int(at * S), state)
    return Assessment(
        first=sample,
        last=sample,
        seen=sample,
        verdict=Verdict.UNKNOWN,
        reasons=(),
        progress_at=point(progress),
        outstanding=outstanding,
        outstanding_at=point(at if outstanding is not False else outstanding_at),
        pending=None,
        rate=None,
    )


@pytest.mark.parametrize(
    ("evidence", "policy", "due"),
    [
        # Nothing outstanding, nothing moved: the grace.
        (seen(1), Policy(), 10),
        (seen(1), Policy(grace=20 * S), 20),
        (seen(1), Policy(stall=15 * S), 15),
        # Progress holds SIGKILL off for StallSec, outstanding I/O for StorageStallSec.
        (seen(9, progress=9), Policy(), 19),
        (seen(9, progress=9, outstanding=True), Policy(), 69),
        (seen(9, outstanding=True), Policy(), 60),
        (seen(9, outstanding=True), Policy(storage_stall=5 * S), 10),
        (seen(9, progress=9, outstanding=True), Policy(storage_stall=5 * S), 19),
        # What was outstanding a moment ago is no idle process yet.
        (seen(40, outstanding_at=39), Policy(), 49),
        # Unknown is not idle; before the first look it is the soonest moment.
        (None, Policy(), 10),
        (None, Policy(stall=15 * S), 15),
        (seen(1, outstanding=None), Policy(), 60),
        # MaxSec caps all, from SIGTERM on.
        (seen(9, progress=9, outstanding=True), Policy(max=30 * S), 30),
        (seen(9, outstanding=None), Policy(grace=INFINITY, max=INFINITY), None),
    ],
)
def test_when_the_evidence_allows_sigkill(
    evidence: Assessment | None, policy: Policy, due: float | None
) -> None:
    standing = Standing(FORCE, policy, term_at=T0, assessment=evidence)
    assert kill_due(standing) == (INFINITY if due is None else T0 + int(due * S))


def test_it_looks_again_right_before_sigkill() -> None:
    stale = Standing(FORCE, Policy(), term_at=T0, assessment=seen(9.5))
    assert decide(stale, T0 + 10 * S).action is Action.LOOK
    fresh = Standing(FORCE, Policy(), term_at=T0, assessment=seen(10))
    assert decide(fresh, T0 + 10 * S).action is Action.KILL
    moved = Standing(FORCE, Policy(), term_at=T0, assessment=seen(10, progress=10))
    assert decide(moved, T0 + 10 * S) == Decision(Action.WAIT, T0 + 20 * S, T0 + 11 * S)


def test_no_sigkill_without_a_look() -> None:
    standing = Standing(FORCE, Policy(), term_at=T0)
    assert decide(standing, T0 + 1000 * S).action is Action.LOOK


def test_without_force_it_gives_up_when_the_time_for_sigkill_and_reaping_is_over() -> None:
    standing = Standing(NONE, Policy(), term_at=T0, assessment=seen(15))
    assert decide(standing, T0 + 15 * S).action is Action.GIVE_UP
    assert decide(standing, T0 + 15 * S - 1).action is Action.WAIT


@pytest.mark.parametrize(
    ("evidence", "jobs", "look"),
    [
        (None, 1, 0.1),
        (seen(0.1), 1, 0.4),
        (seen(1.9), 1, 2.2),
        (seen(2.1), 1, 3.1),
        (seen(2.1), 1000, 4.1),
    ],
)
def test_cadence(evidence: Assessment | None, jobs: int, look: float) -> None:
    standing = Standing(FORCE, Policy(), term_at=T0, assessment=evidence, jobs=jobs)
    assert next_look(standing, T0) == T0 + round(look * S)


def test_what_is_merely_stopped_is_continued_and_its_time_starts_again() -> None:
    stopped = Standing(FORCE, Policy(), term_at=T0, assessment=seen(3, state="T"))
    assert decide(stopped, T0 + 3 * S).action is Action.CONTINUE
    again = replace(stopped, continued_at=T0 + 3 * S, continues=1)
    assert kill_due(replace(again, assessment=seen(4))) == T0 + 13 * S
    # It is stopped once more; but not for ever.
    assert (
        decide(replace(again, assessment=seen(4, state="T")), T0 + 4 * S).action is Action.CONTINUE
    )
    often = replace(again, continues=3, assessment=seen(4, state="T"))
    assert decide(often, T0 + 4 * S).action is Action.WAIT


@pytest.mark.parametrize(
    "change",
    [{"state": "t"}, {"state": "T", "tracer": 7}, {"state": "T", "cgroup": FROZEN}],
)
def test_what_somebody_else_holds_is_not_continued(change: dict[str, Any]) -> None:
    evidence = seen(3)
    held = replace(evidence, last=replace(evidence.last, **change))
    standing = Standing(FORCE, Policy(), term_at=T0, assessment=held)
    assert decide(standing, T0 + 3 * S).action is Action.WAIT


def test_after_sigkill_it_looks_at_what_holds_the_process() -> None:
    standing = Standing(FORCE, Policy(), term_at=T0, kill_at=T0 + 10 * S, assessment=seen(10))
    killed_at = T0 + 10 * S
    assert decide(standing, killed_at) == Decision(Action.WAIT, T0 + 15 * S, killed_at + 300_000)
    assert decide(standing, killed_at + 300_000).action is Action.LOOK
    assert decide(standing, T0 + 15 * S).action is Action.GIVE_UP
