"""The ladder as tables: the action at each moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qkilld.decision.ladder import (
    FIXED_POLICY,
    Action,
    Decision,
    JobFacts,
    Promise,
    decide,
    kill_due,
    lengthen,
    next_sample_time,
    policy_for,
)
from qkilld.decision.verdict import Assessment, assess
from qkilld.model.constants import INFINITY, Flag, Verdict
from qkilld.model.job import Control
from qkilld.model.policy import Policy
from qkilld.model.sample import Cgroup, Device, Node, Sample, Socket, Thread
from tests.engine.conftest import IDLE, ON_PIPE

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
        # SIGTERM sent, without FORCE: 15 s in total, and never SIGKILL
        (NONE, 0, None, 0, wait(15)),
        (NONE, 0, None, 14.999999, wait(15)),
        (NONE, 0, None, 15, Decision(Action.GIVE_UP)),
        (NONE, 0, None, 1e6, Decision(Action.GIVE_UP)),
        # SIGTERM sent, with FORCE: SIGKILL at 10 s
        (FORCE, 0, None, 0, wait(10)),
        (FORCE, 0, None, 9.999999, wait(10)),
        (FORCE, 0, None, 10, Decision(Action.KILL)),
        (FORCE, 0, None, 12.5, Decision(Action.KILL)),
        # SIGKILL sent: 5 s more
        (FORCE, 0, 10, 10, wait(15)),
        (FORCE, 0, 10, 14.999999, wait(15)),
        (FORCE, 0, 10, 15, Decision(Action.GIVE_UP)),
        (FORCE, 0, 12.5, 15, wait(17.5)),
        # NOWAIT: one signal, and no more
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
    facts = JobFacts(
        flags=flags | FIXED,
        policy=FIXED_POLICY,
        term_at=None if term is None else T0 + int(term * S),
        kill_at=None if kill is None else T0 + int(kill * S),
    )
    assert decide(facts, T0 + int(now * S)) == expected


@pytest.mark.parametrize("fixed", [NONE, FIXED])
def test_held_and_extended(fixed: Flag) -> None:
    late = T0 + 10**12
    for flags in (NONE, FORCE):
        held = JobFacts(
            flags=flags | fixed, policy=Policy(), term_at=T0, control=Control(held=True)
        )
        assert decide(held, late).action in (Action.WAIT, Action.SAMPLE)
        assert decide(held, late).deadline == INFINITY
        extended = replace(held, control=Control(not_before=late))
        reap = 0 if flags else 5 * S
        assert decide(extended, T0).deadline == late + reap
    # A hold does not undo SIGKILL.
    killed = replace(held, kill_at=T0)
    assert decide(killed, T0 + 5 * S).action is Action.GIVE_UP
    early = replace(held, term_at=None)
    assert decide(early, late) == Decision(Action.WAIT)
    until = replace(early, control=Control(held=True, held_until=late))
    assert decide(until, T0) == Decision(Action.WAIT, late, late)
    assert decide(until, late).action is Action.TERMINATE


@pytest.mark.parametrize("fixed", [NONE, FIXED])
def test_infinite_grace_never_kills_and_never_gives_up(fixed: Flag) -> None:
    policy = Policy(grace=INFINITY)
    for flags in (NONE, FORCE):
        decision = decide(JobFacts(flags=flags | fixed, policy=policy, term_at=T0), T0 + 10**15)
        assert decision.action in (Action.WAIT, Action.SAMPLE)
        assert decision.deadline == INFINITY


def test_grace_near_infinity_does_not_overflow_the_bus_type() -> None:
    decision = decide(
        JobFacts(flags=FORCE | FIXED, policy=Policy(grace=INFINITY - 1), term_at=T0), T0
    )
    assert decision == Decision(Action.WAIT, INFINITY, INFINITY)


def test_max_caps_the_grace() -> None:
    policy = Policy(grace=60 * S, max=20 * S)
    assert decide(JobFacts(flags=FORCE | FIXED, policy=policy, term_at=T0), T0) == wait(20)


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
    longer = lengthen(CONFIGURED, {"grace": 40 * S, "stall": 1})
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
    """Return the assessment `at` seconds after SIGTERM."""

    def point(seconds: float | None) -> int | None:
        return None if seconds is None else T0 + int(seconds * S)

    sample = Sample(T0 + int(at * S), state, threads=())
    return Assessment(
        first=Sample(T0, state),
        last=sample,
        seen=sample,
        waits=(),
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
        # Nothing is outstanding, and nothing moved: GraceSec counts.
        (seen(1), Policy(), 10),
        (seen(1), Policy(grace=20 * S), 20),
        (seen(1), Policy(stall=15 * S), 15),
        # Progress delays SIGKILL by StallSec, outstanding I/O by StorageStallSec.
        (seen(9, progress=9), Policy(), 19),
        (seen(9, progress=9, outstanding=True), Policy(), 69),
        (seen(9, outstanding=True), Policy(), 60),
        (seen(9, outstanding=True), Policy(storage_stall=5 * S), 10),
        (seen(9, progress=9, outstanding=True), Policy(storage_stall=5 * S), 19),
        # A process that waited a moment ago is not yet idle.
        (seen(40, outstanding_at=39), Policy(), 49),
        # Unknown is never idle. Before the first sample, SIGKILL is due at the earliest time.
        (None, Policy(), 10),
        (None, Policy(stall=15 * S), 15),
        (seen(1, outstanding=None), Policy(), 60),
        # MaxSec limits everything, from SIGTERM on.
        (seen(9, progress=9, outstanding=True), Policy(max=30 * S), 30),
        (seen(9, outstanding=None), Policy(grace=INFINITY, max=INFINITY), None),
    ],
)
def test_when_the_evidence_allows_sigkill(
    evidence: Assessment | None, policy: Policy, due: float | None
) -> None:
    facts = JobFacts(flags=FORCE, policy=policy, term_at=T0, assessment=evidence)
    assert kill_due(facts) == (INFINITY if due is None else T0 + int(due * S))


def test_it_looks_again_right_before_sigkill() -> None:
    stale = JobFacts(flags=FORCE, policy=Policy(), term_at=T0, assessment=seen(9.5))
    assert decide(stale, T0 + 10 * S).action is Action.SAMPLE
    fresh = JobFacts(flags=FORCE, policy=Policy(), term_at=T0, assessment=seen(10))
    assert decide(fresh, T0 + 10 * S).action is Action.KILL
    moved = JobFacts(flags=FORCE, policy=Policy(), term_at=T0, assessment=seen(10, progress=10))
    due, look = T0 + 20 * S, T0 + 11 * S
    assert decide(moved, T0 + 10 * S) == Decision(Action.WAIT, due, look, Promise(due, T0))


def test_a_due_time_once_told_does_not_become_earlier() -> None:
    waits = JobFacts(flags=FORCE, policy=Policy(), term_at=T0, assessment=seen(9, outstanding=True))
    told = decide(waits, T0 + 9 * S)
    assert told.promise == Promise(told.deadline, T0) == Promise(T0 + 60 * S, T0)
    idle = replace(waits, assessment=seen(20, outstanding_at=9), promise=told.promise)
    assert decide(idle, T0 + 20 * S).deadline == T0 + 60 * S
    assert kill_due(replace(idle, promise=Promise())) == T0 + 19 * S


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """For some time, no samples were taken, because the host was paused or the daemon got no
    processor."""
    late = replace(seen(40), unsampled=30 * S)
    assert (
        kill_due(JobFacts(flags=FORCE, policy=Policy(), term_at=T0, assessment=late)) == T0 + 40 * S
    )
    waits = replace(seen(40, progress=5, outstanding=True), unsampled=30 * S)
    facts = JobFacts(flags=FORCE, policy=Policy(), term_at=T0, assessment=waits)
    assert kill_due(facts) == T0 + 95 * S
    moved = replace(seen(40, progress=39, outstanding=True), unsampled=30 * S)
    moved = replace(moved, progress_unsampled=30 * S)
    assert kill_due(replace(facts, assessment=moved)) == T0 + 99 * S
    # The first sample may be late too.
    first = replace(seen(100, outstanding=True), first=Sample(T0 + 100 * S, "S"))
    assert kill_due(replace(facts, assessment=first)) == T0 + 159 * S


def test_unknown_is_bounded_from_the_last_look_that_told_anything() -> None:
    blind = replace(seen(50, outstanding=None), last=Sample(T0 + 50 * S, "?"))
    blind = replace(blind, seen=Sample(T0 + 30 * S, "S", threads=()))
    facts = JobFacts(flags=FORCE, policy=Policy(), term_at=T0, assessment=blind)
    assert kill_due(facts) == T0 + 90 * S


@pytest.mark.parametrize(("doubt", "due"), [(None, 70), (15, 75), (200, 260), (900, 310)])
def test_doubtful_movement_delays_sigkill_for_a_limited_time(doubt: int | None, due: int) -> None:
    evidence = replace(seen(1000, progress=10, outstanding=True), doubt_at=doubt and T0 + doubt * S)
    facts = JobFacts(flags=FORCE, policy=Policy(), term_at=T0, assessment=evidence)
    assert kill_due(facts) == T0 + due * S


def test_no_sigkill_without_a_look() -> None:
    facts = JobFacts(flags=FORCE, policy=Policy(), term_at=T0)
    assert decide(facts, T0 + 1000 * S).action is Action.SAMPLE


def test_without_force_it_gives_up_when_the_time_for_sigkill_and_reaping_is_over() -> None:
    facts = JobFacts(flags=NONE, policy=Policy(), term_at=T0, assessment=seen(15))
    assert decide(facts, T0 + 15 * S).action is Action.GIVE_UP
    assert decide(facts, T0 + 15 * S - 1).action is Action.WAIT


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
    facts = JobFacts(flags=FORCE, policy=Policy(), term_at=T0, assessment=evidence, jobs=jobs)
    assert next_sample_time(facts, T0) == T0 + round(look * S)


def test_a_stopped_process_is_continued_and_its_stall_restarts() -> None:
    stopped = JobFacts(flags=FORCE, policy=Policy(), term_at=T0, assessment=seen(3, state="T"))
    assert decide(stopped, T0 + 3 * S).action is Action.CONTINUE
    again = replace(stopped, continued_at=T0 + 3 * S, continues=1)
    assert kill_due(replace(again, assessment=seen(4))) == T0 + 13 * S
    # The process is stopped again. After MAX_CONTINUES, no SIGCONT follows.
    assert (
        decide(replace(again, assessment=seen(4, state="T")), T0 + 4 * S).action is Action.CONTINUE
    )
    often = replace(again, continues=3, assessment=seen(4, state="T"))
    assert decide(often, T0 + 4 * S).action is Action.WAIT


@pytest.mark.parametrize(
    "change",
    [{"state": "t"}, {"state": "T", "tracer": 7}, {"state": "T", "cgroup": FROZEN}],
)
def test_a_traced_or_frozen_process_is_not_continued(change: dict[str, Any]) -> None:
    evidence = seen(3)
    held = replace(evidence, last=replace(evidence.last, **change))
    facts = JobFacts(flags=FORCE, policy=Policy(), term_at=T0, assessment=held)
    assert decide(facts, T0 + 3 * S).action is Action.WAIT


def test_after_sigkill_it_looks_at_what_holds_the_process() -> None:
    facts = JobFacts(
        flags=FORCE, policy=Policy(), term_at=T0, kill_at=T0 + 10 * S, assessment=seen(10)
    )
    killed_at = T0 + 10 * S
    assert decide(facts, killed_at) == Decision(Action.WAIT, T0 + 15 * S, killed_at + 300_000)
    assert decide(facts, killed_at + 300_000).action is Action.SAMPLE
    assert decide(facts, T0 + 15 * S).action is Action.GIVE_UP


@pytest.mark.parametrize(
    ("missed", "max_s", "expected"),
    [(False, INFINITY // S, 60), (True, INFINITY // S, None), (True, 120, 120)],
)
def test_samples_without_a_thread_bring_sigkill_no_nearer(
    missed: bool, max_s: int, expected: int | None
) -> None:
    """If other users block all threads, samples are missing. Missing samples prove nothing, but
    MaxSec= still limits the job."""
    evidence, promise = None, Promise()
    policy = replace(Policy(), max=max_s * S)
    for second in range(1, 600):
        now = T0 + second * S
        evidence = assess(evidence, Sample(now, "?", missed=missed))
        facts = JobFacts(
            flags=FORCE,
            policy=policy,
            started=T0,
            term_at=T0,
            assessment=evidence,
            promise=promise,
        )
        decision = decide(facts, now)
        promise = decision.promise or promise
        if decision.action is Action.KILL:
            assert second == expected
            return
    assert expected is None


DEFAULT = Policy()


def kill_second(
    shows: Callable[[int], Sample],
    controls: Callable[[int], Control] = lambda second: Control(),
    policy: Policy = DEFAULT,
) -> int:
    """Return the second in which SIGKILL is sent; 999 if it is not. `shows` returns the sample of a
    second; this function sets the sample's time."""
    evidence, promise = None, Promise()
    for second in range(1, 999):
        now = T0 + second * S
        facts = JobFacts(
            flags=FORCE,
            policy=policy,
            started=T0,
            term_at=T0,
            assessment=evidence,
            control=controls(second),
            promise=promise,
        )
        if evidence is not None:
            # A call, such as the end of a hold, comes right before the sample.
            promise = decide(facts, now - 1).promise or promise
        evidence = assess(evidence, replace(shows(second), at=now))
        decision = decide(replace(facts, assessment=evidence, promise=promise), now)
        promise = decision.promise or promise
        if decision.action is Action.KILL:
            return second
    return 999


