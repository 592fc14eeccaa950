"""Assess a process after a time without samples. Pure.

A daemon that resumes a job continues from this assessment. The assessment errs in favour of the
guest's data. If the process made progress before the gap, it is assumed to have made progress until
now. If the process waited for something, it is assumed to be still waiting. The next `assess`
compares counters with those from before the gap, but counts the gap as time without samples, so the
gap does not bring SIGKILL forward. It does not count for times that are assumed to be now.
"""

from __future__ import annotations

from dataclasses import replace

from qkilld.decision.verdict import Assessment
from qkilld.decision.waits import tells_nothing
from qkilld.model.constants import Verdict
from qkilld.model.sample import Sample


def after_gap(before: Assessment | None, began: int, now: int) -> Assessment:
    """Return the assessment at `now` (CLOCK_MONOTONIC, µs), before the next sample.

    `began`: the start of the job. `before` is None if no sample was ever taken.
    """
    if before is None:
        before = unsampled_assessment(began, Verdict.UNKNOWN, now)
    if tells_nothing(before.seen):
        # There was no usable sample, so count time without samples from now on.
        before = replace(before, sampled_at=now)
    unsampled = before.unsampled_until(now)
    if before.verdict is Verdict.FLUSHING:
        before = replace(before, progress_at=now, progress_unsampled=unsampled)
    if before.may_be_outstanding:
        before = replace(before, outstanding_at=now, outstanding_unsampled=unsampled)
    return before


def unsampled_assessment(began: int, verdict: Verdict, progress_at: int) -> Assessment:
    """Make an assessment from only a verdict and the time of the last progress."""
    # Give the empty sample the time of the job's start, so that it is too old to allow SIGKILL.
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
