"""The jobs of the daemon: at most one running job for each process, and recently ended ones."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from signal import Signals
from typing import TYPE_CHECKING, Final

from qkilld.engine import events
from qkilld.engine.collaborators import Collaborators
from qkilld.engine.fair_shares import user_of
from qkilld.engine.job import Job
from qkilld.engine.job_saver import JobSaver
from qkilld.engine.resumed_jobs import ResumedJobs
from qkilld.engine.server_watch import is_stopping
from qkilld.engine.snapshot import Snapshot, SnapshotError
from qkilld.engine.summary import StopSummary
from qkilld.foreign_descriptors import close_later
from qkilld.model.constants import USEC_PER_SEC, Phase, Result
from qkilld.model.errors import Busy, NoSuchJob
from qkilld.model.event import Event
from qkilld.model.guest import Guest, Identity, Label
from qkilld.model.guest_state import KeptMonitor
from qkilld.model.job import Request
from qkilld.model.policy import Config, Policy

if TYPE_CHECKING:
    from qkilld.engine.ports import (
        Clock,
        Journal,
        Monitors,
        Observer,
        Process,
        Sampler,
        ServerExits,
        Traces,
    )

KEEP_ENDED: Final = 60 * USEC_PER_SEC
"""How long (µs) a job's object outlives the job, so that a late Wait still gets its reply."""
UNDO_S: Final = 2.0
"""How long to wait for processors to run again. QEMU needs a millisecond, unless a disk blocks its
main loop."""
MAX_JOBS_PER_UID: Final = 2048
"""The maximum number of running and ended jobs of one user, so that no user can fill the memory.
Root has no limit."""
MAX_JOBS_OF_USERS: Final = 3 * MAX_JOBS_PER_UID
"""The maximum number of jobs of all users other than root, taken together. At 80 kB each
(units/qkilld.service), these jobs take 490 MB, and their descriptors 350 MB. Together with all
calls that users may have open, they take two thirds of MemoryMax=."""


