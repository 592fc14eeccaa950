"""When jobs are written down for the time after this program's end.

What was sent, asked or concluded is written at once, and mere progress rarely: what is missing
after a crash is counted in favour of the guest's data (judgement.gap).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from qkilld.model.job import Control
from qkilld.model.policy import Policy
from qkilld.model.words import USEC_PER_SEC, Flag, Phase, Result, Verdict

if TYPE_CHECKING:
    from qkilld.engine.job import Job
    from qkilld.engine.ports import Clock, Process, Store

PROGRESS_INTERVAL: Final = 3 * USEC_PER_SEC
"""The least time (µs) between two writings of one job for progress alone …"""
PER_JOB: Final = 20_000
"""… and with many jobs so much (µs) for each of them."""


class _Written(NamedTuple):
    """What a writing of a job depends on."""

    phase: Phase
    verdict: Verdict
    result: Result | None
    flags: Flag
    policy: Policy
    control: Control
    rungs: int


class Keeper:
    """Has the jobs of a registry written to a store, as little as will do."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._written: dict[int, tuple[_Written, int]] = {}
        """And when, in µs of CLOCK_MONOTONIC."""

    def began(self, job: Job, process: Process) -> None:
        """A job has sent its first signal, or was resumed."""
        self._store.hold(job.number, process)
        self.changed(job)

    def changed(self, job: Job) -> None:
        now = self._clock.now()
        state = _Written(
            *(job.phase, job.verdict, job.result, job.flags, job.policy, job.control),
            rungs=len(job.rungs),
        )
        if written := self._written.get(job.number):
            before, at = written
            interval = max(PROGRESS_INTERVAL, len(self._written) * PER_JOB)
            if state == before and now - at < interval:
                return
        self._written[job.number] = state, now
        self._store.save(job.snapshot())

    def let_go(self, job: Job) -> None:
        """Its process is gone, or is not held any more."""
        self._store.release(job.number)

    def forget(self, job: Job) -> None:
        self._written.pop(job.number, None)
        self._store.forget(job.number)