WAITING = Sample(0, "S", threads=())


@pytest.mark.parametrize(
    ("good", "bad", "length", "expected"),
    [
        (WAITING, Sample(0, "?"), 1, 60),
        (IDLE, Sample(0, "?"), 1, 10),
        (IDLE, replace(IDLE, sockets=None), 1, 60),
        # Several unreadable samples in a row may hide a wait, so StallSec= starts again, but not
        # without limit.
        (IDLE, Sample(0, "?"), 2, 310),
        (IDLE, replace(IDLE, sockets=None), 2, 310),
    ],
)
def test_unreadable_samples_do_not_start_the_time_again(
    good: Sample, bad: Sample, length: int, expected: int
) -> None:
    """On a busy host, some samples cannot be read: the first `length` of every eight."""
    assert kill_second(lambda second: bad if second % 8 < length else good) == expected


STARVED = replace(IDLE, running=1)


def held_until(end: int) -> Callable[[int], Control]:
    return lambda second: Control(held=second < end)


@pytest.mark.parametrize(
    ("ends", "controls", "policy", "expected"),
    [
        (100, held_until(102), Policy(), 109),
        (400, held_until(402), Policy(), 409),
        (400, held_until(600), Policy(), 600),
        (400, lambda second: Control(not_before=T0 + 401 * S), Policy(), 409),
        (
            119,
            lambda second: Control(),
            Policy(grace=120 * S, storage_stall=10 * S, stall=30 * S),
            148,
        ),
    ],
)
def test_the_end_of_a_late_wait_starts_the_time_again(
    ends: int, controls: Callable[[int], Control], policy: Policy, expected: int
) -> None:
    """Something delays SIGKILL until after the time at which the wait alone would have allowed
    it."""

    def shows(second: int) -> Sample:
        return ON_PIPE if second < ends else IDLE

    assert kill_second(shows, controls, policy) == expected


