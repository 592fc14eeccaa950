"""Stop guests with the engine in this process. It uses real readers, monitors and signals, not
fakes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial

from qkilld.adapters.clock import LoopClock
from qkilld.adapters.host import LocalHost
from qkilld.engine.job import Job
from qkilld.engine.registry import Registry
from qkilld.evidence.sampler import EvidenceSampler
from qkilld.evidence.server_exits import GuestServerExits
from qkilld.evidence.sockdiag import listening_unix
from qkilld.model.constants import Flag
from qkilld.model.event import Event
from qkilld.model.job import Request
from qkilld.model.policy import Config
from qkilld.monitor.job_monitor import JobMonitors
from tests.lab.guest import Guest, own_qemus
from tests.monitor.connecting import run_for

S = 1_000_000
FORCE, POWERDOWN = Flag.FORCE, Flag.POWERDOWN


@dataclass
class Entries:
    """Implements engine.ports.Journal."""

    events: list[Event] = field(default_factory=list)

    def write(self, event: Event) -> None:
        self.events.append(event)


@dataclass
class Stopper:
    registry: Registry
    journal: Entries
    host: LocalHost

    async def begin(
        self, guest: Guest, flags: Flag, spans: dict[str, int] | None = None, qmp_socket: str = ""
    ) -> Job:
        return await self.begin_pid(guest.pid, flags, spans, qmp_socket)

    async def begin_pid(
        self, pid: int, flags: Flag, spans: dict[str, int] | None = None, qmp_socket: str = ""
    ) -> Job:
        return await self.begin_request(pid, Request(flags, spans or {}, qmp_socket=qmp_socket))

    async def begin_request(self, pid: int, request: Request) -> Job:
        process = self.host.open(pid)
        process.set_label(await self.host.label(process.guest.identity))
        return self.registry.terminate(process, request)


@contextlib.asynccontextmanager
async def stopper(config: Config | None = None) -> AsyncIterator[Stopper]:
    journal = Entries()
    faults: list[BaseException] = []
    sampler = EvidenceSampler(lambda doing, error: faults.append(error))
    asyncio.get_running_loop().set_exception_handler(
        lambda loop, context: faults.append(context.get("exception") or AssertionError(context))
    )
    clock = LoopClock()
    registry = Registry(
        config or Config(executables=(own_qemus(),)),
        clock,
        journal,
        sampler=sampler,
        monitors=JobMonitors(listening_unix),
        server_exits=partial(GuestServerExits, started_at=clock.started_at),
    )
    try:
        yield Stopper(registry, journal, LocalHost())
        assert not faults, faults
    finally:
        registry.cancel_all()
        await registry.wait_undone()
        for job in registry:
            job.stop_watching()
        sampler.close()


async def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def stop(
    guest: Guest, flags: Flag, spans: dict[str, int] | None = None, *, timeout_s: float = 170
) -> Job:
    """Stop the guest, wait for the end of the job, and return the job."""

    async def work() -> Job:
        async with stopper() as stopping:
            job = await stopping.begin(guest, flags, spans)
            await until(lambda: not job.running, timeout_s)
            return job

    return run_for(timeout_s + 5, work())


def actions(job: Job) -> list[str]:
    return [rung.action for rung in job.rungs]


def codes(job: Job) -> set[str]:
    return {risk.code for risk in job.risks}
