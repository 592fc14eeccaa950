"""The command terminate, with targets or --all."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, Self

from qkilld.bus.client import ManagerProxy
from qkilld.bus.connection import Connection
from qkilld.ctl.follow import Display, display_on, follow
from qkilld.ctl.libvirt_guest import shut_down_by_libvirt
from qkilld.ctl.listing import MAX_CALLS
from qkilld.ctl.session import Session, error_as_json, explain, open_connection
from qkilld.ctl.targets import GuestRow, Resolver, TargetKind, guest_rows, is_own, labels, parse
from qkilld.ctl.varlink_client import VarlinkFailure, VarlinkStream, monitor_to_pass, order_of
from qkilld.debug_log import ignore
from qkilld.model.bus_address import BusAddress
from qkilld.model.constants import JOB_PATH_PREFIX, ExitCode, Flag
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import BusError, Failed, NoSuchUnit, QkilldError
from qkilld.model.exits import INTERRUPTED, exit_code_of, worst
from qkilld.model.job_status import JobStatus, ending, label, receipt_as_json
from qkilld.model.text import printable
from qkilld.model.varlink_state import receipt_of, status_of
from qkilld.monitor.libvirt import domain_of

WAITS_PER_CONNECTION: Final = 64
"""The maximum number of Wait calls on one connection: half of the 128 pending calls that the system
bus allows."""


@dataclass(slots=True)
class TargetOutcome:
    text: str
    pid: int | None = None
    name: str = ""
    job: str | None = None
    status: JobStatus | None = None
    """The job's status just after its start."""
    result: str | None = None
    receipt: dict[str, Any] | None = None
    error: QkilldError | None = None
    interrupted: bool = False

    @classmethod
    def of_guest(cls, guest: GuestRow) -> Self:
        return cls(str(guest.pid), guest.pid, guest.name)

    @property
    def title(self) -> str:
        return self.text if self.pid is None else label(self.pid, self.name)

    @property
    def job_target(self) -> str:
        """The job as a target of qkillctl, such as `job:7`."""
        return "job:" + (self.job or "").removeprefix(JOB_PATH_PREFIX)

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return INTERRUPTED
        if self.error is not None:
            return self.error.exit_code
        if self.result is None:
            return ExitCode.OK
        return exit_code_of(self.result, str((self.receipt or {}).get("error-name", "")))

    def as_json(self, bus: BusAddress) -> dict[str, Any]:
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
class TerminateOptions:
    flags: Flag
    wait: bool
    job_options: dict[str, int | str]
    """The options of TerminateWithOptions, except start-time."""


async def terminate(
    session: Session, outcomes: list[TargetOutcome], options: TerminateOptions
) -> int:
    """Start a job for every target, and wait for all jobs if requested."""
    resolver = Resolver(session.manager)

    async def start(outcome: TargetOutcome) -> None:
        target = parse(outcome.text)
        try:
            process = await resolver.pin(target)
        except NoSuchUnit:
            if target.kind is not TargetKind.UNIT or options.job_options:
                raise
            # Let the daemon ask systemd, which knows aliases of units (Alias=), and whose errors
            # explain more.
            outcome.job = await session.manager.terminate_unit(target.value, options.flags)
            return
        outcome.pid, outcome.name = process.pid, process.name
        job_options = dict(options.job_options)
        if process.start_time is not None:
            job_options["start-time"] = process.start_time
        flags = options.flags
        if Flag.POWERDOWN in flags:
            span = job_options.get("powerdown-usec")
            shutdown = await shut_down_by_libvirt(
                session,
                process.pid,
                wait=options.wait,
                span=span if isinstance(span, int) else None,
                only=bool(job_options.get("powerdown-only")),
            )
            if shutdown.result:
                outcome.result, outcome.receipt = shutdown.result, shutdown.receipt
                return
            if shutdown.was_asked:
                flags &= ~Flag.POWERDOWN
        outcome.job = await _terminate_with_monitor(session, process.pid, flags, job_options)
        if outcome.job is None:
            outcome.job = await session.manager.terminate(process.pid, flags, job_options)

    return await carry_out(session, outcomes, options, start)


