"""Assess a process after a time without samples. Pure.

A daemon that resumes a job continues from this assessment, which errs in favour of the guest's
data. If the process made progress before the gap, progress is assumed until now. If the process
waited for something, it is assumed to wait still. The next `assess` compares counters with those
from before the gap, but counts the gap as time without samples, so the gap brings SIGKILL no
nearer.
"""

from __future__ import annotations

from dataclasses import replace

from qkilld.decision.verdict import Assessment
from qkilld.decision.waits import tells_nothing
from qkilld.model.constants import Verdict
from qkilld.model.sample import Sample


def after_gap(before: Assessment | None, began: int, now: int) -> Assessment:
    """Return the assessment at `now`, before the next sample; CLOCK_MONOTONIC, µs.

    `began` is the start of the job. `before` is None if no sample was ever taken.
    """
    if before is None:
        before = unsampled_assessment(began, Verdict.UNKNOWN, now)
    return replace(
        before,
        # Without a usable sample, time without samples counts from now.
        sampled_at=now if tells_nothing(before.seen) else before.sampled_at,
        progress_at=now if before.verdict is Verdict.FLUSHING else before.progress_at,
        outstanding_at=now if before.may_be_outstanding else before.outstanding_at,
    )


def unsampled_assessment(began: int, verdict: Verdict, progress_at: int) -> Assessment:
    """Make an assessment when only a verdict and a time of progress are known."""
    # The sample has the time of the job's start, so it is too old to allow SIGKILL.
    empty_sample = Sample(began, "?")
    return Assessment(
        first=empty_sample,
        last=empty_sample,
        seen=empty_sample,
        waits=(),
        verdict=verdict,
        reasons=("no sample was taken yet",),
        progress_at=progress_at,
        outstanding=None,
        outstanding_at=progress_at,
        pending=None,
        rate=None,
    )
