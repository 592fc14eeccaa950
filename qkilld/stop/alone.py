"""The stop of processes without the daemon: its engine in this process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qkilld.adapters import config
from qkilld.adapters.clock import LoopClock
from qkilld.adapters.evidence.sampler import EvidenceSampler
from qkilld.adapters.host import LocalHost
from qkilld.adapters.interpreter import favour_the_loop
from qkilld.bus.job import properties
from qkilld.engine.access import Access
from qkilld.engine.registry import Registry
from qkilld.engine.service import SPANS, Service
from qkilld.engine.snapshot import Snapshot, SnapshotError
from qkilld.judgement.ladder import policy_for
from qkilld.model.errors import ConfigError
from qkilld.model.guest import Guest
from qkilld.model.job import Control, Request
from qkilld.model.jobview import JobView, verdict_of
from qkilld.model.policy import Config
from qkilld.model.words import INFINITY, KNOWN_FLAGS, Flag, Phase
from qkilld.stop.caller import OwnUser
from qkilld.stop.events import stop_alone
from qkilld.stop.log import say

if TYPE_CHECKING:
    from qkilld.engine.job import Job
    from qkilld.stop.log import Log
    from qkilld.stop.order import Order


class Alone:
    """Must be made in a running loop; to be closed."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.config = _configuration()
        self._host = LocalHost()
        self._clock = LoopClock()
        self._sampler = EvidenceSampler()
        self._registry = Registry(self.config, self._clock, log, self, self._sampler)
        self._orders: dict[int, Order] = {}
        favour_the_loop()

    @property
    def service(self) -> Service:
        """For what sends nothing."""
        return Service(self.config, self._host, self._registry, self._clock, self._sampler)

    async def start(self, order: Order, spans: Mapping[str, int], reason: str, why: str) -> Job:
        """Stop a process; where it was being stopped elsewhere, go on with that.

        Raises NoSuchProcess, NotQemu, ProcessChanged, AccessDenied, Failed.
        """
        target = order.target
        access = Access(self.config, self._host)
        process, uid = await access.hold(
            target.pid, OwnUser(), order.flags, start_time=target.start_time
        )
        if order.view is not None and order.view.held:
            why += "; it is held, which only a SIGTERM to qkilld-stop ends now"
        self._log.write(stop_alone(process.guest, why))
        fields = {SPANS[name]: usec for name, usec in spans.items()}
        request = Request(order.flags, fields, reason, uid)
        past = self._past(process.guest, request, order.view)
        self._orders[target.pid] = order
        try:
            if past is not None:
                return self._registry.resume(process, past)
            return self._registry.terminate(process, request)
        except SnapshotError:
            # The daemon told of something that cannot be; nothing is lost by beginning anew.
            order.view = None
            return await self.start(order, spans, reason, why)

    def _past(self, guest: Guest, request: Request, view: JobView | None) -> Snapshot | None:
        """What the daemon has done so far; None where nothing is known of that."""
        if view is None:
            return None
        told = view.properties
        request = replace(request, flags=request.flags | Flag(told["Flags"]) & KNOWN_FLAGS)
        configured = self.config.policy_for(guest.label.name)
        policy = policy_for(request.flags, configured, request.spans)
        deadline = told["DeadlineUSec"]
        killed = view.phase in (Phase.KILL, Phase.REAP) and deadline != INFINITY
        return Snapshot.of_signals(
            guest,
            request,
            policy,
            number=view.id,
            term_at=told["StartedUSec"],
            kill_at=deadline - policy.reap if killed else None,
            verdict=verdict_of(view.verdict),
            progress_at=told["LastProgressUSec"] or None,
            control=Control(view.held, view.not_before),
        )

    def force(self, order: Order, reason: str) -> None:
        """Add FORCE to a job."""
        if order.job is not None and order.job.running:
            order.job.join(Request(order.flags, {}, reason, os.geteuid()))

    def release(self, order: Order) -> None:
        """Of what was held before it came here."""
        if order.job is not None and order.job.running and order.job.control.held:
            order.job.release(os.geteuid())

    async def ended(self, job: Job) -> str:
        """Its result, as soon as there is one."""
        if job.running:
            ended = asyncio.Event()
            job.when_ended(ended.set)
            await ended.wait()
        assert job.result is not None
        return job.result.value

    def close(self) -> None:
        """Send nothing more to anybody."""
        self._registry.cancel_all()
        self._sampler.close()

    # engine.ports.Observer

    def job_new(self, job: Job) -> None:
        self.job_changed(job)

    def job_changed(self, job: Job) -> None:
        self._orders[job.guest.identity.pid].changed(JobView("", properties(job)))

    def job_ended(self, job: Job) -> None: ...


def _configuration() -> Config:
    """qkilld.conf; where that is wrong the defaults, for a guest has to be stopped all the same."""
    try:
        return config.load()
    except ConfigError as error:
        say(f"the configuration is wrong, so the defaults are used instead:\n{error}")
        return Config()