@pytest.mark.parametrize(
    ("begins", "controls", "policy", "expected"),
    [
        (95, held_until(100), Policy(), 155),
        (100, held_until(100), Policy(), 160),
        (900, held_until(901), Policy(), 960),
        (901, held_until(901), Policy(), 961),
        (400, held_until(400), Policy(), 460),
        (100, lambda second: Control(not_before=T0 + 101 * S), Policy(), 160),
        (119, lambda second: Control(), Policy(grace=120 * S), 179),
        (50, held_until(52), Policy(), 110),
    ],
)
@pytest.mark.parametrize("is_pluggable", [False, True])
def test_a_late_wait_gets_its_time(
    begins: int,
    controls: Callable[[int], Control],
    policy: Policy,
    expected: int,
    is_pluggable: bool,
) -> None:
    """The process was idle, and only a hold, an extension or a long grace has delayed SIGKILL.
    Whether a guest with a monitor is idle is unknown."""

    def shows(second: int) -> Sample:
        return replace(IDLE if second < begins else ON_PIPE, pluggable=is_pluggable)

    assert kill_second(shows, controls, policy) == expected


def test_a_late_flush_beside_a_standing_connection_gets_its_time() -> None:
    """A healthy, idle NBD disk may owe a reply all the time. The guest was held until its other
    disk began to flush, and this disk completes a request each second."""
    nbd = Socket(1, "unix", True, 0, 0, role="storage", node="n")
    flush = Thread(1, "worker", "D", 74, True, "folio_wait_bit", "fsync", 3, "disk", ("8:0",))

    def shows(second: int) -> Sample:
        disk = Device("8:0", "sda", second, 0, 0, 1)
        threads = (flush,) if second >= 100 else ()
        return replace(
            IDLE, nodes=(Node("n", "nbd"),), sockets=(nbd,), devices=(disk,), threads=threads
        )

    assert kill_second(shows, held_until(100)) == 999


