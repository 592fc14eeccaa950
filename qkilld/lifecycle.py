"""The life of the daemon: resume the jobs of an earlier daemon, serve Varlink and a bus, and exit
or leave the jobs to the next daemon.

Varlink is served first, because it needs no other service, and the client that activated our socket
is waiting. The bus may be connected later, be lost and return.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qkilld import __version__, foreign_descriptors
from qkilld.adapters import (
    procfs,
    qemu_args,  # noqa: F401  # adapters.procfs would import it with the first guest
)
from qkilld.adapters.clock import LoopClock
from qkilld.adapters.host import LocalHost
from qkilld.adapters.interpreter import collect_garbage, favour_the_loop
from qkilld.adapters.job_store import JobStore
from qkilld.adapters.loop_signals import call_at
from qkilld.adapters.loop_thread import run_in_thread
from qkilld.adapters.memlock import MemoryLock
from qkilld.adapters.service_manager import (
    SOCK_DIAG,
    VARLINK,
    ServiceManager,
    stored_descriptors,
)
from qkilld.adapters.state_dir import StateDirectory
from qkilld.engine import events
from qkilld.engine.job_saver import JobSaver
from qkilld.engine.observers import Observers
from qkilld.engine.rate_limit import RateLimitedJournal
from qkilld.engine.registry import Registry
from qkilld.engine.service import Service
from qkilld.engine.turns import Turns
from qkilld.engine.unit_stop import ControlProcess, UnitStops
from qkilld.evidence.faults import FaultGuard
from qkilld.evidence.sampler import EvidenceSampler
from qkilld.evidence.server_exits import GuestServerExits
from qkilld.evidence.sockdiag import ask_through, listening_unix
from qkilld.model.bus_address import BusAddress
from qkilld.model.constants import ExitCode
from qkilld.model.errors import BusError, ConfigError, NameRefused
from qkilld.model.policy import Config
from qkilld.monitor.job_monitor import JobMonitors
from qkilld.varlink.methods import VarlinkMethods
from qkilld.varlink.server import VarlinkServer
from qkilld.varlink.streams import Streams

if TYPE_CHECKING:
    from qkilld.bus.bus_service import BusService
    from qkilld.engine.ports import Journal, Traces

DRAIN_TIMEOUT_S: Final = 2.0
"""Time to send the last replies."""
BARRIER_TIMEOUT_S: Final = 2.0
BUS_AFTER_S: Final = 0.1
"""How long the import of the D-Bus library waits for the answers to the first Varlink calls. An
answer takes 25 ms if the guest is idle."""
RETRY_S: Final = 0.5
"""Interval between attempts to reach the bus."""
UNLOCK_AFTER_S: Final = 10.0
"""How long memory stays locked after the last job. Another job may follow soon."""


class EndReason(Enum):
    """The reason why the daemon stops serving a bus, or stops waiting for one."""

    STOP = auto()
    LOST = auto()
    IDLE = auto()
    RETRY = auto()


async def live(
    config: Config,
    bus: BusAddress,
    journal: Journal,
    traces: Traces | None,
    *,
    varlink: Path | None,
    exit_idle_s: float | None,
) -> int:
    """Serve `bus` and Varlink until a signal stops the daemon, or the daemon has been idle for
    `exit_idle_s`. Return the exit code.

    `varlink`: the path of a socket to listen on, in addition to the socket that systemd passes.
    Raises BusError as RunningDaemon.run does, and ConfigError if the socket cannot be created or
    the description of an interface cannot be read.
    """
    favour_the_loop()
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(contextlib.closing(ServiceManager()))
        stored = stored_descriptors()
        listeners = _listeners(stored, journal)
        if varlink is not None:
            listeners.append(_listen(varlink))
            stack.callback(varlink.unlink, missing_ok=True)
        store = _job_store(manager, journal, stored)
        if store is not None:
            stack.callback(store.close)

        def report(doing: str, error: Exception) -> None:
            journal.write(events.internal_error(doing, error))

        FaultGuard(report).watch_callbacks(asyncio.get_running_loop())
        sampler = stack.enter_context(contextlib.closing(EvidenceSampler(report)))
        daemon = RunningDaemon(
            config=config,
            bus=bus,
            journal=journal,
            traces=traces,
            sampler=sampler,
            manager=manager,
            store=store,
            exit_idle_s=exit_idle_s,
        )
        stack.enter_context(call_at((signal.SIGTERM, signal.SIGINT), daemon.stop))
        return await daemon.run(listeners)


def _listeners(stored: dict[str, int], journal: Journal) -> list[socket.socket]:
    """Remove from `stored` the sockets that systemd has passed, and return those to listen on."""
    if (diag := stored.pop(SOCK_DIAG, None)) is not None:
        try:
            ask_through(diag)
        except ValueError as error:
            journal.write(events.descriptor_rejected(SOCK_DIAG, str(error)))
    if (fd := stored.pop(VARLINK, None)) is None:
        return []
    listener = socket.socket(fileno=fd)
    if (
        listener.family == socket.AF_UNIX
        and listener.type == socket.SOCK_STREAM
        and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        return [listener]
    listener.close()
    journal.write(events.descriptor_rejected(VARLINK, "it is not a listening unix socket"))
    return []


def _listen(path: Path) -> socket.socket:
    """Make a socket that every user may connect to. Raises ConfigError."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise ConfigError(f"failed to create a socket at {path}: {reason}") from None
    return listener


