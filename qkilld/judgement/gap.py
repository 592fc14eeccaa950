"""What is known of a process after a time in which nobody looked at it.

Pure. Whoever takes up a job of another's goes on from this. Nothing that may have happened unseen
is held against the data: what moved may have moved, and what was outstanding may have been so,
until now; after a longer time anything may have moved. Nothing else changes: a span that ran goes
on, and counters are compared across the gap.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qkilld.judgement.verdict import Assessment
from qkilld.model.evidence import Sample
from qkilld.model.words import USEC_PER_SEC, Verdict

SHORT: Final = 5 * USEC_PER_SEC
"""In so long (µs) what had nothing to do has not begun to write: a restart takes less, and what was
seen last is written down every 3 s."""


def after_gap(before: Assessment | None, began: int, now: int) -> Assessment:
    """What is known at `now`, before the next look; CLOCK_MONOTONIC, µs.

    `began` is when the job began; None stands for "nobody has ever looked".
    """
    if before is None:
        return unseen(began, Verdict.UNKNOWN, now)
    # Of what was only told of (`unseen`) the last look is not known, and not long ago.
    long = began < before.last.at < now - SHORT
    return replace(
        before,
        progress_at=now if long or before.verdict is Verdict.FLUSHING else before.progress_at,
        outstanding_at=before.outstanding_at if before.outstanding is False else now,
    )


def unseen(began: int, verdict: Verdict, progress_at: int) -> Assessment:
    """Of a process that others have looked at, who left no more than a verdict and a time."""
    # As old as the job, so that nothing is decided on it but to look.
    nothing = Sample(began, "?")
    return Assessment(
        first=nothing,
        last=nothing,
        seen=nothing,
        verdict=verdict,
        reasons=("not looked at yet",),
        progress_at=progress_at,
        outstanding=None,
        outstanding_at=progress_at,
        pending=None,
        rate=None,
    )