def test_each_late_wait_gets_its_time() -> None:
    """The process is held, and waits from 200 s to 600 s and from 605 s on."""

    def shows(second: int) -> Sample:
        return ON_PIPE if 200 <= second < 600 or second >= 605 else IDLE

    assert kill_second(shows, held_until(610)) == 665


@pytest.mark.parametrize("every", [2, 3, 8, 10, 11])
@pytest.mark.parametrize("controls", [held_until(0), held_until(600)])
def test_short_waits_delay_sigkill_for_a_limited_time(
    every: int, controls: Callable[[int], Control]
) -> None:
    """One of `every` samples shows a wait. None of them moves."""
    killed = kill_second(lambda second: IDLE if second % every else ON_PIPE, controls)
    is_held = controls(599).held
    assert killed <= (600 if is_held else 0) + 5 * 60 + 10
    if not is_held and every <= 10:
        assert killed >= 5 * 60


def test_the_end_of_a_wait_that_was_last_seen_long_ago() -> None:
    """A starved guest moves in a doubtful way, then cannot be read, and then is idle."""

    def shows(second: int) -> Sample:
        if second <= 298:
            return replace(STARVED, cpu=second)
        return Sample(0, "?") if second <= 345 else replace(IDLE, cpu=300)

    assert kill_second(shows) == 355