async def _terminate_with_monitor(
    session: Session, pid: int, flags: Flag, options: dict[str, int | str]
) -> str | None:
    """Start a job over Varlink, and pass the daemon a connection to the guest's monitor. Return the
    job's path. Return None if the caller must use D-Bus, because NOWAIT or FIXED is set, passing
    the monitor failed, or the daemon can connect to the monitor itself."""
    if not session.varlink or flags & (Flag.NOWAIT | Flag.FIXED):
        return None
    if (monitor := await monitor_to_pass(pid)) is None:
        return None
    order = order_of(flags, options) | {"pid": pid, "monitorIndex": 0}
    with monitor, ignore("passing a monitor on Varlink", VarlinkFailure):
        stream = await VarlinkStream.open(session.varlink, "Terminate", order, passed=monitor)
        try:
            if (reply := await stream.next()) is not None and "state" in reply:
                return f"{JOB_PATH_PREFIX}{reply['state']['job']}"
        finally:
            stream.close()
    return None


async def terminate_all(session: Session, options: TerminateOptions) -> int:
    """Stop every guest on this host that the daemon lets the caller stop. If guests of libvirt are
    to be asked, stop only the caller's own guests."""
    before = await guest_rows(session.manager)
    uid = session.connection.uid
    if Flag.POWERDOWN in options.flags and any(domain_of(guest.pid) for guest in before):
        return await _terminate_each(session, before, options)
    stream, statuses = await _terminate_all_on_varlink(session, options)
    if stream is not None:
        jobs = {status.pid: status.path for status in statuses}
    else:
        jobs = dict(await session.manager.terminate_all(options.flags, options.job_options))
    after = await guest_rows(session.manager)
    others = [guest for guest in after if guest in before and guest.pid not in jobs]
    names = {guest.pid: guest.name for guest in before}
    outcomes = [
        TargetOutcome(str(pid), pid, names.get(pid, ""), path) for pid, path in jobs.items()
    ]
    outcomes += [TargetOutcome.of_guest(guest) for guest in others if is_own(guest, uid)]
    _report_foreign(session, others)
    if not outcomes and not session.json:
        session.output.line("No QEMU guests to stop.")

    async def start(outcome: TargetOutcome) -> None:
        if outcome.job is None:
            raise Failed("the guest was not stopped; see `journalctl -u qkilld`")

    for outcome in outcomes:
        outcome.status = next((one for one in statuses if one.path == outcome.job), None)
    try:
        return await carry_out(session, outcomes, options, start, stream)
    finally:
        if stream is not None:
            stream.close()


async def _terminate_all_on_varlink(
    session: Session, options: TerminateOptions
) -> tuple[VarlinkStream | None, list[JobStatus]]:
    """Stop and follow all guests with one call. The stream is None if D-Bus must be used, because
    the Varlink socket is unknown, the call failed, no job is to be followed (NOWAIT, or no --wait),
    or polkit may have to ask (only on the system bus, and not for root)."""
    root = os.geteuid() == 0 or session.bus.user
    if not session.varlink or not options.wait or not root or Flag.NOWAIT in options.flags:
        return None, []
    order = order_of(options.flags, options.job_options)
    stream = None
    with ignore("stopping all guests on Varlink", VarlinkFailure):
        stream = await VarlinkStream.open(session.varlink, "TerminateAll", order, more=True)
        reply = await stream.next() or {}
        return stream, [_status_on_bus(state) for state in reply.get("states") or ()]
    if stream is not None:
        stream.close()
    return None, []


def _status_on_bus(state: dict[str, Any]) -> JobStatus:
    return replace(status_of(state), path=f"{JOB_PATH_PREFIX}{state['job']}")


