"""The monitor of a job, which adds callbacks to GuestControl. Implements protocols of
engine.ports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from qkilld.debug_log import ignore, note, note_once
from qkilld.foreign_descriptors import close_later, take_over
from qkilld.model.block_state import (
    BackgroundJob,
    BlockState,
    FlushResult,
    GuestDisk,
    YankInstance,
)
from qkilld.model.constants import USEC_PER_SEC, AgentKind, MonitorKind
from qkilld.model.errors import (
    InvalidArgs,
    MonitorClosed,
    MonitorError,
    MonitorProtocolError,
    MonitorTimeout,
    MonitorUnreachable,
    QkilldError,
)
from qkilld.model.guest import AskingWays, GuestChannels, Identity
from qkilld.model.guest_state import GuestObservation, GuestOrder, KeptMonitor, ShutdownSign
from qkilld.model.text import printable
from qkilld.monitor import disks
from qkilld.monitor.answers import says_powered_off
from qkilld.monitor.channel import MAX_FLOW, MAX_MESSAGE, decode_object
from qkilld.monitor.endpoints import NOT_PASSED, Role, endpoint_at, find_endpoints
from qkilld.monitor.guest_control import GuestControl
from qkilld.monitor.qmp import QmpClient
from qkilld.monitor.reach import ListenerTable, prove, read_process

if TYPE_CHECKING:
    from qkilld.engine.ports import GuestMonitor, Process

T = TypeVar("T")

READ_S: Final = 1.0
"""Timeout for reading the disks of a guest that has no job. Reading usually takes 10 ms."""


class JobMonitors:
    """Implements engine.ports.Monitors. Needs a running loop."""

    def __init__(self, table: ListenerTable, *, enter_netns: bool = False) -> None:
        """`enter_netns`: whether to enter the guests' network namespaces."""
        self._table = table
        self._enters_netns = enter_netns

    def open(
        self,
        process: Process,
        qmp_socket: str,
        callback: Callable[[GuestMonitor | str | Exception], None],
        *,
        kept: KeptMonitor | None = None,
        passed: int | None = None,
        was_asked: bool = False,
        agent_was_open: bool | None = None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> Callable[[], None]:
        tasks = _Tasks()
        untouched = [] if kept is None else [kept.fd]
        untouched += [] if passed is None else [passed]

        async def connect() -> GuestMonitor | str:
            control = None
            if kept is not None:
                untouched.remove(kept.fd)
                control = await self._adopt(process, kept, was_asked, agent_was_open)
                if control is None:
                    on_lost()
            if passed is not None and control is None:
                untouched.remove(passed)
                control = await self._take(process, passed, was_asked, agent_was_open)
            try:
                control = control or await GuestControl.open(
                    process,
                    self._table,
                    qmp_socket=qmp_socket,
                    enter_netns=self._enters_netns,
                    was_asked=was_asked,
                    agent_was_open=agent_was_open,
                )
            except QkilldError as error:
                return printable(str(error))
            finally:
                close_untouched()
            return JobMonitor(control)

        def close_untouched() -> None:
            while untouched:
                close_later(untouched.pop())

        def cancel() -> None:
            tasks.cancel()
            close_untouched()

        tasks.run(connect, callback)
        return cancel

    async def _adopt(
        self, process: Process, kept: KeptMonitor, was_asked: bool, agent_was_open: bool | None
    ) -> GuestControl | None:
        """Use the kept connection; return None if it is no longer usable."""
        try:
            control = await GuestControl.adopt(
                process,
                take_over(socket.socket(fileno=kept.fd)),
                frozenset(kept.own_chardevs),
                self._table,
                was_asked=was_asked,
                agent_was_open=agent_was_open,
            )
        except (MonitorError, OSError) as error:
            note(f"adopting the monitor of process {process.guest.identity.pid}", error)
            return None
        note_once("adopting a stored monitor connection", "it answers out-of-band commands")
        return control

    async def _take(
        self, process: Process, passed: int, was_asked: bool, agent_was_open: bool | None
    ) -> GuestControl | None:
        """Use the connection that a caller passed; return None if it is not usable."""
        try:
            return await GuestControl.take(
                process,
                _socket_of(passed),
                self._table,
                was_asked=was_asked,
                agent_was_open=agent_was_open,
            )
        except (MonitorError, OSError) as error:
            note(f"using the connection passed for process {process.guest.identity.pid}", error)
            return None

    async def check_passed(self, process: Process, passed: int) -> None:
        try:
            with _socket_of(os.dup(passed)) as connection:
                if connection.type != socket.SOCK_STREAM:
                    raise MonitorUnreachable("it is no stream socket")
                await prove(process, connection)
        except (MonitorError, OSError) as error:
            raise InvalidArgs(f"The descriptor does not lead to the monitor: {error}") from None

    def read_rest(self, kept: KeptMonitor) -> frozenset[ShutdownSign]:
        """See engine.ports.Monitors. Skip incomplete messages, because the previous daemon may have
        read their beginning."""
        with take_over(socket.socket(fileno=os.dup(kept.fd))) as connection:
            data = b""
            with ignore("reading the rest of a stored monitor connection", OSError):
                while len(data) < MAX_FLOW:
                    received = connection.recv(MAX_MESSAGE)
                    if not received:
                        break
                    data += received
        for line in data.split(b"\n"):
            with ignore("reading a message of a stored monitor connection", MonitorError):
                if says_powered_off(decode_object(line)):
                    return frozenset({ShutdownSign.POWERED_OFF})
        return frozenset()

    async def check(self, process: Process, qmp_socket: str) -> None:
        """Raise InvalidArgs if the process does not listen at `qmp_socket`."""
        _, listeners, _ = await read_process(process.guest.identity)
        endpoint_at(qmp_socket, listeners)

    async def read_disks(
        self, process: Process, qmp_socket: str, *, files: bool
    ) -> BlockState | None:
        try:
            async with asyncio.timeout(READ_S):
                control = await GuestControl.open(
                    process, self._table, qmp_socket=qmp_socket, enter_netns=self._enters_netns
                )
                try:
                    qmp = control.qmp
                    return await disks.read_state(qmp, files=files) if qmp is not None else None
                finally:
                    control.close()
        except (TimeoutError, QkilldError) as error:
            note(f"looking at the disks of process {process.guest.identity.pid}", error)
            return None

    async def describe(self, process: Process) -> AskingWays:
        """Do not connect, because a monitor serves only one client at a time."""
        try:
            guest_endpoints = find_endpoints(*await read_process(process.guest.identity))
        except MonitorError as error:
            return AskingWays((printable(str(error)),))
        ways = [endpoint.title for endpoint in guest_endpoints.endpoints]
        how = "" if self._enters_netns else f" {NOT_PASSED}"
        ways += [f"{endpoint.title}{how}" for endpoint in guest_endpoints.passable]
        may_work = guest_endpoints.libvirt or guest_endpoints.expected or bool(ways)
        return AskingWays((*ways, *guest_endpoints.obstacles), may_work)

    async def survey(self, identity: Identity) -> GuestChannels:
        """Do not connect, because a monitor serves only one client at a time."""
        try:
            guest_endpoints = find_endpoints(*await read_process(identity))
        except MonitorError as error:
            note_once(f"finding the monitor of process {identity.pid}", error)
            return GuestChannels()
        if guest_endpoints.libvirt:
            return GuestChannels(MonitorKind.LIBVIRT, AgentKind.UNKNOWN)
        monitor = MonitorKind.NONE
        if guest_endpoints.with_role(Role.QMP):
            monitor = MonitorKind.QMP
        elif guest_endpoints.with_role(Role.HMP):
            monitor = MonitorKind.HMP
        agent = AgentKind.PORT if guest_endpoints.with_role(Role.AGENT) else AgentKind.NONE
        return GuestChannels(monitor, agent)


class JobMonitor:
    """Implements engine.ports.GuestMonitor."""

    def __init__(self, control: GuestControl) -> None:
        self._control = control
        self._tasks = _Tasks()
        self._server = disks.ExportServer()
        self._can_have_agent = bool(control.guest_endpoints.with_role(Role.AGENT))

    @property
    def has_agent(self) -> bool:
        port = self._control.last_port
        return self._can_have_agent and port is not None and port.opened and not port.held

    @property
    def reads_disks(self) -> bool:
        return self._control.qmp is not None

    @property
    def lost(self) -> bool:
        return self._control.lost

    @property
    def adopted(self) -> bool:
        return self._control.adopted

    @property
    def own_chardevs(self) -> tuple[str, ...]:
        return tuple(sorted(self._control.own_chardevs))

    def fileno(self) -> int | None:
        qmp = self._control.qmp
        return qmp.fileno() if qmp is not None and qmp.oob and not qmp.closed else None

    def observe(self, callback: Callable[[GuestObservation | Exception], None]) -> None:
        self._tasks.run(self._control.observe, callback)

    def read_rest(self) -> tuple[frozenset[ShutdownSign], bool]:
        all_heard = self._control.read_rest()
        return self._control.signs, all_heard

    def order(self, what: GuestOrder, callback: Callable[[str | Exception], None]) -> None:
        control = self._control
        carry_out = {
            GuestOrder.AGENT: control.ask_agent,
            GuestOrder.BUTTON: control.press,
            GuestOrder.WATCH: control.begin_watch,
            GuestOrder.RESUME: control.resume,
            GuestOrder.WAKE: control.wake,
            GuestOrder.THAW: control.thaw,
            GuestOrder.QUIT: control.quit,
        }[what]

        async def obey() -> str:
            await carry_out()
            return ""

        self._run(obey, callback)

    def read_disks(
        self, callback: Callable[[BlockState | str | Exception], None], *, files: bool = True
    ) -> None:
        async def read() -> BlockState:
            return await disks.read_state(self._qmp(), files=files)

        self._run(read, callback)

    def read_jobs(
        self, callback: Callable[[tuple[BackgroundJob, ...] | str | Exception], None]
    ) -> None:
        async def read() -> tuple[BackgroundJob, ...]:
            return await disks.read_jobs(self._qmp())

        self._run(read, callback)

    def stop_and_flush(
        self,
        of: Sequence[GuestDisk],
        callback: Callable[[tuple[FlushResult, ...] | str | Exception], None],
        *,
        stop: bool,
        timeout: int,
    ) -> None:
        until = time.monotonic() + timeout / USEC_PER_SEC

        async def carry_out() -> tuple[FlushResult, ...]:
            qmp = self._qmp()
            if stop:
                await disks.stop_processors(qmp, timeout_s=until - time.monotonic())
            names = [(disk.node, disk.title) for disk in of]
            timeout_s = max(until - time.monotonic(), 0.1)
            return await disks.flush(qmp, names, self._server, timeout_s=timeout_s)

        self._run(carry_out, callback)

    def flush_running(
        self,
        of: Sequence[GuestDisk],
        callback: Callable[[tuple[FlushResult, ...] | Exception], None],
        *,
        timeout: int,
    ) -> None:
        until = time.monotonic() + timeout / USEC_PER_SEC

        async def carry_out() -> tuple[FlushResult, ...]:
            results: list[FlushResult] = []
            with contextlib.suppress(MonitorError):
                for disk in of:
                    remaining_s = max(until - time.monotonic(), 0.0)
                    one = await disks.flush_by_name(self._qmp(), disk, timeout_s=remaining_s)
                    results.append(one)
            return tuple(results)

        self._tasks.run(carry_out, callback)

    def resume_guest(self, callback: Callable[[str | Exception], None]) -> None:
        async def resume() -> str:
            await disks.resume(self._qmp(), self._server)
            return ""

        self._tasks.interrupt()
        self._run(resume, callback)

    def query_yank(
        self, callback: Callable[[tuple[YankInstance, ...] | str | Exception], None]
    ) -> None:
        self._run(self._control.query_yank, callback)

    def yank(
        self, instances: Sequence[YankInstance], callback: Callable[[str | Exception | None], None]
    ) -> None:
        async def cut_off() -> str | None:
            try:
                await self._control.yank(instances)
            except (MonitorClosed, MonitorTimeout, MonitorProtocolError):
                return None
            return ""

        self._run(cut_off, callback)

    def close(self) -> None:
        """Close the monitor. May be called twice, and from a callback."""
        self._tasks.cancel()
        self._control.close()

    def _run(
        self, work: Callable[[], Awaitable[T]], callback: Callable[[T | str | Exception], None]
    ) -> None:
        """Call back with the result of `work`, or with the reason why the monitor failed."""

        async def carry_out() -> T | str:
            try:
                return await work()
            except MonitorError as error:
                return printable(str(error)) or "it was refused"

        self._tasks.run(carry_out, callback)

    def _qmp(self) -> QmpClient:
        """Raises MonitorUnreachable."""
        if self._control.qmp is None:
            raise MonitorUnreachable("The human monitor does not report whether a flush failed")
        return self._control.qmp


def _socket_of(descriptor: int) -> socket.socket:
    """Return the socket. If the descriptor is not a socket, close it and raise OSError."""
    try:
        return take_over(socket.socket(fileno=descriptor))
    except OSError:
        close_later(descriptor)
        raise


async def _call_back(
    work: Callable[[], Awaitable[T]], callback: Callable[[T | Exception], None]
) -> None:
    """Call back with the result of `work`, or with the exception that a bug in `work` has
    caused."""
    result: T | Exception
    try:
        result = await work()
    except Exception as error:
        result = error
    callback(result)


class _Tasks:
    """Keeps references to tasks until they end."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._cancelled = False

    def run(
        self, work: Callable[[], Awaitable[T]], callback: Callable[[T | Exception], None]
    ) -> None:
        """Start a task, unless `cancel` was called. The task itself calls `work`: if `run`
        called it, cancelling the task before it starts would leave a coroutine that is never
        awaited."""
        if self._cancelled:
            return
        task = asyncio.get_running_loop().create_task(_call_back(work, callback))
        self._running.add(task)
        task.add_done_callback(self._end_task)

    def cancel(self) -> None:
        """Cancel all tasks except the calling task, which is about to end. Later calls of `run`
        start no task."""
        self._cancelled = True
        self.interrupt()

    def interrupt(self) -> None:
        """Cancel all tasks except the calling task. New tasks can still be started."""
        current = asyncio.current_task()
        for task in list(self._running):
            if task is not current:
                task.cancel()

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # This is a bug in qkilld. The loop's handler reports it, and the job waits until its
            # deadline.
            task.get_loop().call_exception_handler(
                {"message": "talking to a monitor", "exception": error, "task": task}
            )