def test_unreadable_samples_after_a_late_wait_delay_sigkill_for_a_limited_time() -> None:
    """The limit begins when the wait has ended."""

    def shows(second: int) -> Sample:
        if second < 400:
            return ON_PIPE
        return Sample(0, "?") if second % 8 in (1, 2) else IDLE

    assert kill_second(shows, held_until(402)) == 709


def test_time_without_samples_after_a_late_wait_is_not_counted() -> None:
    """The wait ends at 400 s, and from 402 s to 800 s no sample can be taken."""

    def shows(second: int) -> Sample:
        if second < 400:
            return ON_PIPE
        if 402 <= second <= 802:
            return Sample(0, "?", missed=second <= 800)
        return IDLE

    assert kill_second(shows, held_until(803)) == 812


def test_time_without_a_thread_is_not_counted_afterwards() -> None:
    first = Sample(T0, "?")
    evidence = assess(None, first)
    for second in range(1, 100):
        evidence = assess(evidence, Sample(T0 + second * S, "?", missed=True))
    assert evidence.unsampled == 99 * S
    assert evidence.reasons == ("the threads of qkilld are blocked by processes of other users",)
    evidence = assess(evidence, Sample(T0 + 100 * S, "?"))
    facts = JobFacts(flags=FORCE, policy=Policy(), started=T0, term_at=T0, assessment=evidence)
    assert kill_due(facts) == T0 + (99 + 60) * S


@pytest.mark.parametrize("action", [{"yank_at": T0 + 660 * S}, {"continued_at": T0 + 660 * S}])
def test_time_without_samples_before_an_action_does_not_count_after_it(
    action: dict[str, Any],
) -> None:
    """The process waits, and no samples are taken from 10 s to 600 s."""
    facts = JobFacts(flags=FORCE, policy=Policy(), started=T0, term_at=T0)
    seconds = [*range(1, 11), *range(600, 9999)]
    for second in seconds:
        now = T0 + second * S
        facts = replace(facts, assessment=assess(facts.assessment, replace(ON_PIPE, at=now)))
        if second == 660:
            facts = replace(facts, **action)
        decision = decide(facts, now)
        facts = replace(facts, promise=decision.promise or facts.promise)
        if decision.action is Action.KILL and second > 660:
            assert second == 720
            return
    raise AssertionError("no SIGKILL")
