"""One journal entry for stops that ran at the same time, as at the shutdown of a host."""

from __future__ import annotations

from qkilld.engine import events
from qkilld.engine.ports import ObservedJob
from qkilld.model.event import Event


class StopSummary:
    """Counts concurrent stops: from the first that runs until none does."""

    def __init__(self) -> None:
        self._ended_jobs: list[ObservedJob] = []

    def ended(self, job: ObservedJob, *, is_last: bool) -> Event | None:
        """Count a stop. Return the entry if no other runs (`is_last`) and there was more than
        one."""
        self._ended_jobs.append(job)
        if not is_last:
            return None
        jobs, self._ended_jobs = self._ended_jobs, []
        return events.stops_ended(jobs) if len(jobs) > 1 else None
