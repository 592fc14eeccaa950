"""Stop processes without the daemon, with the daemon's engine in this process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qkilld.adapters.clock import LoopClock
from qkilld.adapters.host import LocalHost
from qkilld.adapters.interpreter import favour_the_loop
from qkilld.debug_log import ignore, note
from qkilld.decision.ladder import policy_for
from qkilld.engine.access import Access
from qkilld.engine.events import internal_error
from qkilld.engine.registry import Registry
from qkilld.engine.service import Service
from qkilld.engine.snapshot import Snapshot, SnapshotError
from qkilld.evidence.sampler import EvidenceSampler
from qkilld.evidence.server_exits import GuestServerExits
from qkilld.evidence.sockdiag import listening_unix
from qkilld.model.access import Answer, PolkitAction, Steerer
from qkilld.model.constants import INFINITY, KNOWN_FLAGS, Flag, Phase
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import ProcessChanged, QkilldError
from qkilld.model.guest import Guest
from qkilld.model.job import Control, Request
from qkilld.model.job_status import BEFORE_SIGNALS, JobStatus, guest_asked_of, verdict_of
from qkilld.model.varlink_state import flags_of, status_of
from qkilld.monitor.job_monitor import JobMonitors
from qkilld.stop.configuration import configuration
from qkilld.stop.helper_events import stop_fallback
from qkilld.varlink.values import state

if TYPE_CHECKING:
    from qkilld.engine.job import Job
    from qkilld.engine.ports import ObservedJob
    from qkilld.stop.guest_stop import GuestStop
    from qkilld.stop.log import Log


class LocalCaller:
    """The user of this process as a caller. polkit cannot be asked, so it authorizes nothing.

    Implements engine.ports.Caller.
    """

    async def uid(self) -> int:
        return os.geteuid()

    async def may(self, action: PolkitAction, details: Mapping[str, str], *, ask: bool) -> Answer:
        return Answer.DENIED


@dataclass(slots=True, kw_only=True)
class LocalStop:
    """The engine's view of a stop. After the stop has begun, only the engine's thread may change
    this object."""

    pid: int
    start_time: int | None
    flags: Flag
    powerdown: bool | None
    """Whether to ask the guest first; None: as configured."""
    ask_at_most: int
    spans: Mapping[str, int]
    reason: str
    status: JobStatus | None
    """The last status of the stop's job in the daemon."""
    job: Job | None = None
    on_state: Callable[[dict[str, Any]], None] = lambda state: None
    """Called with each State (org.qkilld1.varlink) of the job."""

    @classmethod
    def of(cls, stop: GuestStop, spans: Mapping[str, int], reason: str) -> LocalStop:
        return cls(
            pid=stop.process.pid,
            start_time=stop.process.start_time,
            flags=flags_of(stop.flags),
            powerdown=stop.powerdown,
            ask_at_most=ask_at_most_of(stop),
            spans=spans,
            reason=reason,
            status=None if stop.state is None else status_of(stop.state),
        )


def ask_at_most_of(stop: GuestStop) -> int:
    """Return the longest time for asking the guest, µs."""
    return INFINITY if stop.ask_at_most is None else stop.ask_at_most