class Registry:
    """Starts jobs, joins them, and finds them again by number or by process."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        journal: Journal,
        observer: Observer | None = None,
        sampler: Sampler | None = None,
        monitors: Monitors | None = None,
        traces: Traces | None = None,
        saver: JobSaver | None = None,
        server_exits: Callable[[Process], ServerExits] | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._journal = journal
        self.observer = observer
        self.saver = saver
        self._collaborators = Collaborators(
            clock=clock,
            journal=journal,
            sampler=sampler,
            traces=traces,
            executables=config.executables,
            monitors=monitors,
            may_yank=config.yanks,
            load=lambda: len(self._running),
            when_saved=self._when_saved,
            on_change=self._changed,
            on_sample=self._sampled,
            on_end=self._ended,
            on_survivor_exit=self._survivor_gone,
            on_monitor=self._monitor_opened,
            server_exits=server_exits,
            stopping=self._stopping,
            write_down=self._write_down,
        )
        self._jobs: dict[int, Job] = {}
        self._running: dict[tuple[int, int], Job] = {}
        self._survivors: dict[tuple[int, int], Job] = {}
        self._ended_jobs: dict[tuple[int, int], Job] = {}
        """The last ended job of each process."""
        self._per_user: Counter[int] = Counter()
        self._last = 0
        self._summary = StopSummary()
        self._resumed = ResumedJobs(clock)
        self.on_busy: Callable[[bool], None] = lambda busy: None
        """Called when the first job starts to run, and when the last one ends."""

    def __iter__(self) -> Iterator[Job]:
        """Iterate over all jobs, oldest first."""
        return iter(list(self._jobs.values()))

    @property
    def running(self) -> int:
        return len(self._running)

    def terminate(self, process: Process, request: Request, passed: int | None = None) -> Job:
        """Join the running job for this process, or start a new one. Return the job.

        The registry owns the process from now on, even if this raises an exception. `passed`: a
        connection to the guest's monitor, for use by a new job. The registry owns it unless this
        raises an exception. Raises what Job.start and Job.join raise, and Busy.
        """
        key = process.guest.identity.key
        if job := self._running.get(key):
            process.close()
            before = user_of(job.request.uid)
            job.join(request)
            if passed is not None:
                close_later(passed)
            # If the request has taken the job over, the job counts for the new requester.
            self._per_user -= Counter((before,))
            self._per_user[user_of(job.request.uid)] += 1
            return job
        freed = self._freed_by_job_for(key)
        user = user_of(request.uid)
        own = self._per_user[user] - freed[user]
        if request.uid != 0 and own >= MAX_JOBS_PER_UID:
            process.close()
            raise Busy(
                f"You have {MAX_JOBS_PER_UID} jobs here that run, have just finished, or whose "
                "guest has survived; try again in a minute"
            )
        every = self._per_user - freed
        if request.uid != 0 and every.total() - every[0] >= MAX_JOBS_OF_USERS:
            process.close()
            raise Busy(
                f"Users other than root have {MAX_JOBS_OF_USERS} jobs here that run, have just "
                "finished, or whose guest has survived; try again in a minute"
            )
        policy = self._config.policy_for(process.guest.label.name)
        job = self._job(self._last + 1, process, request, policy)
        if passed is not None:
            job.offer_monitor(passed)
        if ended := self._ended_jobs.get(key):
            job.follow_up(ended)
        job.start()
        self._add(job)
        if self.saver is not None:
            self.saver.job_began(job, process)
        self._tell(lambda observer: observer.job_new(job))
        job.follow()
        return job

    def resume(
        self,
        process: Process | None,
        past: Snapshot,
        monitor: KeptMonitor | None = None,
        *,
        among_many: bool = False,
    ) -> Job:
        """Continue a job of an earlier daemon. Its number, rungs, flags, policy and times are kept.

        `process` must be the process in the snapshot, or None if that process has exited. With
        None, a running job ends as exited or killed. The registry owns `process` from now on. It
        also owns `monitor`, unless this raises an exception. With `among_many`, a job that would
        begin with a sample does nothing until `follow_resumed`.

        Raises SnapshotError if the job conflicts with an existing one, or has times in the future.
        In this case, `process` is closed.
        """
        now, key = self._clock.now(), past.guest.identity.key
        process = process or ExitedProcess(past.guest)
        saved = past
        if past.may_be_killed and not process.dying():
            past = past.without_kill()
        running = past.result is None
        if past.latest > now:
            problem = "it has times in the future"
        elif past.number in self._jobs:
            problem = "there is a job of that number already"
        elif running and key in self._running:
            problem = "there is a running job for that process already"
        else:
            problem = ""
        if problem:
            process.close()
            raise SnapshotError(problem)
        policy = self._config.policy_for(past.guest.label.name)
        job = self._job(past.number, process, past.request, policy)
        job.resume(past, monitor)
        self._add(job)
        if self.saver is not None:
            self.saver.job_resumed(job, process, saved)
        if past.ended is not None:
            self._clock.call_at(
                max(past.ended + KEEP_ENDED, now), lambda: self._forget(job), job.request.uid
            )
        job.check_process()
        samples = job.phase is Phase.TERMINATE and job.by_evidence and not job.processors_stopped
        if among_many and job.running and samples and not past.forced:
            self._resumed.add(job)
        else:
            job.follow()
        return job

    def follow_resumed(self) -> None:
        """Continue the jobs that were resumed with `among_many`."""
        self._resumed.follow()

    def get(self, number: int) -> Job:
        try:
            return self._jobs[number]
        except KeyError:
            raise NoSuchJob(
                f"There is no job {number}: it never existed, or ended over a minute ago"
            ) from None

    def by_pid(self, pid: int) -> Job:
        """Return the running job of that process, or else its newest ended one."""
        candidates = [job for job in self._jobs.values() if job.guest.identity.pid == pid]
        if not candidates:
            raise NoSuchJob(f"There is no job for process {pid}")
        return max(candidates, key=lambda job: (job.running, job.number))

    def running_for(self, key: tuple[int, int]) -> Job | None:
        return self._running.get(key)

    def count_from(self, last: int) -> None:
        """Give new jobs only numbers above `last`, because the others may be used already."""
        self._last = max(self._last, last)

    def note(self, event: Event) -> None:
        """Write a journal entry about a job, or about a stop that could not begin."""
        self._journal.write(event)

    @property
    def last(self) -> int:
        return self._last

    @property
    def empty(self) -> bool:
        """Whether there are no jobs, running or ended, and no watched processes that survived a
        job."""
        return not self._jobs and not self._survivors

    def cancel_all(self, why: str = "") -> None:
        """`why` is for the receipts."""
        for job in list(self._running.values()):
            job.cancel(why)

    async def wait_undone(self) -> None:
        """Wait until all ended jobs have started their guests' processors again, but at most
        UNDO_S. Call this before the daemon exits."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(UNDO_S):
                while any(job.processors_stopped for job in self if not job.running):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    def interrupt_waits(self) -> None:
        """End all Waits for running jobs, because this daemon will not see their end."""
        for job in list(self._running.values()):
            job.interrupt_waits()

    def _freed_by_job_for(self, key: tuple[int, int]) -> Counter[int]:
        """Return how many jobs of each user are forgotten when this process gets a new job. There
        is at most one: a job that the process survived, and that ended over a minute ago
        (KEEP_ENDED)."""
        survivor = self._survivors.get(key)
        if survivor is None or survivor.number in self._jobs:
            return Counter()
        return Counter((user_of(survivor.request.uid),))

    def _stopping(self, pids: frozenset[int]) -> frozenset[int]:
        jobs = [job for job in self._jobs.values() if job.guest.identity.pid in pids]
        return frozenset(job.guest.identity.pid for job in jobs if is_stopping(job))

    def _job(self, number: int, process: Process, request: Request, policy: Policy) -> Job:
        return Job(number, process, request, policy, self._collaborators)

    def _add(self, job: Job) -> None:
        self._last = max(self._last, job.number)
        self._jobs[job.number] = job
        key = job.guest.identity.key
        if job.running or job.result is Result.SURVIVED:
            if older := self._survivors.pop(key, None):
                older.stop_watching()
                self._drop_survivor(older)
            (self._running if job.running else self._survivors)[key] = job
            if job.running and len(self._running) == 1:
                self.on_busy(True)
        self._per_user[user_of(job.request.uid)] += 1

    def _changed(self, job: Job) -> None:
        if self.saver is not None:
            self.saver.job_changed(job)
        self._tell(lambda observer: observer.job_changed(job))

    def _sampled(self, job: Job) -> None:
        if self.saver is not None:
            self.saver.job_sampled(job)

    def _monitor_opened(self, job: Job, fd: int | None) -> None:
        if self.saver is not None:
            self.saver.monitor_opened(job, fd)

    def _write_down(self, job: Job, go_on: Callable[[], None]) -> None:
        if self.saver is None:
            go_on()
        else:
            self.saver.write_first(job, go_on)

    def _when_saved(self, callback: Callable[[], None]) -> None:
        if self.saver is not None:
            self.saver.when_saved(callback)
        else:
            self._clock.call_at(self._clock.now(), callback)

    def _ended(self, job: Job) -> None:
        key = job.guest.identity.key
        del self._running[key]
        self._ended_jobs[key] = job
        if job.result is Result.SURVIVED:
            self._survivors[key] = job
        self._tell(lambda observer: observer.job_ended(job))
        if self.saver is not None:
            self.saver.job_changed(job)
            self.saver.drop_monitor(job)
            if job.result is not Result.SURVIVED:
                self.saver.drop_process(job)
        self._clock.call_at(
            self._clock.now() + KEEP_ENDED, lambda: self._forget(job), job.request.uid
        )
        if summary := self._summary.ended(job, is_last=not self._running):
            self._journal.write(summary)
        if not self._running:
            self.on_busy(False)

    def _survivor_gone(self, job: Job) -> None:
        key = job.guest.identity.key
        # Another job for the same process may be registered, because several may have been resumed.
        if self._survivors.get(key) is job:
            del self._survivors[key]
        self._drop_survivor(job)

    def _drop_survivor(self, job: Job) -> None:
        """Drop the stored process of an ended job, because the process is gone or has a new job."""
        if self.saver is not None:
            self.saver.drop_process(job)
        if job.number not in self._jobs:
            self._forget_entirely(job)

    def _forget(self, job: Job) -> None:
        if job.processors_stopped:
            self._clock.call_at(
                self._clock.now() + KEEP_ENDED, lambda: self._forget(job), job.request.uid
            )
            return
        del self._jobs[job.number]
        if self._ended_jobs.get(job.guest.identity.key) is job:
            del self._ended_jobs[job.guest.identity.key]
        if self._survivors.get(job.guest.identity.key) is not job:
            self._forget_entirely(job)
        self._tell(lambda observer: observer.job_forgotten(job))

    def _forget_entirely(self, job: Job) -> None:
        """Remove the saved state of a job, and stop counting the job for its user. Call this when
        the job's object is gone. If the process survived the job, call it only when the process is
        gone, too, or has a new job."""
        if self.saver is not None:
            self.saver.forget(job)
        self._per_user -= Counter((user_of(job.request.uid),))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        """Call the observer. The observer's exceptions must not affect a job."""
        if self.observer is None:
            return
        try:
            what(self.observer)
        except Exception as error:
            self._journal.write(events.internal_error("reporting a job on the bus", error))


class ExitedProcess:
    """A process that was gone before it could be opened. Implements engine.ports.Process."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def identify(self) -> Identity:
        return self.guest.identity

    def set_label(self, label: Label) -> None:
        self.guest = Guest(self.guest.identity, label)

    def signal(self, number: Signals) -> None:
        raise ProcessLookupError

    def exited(self) -> bool:
        return True

    def collected(self) -> bool:
        return True

    def exit_status(self) -> int:
        return 0

    def dying(self) -> bool:
        return True

    def watch(self, callback: Callable[[], None]) -> None:
        """Do nothing, because the process has already exited."""

    def fileno(self) -> None:
        return None

    def close(self) -> None: ...
