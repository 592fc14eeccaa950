"""Stream the progress of jobs to calls with `more`. `Streams` implements engine.ports.Observer."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from qkilld.engine.job import Job
from qkilld.varlink.values import receipt, state

if TYPE_CHECKING:
    from qkilld.engine.ports import ObservedJob

MIN_INTERVAL_S: Final = 0.2
"""The shortest time between two replies about changes."""


class Streams:
    def __init__(self) -> None:
        self._by_job: dict[int, list[JobStream]] = {}

    def add(self, number: int, stream: JobStream) -> None:
        self._by_job.setdefault(number, []).append(stream)

    def remove(self, number: int, stream: JobStream) -> None:
        streams = self._by_job[number]
        streams.remove(stream)
        if not streams:
            del self._by_job[number]

    def job_new(self, job: ObservedJob) -> None: ...

    def job_changed(self, job: ObservedJob) -> None:
        for stream in self._by_job.get(job.number, ()):
            stream.changed(job)

    def job_ended(self, job: ObservedJob) -> None:
        """Do nothing: Job.when_ended notifies streams of the end earlier."""

    def job_forgotten(self, job: ObservedJob) -> None: ...


class StreamingCall(Protocol):
    """The call whose replies a stream sends."""

    @property
    def uid(self) -> int: ...

    @property
    def blocked(self) -> bool:
        """Whether messages wait because the socket is full."""

    def when_sent(self, callback: Callable[[], None]) -> None: ...

    def progress(self, parameters: dict[str, Any]) -> None:
        """Send a reply with more to come."""

    def finish(self, parameters: dict[str, Any]) -> None:
        """Send the last reply."""

    def abandon(self) -> None:
        """Close the connection without a reply, as a crash would."""


class JobStream:
    """Streams the states of jobs until all have ended.

    A slow client gets the newest state of each job, and every end.
    """

    def __init__(
        self,
        streams: Streams,
        call: StreamingCall,
        jobs: Sequence[Job],
        *,
        changes: bool,
        first: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        """`changes`: send changes too, not only the end. `first`: returns the parameters of a first
        reply, which is sent at `open` or at the end of a job. If all jobs have ended by then, it is
        left out."""
        self._streams = streams
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._changed_jobs: dict[int, ObservedJob] = {}
        self._callbacks: dict[Job, Callable[[], None]] = {}
        """The end callback of each running job."""
        self._ended_jobs: list[Job] = []
        """Ended jobs that are not reported yet."""
        self._last_report = -MIN_INTERVAL_S
        self._timer: asyncio.TimerHandle | None = None
        self._postponed: set[Callable[[], None]] = set()
        """The calls to make once the socket has taken all messages."""
        self._changes = changes
        self._first_reply = first
        for job in jobs:
            if job.running:
                callback = self._callbacks[job] = functools.partial(self._end, job)
                job.when_ended(callback, call.uid)
                if changes:
                    streams.add(job.number, self)
            else:
                self._ended_jobs.append(job)
        self._report_ends()

    def open(self, **more: object) -> None:
        """Send the first reply with `more` in it. If the first reply was already sent, send `more`
        alone."""
        first, self._first_reply = self._first_reply, None
        if first is not None:
            more = first() | more
            self._last_report = self._loop.time()
        if more:
            self._call.progress(more)

    def changed(self, job: ObservedJob) -> None:
        if self._first_reply is not None:
            return  # The first reply will have the newest state.
        self._changed_jobs[job.number] = job
        if self._timer is None:
            wait = max(0.0, self._last_report + MIN_INTERVAL_S - self._loop.time())
            if wait > 0:
                self._timer = self._loop.call_later(wait, self._report)
            else:
                self._report()

    def close(self, *, disconnected: bool) -> None:
        """Stop reporting. `disconnected`: whether the reason is that the caller disconnected."""
        for job, callback in self._callbacks.items():
            job.forget_waiter(callback, disconnected=disconnected)
            self._forget(job)
        self._callbacks.clear()
        self._ended_jobs.clear()
        self._first_reply = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forget(self, job: Job) -> None:
        if self._changes:
            self._streams.remove(job.number, self)
        self._changed_jobs.pop(job.number, None)

    def _report(self) -> None:
        self._timer = None
        if self._call.blocked:
            self._postpone(self._report)
            return
        self._last_report = self._loop.time()
        changed, self._changed_jobs = self._changed_jobs, {}
        for job in changed.values():
            self._call.progress({"state": state(job, self._call.uid)})

    def _postpone(self, report: Callable[[], None]) -> None:
        """Call `report` once when the socket has taken all messages, however often this is
        requested before: a client may never read."""
        if report in self._postponed:
            return
        self._postponed.add(report)

        def resume() -> None:
            self._postponed.remove(report)
            report()

        self._call.when_sent(resume)

    def _end(self, job: Job) -> None:
        del self._callbacks[job]
        self._forget(job)
        if job.result is None:
            # This daemon exits, and the next one continues the job.
            self.close(disconnected=False)
            self._call.abandon()
            return
        self._ended_jobs.append(job)
        self._report_ends()

    def _report_ends(self) -> None:
        if self._call.blocked and self._callbacks:
            self._postpone(self._report_ends)
            return
        if self._callbacks and self._ended_jobs:
            self.open()
        uid = self._call.uid
        while self._ended_jobs:
            job = self._ended_jobs.pop(0)
            end = {"state": state(job, uid), "receipt": receipt(job, uid)}
            if self._ended_jobs or self._callbacks:
                self._call.progress(end)
            else:
                self._call.finish(end)
                self.close(disconnected=False)
