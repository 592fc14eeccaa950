"""The assessment after a time without a daemon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from qkilld.decision.gap import after_gap
from qkilld.decision.ladder import Action, JobFacts, decide
from qkilld.decision.verdict import assess
from qkilld.model.constants import Flag
from qkilld.model.policy import Policy
from qkilld.model.sample import Device, Sample
from tests.pure.test_verdict import FDATASYNC, IDLE, S

Shows = Callable[[int], Sample]
GONE_AT = 100


def writes(requests: int) -> Sample:
    """Return a sample of a guest whose disk has completed this many requests."""
    return replace(IDLE, threads=(FDATASYNC,), devices=(Device("8:0", "sda", requests, 0, 0, 1),))


def killed_after(shows: Shows, then: Shows, gap: int) -> int:
    """Return how many seconds after the start of the next daemon SIGKILL is sent. `shows` and
    `then` return the samples before and after a gap of this many seconds."""
    facts = JobFacts(flags=Flag.FORCE, policy=Policy(), started=0, term_at=0)
    for second in range(9999):
        if GONE_AT < second < GONE_AT + gap:
            continue
        if gap and second == GONE_AT + gap:
            facts = replace(facts, assessment=after_gap(facts.assessment, 0, second * S))
        sample = shows(second) if second <= GONE_AT else then(second)
        facts = replace(facts, assessment=assess(facts.assessment, replace(sample, at=second * S)))
        decision = decide(facts, second * S)
        if decision.action is Action.KILL:
            return second - GONE_AT - gap
        facts = replace(facts, promise=decision.promise or facts.promise)
    raise AssertionError("no SIGKILL")


@pytest.mark.parametrize("gap", [0, 1, 3, 5, 10, 30, 600])
def test_progress_may_have_lasted_until_the_end_of_a_gap(gap: int) -> None:
    """SIGKILL follows StorageStallSec= after the end of the gap, whatever its length."""
    assert killed_after(writes, lambda second: writes(GONE_AT), gap) == 60


@pytest.mark.parametrize("gap", [0, 1, 3, 5, 10, 30, 600])
def test_a_wait_may_have_lasted_until_the_end_of_a_gap(gap: int) -> None:
    """The wait was about to be over when the gap began, and is over after it."""
    end = killed_after(writes, lambda second: replace(IDLE, devices=writes(GONE_AT).devices), gap)
    assert end == max(10, 60 - gap)


@pytest.mark.parametrize("gap", [0, 3, 10, 600])
def test_a_gap_neither_shortens_nor_restarts_a_standstill(gap: int) -> None:
    """The last movement was 20 s before the gap, so 40 s of StorageStallSec= are left."""
    last = GONE_AT - 20
    end = killed_after(lambda second: writes(min(second, last)), lambda second: writes(last), gap)
    assert end == pytest.approx(40, abs=3)
