"""Sum up concurrent stops, as at the shutdown of a host, in one journal entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkilld.engine import events
from qkilld.model.event import Event

if TYPE_CHECKING:
    from qkilld.engine.ports import ObservedJob


class StopSummary:
    """Counts the stops from the start of the first one until no stop runs."""

    def __init__(self) -> None:
        self._ended_jobs: list[ObservedJob] = []

    def ended(self, job: ObservedJob, *, is_last: bool) -> Event | None:
        """Count a stop. Return the entry if no other stop runs (`is_last`) and there was more than
        one."""
        self._ended_jobs.append(job)
        if not is_last:
            return None
        jobs, self._ended_jobs = self._ended_jobs, []
        return events.stops_ended(jobs) if len(jobs) > 1 else None
