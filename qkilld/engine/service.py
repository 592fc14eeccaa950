"""What the daemon does for a caller, whatever way the call came in.

Every method checks the process and the caller itself; nothing here trusts an argument.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from qkilld.engine import events
from qkilld.engine.access import Access, Held
from qkilld.engine.job import Job
from qkilld.engine.ports import Caller, Clock, Host, Process, Sampler, Units, Watch
from qkilld.engine.registry import Registry
from qkilld.engine.shared import Shared
from qkilld.judgement.ladder import policy_for
from qkilld.judgement.plan import Plan, make_plan
from qkilld.judgement.target import (
    action_for,
    check_answer,
    check_same,
    details_of_all,
    is_free,
    is_qemu,
)
from qkilld.judgement.unit import check_unit_name, choose_guest
from qkilld.judgement.verdict import Assessment, assess
from qkilld.model.access import Action, Answer
from qkilld.model.errors import BusError, Exiting, Failed, InvalidArgs, NoSuchUnit, QkilldError
from qkilld.model.evidence import Sample
from qkilld.model.guest import Guest
from qkilld.model.job import Request
from qkilld.model.policy import Config
from qkilld.model.text import MAX_TEXT, printable
from qkilld.model.words import KNOWN_FLAGS, Flag


@dataclass(frozen=True, slots=True)
class Option:
    """An option of TerminateWithOptions as it came in: its D-Bus type and its value."""

    signature: str
    value: object


SPANS: Final = {
    "grace-usec": "grace",
    "stall-usec": "stall",
    "storage-stall-usec": "storage_stall",
    "max-usec": "max",
}
"""Options that are fields of Policy."""
INSPECT_INTERVAL_S: Final = 0.2
INSPECT_TIMEOUT_S: Final = 2.0
MAX_AT_ONCE: Final = 64
"""Processes that TerminateAll takes hold of at a time: each may wait for a thread of its own."""
OPTION_TYPES: Final = {"start-time": "t", "reason": "s", **dict.fromkeys(SPANS, "t")}


@dataclass(frozen=True, slots=True)
class Inspection:
    guest: Guest
    evidence: Assessment | None
    """None where looking at it did not come to an end."""
    job: Job | None
    """The one that is running."""


class Service:
    def __init__(
        self,
        config: Config,
        host: Host,
        registry: Registry,
        clock: Clock,
        sampler: Sampler | None = None,
        units: Units | None = None,
    ) -> None:
        self.config = config
        self.registry = registry
        self._host = host
        self._access = Access(config, host)
        self.units = units
        """None where there is nobody to ask; another one with each bus that we are on."""
        self._clock = clock
        self._sampler = sampler
        self._guests = Shared(self._look_for_guests)

    async def terminate(
        self, pid: int, flags: int, options: Mapping[str, Option], caller: Caller
    ) -> Job:
        """Start or join the job that stops a process.

        Raises InvalidArgs, NoSuchProcess, NotQemu, ProcessChanged, AccessDenied, Busy, Failed.
        """
        asked = _parse_flags(flags)
        given = _parse_options(options)
        start_time = _number(given, "start-time")
        try:
            held = await self._access.hold(pid, caller, asked, start_time=start_time)
        except Exiting as error:
            # What it was cannot be seen any more; but if we stop it, it has been seen.
            job = self.registry.running_for(error.key)
            if job is None or start_time not in (None, error.key[1]):
                raise
            uid = await self._access.permit(caller, job.guest, action_for(asked))
            if not job.running:
                raise
            job.join(_request(asked, given, uid))
            return job
        return self._start(held, asked, given)

    async def terminate_unit(self, name: str, flags: int, caller: Caller) -> Job:
        """The same for the main process of a unit, or where that is no QEMU, for the one in it.

        Which QEMUs are in it is the kernel's word (their control groups); systemd is asked for the
        main process and for the unit's primary name alone. Raises NoSuchUnit as well.
        """
        asked = _parse_flags(flags)
        check_unit_name(name)
        facts, known = None, True
        if self.units is not None:
            try:
                facts = await self.units.unit(name)
            except NoSuchUnit:
                known = False
            except (BusError, Failed):
                pass  # it does not answer, or not to us: the control groups tell enough
        guest = choose_guest(name, facts, await self.guests(), known=known)
        held = await self._access.hold(
            guest.identity.pid,
            caller,
            asked,
            start_time=guest.identity.start_time,
            unit=guest.label.unit,
        )
        return self._start(held, asked, {})

    async def terminate_all(
        self, flags: int, options: Mapping[str, Option], caller: Caller
    ) -> list[Job]:
        """The same for every QEMU that the caller may stop, as of now.

        Polkit is asked once, and only where there are guests of others. One that cannot be stopped
        is told in the journal. Raises InvalidArgs, and where there is nothing of the caller's own
        AccessDenied, Busy.
        """
        asked = _parse_flags(flags)
        given = _parse_options(options)
        if "start-time" in given:
            raise InvalidArgs('Option "start-time" is of one process: leave it out here')
        uid = await caller.uid()
        guests = await self.guests()
        own = [guest for guest in guests if is_free(uid, guest.identity)]
        answer = Answer.DENIED
        if len(own) < len(guests):
            answer = await caller.may(action_for(asked), details_of_all(asked), ask=True)
            if not own:
                check_answer(answer, "The QEMU guests of this host are")
        wanted = guests if answer is Answer.GRANTED else own
        slots = asyncio.Semaphore(MAX_AT_ONCE)

        async def one(guest: Guest) -> Job | None:
            pid, start_time = guest.identity.key
            try:
                async with slots:
                    held = await self._access.hold(
                        pid, caller, asked, start_time=start_time, answer=answer
                    )
                    return self._start(held, asked, given)
            except QkilldError as error:
                self.registry.note(events.not_stopped(guest, uid, error))
            return None

        jobs = await asyncio.gather(*(one(guest) for guest in wanted))
        return [job for job in jobs if job is not None]

    async def cancel(self, job: Job, caller: Caller) -> None:
        """Raises AccessDenied, Busy. Nothing happens where the job has ended."""
        await self._access.permit(caller, job.guest, Action.TERMINATE)
        job.cancel()

    async def extend(self, job: Job, usec: int, caller: Caller) -> None:
        """These raise AccessDenied, Busy, and Failed where nothing is to be done any more."""
        job.extend(usec, await self._access.permit(caller, job.guest, Action.TERMINATE))

    async def hold(self, job: Job, caller: Caller) -> None:
        job.hold(await self._access.permit(caller, job.guest, Action.TERMINATE))

    async def release(self, job: Job, caller: Caller) -> None:
        job.release(await self._access.permit(caller, job.guest, Action.TERMINATE))

    async def force(self, job: Job, caller: Caller) -> None:
        """SIGKILL now."""
        job.force(await self._access.permit(caller, job.guest, Action.FORCE))

    async def inspect(self, pid: int, caller: Caller) -> Inspection:
        """Who a process is and what is to be seen of it. Sends nothing.

        Raises InvalidArgs, NoSuchProcess, NotQemu, ProcessChanged, AccessDenied, Busy, Failed.
        """
        process, _ = await self._access.hold(pid, caller, Flag(0), action=Action.INSPECT)
        try:
            job = self.registry.running_for(process.guest.identity.key)
            evidence = job.assessment if job is not None else None
            return Inspection(process.guest, evidence or await self._look_twice(process), job)
        finally:
            process.close()

    async def plan(
        self, pid: int, flags: int, options: Mapping[str, Option], caller: Caller
    ) -> tuple[Guest, Plan]:
        """What `terminate` would do. Sends nothing. Raises what `terminate` raises but Busy."""
        asked = _parse_flags(flags)
        given = _parse_options(options)
        found = await self.inspect(pid, caller)
        identity = found.guest.identity
        if (start_time := _number(given, "start-time")) is not None:
            check_same(identity, start_time)
        configured = self.config.policy_for(found.guest.label.name)
        policy = policy_for(asked, configured, _spans(given))
        return found.guest, make_plan(identity, asked, policy, found.evidence, self._clock.now())

    async def guests(self) -> list[Guest]:
        """Every QEMU of this system that can be seen."""
        return list(await self._guests.get())

    async def _look_for_guests(self) -> list[Guest]:
        # All of /proc is read for it, 0.1 ms a process, and anybody may ask as often as they like.
        return [
            Guest(identity, await self._host.label(identity))
            for identity in await self._host.identities()
            if is_qemu(identity.executable, self.config.executables)
        ]

    async def _look_twice(self, process: Process) -> Assessment | None:
        """What moves lies between two samples. None where none came in time."""
        if self._sampler is None:
            return None
        watch = self._sampler.watch(process)
        evidence = None
        try:
            async with asyncio.timeout(INSPECT_TIMEOUT_S):
                evidence = assess(None, await _look(watch))
                await asyncio.sleep(INSPECT_INTERVAL_S)
                evidence = assess(evidence, await _look(watch))
        except TimeoutError:
            pass
        finally:
            watch.close()
        return evidence

    def _start(self, held: Held, flags: Flag, given: Mapping[str, object]) -> Job:
        """Takes the process over."""
        return self.registry.terminate(held.process, _request(flags, given, held.uid))


async def _look(watch: Watch) -> Sample:
    seen: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
    watch.look(lambda sample: None if seen.done() else seen.set_result(sample))
    return await seen


def _parse_flags(flags: int) -> Flag:
    if unknown := flags & ~int(KNOWN_FLAGS):
        raise InvalidArgs(f"Flags {flags:#x} has unknown bits: {unknown:#x}")
    if flags & Flag.POWERDOWN:
        raise InvalidArgs("POWERDOWN (4) is not available in this version; leave it out")
    return Flag(flags)


def _request(flags: Flag, given: Mapping[str, object], uid: int) -> Request:
    return Request(flags, _spans(given), printable(str(given.get("reason", ""))), uid)


def _number(given: Mapping[str, object], name: str) -> int | None:
    value = given.get(name)
    return value if isinstance(value, int) else None


def _spans(given: Mapping[str, object]) -> dict[str, int]:
    return {
        field: value for name, field in SPANS.items() if isinstance(value := given.get(name), int)
    }


def _parse_options(options: Mapping[str, Option]) -> dict[str, object]:
    """The values by name, each of the type that OPTION_TYPES says."""
    for name, option in options.items():
        shown = printable(name, 64)
        if (expected := OPTION_TYPES.get(name)) is None:
            raise InvalidArgs(f'Unknown option "{shown}"; known are {", ".join(OPTION_TYPES)}')
        if option.signature != expected:
            raise InvalidArgs(f'Option "{shown}" is of type {expected}, not {option.signature}')
    reason = options.get("reason")
    if reason is not None and len(str(reason.value)) > MAX_TEXT:
        raise InvalidArgs(f'Option "reason" is longer than {MAX_TEXT} characters')
    return {name: option.value for name, option in options.items()}
