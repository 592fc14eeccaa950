"""Observe one guest and ask it to shut down, over its monitor and agent.

A command that waits for a stuck disk blocks all later commands, so each command has a deadline.
With a Debian guest on QEMU 7.2, opening takes 5 ms, and observing takes 5 to 10 ms (measured).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qkilld.adapters import procfs
from qkilld.model.block_state import YankInstance
from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.errors import (
    CommandRefused,
    MonitorBusy,
    MonitorClosed,
    MonitorError,
    MonitorProtocolError,
    MonitorUnreachable,
)
from qkilld.model.guest_state import Button, EventKind, GuestEvent, GuestObservation, ShutdownSign
from qkilld.monitor import answers
from qkilld.monitor.agent import AgentClient
from qkilld.monitor.answers import AgentPort
from qkilld.monitor.channel import STARVED_S
from qkilld.monitor.endpoints import (
    NO_MONITOR,
    NOT_PASSED,
    Endpoint,
    GuestEndpoints,
    Role,
    UnixListener,
    endpoint_at,
    find_endpoints,
)
from qkilld.monitor.hmp import HmpClient
from qkilld.monitor.qmp import QmpClient, QmpEvent
from qkilld.monitor.reach import (
    ListenerTable,
    check_end,
    connect,
    is_stopped,
    is_young,
    prove,
    read_process,
)
from qkilld.monitor.starvation import Starvation
from qkilld.monitor.vcpu_threads import VcpuThreads, own_threads

if TYPE_CHECKING:
    from qkilld.engine.ports import Process

BUSY_S: Final = 1.0
"""How long to wait for a busy monitor. Programs that poll a monitor use it for a shorter time."""
START_WAIT_S: Final = 1.0
"""How long to wait for the monitor of a QEMU younger than START_S."""
TRY_S: Final = 5.0
"""No further monitor is tried after this time: a hostile process may have thousands of monitors."""
QUERY_S: Final = 2.0
CACHE_AGE_S: Final = 0.1
"""The maximum age of the cached reply to query-chardev. The command takes 1 ms, and more on a busy
host."""
ORDER_S: Final = 5.0
RESUME_S: Final = 30.0
"""Timeout of cont, which may have to wait for the disks."""
AGENT_REFUSAL_S: Final = 1.0
"""How long to wait for a refusal of guest-shutdown. If it succeeds, there is no reply."""
AGENT_ORDER_S: Final = 10.0
FOREIGN_PRESS_AGE: Final = 10 * USEC_PER_SEC
"""How long (µs) somebody else's press of the power button counts as pending, even if the guest has
already noticed it."""

PM1_POWER_BUTTON: Final = 0x100
"""The bit of the power button in PM1_STS and PM1_EN (ACPI specification, 4.8.4.1)."""

_KINDS: Final = frozenset(EventKind)


class GuestControl:
    """One monitor of a guest. `qmp` is None if it is a human monitor."""

    def __init__(
        self,
        process: Process,
        guest_endpoints: GuestEndpoints,
        endpoint: Endpoint,
        table: ListenerTable,
        proc: Path = procfs.PROC,
    ) -> None:
        """Do not call this directly: use `open`, `take` or `adopt`, which also connect."""
        self.guest_endpoints = guest_endpoints
        self.endpoint = endpoint
        self.adopted = False
        self.qmp: QmpClient | None = None
        self._hmp: HmpClient | None = None
        self._process = process
        self._table = table
        self._proc = proc
        self._tasks = proc / str(process.guest.identity.pid) / "task"
        self._on_event: Callable[[GuestEvent], None] | None = None
        self.own_chardevs: frozenset[str] = frozenset()
        """The labels of this monitor's character devices, which must not be cut off (yank)."""
        self._registers: int | None = 0
        """The I/O port of PM1_STS; 0 if not known yet, None if the machine has none."""
        self._vcpus: VcpuThreads | None = None
        self._signs: set[ShutdownSign] = set()
        self.last_port: AgentPort | None = None
        """The agent's port in the last observation; None if unknown."""
        self._expects_shutdown = False
        """Whether a shutdown was requested. Until then, signs of a shutdown are ignored."""
        self._pressed_at = -FOREIGN_PRESS_AGE
        """When somebody else pressed the power button (µs, CLOCK_MONOTONIC)."""
        self._chardevs: tuple[float, object] = (float("-inf"), None)
        """The time of the last reply to query-chardev (s, time.monotonic()), and the reply."""
        self._agent_was_open: bool | None = None
        """Whether the agent's port was open when a shutdown was requested; None if not known
        yet."""

    @classmethod
    async def open(
        cls,
        process: Process,
        table: ListenerTable,
        *,
        on_event: Callable[[GuestEvent], None] | None = None,
        qmp_socket: str = "",
        enter_netns: bool = False,
        was_asked: bool = False,
        agent_was_open: bool | None = None,
        proc: Path = procfs.PROC,
    ) -> GuestControl:
        """Find the guest's monitor, prove that it belongs to the guest, and open it.

        `enter_netns`: include monitors on TCP and abstract sockets. To connect to them, a thread
        enters the guest's network namespace.

        If the monitor is in use, waits up to BUSY_S, or up to STARVED_S if QEMU gets no processor
        time. If QEMU has just started, waits up to START_WAIT_S.

        `qmp_socket`: the path of the QMP monitor according to the caller. `was_asked`: the guest
        was already asked to shut down. `agent_was_open`: whether its agent had the port open then.
        Raises InvalidArgs if the process does not listen at `qmp_socket`; MonitorUnreachable, with
        reasons, if no monitor can be used; MonitorTimeout if the process is not read in time.
        """
        began = time.monotonic()
        starvation = Starvation(proc / str(process.guest.identity.pid) / "task")
        while True:
            latest = time.monotonic() + TRY_S
            facts = await read_process(process.guest.identity, proc)
            guest_endpoints = find_endpoints(*facts)
            endpoints = [*guest_endpoints.with_role(Role.QMP), *guest_endpoints.with_role(Role.HMP)]
            if enter_netns:
                endpoints += guest_endpoints.passable
            if qmp_socket:
                endpoints = [endpoint_at(qmp_socket, facts[1])]
            obstacles = list(guest_endpoints.obstacles)
            if not enter_netns:
                obstacles += [f"{each.title} {NOT_PASSED}" for each in guest_endpoints.passable]
            for endpoint in endpoints:
                if time.monotonic() >= latest:
                    break
                control = cls(process, guest_endpoints, endpoint, table, proc)
                control._expects_shutdown, control._agent_was_open = was_asked, agent_was_open
                try:
                    await control._connect(on_event)
                except MonitorError as error:
                    obstacles.append(str(error))
                    control.close()
                except BaseException:
                    control.close()
                    raise
                else:
                    return control
            waited = time.monotonic() - began
            in_use = any(endpoint.listener.in_use for endpoint in endpoints)
            # A QEMU without processor time may not have noticed that its last client has
            # disconnected.
            is_slow = in_use and waited < STARVED_S and starvation.is_starved()
            if is_slow or (in_use and waited < BUSY_S):
                await asyncio.sleep(BUSY_S / 5)
            elif (
                not endpoints
                and guest_endpoints.expected
                and waited < START_WAIT_S
                and is_young(process)
            ):
                await asyncio.sleep(START_WAIT_S / 50)
            elif endpoints and is_stopped(process, proc):
                # `obstacles` may be wrong: the monitor of a stopped QEMU seems to be in use even
                # after its client has disconnected.
                raise MonitorUnreachable(
                    f"{endpoints[0].title} does not answer, because the guest's process is stopped"
                )
            else:
                raise MonitorUnreachable("; ".join(obstacles) or NO_MONITOR)

    @classmethod
    async def take(
        cls,
        process: Process,
        connection: socket.socket,
        table: ListenerTable,
        *,
        was_asked: bool = False,
        agent_was_open: bool | None = None,
        proc: Path = procfs.PROC,
    ) -> GuestControl:
        """Open the guest's monitor over a connection that a caller has made.

        `was_asked`: see `open`. If the connection does not end in the process's monitor, or the
        monitor does not answer, closes the connection and raises MonitorError.
        """
        try:
            endpoint = await prove(process, connection, proc)
            guest_endpoints = find_endpoints(*await read_process(process.guest.identity, proc))
        except BaseException:
            connection.close()
            raise
        control = cls(process, guest_endpoints, endpoint, table, proc)
        control._expects_shutdown, control._agent_was_open = was_asked, agent_was_open
        try:
            await control._open_client(connection)
        except BaseException:
            control.close()
            raise
        return control

    @classmethod
    async def adopt(
        cls,
        process: Process,
        connection: socket.socket,
        own_chardevs: frozenset[str],
        table: ListenerTable,
        *,
        was_asked: bool = False,
        agent_was_open: bool | None = None,
        on_event: Callable[[GuestEvent], None] | None = None,
        proc: Path = procfs.PROC,
    ) -> GuestControl:
        """Take over an out-of-band connection that an earlier daemon opened.

        Send no in-band command on it, because QEMU may never answer. `was_asked`: see `open`. If
        the connection does not end in the process, or QEMU does not answer, closes the connection
        and raises MonitorError.
        """
        try:
            await check_end(process, connection, proc)
        except BaseException:
            connection.close()
            raise
        guest_endpoints = GuestEndpoints()
        with contextlib.suppress(MonitorError):
            guest_endpoints = find_endpoints(*await read_process(process.guest.identity, proc))
        endpoint = Endpoint(Role.QMP, UnixListener(0, ()))
        control = cls(process, guest_endpoints, endpoint, table, proc)
        control.own_chardevs = own_chardevs
        control._expects_shutdown, control._agent_was_open = was_asked, agent_was_open
        control._on_event = on_event
        control.adopted = True
        control.qmp = await QmpClient.adopt(connection, control._take_event)
        control.qmp.is_starved = Starvation(control._tasks).is_starved
        try:
            await control.query_yank()
        except BaseException:
            control.close()
            raise
        return control

    @property
    def signs(self) -> frozenset[ShutdownSign]:
        """The signs seen since a shutdown was requested, except those disproved later. RESTARTED is
        included only until the next observation. POWERED_OFF is included even without a request."""
        return frozenset(self._signs)

    @property
    def oob(self) -> bool:
        return self.qmp is not None and self.qmp.oob

    @property
    def lost(self) -> bool:
        """Whether the connection has ended."""
        client = self.qmp or self._hmp
        return client is None or client.closed

    def read_rest(self) -> bool:
        """Read the last events of a QEMU that has exited. Return whether it is certain that all
        were read. With HMP, this is never certain."""
        return self.qmp is not None and self.qmp.read_rest()

    def close(self) -> None:
        """May be called twice."""
        for client in (self.qmp, self._hmp):
            if client is not None:
                client.close()

    async def hmp(self, line: str, *, timeout_s: float = QUERY_S) -> str:
        if self.qmp is not None:
            return await self.qmp.hmp(line, timeout_s=timeout_s)
        assert self._hmp is not None
        return await self._hmp.hmp(line, timeout_s=timeout_s)

    # ---- observing the guest ----

    async def runstate(self) -> str:
        """Raises MonitorError."""
        if self.qmp is not None:
            return answers.read_runstate(await self.qmp.execute("query-status", timeout_s=QUERY_S))
        return answers.read_runstate_text(await self.hmp("info status"))

    async def read_button(self) -> tuple[Button, bool | None]:
        """Read whether the guest listens to the power button, and whether a press is pending.

        Raises MonitorError.
        """
        if self._registers == 0:
            self._registers = answers.find_event_registers(await self.hmp("info mtree"))
        if self._registers is None:
            return Button.NO_REGISTER, None
        if self._registers == 0:
            return Button.NOT_LISTENED, False
        status, enable = [
            answers.read_port(await self.hmp(f"i/2xh 0x{port:x}"), port)
            for port in (self._registers, self._registers + 2)
        ]
        listened = Button.LISTENED if enable & PM1_POWER_BUTTON else Button.NOT_LISTENED
        return listened, bool(status & PM1_POWER_BUTTON)

    async def block_totals(self) -> answers.BlockTotals:
        """Raises MonitorError."""
        if self.qmp is not None:
            stats = await self.qmp.execute("query-blockstats", timeout_s=QUERY_S)
            return answers.read_block_totals(stats)
        return answers.read_block_totals_text(await self.hmp("info blockstats"))

    async def agent_port(self, *, max_age_s: float = 0) -> AgentPort | None:
        """Return the agent's port, from a reply that is at most `max_age_s` old; None if unknown.

        Raises MonitorError.
        """
        if self.qmp is None or not self.guest_endpoints.agent_chardev:
            return None
        read_at, chardevs = self._chardevs
        if time.monotonic() - read_at > max_age_s:
            chardevs = await self._read_chardevs(self.qmp)
        return answers.read_agent_port(chardevs, self.guest_endpoints.agent_chardev)

    async def _read_chardevs(self, qmp: QmpClient) -> object:
        chardevs = await qmp.execute("query-chardev", timeout_s=QUERY_S)
        self._chardevs = time.monotonic(), chardevs
        return chardevs

    async def has_agent(self) -> bool:
        """Return whether an agent can be asked. Return False if qkilld cannot reach its socket, or
        if its port is in use, or closed in the guest. Raises MonitorError."""
        if not self.guest_endpoints.with_role(Role.AGENT):
            return False
        port = await self.agent_port()
        return port is None or (port.opened and not port.held)

    async def observe(self) -> GuestObservation:
        """Observe the guest. Never raises MonitorError: unreadable values are None or UNKNOWN."""
        at = time.monotonic_ns() // 1000
        runstate = totals = vcpus = ran = waited = None
        button, pending = Button.UNKNOWN, None
        self.last_port = None
        with contextlib.suppress(MonitorError):
            runstate = await self.runstate()
            button, pending = await self.read_button()
            if at < self._pressed_at + FOREIGN_PRESS_AGE:
                pending = True
            self.last_port = await self.agent_port(max_age_s=CACHE_AGE_S)
            if self._expects_shutdown:
                self._note_agent(self.last_port)
            if self._vcpus is None:
                # QEMU 2.11 and older have no query-cpus-fast.
                with contextlib.suppress(CommandRefused, MonitorProtocolError):
                    self._vcpus = await self._find_vcpus()
            totals = await self.block_totals()
            # Read the clock together with the counters: on a busy host, the other replies may take
            # seconds.
            at, vcpus = time.monotonic_ns() // 1000, self._vcpus
            ran, waited = vcpus.times() if vcpus is not None else (None, None)
        signs = self.signs
        self._signs.discard(ShutdownSign.RESTARTED)
        return GuestObservation(
            at=at,
            runstate=runstate,
            button=button,
            press_pending=pending,
            requests=None if totals is None else totals.requests,
            request_time=None if totals is None else totals.time,
            disks_idle=None if totals is None else totals.idle,
            vcpu_time=ran,
            vcpu_wait=waited,
            vcpus=None if vcpus is None else vcpus.count,
            vcpu_load=vcpus.load() if vcpus is not None and not self._expects_shutdown else None,
            agent_open=self.last_port.opened if self.last_port is not None else None,
            signs=signs,
        )

    # ---- asking the guest ----

    async def press(self) -> None:
        """Raises MonitorError if the button is not pressed. After a timeout, QEMU still executes a
        QMP command. QEMU 7.2 drops a line of the human monitor, later versions may execute it."""
        await self.begin_watch()
        if self.qmp is not None:
            await self.qmp.send("system_powerdown", timeout_s=ORDER_S)
        else:
            await self.hmp("system_powerdown", timeout_s=ORDER_S)

    async def ask_agent(self) -> None:
        """Ask the agent to shut the guest down.

        Raises CommandRefused if the agent refuses, for example because the guest's file systems are
        frozen, and MonitorError if no agent answers. After success, no reply comes, and the agent
        may close its port.
        """
        async with self._agent() as agent:
            await self.begin_watch()
            await agent.send("guest-shutdown", {"mode": "powerdown"}, timeout_s=AGENT_REFUSAL_S)

    async def is_frozen(self) -> bool:
        """Ask the agent whether the guest's file systems are frozen. Raises MonitorError."""
        async with self._agent() as agent:
            status = await agent.execute("guest-fsfreeze-status", timeout_s=AGENT_ORDER_S)
            return bool(status == "frozen")

    async def thaw(self) -> None:
        """Raises MonitorError."""
        async with self._agent() as agent:
            await agent.execute("guest-fsfreeze-thaw", timeout_s=AGENT_ORDER_S)

    async def resume(self) -> None:
        """Raises MonitorError."""
        await self._order("cont", timeout_s=RESUME_S)

    async def wake(self) -> None:
        """Raises MonitorError."""
        await self._order("system_wakeup")

    async def quit(self) -> None:
        """Raises MonitorError if QEMU refuses or does not answer in time, but not if it closes the
        connection."""
        with contextlib.suppress(MonitorClosed):
            await self._order("quit")

    # ---- out of band, which works while QEMU's main loop is busy ----

    async def query_yank(self) -> tuple[YankInstance, ...]:
        """List the connections that can be cut off, except those of this monitor. A reply also
        shows that QEMU is alive.

        Raises MonitorError, for example CommandRefused if this QEMU has no out-of-band commands.
        """
        qmp = self._out_of_band()
        instances = answers.read_yank_instances(
            await qmp.execute_oob("query-yank", timeout_s=QUERY_S)
        )
        return tuple(one for one in instances if not self._is_own(one))

    async def yank(self, instances: Sequence[YankInstance]) -> None:
        """Cut off all these connections with one command.

        Raises MonitorError; ValueError if one of the connections is this monitor's own.
        """
        if any(self._is_own(instance) for instance in instances):
            raise ValueError("the monitor's own connection")
        wire = {"instances": [dict(instance.wire) for instance in instances]}
        await self._out_of_band().execute_oob("yank", wire, timeout_s=ORDER_S)

    # ----

    async def _connect(self, on_event: Callable[[GuestEvent], None] | None) -> None:
        self._on_event = on_event
        connection = await connect(self._process, self.endpoint, self._table, self._proc)
        await self._open_client(connection)

    async def _open_client(self, connection: socket.socket) -> None:
        starvation = Starvation(self._tasks)
        if self.endpoint.role is Role.QMP:
            places = answers.chardev_places(self.endpoint.listener, connection.getsockname())
            self.qmp = await QmpClient.open(
                connection, self._take_event, is_starved=starvation.is_starved
            )
            chardevs = await self._read_chardevs(self.qmp)
            self.own_chardevs = answers.read_chardevs_at(chardevs, places)
        else:
            self._hmp = await HmpClient.open(connection, is_starved=starvation.is_starved)

    async def _find_vcpus(self) -> VcpuThreads | None:
        """Find the threads of the virtual processors; None if unknown. Raises MonitorError."""
        if self.qmp is not None:
            vcpus = await self.qmp.execute("query-cpus-fast", timeout_s=QUERY_S)
            return own_threads(self._tasks, answers.read_vcpu_threads(vcpus))
        text = await self.hmp("info cpus")
        return own_threads(self._tasks, answers.read_vcpu_threads_text(text))

    async def _order(self, command: str, timeout_s: float = ORDER_S) -> None:
        if self.qmp is not None:
            await self.qmp.execute(command, timeout_s=timeout_s)
        else:
            await self.hmp(command, timeout_s=timeout_s)

    @contextlib.asynccontextmanager
    async def _agent(self) -> AsyncIterator[AgentClient]:
        """Connect to the agent and synchronize. If the agent is in use, wait up to BUSY_S.

        Raises MonitorError.
        """
        until = time.monotonic() + BUSY_S
        while True:
            try:
                connection = await self._connect_agent()
                break
            except MonitorBusy:
                # Try again, because QEMU may not have noticed yet that our previous connection is
                # closed.
                if time.monotonic() >= until:
                    raise
                await asyncio.sleep(BUSY_S / 20)
        agent = await AgentClient.open(connection)
        try:
            yield agent
        finally:
            agent.close()

    async def _connect_agent(self) -> socket.socket:
        port = await self.agent_port()
        if port is not None and not port.opened:
            raise MonitorUnreachable("No agent runs in the guest")
        if port is not None and port.held:
            raise MonitorBusy("Another program uses the guest's agent")
        # Read again which sockets are in use, because this may have changed.
        facts = await read_process(self._process.guest.identity, self._proc)
        endpoints = find_endpoints(*facts).with_role(Role.AGENT)
        if not endpoints:
            raise MonitorUnreachable("The guest has no port for an agent that qkilld can reach")
        return await connect(self._process, endpoints[0], self._table, self._proc)

    async def begin_watch(self) -> None:
        """Note signs of a shutdown from now on."""
        if self._expects_shutdown:
            return
        with contextlib.suppress(MonitorError):
            self._note_agent(await self.agent_port(max_age_s=CACHE_AGE_S))
        self._expects_shutdown, self._pressed_at = True, -FOREIGN_PRESS_AGE

    def _note_agent(self, port: AgentPort | None) -> None:
        if port is None:
            return
        if self._agent_was_open is None:
            self._agent_was_open = port.opened
        elif port.opened:
            # The port is open again, because the agent or the guest was restarted. So the closed
            # port was not a sign of a shutdown.
            self._signs.discard(ShutdownSign.AGENT_CLOSED)
        elif self._agent_was_open:
            self._signs.add(ShutdownSign.AGENT_CLOSED)

    def _take_event(self, event: QmpEvent) -> None:
        if event.name not in _KINDS:
            return
        kind = EventKind(event.name)
        by_guest = event.data.get("guest") is True
        if answers.says_powered_off({"event": event.name, "data": event.data}):
            self._signs.add(ShutdownSign.POWERED_OFF)
        elif self._expects_shutdown:
            self._take_sign(kind, event, by_guest)
        elif kind is EventKind.POWERDOWN:
            self._pressed_at = event.received
        if self._on_event is not None:
            self._on_event(GuestEvent(kind, event.received, event.data))

    def _take_sign(self, kind: EventKind, event: QmpEvent, by_guest: bool) -> None:
        if kind is EventKind.GUEST_PVSHUTDOWN:
            self._signs.add(ShutdownSign.PVSHUTDOWN)
        elif kind is EventKind.RESET and by_guest:
            self._signs.add(ShutdownSign.RESTARTED)
        elif kind is EventKind.VSERPORT_CHANGE and event.data.get("open") is False:
            own = self.guest_endpoints.agent_device
            if own and event.data.get("id") == own and self._agent_was_open:
                self._signs.add(ShutdownSign.AGENT_CLOSED)

    def _out_of_band(self) -> QmpClient:
        if self.qmp is None:
            raise MonitorUnreachable("The human monitor has no out-of-band commands")
        return self.qmp

    def _is_own(self, instance: YankInstance) -> bool:
        return instance.kind == "chardev" and instance.wire.get("id") in self.own_chardevs
