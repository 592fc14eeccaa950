"""The jobs of the daemon: at most one running for a process, and the finished ones for a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

from qkilld.engine import events
from qkilld.engine.departed import Departed
from qkilld.engine.job import Job
from qkilld.engine.keeper import Keeper
from qkilld.engine.ports import Clock, Journal, Observer, Process, Sampler, Traces
from qkilld.engine.snapshot import Snapshot, SnapshotError
from qkilld.model.errors import Busy, NoSuchJob
from qkilld.model.job import Request
from qkilld.model.policy import Config, Policy
from qkilld.model.words import USEC_PER_SEC, Result

KEEP_ENDED: Final = 60 * USEC_PER_SEC
"""A job's object outlives its end by so long (µs), so that a late Wait still gets its answer."""
MAX_JOBS_PER_UID: Final = 2048
"""Jobs, running and finished, that one user may have here: a flood must not fill the memory. Root
may have any number."""


class Registry:
    """Starts jobs, joins them, and finds them again by number or by process."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        journal: Journal,
        observer: Observer | None = None,
        sampler: Sampler | None = None,
        traces: Traces | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._journal = journal
        self.observer = observer
        self._sampler = sampler
        self._traces = traces
        self.keeper = keeper
        self._jobs: dict[int, Job] = {}
        self._running: dict[tuple[int, int], Job] = {}
        self._survivors: dict[tuple[int, int], Job] = {}
        self._per_uid: Counter[int] = Counter()
        self._last = 0
        self.on_busy: Callable[[bool], None] = lambda busy: None
        """Called when the first job runs, and when none runs any more."""

    def __iter__(self) -> Iterator[Job]:
        """All of them, oldest first."""
        return iter(list(self._jobs.values()))

    @property
    def running(self) -> int:
        return len(self._running)

    def terminate(self, process: Process, request: Request) -> Job:
        """The job that stops this process: the running one, or a new one, its first signal sent.

        Takes the process over. Raises what Job.start raises, and Busy.
        """
        key = process.guest.identity.key
        if job := self._running.get(key):
            process.close()
            job.join(request)
            return job
        if request.uid != 0 and self._per_uid[request.uid] >= MAX_JOBS_PER_UID:
            process.close()
            raise Busy(
                f"You have {MAX_JOBS_PER_UID} jobs here, running or just finished; "
                "try again in a minute"
            )
        policy = self._config.policy_for(process.guest.label.name)
        job = self._job(self._last + 1, process, request, policy)
        job.start()
        self._add(job, process)
        self._tell(lambda observer: observer.job_new(job))
        job.follow()
        return job

    def resume(self, process: Process | None, past: Snapshot) -> Job:
        """Go on with a job that began elsewhere: the same number, rungs, flags, policy and times.

        Takes the process over, which must be the one of the snapshot; None where it is gone: a
        running job ends as exited or killed then. Raises SnapshotError where the job cannot be
        added to those that are here, or has times that have not come.
        """
        now, key = self._clock.now(), past.guest.identity.key
        process = process or Departed(past.guest)
        running = past.result is None
        if past.latest > now:
            problem = "it has points in time that have not come"
        elif past.number in self._jobs:
            problem = "there is a job of that number already"
        elif running and key in self._running:
            problem = "there is a running job for that process already"
        else:
            problem = ""
        if problem:
            process.close()
            raise SnapshotError(problem)
        job = self._job(past.number, process, past.request, past.policy)
        job.resume(past)
        self._add(job, process)
        if past.ended is not None:
            self._clock.call_at(max(past.ended + KEEP_ENDED, now), lambda: self._forget(job))
        job.follow()
        return job

    def get(self, number: int) -> Job:
        try:
            return self._jobs[number]
        except KeyError:
            raise NoSuchJob(
                f"There is no job {number}: there never was, or it ended over a minute ago"
            ) from None

    def by_pid(self, pid: int) -> Job:
        """The running job of that process, else its newest finished one."""
        found = [job for job in self._jobs.values() if job.guest.identity.pid == pid]
        if not found:
            raise NoSuchJob(f"There is no job for process {pid}")
        return max(found, key=lambda job: (job.running, job.number))

    def running_for(self, key: tuple[int, int]) -> Job | None:
        """The running job of that process, if there is one."""
        return self._running.get(key)

    def count_from(self, last: int) -> None:
        """Give no number up to this one: they were given before."""
        self._last = max(self._last, last)

    def note(self, event: events.Event) -> None:
        """Write what concerns jobs that could not begin to the journal, too."""
        self._journal.write(event)

    @property
    def last(self) -> int:
        """The last number given."""
        return self._last

    @property
    def empty(self) -> bool:
        """Nothing runs, nobody is watched and nobody can ask for anything."""
        return not self._jobs and not self._survivors

    def cancel_all(self, why: str = "") -> None:
        """Cancel what is running; receipts tell why."""
        for job in list(self._running.values()):
            job.cancel(why)

    def interrupt_waits(self) -> None:
        """Let go of whoever waits for the end of a running job: it will not be told here."""
        for job in list(self._running.values()):
            job.interrupt_waits()

    def _job(self, number: int, process: Process, request: Request, policy: Policy) -> Job:
        return Job(
            number,
            process,
            request,
            policy,
            self._clock,
            self._journal,
            self._sampler,
            self._traces,
            load=lambda: len(self._running),
            on_change=self._changed,
            on_end=self._ended,
            on_survivor_gone=self._survivor_gone,
        )

    def _add(self, job: Job, process: Process) -> None:
        self._last = max(self._last, job.number)
        self._jobs[job.number] = job
        key = job.guest.identity.key
        if job.running or job.result is Result.SURVIVED:
            if older := self._survivors.pop(key, None):
                older.let_go()
                self._released(older)
            (self._running if job.running else self._survivors)[key] = job
            if job.running and len(self._running) == 1:
                self.on_busy(True)
        self._per_uid[job.request.uid] += 1
        if self.keeper is not None:
            self.keeper.began(job, process)

    def _changed(self, job: Job) -> None:
        if self.keeper is not None:
            self.keeper.changed(job)
        self._tell(lambda observer: observer.job_changed(job))

    def _ended(self, job: Job) -> None:
        key = job.guest.identity.key
        del self._running[key]
        if job.result is Result.SURVIVED:
            self._survivors[key] = job
        self._tell(lambda observer: observer.job_ended(job))
        if self.keeper is not None:
            self.keeper.changed(job)
            if job.result is not Result.SURVIVED:
                self.keeper.let_go(job)
        self._clock.call_at(self._clock.now() + KEEP_ENDED, lambda: self._forget(job))
        if not self._running:
            self.on_busy(False)

    def _survivor_gone(self, job: Job) -> None:
        key = job.guest.identity.key
        # Another job of the same process may have taken its place: one that was resumed beside it.
        if self._survivors.get(key) is job:
            del self._survivors[key]
        self._released(job)

    def _released(self, job: Job) -> None:
        """Its process, a survivor, is gone or taken over."""
        if self.keeper is not None:
            self.keeper.let_go(job)
            if job.number not in self._jobs:
                self.keeper.forget(job)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.number]
        if self.keeper is not None and self._survivors.get(job.guest.identity.key) is not job:
            self.keeper.forget(job)
        self._per_uid -= Counter((job.request.uid,))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        """Tell the observer; whatever goes wrong there must not touch a job."""
        if self.observer is None:
            return
        try:
            what(self.observer)
        except Exception as error:
            self._journal.write(events.internal_error("telling the bus of a job", error))