def _job_store(
    manager: ServiceManager, journal: Journal, stored: dict[str, int]
) -> JobStore | None:
    """Open the storage for jobs that must survive the daemon; None if $RUNTIME_DIRECTORY is not
    usable."""
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
    return JobStore(directory, manager, journal, stored)


def control_process(pid: int) -> ControlProcess | None:
    """Return the unit and the age of a client that claims to be an ExecStop= process.

    None if the process is hidden or gone.
    """
    if pid <= 0 or (unit := procfs.read_unit(pid)) is None:
        return None
    try:
        started = procfs.read_stat(pid).start_time
    except OSError:
        return None
    ran_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return ControlProcess(unit, max(0, int(ran_s * 1e6)))


class RunningDaemon:
    """The daemon. Create it in a running loop, and call `run` once."""

    def __init__(
        self,
        *,
        config: Config,
        bus: BusAddress,
        journal: Journal,
        traces: Traces | None,
        sampler: EvidenceSampler,
        manager: ServiceManager,
        store: JobStore | None,
        exit_idle_s: float | None,
    ) -> None:
        clock = LoopClock()
        saver = JobSaver(store, clock) if store is not None else None
        self._bus = bus
        self._exit_idle_s = exit_idle_s
        self._journal = journal
        self._manager = manager
        self._store = store
        self._limited = limited_journal = RateLimitedJournal(journal, clock)
        monitors = JobMonitors(listening_unix)
        self._observers = Observers(limited_journal)
        self._registry = Registry(
            config,
            clock,
            limited_journal,
            observer=self._observers,
            sampler=sampler,
            monitors=monitors,
            traces=traces,
            saver=saver,
            server_exits=partial(GuestServerExits, started_at=clock.started_at),
        )
        sampler.count_jobs(lambda: self._registry.running)
        self._service = Service(
            config, LocalHost(), self._registry, clock, sampler, monitors=monitors
        )
        # Our own user has no limits, because on a session bus, everything belongs to this user.
        self._turns = Turns(frozenset({0, os.getuid()}))
        streams = Streams()
        self._observers.add(streams)
        units = UnitStops(self._service, control_process, user=bus.user)
        methods = VarlinkMethods(self._service, streams, units, self._turns.limits)
        self._varlink = VarlinkServer(methods, self._turns, self._fault)
        self._memory = MemoryLock(lambda why: journal.write(events.memory_not_locked(why)))
        self._unlock: asyncio.TimerHandle | None = None
        self._stop = asyncio.Event()
        self._ready = False

    def stop(self) -> None:
        """Make `run` end as it does after a signal."""
        self._stop.set()

    async def run(self, listeners: list[socket.socket]) -> int:
        """Serve Varlink on `listeners`, and the bus; return the exit code.

        Raises BusError if we cannot own our name, or if there is neither a bus nor a listener.
        Never raises it while a job runs. If the journal already has the error, returns FAILURE
        instead.
        """
        feeding = asyncio.get_running_loop().create_task(self._feed_watchdog())
        self._registry.on_busy = self._busy
        try:
            if self._store is not None:
                self._store.restore(self._registry)
            for listener in listeners:
                self._varlink.listen(listener)
            if listeners:
                self._journal.write(events.daemon_started(__version__, "Varlink"))
                self._tell_ready()
                await self._answer_first(listeners)
            return await self._serve()
        finally:
            self._varlink.close()
            feeding.cancel()
            self._limited.flush()

    async def _answer_first(self, listeners: list[socket.socket]) -> None:
        """Answer the calls that waited when qkilld started. Do this before the import of the D-Bus
        library, which would delay the answers."""
        poll = select.poll()
        for listener in listeners:
            poll.register(listener, select.POLLIN)
        if poll.poll(0):
            await self._varlink.answer_first(BUS_AFTER_S)

    async def _serve(self) -> int:
        """Serve the bus, and reconnect if it disappears; return the exit code."""
        reported = False
        while True:
            try:
                bus = await self._connect()
            except BusError as error:
                goes_on = self._varlink.listens and not isinstance(error, NameRefused)
                if not goes_on and not self._registry.running:
                    if reported:
                        return ExitCode.FAILURE
                    raise
                if not reported:
                    reported = True
                    running = self._registry.running
                    self._journal.write(events.bus_lost(running, str(error), goes_on=goes_on))
                    # Report the start as successful, because without a bus there is still work to
                    # do.
                    self._tell_ready()
                code = await self._serve_on(None)
            else:
                self._varlink.authority = bus.polkit
                with contextlib.closing(bus):
                    bus_title = f"the {self._bus.title}"
                    self._journal.write(events.daemon_started(__version__, bus_title))
                    self._tell_ready()
                    code = await self._serve_on(bus)
                self._varlink.authority = None
                reported = True
            if code is not None:
                return code

    async def _serve_on(self, bus: BusService | None) -> int | None:
        """Serve until the bus is lost, a signal comes, or nothing is left to do. Without a bus,
        serve for at most RETRY_S. Return the exit code, or None if the caller must try again to
        reach the bus."""
        while True:
            match await self._until_end(bus):
                case EndReason.STOP:
                    return await self._end(bus)
                case EndReason.IDLE:
                    code = await self._end_idle(bus)
                    if code is not None:
                        return code
                case EndReason.RETRY:
                    return None
                case EndReason.LOST:
                    running, goes_on = self._registry.running, self._varlink.listens
                    why = "it closed the connection"
                    self._journal.write(events.bus_lost(running, why, goes_on=goes_on))
                    return None if running or goes_on else ExitCode.FAILURE

    async def _connect(self) -> BusService:
        """Raises BusError, ConfigError, ImportError."""
        # Import in a thread, so that Varlink is served meanwhile. The import of the D-Bus library
        # takes as long as all other imports together.
        serve = await run_in_thread(_import_bus_service)
        return await serve(self._bus, self._service, self._observers, self._turns, self._fault)

    async def _until_end(self, bus: BusService | None) -> EndReason:
        loop = asyncio.get_running_loop()
        ends: dict[asyncio.Task[Any], EndReason] = {
            loop.create_task(self._stop.wait()): EndReason.STOP
        }
        if bus is not None:
            ends[loop.create_task(bus.wait_closed())] = EndReason.LOST
        else:
            ends[loop.create_task(asyncio.sleep(RETRY_S))] = EndReason.RETRY
        if self._exit_idle_s is not None:
            ends[loop.create_task(self._idle(bus, self._exit_idle_s))] = EndReason.IDLE
        try:
            ended, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return EndReason.STOP if self._stop.is_set() else ends[ended.pop()]
        finally:
            for task in ends:
                task.cancel()

    async def _end(self, bus: BusService | None) -> int:
        """End after a signal; return the exit code.

        Cancels all jobs if systemd reports that it stops our unit, or if there is no store.
        Otherwise, leaves the jobs to the next daemon.
        """
        self._manager.tell("STOPPING=1")
        self._varlink.stop_listening()
        why = "stop" if self._store is None else ""
        if self._store is not None and bus is not None:
            why = await bus.own_job()
        running = self._registry.running
        self._journal.write(events.daemon_stopping(running, to_go_on=why != "stop"))
        if why == "stop":
            self._registry.cancel_all("qkilld was stopped")
            await self._registry.wait_undone()
        else:
            self._registry.interrupt_waits()
        await self._varlink.drain(DRAIN_TIMEOUT_S)
        # Close the Varlink connections before leaving the bus, because leaving takes time. If a
        # connection closes soon after a job was cancelled, the client concludes that the job was
        # cancelled by the stop of the daemon, not by a caller.
        self._varlink.close()
        await self._leave(bus)
        # systemd must start a new daemon for the remaining jobs. In a restart, it always does so.
        # In all other cases, it does so only if this process exits with a failure.
        jobs_remain = running and why not in ("stop", "restart", "try-restart")
        return ExitCode.FAILURE if jobs_remain else ExitCode.OK

    async def _end_idle(self, bus: BusService | None) -> int | None:
        """Stop serving because the daemon is idle. Return the exit code; None to go on serving.

        systemd is notified first. If the bus wants to activate our name after that, systemd starts
        a new daemon. Connections to the socket wait for that daemon.
        """
        self._manager.tell("STOPPING=1")
        self._varlink.stop_listening()
        await self._manager.barrier(BARRIER_TIMEOUT_S)
        await self._leave(bus)
        if self._registry.empty:
            self._journal.write(events.daemon_idle())
            return ExitCode.OK
        if self._store is not None:
            # A job that was requested meanwhile continues in the next daemon, which systemd starts
            # at once.
            self._registry.interrupt_waits()
            self._journal.write(events.daemon_stopping(self._registry.running, to_go_on=True))
            return ExitCode.FAILURE
        self._varlink.listen_again()
        return None if bus is None or await bus.own() else ExitCode.FAILURE

    async def _leave(self, bus: BusService | None) -> None:
        """Release the bus name, and answer all received calls, also those on Varlink."""
        if bus is not None:
            await bus.leave()
        await self._varlink.drain(DRAIN_TIMEOUT_S)

    async def _idle(self, bus: BusService | None, span_s: float) -> None:
        """Wait until there has been no work for `span_s` seconds."""
        while True:
            remaining_s = self._turns.last_call + span_s - time.monotonic()
            busy = self._varlink.busy or (bus is not None and bus.busy)
            # Do not exit while files are still to be closed: closing them could keep this process
            # from ending, and systemd starts a new daemon only after this one has ended.
            busy = busy or foreign_descriptors.closes_files()
            if remaining_s <= 0 and self._registry.empty and not busy:
                return
            await asyncio.sleep(remaining_s if remaining_s > 0 else span_s / 4)

    async def _feed_watchdog(self) -> None:
        """Ping systemd's watchdog from the event loop, so that systemd notices if the loop
        stalls."""
        if (interval := self._manager.watchdog_s) is not None:
            while True:
                self._manager.ping()
                await asyncio.sleep(interval / 2)

    def _fault(self, doing: str, error: BaseException) -> None:
        self._limited.write(events.internal_error(doing, error))

    def _busy(self, busy: bool) -> None:
        """Handle the start of the first job and the end of the last one."""
        if self._unlock is not None:
            self._unlock.cancel()
            self._unlock = None
        if busy:
            self._memory.set(True)
        else:
            loop = asyncio.get_running_loop()
            self._unlock = loop.call_later(UNLOCK_AFTER_S, self._rest)

    def _rest(self) -> None:
        collect_garbage()
        self._memory.set(False)

    def _tell_ready(self) -> None:
        if not self._ready:
            self._ready = True
            self._manager.tell("READY=1")


def _import_bus_service() -> Callable[..., Coroutine[Any, Any, BusService]]:
    """Import the D-Bus library and bus.bus_service. Raises ConfigError."""
    from qkilld.bus import bus_service, interfaces

    interfaces.load()
    return bus_service.serve
