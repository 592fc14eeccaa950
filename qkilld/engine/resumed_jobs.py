"""Continue the jobs of an earlier daemon: the most urgent first, and a few at a time.

Each job begins with a sample, and the first sample of a process takes longest. If all first samples
were requested at once, most of them would time out. Their processes would then count as blocked,
which delays SIGKILL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qkilld.decision.ladder import decide
from qkilld.engine.job import Job

if TYPE_CHECKING:
    from qkilld.engine.ports import Clock

AT_ONCE: Final = 16
"""The maximum number of first samples that are taken at a time."""
PAUSE: Final = 5_000
"""How long (µs) the loop may do other work before more samples are requested."""


class ResumedJobs:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: list[Job] = []
        self._sampling: list[Job] = []

    def add(self, job: Job) -> None:
        self._waiting.append(job)

    def follow(self) -> None:
        """Continue the added jobs as soon as possible. Call this once."""
        now = self._clock.now()
        for job in self._waiting:
            # Set the deadline now: callers may read it before the first sample comes.
            job.deadline = decide(job.facts, now).deadline
        self._waiting.sort(key=lambda job: job.deadline)
        self._waiting.reverse()  # The most urgent job is last.
        self._follow_some()

    def _follow_some(self) -> None:
        try:
            self._sampling = [job for job in self._sampling if job.is_sampling]
            while self._waiting and len(self._sampling) < AT_ONCE:
                job = self._waiting.pop()
                if job.running:
                    self._sampling.append(job)
                    job.follow()
        finally:
            # This is in `finally`: even if a job raises an exception, the others must continue.
            if self._waiting:
                self._clock.call_at(self._clock.now() + PAUSE, self._follow_some)
            else:
                self._sampling.clear()
