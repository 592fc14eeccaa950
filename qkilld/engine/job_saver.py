"""Decide when to save jobs, so that they continue in the next daemon.

Rungs, requests and verdicts are saved at once. Mere progress is saved rarely: a daemon that resumes
a job assumes that progress went on while no daemon ran (decision.gap).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qkilld.engine.job import Job
from qkilld.engine.snapshot import Snapshot
from qkilld.model.constants import USEC_PER_SEC, Flag, Phase, Result, Verdict
from qkilld.model.job import Control, Request
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.policy import Policy

if TYPE_CHECKING:
    from qkilld.engine.ports import Clock, Process, Store

PROGRESS_INTERVAL: Final = 3 * USEC_PER_SEC
"""A job that has only made progress is saved at most once in this time (µs)."""
PER_JOB: Final = 20_000
"""With many jobs, PROGRESS_INTERVAL grows to this time (µs) multiplied by their number."""

TIMEOUT_S: Final = 0.05
"""How long saving may delay SIGKILL. Saving usually takes 0.1 ms, but can fail or block."""
ANSWER_TIMEOUT_S: Final = 0.5
"""How long saving may delay the reply to a caller. This limit is longer than TIMEOUT_S, because
even on a busy host a job should be saved before its caller relies on it."""


class _SavedValues(NamedTuple):
    """If one of these values changes, the job must be saved."""

    request: Request
    phase: Phase
    verdict: Verdict
    result: Result | None
    flags: Flag
    policy: Policy
    control: Control
    rungs: int
    own_chardevs: tuple[str, ...]
    processors_stopped: bool
    forced: bool


class JobSaver:
    """Saves the jobs of a registry to a store."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._saved: dict[int, tuple[_SavedValues, int]] = {}
        """The saved values of each job, by its number, and when they were saved (CLOCK_MONOTONIC,
        µs)."""

    def job_began(self, job: Job, process: Process) -> None:
        self._store.store_fd(job.number, process)
        self.job_changed(job)

    def job_resumed(self, job: Job, process: Process, saved: Snapshot) -> None:
        """Save a job resumed from `saved` only if it has changed: a daemon that resumes thousands
        of jobs has more urgent work."""
        self._store.store_fd(job.number, process)
        self._saved[job.number] = _values_of(saved), self._clock.now()
        self.job_changed(job)

    def job_changed(self, job: Job) -> None:
        now = self._clock.now()
        state = _values_of(job)
        if saved := self._saved.get(job.number):
            before, at = saved
            if state == before and now - at < self._interval():
                return
        self._saved[job.number] = state, now
        self._store.save(job.snapshot())

    def job_sampled(self, job: Job) -> None:
        """Save the job after a sample that changed nothing worth reporting, unless it was saved
        recently."""
        saved = self._saved.get(job.number)
        if saved is None or self._clock.now() - saved[1] >= self._interval():
            self.job_changed(job)

    def _interval(self) -> int:
        return max(PROGRESS_INTERVAL, len(self._saved) * PER_JOB)

    def write_first(self, job: Job, callback: Callable[[], None]) -> None:
        """Write this job's changes first, because its SIGKILL waits until they are written. Call
        back when they are written, or after TIMEOUT_S."""
        waits = True

        def once() -> None:
            nonlocal waits
            if waits:
                waits = False
                timer.cancel()
                callback()

        deadline = self._clock.now() + int(TIMEOUT_S * USEC_PER_SEC)
        timer = self._clock.call_at(deadline, once)
        self._store.write_first(job.number, once)

    def when_saved(self, callback: Callable[[], None]) -> None:
        """Call back when all changes so far are written, or writing has failed. No time limit."""
        self._store.when_written(callback)

    async def wait_saved(self) -> bool:
        """Wait until all changes so far are saved, or saving has failed; the store reports
        failures. Return False if this takes longer than ANSWER_TIMEOUT_S."""
        finished = asyncio.Event()
        self._store.when_written(finished.set)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await finished.wait()
        except TimeoutError:
            return False
        return True

    def monitor_opened(self, job: Job, fd: int | None) -> None:
        """If the connection has a descriptor (`fd`), keep it for the next daemon and save its
        labels. Otherwise, drop the descriptor of an earlier connection."""
        if fd is None:
            self._store.drop_monitor(job.number)
        else:
            self._store.store_monitor(job.number, fd)
            self.job_changed(job)

    def drop_process(self, job: Job) -> None:
        """Drop the stored pidfd of a process that has exited or is no longer watched."""
        self._store.drop_fd(job.number)

    def drop_monitor(self, job: Job) -> None:
        """Drop the stored connection of a job that has ended."""
        self._store.drop_monitor(job.number)

    def forget(self, job: Job) -> None:
        self._saved.pop(job.number, None)
        self._store.forget(job.number)


def _values_of(job: Job | Snapshot) -> _SavedValues:
    return _SavedValues(
        request=job.request,
        phase=job.phase,
        verdict=job.verdict,
        result=job.result,
        flags=job.flags,
        policy=job.policy,
        control=job.control,
        rungs=len(job.rungs),
        own_chardevs=job.own_chardevs,
        processors_stopped=job.processors_stopped,
        forced=job.forced,
    )
