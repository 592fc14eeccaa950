"""The daemon's methods, for calls over D-Bus and Varlink.

Each method that acts on a process checks both the process and the caller. No argument is trusted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar
from weakref import WeakValueDictionary

from qkilld.decision.early_flush import CACHE_UNSAFE_UNKNOWN, may_hang
from qkilld.decision.flush_plan import HUMAN_MONITOR_ALONE, notes_of_plan
from qkilld.decision.ladder import policy_for
from qkilld.decision.plan import Plan, make_plan
from qkilld.decision.verdict import Assessment, assess
from qkilld.engine import events
from qkilld.engine.access import Access, CheckedProcess, retry_until
from qkilld.engine.checks import (
    action_for,
    check_answer,
    check_same,
    details_of_all,
    is_free,
)
from qkilld.engine.coalesce import SharedRun
from qkilld.engine.fair_shares import user_of
from qkilld.engine.job import Job
from qkilld.engine.long_replies import Pace
from qkilld.engine.registry import Registry
from qkilld.engine.unit_guest import check_unit_name, choose_guest
from qkilld.foreign_descriptors import close_later
from qkilld.model.access import Answer, PolkitAction
from qkilld.model.constants import INFINITY, KNOWN_FLAGS, Flag, MonitorKind
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import BusError, Failed, InvalidArgs, NoSuchUnit, QkilldError
from qkilld.model.guest import AskingWays, Guest, Identity, Unidentified
from qkilld.model.guest_state import GuestOrder
from qkilld.model.job import Request
from qkilld.model.policy import JOB_SPANS, Config, is_qemu
from qkilld.model.sample import Sample
from qkilld.model.text import MAX_TEXT, printable
from qkilld.model.timespan import from_call

if TYPE_CHECKING:
    from qkilld.engine.ports import Caller, Clock, Host, Monitors, Process, Sampler, Units, Watch

Item = TypeVar("Item")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Option:
    """An option of TerminateWithOptions as received: its D-Bus type and its value."""

    signature: str
    value: object


INSPECT_INTERVAL_S: Final = 0.2
INSPECT_TIMEOUT_S: Final = 2.0
MAX_AT_ONCE: Final = 16
"""The maximum number of processes that one user's TerminateAll calls open at a time. Each can
occupy a thread, and opening many at a time would delay the calls of other users."""
_HELP: Final = {
    "resume": GuestOrder.RESUME,
    "wake": GuestOrder.WAKE,
    "thaw": GuestOrder.THAW,
}
OPTION_TYPES: Final = {
    "start-time": "t",
    "reason": "s",
    **{span.bus_option: "t" for span in JOB_SPANS},
    "qmp-socket": "s",
    "powerdown-max-usec": "t",
    **dict.fromkeys(("powerdown-as-configured", "powerdown-only", "resume", "wake", "thaw"), "b"),
}


@dataclass(frozen=True, slots=True)
class Inspection:
    guest: Guest
    evidence: Assessment | None
    """None if no sample arrived in time."""
    job: Job | None
    """The running job, if there is one."""


class Service:
    def __init__(
        self,
        config: Config,
        host: Host,
        registry: Registry,
        clock: Clock,
        sampler: Sampler | None = None,
        units: Units | None = None,
        monitors: Monitors | None = None,
    ) -> None:
        self.config = config
        self.registry = registry
        self._host = host
        self._access = Access(config, host, lambda key: registry.running_for(key) is not None)
        self.units = units
        """None if there is no bus. Each new connection to a bus sets it again."""
        self._clock = clock
        self._sampler = sampler
        self._monitors = monitors
        self._guests = SharedRun(self._find_guests)
        self._slots: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()
        """A semaphore of MAX_AT_ONCE for each calling user. A semaphore is kept while calls use
        it."""

    @property
    def monitors(self) -> Monitors | None:
        return self._monitors

    async def terminate(
        self,
        pid: int,
        flags: int,
        options: Mapping[str, Option],
        caller: Caller,
        *,
        passed: int | None = None,
    ) -> Job:
        """Start the job that stops a process, or join the running one.

        `passed` is a connection that the caller has made to the monitor. It is closed if it is not
        used. Raises InvalidArgs, NoSuchProcess, NotQemu, ProcessChanged, AccessDenied, Busy,
        Failed.
        """
        try:
            flag_set = _parse_flags(flags)
            given = _parse_options(options, flag_set)
            start_time = _number(given, "start-time")
            checked = await self._access.open_checked(pid, caller, flag_set, start_time=start_time)
            await self._check_monitor(checked.process, given, passed)
            job = self._start(checked, flag_set, given, passed)
        except BaseException:
            if passed is not None:
                close_later(passed)
            raise
        await self.keep(job)
        return job

    async def terminate_unit(self, name: str, flags: int, caller: Caller) -> Job:
        """Stop the main process of a unit or, if that is not QEMU, the only QEMU process in it.

        Control groups show which processes are in the unit. systemd reports whether the unit
        exists, its primary name and its main process. Raises what `terminate` raises, and
        NoSuchUnit.
        """
        flag_set = _parse_flags(flags)
        check_unit_name(name)
        facts, known = None, True
        if self.units is not None:
            try:
                facts = await self.units.unit(name)
            except NoSuchUnit:
                known = False
            except (BusError, Failed):
                pass  # systemd does not answer. The control groups are enough to find the guest.
        guest = choose_guest(name, facts, *await self._guests.get(), known=known)
        checked = await self._access.open_checked(
            guest.identity.pid,
            caller,
            flag_set,
            start_time=guest.identity.start_time,
            unit=guest.label.unit,
        )
        job = self._start(checked, flag_set, {})
        await self.keep(job)
        return job

    async def terminate_all(
        self, flags: int, options: Mapping[str, Option], caller: Caller
    ) -> list[Job]:
        """Stop every QEMU process that the caller may stop.

        polkit is asked once, and only if there are guests of other users. Guests that cannot be
        stopped are reported in the journal, and so are processes that may be guests. Raises
        InvalidArgs and Busy, and AccessDenied if there are guests but the caller may stop none of
        them.
        """
        flag_set = _parse_flags(flags)
        given = _parse_options(options, flag_set)
        _check_for_many(given)
        uid = await caller.uid()
        guests, unidentified = await self._guests.get()
        own = [guest for guest in guests if is_free(uid, guest.identity)]
        answer = Answer.DENIED
        if len(own) < len(guests):
            answer = await caller.may(action_for(flag_set), details_of_all(flag_set), ask=True)
            if not own:
                check_answer(answer, "The QEMU guests of this host are")
        wanted = guests if answer is Answer.GRANTED else own
        every = answer is Answer.GRANTED or uid == 0
        if unknown := [each for each in unidentified if every or each.uid == uid]:
            self.registry.note(events.not_identified(unknown, uid))

        until = retry_until()

        async def one(guest: Guest) -> Job | None:
            pid, start_time = guest.identity.key
            try:
                checked = await self._access.open_checked(
                    pid, caller, flag_set, start_time=start_time, answer=answer, until=until
                )
                return self._start(checked, flag_set, given)
            except QkilldError as error:
                self.registry.note(events.not_stopped(guest, uid, error))
            return None

        results = await self._for_each(wanted, one, uid)
        jobs = [job for job in results if job is not None]
        await self.keep(*jobs)
        return jobs

    async def terminate_each(
        self,
        processes: Sequence[tuple[int, int | None]],
        flags: int,
        options: Mapping[str, Option],
        caller: Caller,
    ) -> list[Job | QkilldError]:
        """Start a job for each of these processes. Each is given by its pid and, if known, its
        start time. Return a job or an error for each. Raises InvalidArgs."""
        flag_set = _parse_flags(flags)
        given = _parse_options(options, flag_set)
        _check_for_many(given)

        until = retry_until()

        async def one(process: tuple[int, int | None]) -> Job | QkilldError:
            pid, start_time = process
            try:
                checked = await self._access.open_checked(
                    pid, caller, flag_set, start_time=start_time, until=until
                )
                return self._start(checked, flag_set, given)
            except QkilldError as error:
                return error

        results = await self._for_each(processes, one, await caller.uid())
        await self.keep(*(job for job in results if isinstance(job, Job)))
        return results

    async def _for_each(
        self, items: Sequence[Item], act: Callable[[Item], Awaitable[T]], uid: int
    ) -> list[T]:
        """Call `act` for all items, for at most MAX_AT_ONCE at a time; return the results. There is
        no asyncio task for each item, because a user can have tens of thousands of processes."""
        slots, results = self._slots_of(uid), dict[int, T]()
        waiting = iter(enumerate(items))

        async def work() -> None:
            for index, item in waiting:
                async with slots:
                    results[index] = await act(item)
                await asyncio.sleep(0)

        await asyncio.gather(*(work() for _ in range(min(MAX_AT_ONCE, len(items)))))
        return [results[index] for index in range(len(items))]

    def _slots_of(self, uid: int) -> asyncio.Semaphore:
        """Return the semaphore that all calls of a user share."""
        user = user_of(uid)
        slots = self._slots.get(user)
        if slots is None:
            slots = self._slots[user] = asyncio.Semaphore(MAX_AT_ONCE)
        return slots

    async def cancel(self, job: Job, caller: Caller) -> None:
        """Cancel a job; do nothing if it has ended. Raises AccessDenied, Busy."""
        await self._access.permit(caller, job, PolkitAction.TERMINATE)
        job.cancel()
        await self.keep(job)

    async def extend(self, job: Job, usec: int, caller: Caller) -> None:
        """See Job.extend. `extend`, `hold`, `release` and `force` also raise AccessDenied and
        Busy."""
        usec = from_call(usec)
        within = self._clock.now() + usec <= job.owner_limit
        by = await self._access.permit(caller, job, PolkitAction.TERMINATE, owner=within)
        job.extend(usec, by)
        await self.keep(job)

    async def hold(self, job: Job, caller: Caller) -> None:
        job.hold(await self._access.permit(caller, job, PolkitAction.TERMINATE))
        await self.keep(job)

    async def release(self, job: Job, caller: Caller) -> None:
        job.release(await self._access.permit(caller, job, PolkitAction.TERMINATE))
        await self.keep(job)

    async def force(self, job: Job, caller: Caller) -> None:
        job.force(await self._access.permit(caller, job, PolkitAction.FORCE))
        await self.keep(job)

    async def inspect(self, pid: int, caller: Caller) -> Inspection:
        """Return the identity of a process, and the evidence about it. Sends no signal.

        Raises InvalidArgs, NoSuchProcess, NotQemu, ProcessChanged, AccessDenied, Busy, Failed.
        """
        process, _ = await self._access.open_checked(
            pid, caller, Flag(0), action=PolkitAction.INSPECT
        )
        try:
            job = self.registry.running_for(process.guest.identity.key)
            evidence = job.assessment if job is not None else None
            return Inspection(process.guest, evidence or await self._sample_twice(process), job)
        finally:
            process.close()

    async def plan(
        self, pid: int, flags: int, options: Mapping[str, Option], caller: Caller
    ) -> tuple[Guest, Plan]:
        """Return what `terminate` would do, without doing it. Raises what `terminate` raises."""
        flag_set = _parse_flags(flags)
        given = _parse_options(options, flag_set)
        inspection = await self.inspect(pid, caller)
        identity = inspection.guest.identity
        flag_set = self._as_configured(flag_set, given, inspection.guest)
        ways = await self._ways(identity, flag_set)
        if (start_time := _number(given, "start-time")) is not None:
            check_same(identity, start_time)
        configured = self.config.policy_for(inspection.guest.label.name)
        policy = policy_for(flag_set, configured, _spans(given))
        request = _request(flag_set, given, identity.uid)
        may_be_asked = ways.may_work or bool(request.qmp_socket)
        evidence = inspection.evidence
        plan = make_plan(
            identity, request, policy, evidence, self._clock.now(), may_be_asked=may_be_asked
        )
        notes = await self._notes(inspection.guest, request, evidence)
        if inspection.guest.label.name is None:
            notes = (events.NAME_UNKNOWN, *notes)
        return inspection.guest, replace(plan, ways=ways.texts, warnings=(*plan.warnings, *notes))

    async def _notes(
        self, guest: Guest, request: Request, evidence: Assessment | None
    ) -> tuple[str, ...]:
        """Describe which disks cannot be flushed, and which background jobs SIGTERM would
        cancel."""
        reachable = guest.label.qmp or bool(request.qmp_socket)
        by_evidence = not request.flags & (Flag.FIXED | Flag.NOWAIT)
        if self._monitors is None or not by_evidence:
            return ()
        if not reachable:
            channels = await self._monitors.survey(guest.identity)
            return (HUMAN_MONITOR_ALONE,) if channels.monitor is MonitorKind.HMP else ()
        process = self._host.open(guest.identity.pid)
        try:
            check_same(process.guest.identity, guest.identity.start_time)
            # Do not make QEMU ask a file system that may not answer: a plan must not block the
            # guest.
            files = evidence is not None and not may_hang(evidence.last)
            state = await self._monitors.read_disks(process, request.qmp_socket, files=files)
            if state is None:
                return ()
            return notes_of_plan(state) if files else (*notes_of_plan(state), CACHE_UNSAFE_UNKNOWN)
        finally:
            process.close()

    async def _ways(self, identity: Identity, flags: Flag) -> AskingWays:
        """Describe how the guest can be asked, and what prevents it."""
        if Flag.POWERDOWN not in flags or self._monitors is None:
            return AskingWays()
        process = self._host.open(identity.pid)
        try:
            check_same(process.guest.identity, identity.start_time)
            return await self._monitors.describe(process)
        finally:
            process.close()

    async def _check_monitor(
        self, process: Process, given: Mapping[str, object], passed: int | None
    ) -> None:
        """Check the monitor that the caller names or passes. Raise InvalidArgs if it is not the
        monitor of this process. On any error, close `process`."""
        if self._monitors is None:
            return
        try:
            if "qmp-socket" in given:
                await self._monitors.check(process, str(given["qmp-socket"]))
            if passed is not None:
                await self._monitors.check_passed(process, passed)
        except BaseException:
            process.close()
            raise

    async def guests(self) -> list[Guest]:
        """Return every visible QEMU process on this host."""
        return list((await self._guests.get())[0])

    async def _find_guests(self) -> tuple[list[Guest], list[Unidentified]]:
        """Return all guests, and the processes that may be guests but cannot be identified."""
        # Concurrent callers share one run, because reading all of /proc takes 0.1 ms for each
        # process.
        identities, unidentified = await self._host.identities()
        qemus, guests = list[Identity](), list[Guest]()
        pace = Pace()
        for identity in identities:
            if is_qemu(identity.executable, self.config.executables):
                qemus.append(identity)
            await pace.rest()
        labels = await self._host.labels(qemus)
        for identity, label in zip(qemus, labels, strict=True):
            guests.append(Guest(identity, label))
            await pace.rest()
        return guests, unidentified

    async def _sample_twice(self, process: Process) -> Assessment | None:
        """Take two samples, because only their difference shows movement. Use only the first if the
        second is late; return None if both are."""
        if self._sampler is None:
            return None
        watch = self._sampler.watch(process)
        evidence = None
        try:
            async with asyncio.timeout(INSPECT_TIMEOUT_S):
                evidence = assess(None, await _take_sample(watch))
                await asyncio.sleep(INSPECT_INTERVAL_S)
                evidence = assess(evidence, await _take_sample(watch, detail=True))
        except TimeoutError:
            pass
        finally:
            watch.close()
        return evidence

    def _start(
        self,
        checked: CheckedProcess,
        flags: Flag,
        given: Mapping[str, object],
        passed: int | None = None,
    ) -> Job:
        """Start a job, or join the running one. The registry owns the process from now on."""
        flags = self._as_configured(flags, given, checked.process.guest)
        request = _request(flags, given, checked.uid)
        return self.registry.terminate(checked.process, request, passed)

    def _as_configured(self, flags: Flag, given: Mapping[str, object], guest: Guest) -> Flag:
        """Remove POWERDOWN if the caller leaves the decision to the configuration, and the
        configuration says not to ask."""
        if given.get("powerdown-as-configured") and not self.config.asks(guest.label.name):
            return flags & ~Flag.POWERDOWN
        return flags

    async def keep(self, *jobs: Job) -> None:
        """Wait until these jobs are saved, so that they survive a crash. If saving takes too long,
        log it."""
        if self.registry.saver is not None and not await self.registry.saver.wait_saved():
            for job in jobs:
                self.registry.note(events.not_written(job))


async def _take_sample(watch: Watch, *, detail: bool = False) -> Sample:
    result: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()

    def answer(sample: Sample) -> None:
        if not result.done():
            result.set_result(sample)

    watch.take_sample(answer, detail=detail)
    return await result


def _parse_flags(flags: int) -> Flag:
    if unknown := flags & ~int(KNOWN_FLAGS):
        raise InvalidArgs(f"Flags {flags:#x} has unknown bits: {unknown:#x}")
    flag_set = Flag(flags)
    if Flag.POWERDOWN in flag_set:
        if Flag.FIXED in flag_set:
            raise InvalidArgs("POWERDOWN (4) cannot be combined with FIXED (8)")
        if (Flag.FORCE | Flag.NOWAIT) in flag_set:
            raise InvalidArgs("POWERDOWN (4) cannot be combined with both FORCE (1) and NOWAIT (2)")
    return flag_set


def _check_for_many(given: Mapping[str, object]) -> None:
    for name in ("start-time", "qmp-socket"):
        if name in given:
            raise InvalidArgs(f'Option "{name}" is for a single process: leave it out here')


def _request(flags: Flag, given: Mapping[str, object], uid: int) -> Request:
    most = _number(given, "powerdown-max-usec")
    return Request(
        flags=flags,
        spans=_spans(given),
        reason=printable(str(given.get("reason", ""))),
        uid=uid,
        powerdown_only=bool(given.get("powerdown-only", False)),
        help=tuple(order for name, order in _HELP.items() if given.get(name)),
        qmp_socket=str(given.get("qmp-socket", "")),
        ask_at_most=INFINITY if most is None else from_call(most),
    )


def _number(given: Mapping[str, object], name: str) -> int | None:
    value = given.get(name)
    return value if isinstance(value, int) else None


def _spans(given: Mapping[str, object]) -> dict[str, int]:
    return {
        span.field: from_call(value)
        for span in JOB_SPANS
        if isinstance(value := given.get(span.bus_option), int)
    }


def _parse_options(options: Mapping[str, Option], flags: Flag) -> dict[str, object]:
    """Check the options. Return their values by name."""
    for name, option in options.items():
        shown = printable(name, 64)
        if (expected := OPTION_TYPES.get(name)) is None:
            raise InvalidArgs(f'Unknown option "{shown}"; known are {", ".join(OPTION_TYPES)}')
        if option.signature != expected:
            raise InvalidArgs(f'Option "{shown}" is of type {expected}, not {option.signature}')
    reason = options.get("reason")
    if reason is not None and len(str(reason.value)) > MAX_TEXT:
        raise InvalidArgs(f'Option "reason" is longer than {MAX_TEXT} characters')
    given = {name: option.value for name, option in options.items()}
    if given.get("powerdown-only"):
        # This option promises that no signal is sent, so the guest must be asked.
        if Flag.POWERDOWN not in flags:
            raise InvalidArgs('Option "powerdown-only" needs the flag POWERDOWN (4)')
        if given.get("powerdown-as-configured"):
            raise InvalidArgs("powerdown-only cannot be combined with powerdown-as-configured")
    return given
