"""Recorded jobs of the safety matrix are judged again, with the verdict at every sample."""

from __future__ import annotations

import pytest

from qkilld.decision.replay import Overrides, Replay, replay
from qkilld.model.constants import USEC_PER_SEC, Flag, Result
from qkilld.model.trace import RungRecord, Trace, decode
from tests.pure.test_replay import TRACES
from tests.safety.cases import CASES, Case
from tests.safety.cell import Cell, wrong
from tests.safety.outcome import Outcome
from tests.safety.policies import OURS

DIRECTORY = TRACES / "matrix"
CLOCK_USEC = 10 * USEC_PER_SEC
"""The time from SIGTERM to SIGKILL with FIXED."""


def trace_of(case: Case) -> Trace:
    return decode((DIRECTORY / f"{case.name}.jsonl").read_text())


def ticks(replayed: Replay) -> list[tuple[float, str]]:
    """Return the verdict at each sample, as a caller would have got it."""
    started = replayed.recorded.started
    return [
        ((step.at - started) / USEC_PER_SEC, step.assessment.verdict.value)
        for step in replayed.steps
        if step.assessment is not None
    ]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_verdict_of_a_row_is_right(case: Case) -> None:
    replayed = replay(trace_of(case))
    recorded = replayed.recorded
    assert recorded.ended is not None
    assert recorded.result is not None
    seconds = (recorded.ended - recorded.started) / USEC_PER_SEC
    outcome = Outcome(recorded.result.value, seconds, ticks=ticks(replayed))
    assert wrong(case, Cell(case.name, OURS, 0, 0, 0, outcome, wrong=[])) == []
    # The decision is the same as in the recording.
    exited = recorded.result is Result.EXITED
    assert replayed.result is (Result.EXITED if exited else Result.KILLED)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_fixed_clock_kills_guests_that_have_not_exited(case: Case) -> None:
    trace = trace_of(case)
    replayed = replay(trace, Overrides(add=Flag.FIXED))
    due = min(rung.at for rung in trace.of(RungRecord)) + CLOCK_USEC
    if replayed.recorded.until < due:
        assert replayed.result is Result.EXITED
        return
    assert replayed.result is Result.KILLED
    assert due <= replayed.at <= due + 10_000
    # QEMU had not finished handling SIGTERM, so nothing proves that the guest's data is safe.
    assert replayed.data_at_risk


def test_there_is_a_trace_of_each_row_and_no_other() -> None:
    assert {path.name for path in DIRECTORY.iterdir()} == {f"{name}.jsonl" for name in CASES}