async def _terminate_each(
    session: Session, guests: list[GuestRow], options: TerminateOptions
) -> int:
    """Stop only the caller's own guests, with one call for each. A call for all guests would send
    SIGTERM to libvirt's guests, because the daemon cannot ask them."""
    _report_foreign(session, guests)
    own = [guest for guest in guests if is_own(guest, session.connection.uid)]
    return await terminate(session, [TargetOutcome.of_guest(guest) for guest in own], options)


def _report_foreign(session: Session, guests: list[GuestRow]) -> None:
    if foreign := [guest for guest in guests if not is_own(guest, session.connection.uid)]:
        session.output.error(f"left alone, as they are not yours: {labels(foreign)}")


async def carry_out(
    session: Session,
    outcomes: list[TargetOutcome],
    options: TerminateOptions,
    start: Callable[[TargetOutcome], Awaitable[None]],
    stream: VarlinkStream | None = None,
) -> int:
    """Call `start` with the outcome of each target, and show the outcomes. `start` sets the
    outcome's job or, if the target needs no job, the outcome's result. `stream`: the replies of the
    Varlink call that started the jobs, if any."""

    async def begin(outcome: TargetOutcome) -> None:
        await start(outcome)
        if outcome.result is not None:
            # The guest needed no job.
            if not session.json:
                text = ending(outcome.result, outcome.receipt or {})
                session.output.line(f"{outcome.title}: {text}")
            return
        assert outcome.job is not None
        if outcome.status is not None:
            return
        with ignore(f"reading {outcome.job}", QkilldError):
            # Ignore a failure: the job has started, and this status is only for messages.
            outcome.status = await session.manager.job(outcome.job).status()
            outcome.pid, outcome.name = outcome.status.pid, outcome.status.name

    try:
        await each(session, outcomes, begin)
        started = [one for one in outcomes if one.error is None and one.job is not None]
        if options.wait or Flag.NOWAIT in options.flags:
            brief = [outcome for outcome in started if _ends_at_once(outcome)]
            await _follow_all(session, started if options.wait else brief, stream)
        if not options.wait and not session.json:
            for outcome in started:
                if outcome.result is None:
                    session.output.line(_started_line(outcome, session.command))
    except asyncio.CancelledError:
        _interrupt(session, outcomes)
    return finish(session, outcomes)


def finish(session: Session, outcomes: list[TargetOutcome]) -> int:
    """With --json, print the document. Return the worst exit code."""
    if session.json:
        session.output.json([outcome.as_json(session.bus) for outcome in outcomes])
    return worst([outcome.exit_code for outcome in outcomes])


async def each(
    session: Session, outcomes: list[TargetOutcome], act: Callable[[TargetOutcome], Awaitable[None]]
) -> None:
    """Act on all targets concurrently. An error is printed and stored in the target's outcome, and
    does not affect the other targets."""
    slots = asyncio.Semaphore(MAX_CALLS)

    async def one(outcome: TargetOutcome) -> None:
        try:
            async with slots:
                await act(outcome)
        except QkilldError as error:
            outcome.error = error
            _print_error(session, outcome)

    await asyncio.gather(*(one(outcome) for outcome in outcomes))


