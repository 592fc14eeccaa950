"""Stream the progress of jobs to calls with `more`. `Streams` implements engine.ports.Observer.

Replies are prepared and sent in steps (engine.steps), because thousands of jobs may change or end
at a time, and a user may have hundreds of streams.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from qkilld.engine.job import Job
from qkilld.engine.steps import Steps
from qkilld.varlink.connection import encode, encode_list, join_encoded
from qkilld.varlink.values import receipt, state

if TYPE_CHECKING:
    from qkilld.engine.ports import ObservedJob

MIN_INTERVAL_S: Final = 0.2
"""The shortest time between two replies about changes."""


class Streams:
    def __init__(self) -> None:
        self._by_job: dict[int, list[JobStream]] = {}
        self.steps: Final = Steps()
        """Sends the replies of all streams."""

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
        """Do nothing, because streams have already been notified by Job.when_ended."""

    def job_forgotten(self, job: ObservedJob) -> None: ...


class StreamingCall(Protocol):
    """The call whose replies a stream sends."""

    @property
    def uid(self) -> int: ...

    @property
    def blocked(self) -> bool: ...

    def when_sent(self, callback: Callable[[], None]) -> None: ...

    def progress_encoded(self, parameters: bytes) -> None:
        """Send a reply with more to come."""

    def finish_encoded(self, parameters: bytes) -> None:
        """Send the last reply."""

    def abandon(self) -> None:
        """Close the connection without a reply, as a crash would."""

    def now_waits(self) -> None:
        """Called when the work of the call is done, and the call only waits for its jobs."""


class FirstReply:
    """The first reply of a call: the states of its jobs, encoded one by one."""

    def __init__(self, jobs: Sequence[Job], parameters: Mapping[str, Any] | None = None) -> None:
        """If `parameters` is None, the reply has the state of a single job in `state`. Otherwise,
        the reply has the states of any number of jobs in `states`, and these parameters."""
        self.jobs = jobs
        self._parameters = parameters
        self._states: list[bytes] = []

    @property
    def is_optional(self) -> bool:
        """Whether to leave this reply out if all jobs have ended. In that case, the reply about the
        end is enough."""
        return self._parameters is None and not self._states

    @property
    def has_begun(self) -> bool:
        return bool(self._states)

    @property
    def is_complete(self) -> bool:
        return len(self._states) == len(self.jobs)

    def encode_next(self, uid: int) -> None:
        """Encode the state of the next job for this user."""
        self._states.append(encode(state(self.jobs[len(self._states)], uid)))

    def encoded(self, more: Mapping[str, Any]) -> bytes:
        """Return the encoded parameters, including those of `more`."""
        if self._parameters is None:
            return join_encoded(b'"state":%b' % self._states[0], more)
        return encode_list("states", self._states, {**self._parameters, **more})


class JobStream:
    """Streams the states of jobs until all have ended.

    A slow client may miss changes, but it gets the newest state of each job, and the end of each
    job.
    """

    def __init__(
        self,
        streams: Streams,
        call: StreamingCall,
        jobs: Sequence[Job],
        *,
        changes: bool,
        first: FirstReply | None = None,
    ) -> None:
        """`changes`: send changes too, not only the end. `first`: a first reply, which is sent when
        `open` is called, or earlier if a job ends."""
        self._streams = streams
        self._call = call
        self._changes = changes
        self._loop = asyncio.get_running_loop()
        self._first = first
        self._is_opening = False
        """Whether `open` was called."""
        self._more: dict[str, Any] = {}
        """Parameters to send with the first reply. If that reply was sent already, the parameters
        are sent alone."""
        self._changed_jobs: dict[int, ObservedJob] = {}
        self._due_changes: dict[int, ObservedJob] = {}
        """The changed jobs to report now."""
        self._callbacks: dict[Job, Callable[[], None]] = {}
        """For each running job: the callback for its end."""
        self._ended_jobs: deque[Job] = deque()
        """Jobs whose end is to be encoded."""
        self._ends: deque[bytes] = deque()
        """The encoded ends to report. Their jobs are not kept, because jobs take much more memory,
        and the client may never read."""
        self._last_report = -MIN_INTERVAL_S
        self._timer: asyncio.TimerHandle | None = None
        self._is_scheduled = False
        """Whether `_step` will be called."""
        self._is_waiting = False
        """Whether `_schedule` will be called when the socket has taken all messages."""
        self._is_closed = False
        for job in jobs:
            if job.running:
                callback = self._callbacks[job] = functools.partial(self._end, job)
                job.when_ended(callback, call.uid)
                if changes:
                    streams.add(job.number, self)
            else:
                self._ended_jobs.append(job)
        if self._ended_jobs:
            self._schedule()

    def open(self, **more: object) -> None:
        """Send the first reply, including `more`. If the first reply was already sent, send `more`
        alone."""
        self._is_opening = True
        self._more |= more
        self._schedule()

    def changed(self, job: ObservedJob) -> None:
        if self._first is not None and not self._first.has_begun:
            return  # The first reply will have the newest state.
        self._changed_jobs[job.number] = job
        if self._timer is None and not self._due_changes:
            self._report_later()

    def close(self, *, disconnected: bool) -> None:
        """Stop reporting. `disconnected`: whether the caller has disconnected."""
        self._is_closed = True
        for job, callback in self._callbacks.items():
            job.forget_waiter(callback, disconnected=disconnected)
            self._forget(job)
        self._callbacks.clear()
        self._ended_jobs.clear()
        self._ends.clear()
        self._first = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forget(self, job: Job) -> None:
        if self._changes:
            self._streams.remove(job.number, self)
        self._changed_jobs.pop(job.number, None)
        self._due_changes.pop(job.number, None)

    def _report_later(self) -> None:
        """Report the changes when MIN_INTERVAL_S has passed since the last report."""
        wait = max(0.0, self._last_report + MIN_INTERVAL_S - self._loop.time())
        if wait > 0:
            self._timer = self._loop.call_later(wait, self._report)
        else:
            self._report()

    def _report(self) -> None:
        self._timer = None
        self._last_report = self._loop.time()
        self._due_changes, self._changed_jobs = self._changed_jobs, {}
        self._schedule()

    def _end(self, job: Job) -> None:
        del self._callbacks[job]
        self._forget(job)
        if job.result is None:
            # The job has no result, because this daemon exits. The next daemon continues the job.
            self.close(disconnected=False)
            self._call.abandon()
            return
        self._ended_jobs.append(job)
        self._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._streams.steps.put(self._call.uid, self._step)

    def _step(self) -> bool:
        """Encode or send a little; return whether `_step` should run again."""
        self._is_scheduled = False
        more = not self._is_closed and (self._encode_end() or self._send())
        self._is_scheduled |= more  # `_send` may have scheduled a later step.
        return more

    def _encode_end(self) -> bool:
        if not self._ended_jobs:
            return False
        job, uid = self._ended_jobs.popleft(), self._call.uid
        self._ends.append(encode({"state": state(job, uid), "receipt": receipt(job, uid)}))
        return True

    def _send(self) -> bool:
        """Send something if the socket has room; return whether `_step` should run again."""
        if self._call.blocked:
            if not self._is_waiting:
                self._is_waiting = True
                self._call.when_sent(self._has_room)
            return False
        if self._first is not None:
            return self._prepare(self._first)
        if self._more:
            self._call.progress_encoded(encode(self._more))
            self._more.clear()
        elif self._ends:
            end = self._ends.popleft()
            if not self._ends and not self._callbacks:
                self.close(disconnected=False)
                self._call.finish_encoded(end)
                return False
            self._call.progress_encoded(end)
        elif self._due_changes:
            job = self._due_changes.pop(next(iter(self._due_changes)))
            self._call.progress_encoded(encode({"state": state(job, self._call.uid)}))
        else:
            # All changes of the last report are sent, so begin the next report.
            if self._changed_jobs and self._timer is None:
                self._report_later()
            return False
        return True

    def _has_room(self) -> None:
        self._is_waiting = False
        self._schedule()

    def _prepare(self, first: FirstReply) -> bool:
        """Prepare a part of the first reply, or send the reply if it is complete. Return whether
        `_step` should run again."""
        if first.is_optional and not self._callbacks:
            self._first = None
        elif not self._is_opening and not self._ends:
            return False
        elif not first.is_complete:
            first.encode_next(self._call.uid)
        else:
            self._first = None
            self._last_report = self._loop.time()
            self._call.progress_encoded(first.encoded(self._more))
            self._more.clear()
            self._call.when_sent(self._call.now_waits)
        return True