class Fallback:
    """Construct it in a running event loop, and close it after use."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.config = configuration()
        self._host = LocalHost()
        self._clock = LoopClock()
        self._sampler = EvidenceSampler(
            lambda doing, error: log.write(internal_error(doing, error))
        )
        self._monitors = JobMonitors(listening_unix, enter_netns=True)
        self._registry = Registry(
            self.config,
            self._clock,
            log,
            self,
            self._sampler,
            self._monitors,
            server_exits=partial(GuestServerExits, started_at=self._clock.started_at),
        )
        self._sampler.count_jobs(lambda: self._registry.running)
        self._stops: dict[int, LocalStop] = {}
        favour_the_loop()

    @property
    def service(self) -> Service:
        """A service object for queries that stop nothing."""
        return Service(
            self.config,
            self._host,
            self._registry,
            self._clock,
            self._sampler,
            monitors=self._monitors,
        )

    async def stop(self, stop: LocalStop, why: str) -> str:
        """Stop a process, or continue a stop that the daemon began; return the result.

        Raises NoSuchProcess, NotQemu, ProcessChanged, AccessDenied, Failed.
        """
        job = stop.job = await self._start(stop, why)
        if job.running:
            ended = asyncio.Event()
            job.when_ended(ended.set)
            await ended.wait()
        assert job.result is not None
        if job.error_name == ProcessChanged.bus_name:
            raise ProcessChanged(job.error)
        return job.result.value

    async def _start(self, stop: LocalStop, why: str) -> Job:
        process, uid = await Access(self.config, self._host).open_checked(
            stop.pid, LocalCaller(), stop.flags, start_time=stop.start_time
        )
        if stop.status is not None and stop.status.held:
            why += "; the job is held, and only a SIGTERM to qkilld-stop ends the hold now"
        self._log.write(stop_fallback(process.guest, why))
        flags = stop.flags
        if stop.powerdown is None and not self.config.asks(process.guest.label.name):
            flags &= ~Flag.POWERDOWN
        request = Request(flags, stop.spans, stop.reason, uid, ask_at_most=stop.ask_at_most)
        past = self._past(process.guest, request, stop.status)
        self._stops[stop.pid] = stop
        try:
            if past is not None:
                return self._registry.resume(process, past)
            return self._registry.terminate(process, request)
        except SnapshotError as error:
            note("continuing the job of qkilld", error)
            # The daemon reported an impossible state. Start from the beginning, which is safe.
            stop.status = None
            return await self._start(stop, why)

    def _past(self, guest: Guest, request: Request, status: JobStatus | None) -> Snapshot | None:
        """Return the daemon's job as a snapshot; None if `status` is None."""
        if status is None:
            return None
        request = replace(request, flags=request.flags | status.flags & KNOWN_FLAGS)
        configured = self.config.policy_for(guest.label.name)
        policy = policy_for(request.flags, configured, request.spans)
        asking = status.phase in BEFORE_SIGNALS
        killed = status.phase in (Phase.KILL, Phase.REAP) and status.deadline != INFINITY
        return Snapshot.of_signals(
            guest,
            request,
            policy,
            number=status.id,
            started=status.started,
            guest_asked=guest_asked_of(status.guest_asked) if asking else None,
            kill_at=status.deadline - policy.reap if killed else None,
            verdict=verdict_of(status.verdict),
            progress_at=status.last_progress,
            control=Control(status.held, status.not_before),
        )

    def amend(self, stop: LocalStop, flags: Flag, ask_at_most: int) -> None:
        """Change the flags and `ask_at_most` (the longest time for asking the guest) of the stop,
        and of its job if that is running."""
        stop.flags, stop.ask_at_most = flags, ask_at_most
        if stop.job is not None and stop.job.running:
            request = Request(
                stop.flags, {}, stop.reason, os.geteuid(), ask_at_most=stop.ask_at_most
            )
            # Ignore errors here: a reuse of the pid is reported by the coroutine that waits for the
            # job.
            with ignore("joining the job", QkilldError):
                stop.job.join(request)

    def release(self, stop: LocalStop) -> None:
        """Release a job that was held in the daemon."""
        if stop.job is not None and stop.job.running and stop.job.control.held:
            stop.job.release(Steerer(os.geteuid(), stop.job.rank))

    async def close(self) -> None:
        self._registry.cancel_all()
        await self._registry.wait_undone()
        self._sampler.close()

    # ---- engine.ports.Observer ----

    def job_new(self, job: ObservedJob) -> None:
        self.job_changed(job)

    def job_changed(self, job: ObservedJob) -> None:
        self._stops[job.guest.identity.pid].on_state(state(job, 0))

    def job_ended(self, job: ObservedJob) -> None: ...

    def job_forgotten(self, job: ObservedJob) -> None: ...