async def _follow_all(
    session: Session, outcomes: list[TargetOutcome], stream: VarlinkStream | None = None
) -> None:
    if not outcomes:
        return

    async def one(outcome: TargetOutcome, connection: Connection, display: Display) -> None:
        assert outcome.job is not None
        try:
            job = ManagerProxy(connection).job(outcome.job)
            outcome.result, outcome.receipt = await follow(job, display)
        except QkilldError as error:
            outcome.error = _fate_unknown(outcome, error)
        else:
            display.show_end(
                outcome.job, f"{outcome.title}: {ending(outcome.result, outcome.receipt)}"
            )

    async def batch(part: list[TargetOutcome], display: Display, first: bool) -> None:
        try:
            async with contextlib.AsyncExitStack() as stack:
                connection = session.connection
                if not first:
                    connection = await stack.enter_async_context(open_connection(session.bus))
                await asyncio.gather(*(one(outcome, connection, display) for outcome in part))
        except BusError as error:
            for outcome in part:
                outcome.error = _fate_unknown(outcome, error)

    try:
        async with display_on(session.output, quiet=session.json) as display:
            if stream is not None:
                await _follow_stream(stream, outcomes, display)
            # Follow the other jobs on D-Bus. If the daemon exited, its successor continues them.
            rest = [outcome for outcome in outcomes if outcome.result is None]
            await asyncio.gather(
                *(
                    batch(rest[start : start + WAITS_PER_CONNECTION], display, start == 0)
                    for start in range(0, len(rest), WAITS_PER_CONNECTION)
                )
            )
    finally:
        # Print the errors last, because a live line would overwrite them.
        for outcome in outcomes:
            _print_error(session, outcome)


async def _follow_stream(
    stream: VarlinkStream, outcomes: list[TargetOutcome], display: Display
) -> None:
    """Follow the jobs of one call until its last reply."""
    by_path = {outcome.job: outcome for outcome in outcomes}
    for outcome in outcomes:
        if outcome.status is not None:
            display.show(outcome.status)
    with ignore("following jobs on Varlink", VarlinkFailure):
        while (reply := await stream.next()) is not None:
            if (state := reply.get("state")) is None:
                continue
            status = _status_on_bus(state)
            ended = by_path.get(status.path)
            if (receipt := reply.get("receipt")) is None or ended is None:
                display.show(status)
                continue
            ended.result, ended.receipt = status.result, receipt_of(receipt)
            display.show_end(status.path, f"{ended.title}: {ending(ended.result, ended.receipt)}")


def _print_error(session: Session, outcome: TargetOutcome) -> None:
    if outcome.error is not None:
        text = explain(outcome.error, session.bus)
        # If the target was not found, the error text may already contain it.
        target = printable(outcome.text)
        is_named = outcome.pid is None and (f'"{target}"' in text or f" {target}: " in text)
        session.output.error(text if is_named else f"{outcome.title}: {text}")


def _fate_unknown(outcome: TargetOutcome, error: QkilldError) -> BusError:
    return BusError(
        f"{outcome.job_target} could not be followed to its end: {error}. The guest may still be "
        "running, and the job's result is unknown: see `qkillctl list`"
    )


def _ends_at_once(outcome: TargetOutcome) -> bool:
    """Return whether the job has NOWAIT. If the call has joined an older job, that job may
    lack NOWAIT."""
    return outcome.status is not None and outcome.status.unsupervised


def _started_line(outcome: TargetOutcome, command: str) -> str:
    status = outcome.status
    if status is not None and status.result:
        return (
            f"{outcome.title}: job {status.id} ({outcome.job}) has ended already: {status.result}"
        )
    doing = "would stop it, but is held" if status is not None and status.held else "is stopping it"
    return (
        f"{outcome.title}: {outcome.job} {doing}. Follow the job with "
        f"`{command} status {outcome.job_target}`, cancel it with "
        f"`{command} cancel {outcome.job_target}`"
    )


def _interrupt(session: Session, outcomes: list[TargetOutcome]) -> None:
    """Handle Ctrl-C: print which jobs continue."""
    for outcome in outcomes:
        if outcome.error is not None or outcome.result is not None:
            continue
        outcome.interrupted = True
        if outcome.job is None:
            text = f"a job may have been started: see `{session.command} jobs`"
        else:
            text = (
                f"{outcome.job_target} continues without this program. "
                f"Cancel it with `{session.command} cancel {outcome.job_target}`"
            )
        session.output.error(f"interrupted: {outcome.title}: {text}")
