"""Describe what running jobs wait for, in one line for `systemctl status`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qkilld.model.job_status import JobStatus, label
from qkilld.model.text import format_bytes

NAMED: Final = 3


def status_line(jobs: Sequence[JobStatus], now: int) -> str:
    """Describe the running jobs, of which there is at least one; `now` is CLOCK_MONOTONIC, µs."""
    if len(jobs) == 1:
        return f"Stopping {_progress(jobs[0], now)}"
    named = "; ".join(_progress(job, now) for job in jobs[:NAMED])
    more = f"; and {len(jobs) - NAMED} more" if len(jobs) > NAMED else ""
    return f"Stopping {len(jobs)} guests: {named}{more}"


def _progress(job: JobStatus, now: int) -> str:
    parts = [job.doing]
    for count, words in ((job.bytes_written, "written"), (job.bytes_pending, "to go")):
        if count is not None:
            parts.append(f"{format_bytes(count)} {words}")
    if outlook := job.outlook(now):
        parts.append(f"{outlook} until `qkillctl release`" if job.held else outlook)
    return f"{label(job.pid, job.name)}: {', '.join(parts)}"
