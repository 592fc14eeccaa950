"""The command that stops guests: terminate."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from qkilld.bus.client import Manager
from qkilld.bus.connection import Connection
from qkilld.ctl.commands import MAX_CALLS
from qkilld.ctl.follow import Display, display_on, follow
from qkilld.ctl.session import Bus, Session, error_as_json, explain, open_connection
from qkilld.ctl.targets import Kind, Resolver, parse
from qkilld.model.errors import BusError, NoSuchUnit, QkilldError
from qkilld.model.exits import INTERRUPTED, exit_code_of, worst
from qkilld.model.jobview import JobView, ending, label, receipt_as_json
from qkilld.model.words import JOB_PATH_PREFIX, ExitCode, Flag

WAITS_PER_CONNECTION: Final = 64
"""The system bus allows 128 unanswered calls for each connection."""


@dataclass(slots=True)
class Order:
    """One target of a command, and what has become of it."""

    text: str
    pid: int | None = None
    name: str = ""
    job: str | None = None
    view: JobView | None = None
    """The job as it was right after its start."""
    result: str | None = None
    receipt: dict[str, Any] | None = None
    error: QkilldError | None = None
    interrupted: bool = False

    @property
    def title(self) -> str:
        return self.text if self.pid is None else label(self.pid, self.name)

    @property
    def job_target(self) -> str:
        """The job as a target of qkillctl: `job:7`."""
        return "job:" + (self.job or "").removeprefix(JOB_PATH_PREFIX)

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return INTERRUPTED
        if self.error is not None:
            return self.error.exit_code
        return ExitCode.OK if self.result is None else exit_code_of(self.result)

    def as_json(self, bus: Bus) -> dict[str, Any]:
        return {
            "target": self.text,
            "pid": self.pid,
            "job": self.job,
            "result": self.result,
            "receipt": None if self.receipt is None else receipt_as_json(self.receipt),
            "error": None if self.error is None else error_as_json(self.error, bus),
            "exit_code": int(self.exit_code),
        }


@dataclass(frozen=True, slots=True)
class How:
    """The options of terminate."""

    flags: Flag
    wait: bool
    options: dict[str, int | str]
    """As for TerminateWithOptions, without start-time."""


async def terminate(session: Session, orders: list[Order], how: How) -> int:
    """Start a job for every target, then, where that is wanted, wait for all of them at once."""
    resolver = Resolver(session.manager)

    async def start(order: Order) -> None:
        target = parse(order.text)
        try:
            found = await resolver.pin(target)
        except NoSuchUnit:
            if target.kind is not Kind.UNIT or how.options:
                raise
            # It may be another name of the unit (Alias=), and systemd says best what is wrong.
            order.job = await session.manager.terminate_unit(target.value, how.flags)
            return
        order.pid, order.name = found.pid, found.name
        options = dict(how.options)
        if found.start_time is not None:
            options["start-time"] = found.start_time
        order.job = await session.manager.terminate(found.pid, how.flags, options)

    return await carry_out(session, orders, how, start)


async def carry_out(
    session: Session,
    orders: list[Order],
    how: How,
    start: Callable[[Order], Awaitable[None]],
) -> int:
    """`start` each order, which gives it its job, and show what becomes of them."""

    async def begin(order: Order) -> None:
        await start(order)
        assert order.job is not None
        with contextlib.suppress(QkilldError):
            # It has started, and that is what counts; this is for the lines about it.
            order.view = JobView(order.job, await session.manager.job(order.job).properties())
            order.pid, order.name = order.view.pid, order.view.name

    try:
        await each(session, orders, begin)
        started = [order for order in orders if order.error is None]
        if how.wait or Flag.NOWAIT in how.flags:
            await _follow_all(session, [o for o in started if how.wait or _ends_at_once(o)])
        if not how.wait and not session.json:
            for order in started:
                if order.result is None:
                    session.output.line(_started_line(order, session.bus))
    except asyncio.CancelledError:
        _interrupt(session, orders)
    return finish(session, orders)


def finish(session: Session, orders: list[Order]) -> int:
    """Print the JSON document where one is wanted, and return the exit code of the whole."""
    if session.json:
        session.output.json([order.as_json(session.bus) for order in orders])
    return worst([order.exit_code for order in orders])


async def each(
    session: Session, orders: list[Order], act: Callable[[Order], Awaitable[None]]
) -> None:
    """Act on all at once. An error is noted with its order and printed, and stops no other."""
    slots = asyncio.Semaphore(MAX_CALLS)

    async def one(order: Order) -> None:
        try:
            async with slots:
                await act(order)
        except QkilldError as error:
            order.error = error
            _print_error(session, order)

    await asyncio.gather(*(one(order) for order in orders))


async def _follow_all(session: Session, orders: list[Order]) -> None:
    if not orders:
        return

    async def one(order: Order, connection: Connection, display: Display) -> None:
        assert order.job is not None
        try:
            job = Manager(connection).job(order.job)
            order.result, order.receipt = await follow(job, display)
        except QkilldError as error:
            order.error = _fate_unknown(order, error)
        else:
            display.ended(order.job, f"{order.title}: {ending(order.result, order.receipt)}")

    async def batch(part: list[Order], display: Display, first: bool) -> None:
        try:
            async with contextlib.AsyncExitStack() as stack:
                connection = session.connection
                if not first:
                    connection = await stack.enter_async_context(open_connection(session.bus))
                await asyncio.gather(*(one(order, connection, display) for order in part))
        except BusError as error:
            for order in part:
                order.error = _fate_unknown(order, error)

    try:
        async with display_on(session.output, quiet=session.json) as display:
            await asyncio.gather(
                *(
                    batch(orders[start : start + WAITS_PER_CONNECTION], display, start == 0)
                    for start in range(0, len(orders), WAITS_PER_CONNECTION)
                )
            )
    finally:
        # Not earlier: a live line would be drawn over it.
        for order in orders:
            _print_error(session, order)


def _print_error(session: Session, order: Order) -> None:
    if order.error is not None:
        session.output.error(f"{order.title}: {explain(order.error, session.bus)}")


def _fate_unknown(order: Order, error: QkilldError) -> BusError:
    return BusError(
        f"{order.job_target} could not be followed to its end: {error}. The guest may still be "
        "running, and what becomes of the job is not known: see `qkillctl list`"
    )


def _ends_at_once(order: Order) -> bool:
    """Whether it is a job of NOWAIT, and not one that was joined and takes its time."""
    return order.view is not None and order.view.unsupervised


def _started_line(order: Order, bus: Bus) -> str:
    view = order.view
    if view is not None and view.result:
        return f"{order.title}: job {view.id} ({order.job}) has ended already: {view.result}"
    return (
        f"{order.title}: {order.job} is stopping it. Follow it with "
        f"`{bus.command} status {order.job_target}`, call it off with "
        f"`{bus.command} cancel {order.job_target}`"
    )


def _interrupt(session: Session, orders: list[Order]) -> None:
    """Ctrl-C: say what goes on without this program."""
    for order in orders:
        if order.error is not None or order.result is not None:
            continue
        order.interrupted = True
        if order.job is None:
            text = f"whether a job was started is not known: see `{session.bus.command} jobs`"
        else:
            text = (
                f"{order.job_target} goes on without this program. "
                f"Call it off with `{session.bus.command} cancel {order.job_target}`"
            )
        session.output.error(f"interrupted: {order.title}: {text}")
