"""The daemon's life: it takes up the jobs that an earlier one left, serves a bus, and ends in good
order, or leaves its jobs to the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid  # noqa: F401  # adapters.procfs would import it with the first guest that has one
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Final

from qkilld import __version__
from qkilld.adapters.clock import LoopClock
from qkilld.adapters.evidence.sampler import EvidenceSampler
from qkilld.adapters.evidence.sockdiag import ask_through
from qkilld.adapters.host import LocalHost
from qkilld.adapters.interpreter import favour_the_loop
from qkilld.adapters.manager import ServiceManager, stored_descriptors
from qkilld.adapters.memory import MemoryLock
from qkilld.adapters.statedir import StateDirectory
from qkilld.adapters.survival import Survival
from qkilld.bus.announcer import Announcer
from qkilld.bus.connection import Connection, connect
from qkilld.bus.manager import ManagerObject, Tree
from qkilld.bus.polkit import Polkit
from qkilld.bus.server import Server
from qkilld.bus.systemd import Systemd
from qkilld.engine import events
from qkilld.engine.keeper import Keeper
from qkilld.engine.ports import Journal, Traces
from qkilld.engine.registry import Registry
from qkilld.engine.service import Service
from qkilld.model.errors import BusError, QkilldError
from qkilld.model.policy import Config
from qkilld.model.words import BUS_NAME, ExitCode

SOCK_DIAG: Final = "sock-diag"
"""The descriptor from units/qkilld.socket."""
DRAIN_TIMEOUT_S: Final = 2.0
"""For the last replies to be sent."""
ASK_TIMEOUT_S: Final = 1.0
"""For systemd to say why we are to end."""
BARRIER_TIMEOUT_S: Final = 2.0
RETRY_S: Final = 0.5
"""Between two tries to reach a bus that is gone."""
UNLOCK_AFTER_S: Final = 10.0
"""Memory stays locked so long after the last job: the next one may be near."""


class End(Enum):
    """Why a bus is served no longer."""

    STOP = auto()
    LOST = auto()
    IDLE = auto()


@dataclass(frozen=True, slots=True)
class Where:
    """Which bus, and for how long."""

    address: str | None
    user: bool
    exit_idle_s: float | None
    """None for ever."""

    @property
    def is_system_bus(self) -> bool:
        return not self.user and not self.address

    @property
    def bus(self) -> str:
        if self.address:
            return f"bus at {self.address}"
        return "session bus" if self.user else "system bus"


async def live(config: Config, where: Where, journal: Journal, traces: Traces | None) -> int:
    """The exit code. Raises BusError where there is neither a bus nor a job."""
    favour_the_loop()
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(contextlib.closing(ServiceManager()))
        survival = _survival(manager, journal)
        if survival is not None:
            stack.callback(survival.close)
        sampler = stack.enter_context(contextlib.closing(EvidenceSampler()))
        return await Life(config, where, journal, traces, sampler, manager, survival).run()


def _survival(manager: ServiceManager, journal: Journal) -> Survival | None:
    """What jobs outlive us in; None where nobody gave us a place for it."""
    stored = stored_descriptors()
    if (diag := stored.pop(SOCK_DIAG, None)) is not None:
        try:
            ask_through(diag)
        except ValueError as error:
            journal.write(events.descriptor_rejected(SOCK_DIAG, str(error)))
    path = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if not path:
        return None
    try:
        directory = StateDirectory(
            Path(path), on_error=lambda why: journal.write(events.state_failed(why))
        )
    except OSError as error:
        journal.write(events.state_failed(error.strerror or str(error)))
        return None
    return Survival(directory, manager, journal, stored)


class Life:
    """To be made in a running loop, and run once."""

    def __init__(
        self,
        config: Config,
        where: Where,
        journal: Journal,
        traces: Traces | None,
        sampler: EvidenceSampler,
        manager: ServiceManager,
        survival: Survival | None,
    ) -> None:
        clock = LoopClock()
        keeper = Keeper(survival, clock) if survival is not None else None
        self._where = where
        self._journal = journal
        self._manager = manager
        self._survival = survival
        self._registry = Registry(
            config, clock, journal, sampler=sampler, traces=traces, keeper=keeper
        )
        self._service = Service(config, LocalHost(), self._registry, clock, sampler)
        self._memory = MemoryLock(lambda why: journal.write(events.memory_not_locked(why)))
        self._unlock: asyncio.TimerHandle | None = None
        self._stop = asyncio.Event()
        self._ready = False

    async def run(self) -> int:
        """The exit code. Raises BusError where there is neither a bus nor a job."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        feeding = loop.create_task(self._feed_watchdog())
        self._registry.on_busy = self._busy
        try:
            if self._survival is not None:
                self._survival.restore(self._registry)
            return await self._serve()
        finally:
            feeding.cancel()

    async def _serve(self) -> int:
        """Serve one bus after the other: one that is gone may come back while jobs run."""
        told = False
        while True:
            try:
                connection, server = await self._connect()
            except BusError as error:
                if not self._registry.running:
                    if told:
                        return ExitCode.FAILURE
                    raise
                if not told:
                    told = True
                    self._journal.write(events.bus_lost(self._registry.running, str(error)))
                    # systemd is not to take what goes on without a bus for a start that failed.
                    self._tell_ready()
                if await self._stops_within(RETRY_S):
                    return await self._end(None, None)
                continue
            with contextlib.closing(connection):
                self._journal.write(events.daemon_started(__version__, self._where.bus))
                self._tell_ready()
                code = await self._serve_on(connection, server)
            if code is not None:
                return code
            told = True

    async def _serve_on(self, connection: Connection, server: Server) -> int | None:
        """The exit code; None where the bus is gone and jobs run."""
        while True:
            match await self._until_end(connection, server):
                case End.STOP:
                    return await self._end(connection, server)
                case End.IDLE:
                    code = await self._end_idle(connection, server)
                    if code is not None:
                        return code
                case End.LOST:
                    running = self._registry.running
                    self._journal.write(events.bus_lost(running, "it closed the connection"))
                    return None if running else ExitCode.FAILURE

    def _server(self, connection: Connection) -> Server:
        self._service.units = Systemd(connection)
        manager = ManagerObject(self._service)
        server = Server(
            connection,
            Tree(manager, self._service),
            on_fault=lambda doing, error: self._journal.write(events.internal_error(doing, error)),
            authority=Polkit(connection) if self._where.is_system_bus else None,
        )
        manager.server = server
        announcer = Announcer(server)
        for job in self._registry:
            if job.running:
                announcer.adopt(job)
        self._registry.observer = announcer
        return server

    async def _connect(self) -> tuple[Connection, Server]:
        """To the bus, with our name on it. Raises BusError."""
        connection = await connect(self._where.address, user=self._where.user)
        try:
            server = self._server(connection)
            if not await connection.own(BUS_NAME):
                raise BusError(
                    f"another process has the name {BUS_NAME} on this bus already: "
                    "is qkilld running here? See `qkillctl status`"
                )
        except BaseException:
            connection.close()
            raise
        return connection, server

    async def _until_end(self, connection: Connection, server: Server) -> End:
        loop = asyncio.get_running_loop()
        ends = {
            loop.create_task(connection.wait_closed()): End.LOST,
            loop.create_task(self._stop.wait()): End.STOP,
        }
        if self._where.exit_idle_s is not None:
            ends[loop.create_task(self._idle(server, self._where.exit_idle_s))] = End.IDLE
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return End.STOP if self._stop.is_set() else ends[done.pop()]
        finally:
            for task in ends:
                task.cancel()

    async def _end(self, connection: Connection | None, server: Server | None) -> int:
        """End because somebody wants it."""
        self._manager.tell("STOPPING=1")
        why = "stop" if self._survival is None else await self._why(connection)
        running = self._registry.running
        self._journal.write(events.daemon_stopping(running, to_go_on=why != "stop"))
        if why == "stop":
            self._registry.cancel_all("qkilld was stopped")
        else:
            self._registry.interrupt_waits()
        if connection is not None and server is not None:
            await self._leave(connection, server)
        # Nobody but a restart under way would start it again to go on with what is left.
        left = running and why not in ("stop", "restart", "try-restart")
        return ExitCode.FAILURE if left else ExitCode.OK

    async def _why(self, connection: Connection | None) -> str:
        """What systemd is about to do with us: stop, restart, …; "" for nothing that it says."""
        if connection is None:
            return ""
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return await Systemd(connection).own_job()
        except (QkilldError, TimeoutError):
            return ""

    async def _end_idle(self, connection: Connection, server: Server) -> int | None:
        """End for lack of work; None where some has come in between.

        systemd first: from then on it starts us anew for a call that finds the name without owner,
        where before it would have thought that we serve it.
        """
        self._manager.tell("STOPPING=1")
        await self._manager.barrier(BARRIER_TIMEOUT_S)
        await self._leave(connection, server)
        if self._registry.empty:
            self._journal.write(events.daemon_idle())
            return ExitCode.OK
        if self._survival is not None:
            # What has come in meanwhile goes on in the next life, which systemd begins at once.
            self._registry.interrupt_waits()
            self._journal.write(events.daemon_stopping(self._registry.running, to_go_on=True))
            return ExitCode.FAILURE
        return None if await connection.own(BUS_NAME) else ExitCode.FAILURE

    async def _leave(self, connection: Connection, server: Server) -> None:
        """Give up the name, and answer every call that came for it."""
        with contextlib.suppress(QkilldError):
            await connection.disown(BUS_NAME)
        await server.drain(DRAIN_TIMEOUT_S)
        await connection.flush()

    async def _idle(self, server: Server, span_s: float) -> None:
        """Return when there was nothing to do for so long."""
        while True:
            left = server.last_call + span_s - time.monotonic()
            if left <= 0 and self._registry.empty and not server.busy:
                return
            await asyncio.sleep(left if left > 0 else span_s / 4)

    async def _feed_watchdog(self) -> None:
        """From the loop: it is the loop that must not stall."""
        if (interval := self._manager.watchdog_s) is not None:
            while True:
                self._manager.ping()
                await asyncio.sleep(interval / 2)

    async def _stops_within(self, span_s: float) -> bool:
        """Whether we are to end before so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(span_s):
                await self._stop.wait()
        return self._stop.is_set()

    def _busy(self, busy: bool) -> None:
        """Jobs have begun to run, or run no longer."""
        if self._unlock is not None:
            self._unlock.cancel()
            self._unlock = None
        if busy:
            self._memory.set(True)
        else:
            loop = asyncio.get_running_loop()
            self._unlock = loop.call_later(UNLOCK_AFTER_S, self._memory.set, False)

    def _tell_ready(self) -> None:
        if not self._ready:
            self._ready = True
            self._manager.tell("READY=1")
