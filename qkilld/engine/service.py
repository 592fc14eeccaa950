"""What the daemon does for a caller, whatever way the call came in.

Every method checks the process and the caller itself; nothing here trusts an argument.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from qkilld.engine.job import Job
from qkilld.engine.ports import Clock, Host, Process, Sampler, Watch
from qkilld.engine.registry import Registry
from qkilld.judgement.ladder import policy_for
from qkilld.judgement.plan import Plan, make_plan
from qkilld.judgement.target import check_caller, check_qemu, check_same, is_qemu
from qkilld.judgement.verdict import Assessment, assess
from qkilld.model.errors import InvalidArgs
from qkilld.model.evidence import Sample
from qkilld.model.guest import Guest
from qkilld.model.job import Request
from qkilld.model.policy import Config
from qkilld.model.text import MAX_TEXT, printable
from qkilld.model.words import KNOWN_FLAGS, Flag

CallerUid = Callable[[], Awaitable[int]]
"""Who calls. Asked only once the process is held, so that its id cannot change hands meanwhile."""


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
    ) -> None:
        self.config = config
        self.registry = registry
        self._host = host
        self._clock = clock
        self._sampler = sampler

    async def terminate(
        self, pid: int, flags: int, options: Mapping[str, Option], caller_uid: CallerUid
    ) -> Job:
        """Start or join the job that stops a process.

        Raises InvalidArgs, NoSuchProcess, NotQemu, ProcessChanged, AccessDenied, Busy, Failed.
        """
        asked = _parse_flags(flags)
        given = _parse_options(options)
        process = self._open(pid)
        try:
            uid = await caller_uid()
            self._check(process, uid, given.get("start-time"))
            process.set_label(await self._host.label(process.guest.identity))
            # Time has passed: it may have executed another program.
            process.identify()
            self._check(process, uid, given.get("start-time"))
        except BaseException:
            process.close()
            raise
        reason = printable(str(given.get("reason", "")))
        return self.registry.terminate(process, Request(asked, _spans(given), reason, uid))

    async def cancel(self, job: Job, caller_uid: CallerUid) -> None:
        """Raises AccessDenied. Nothing happens where the job has ended."""
        check_caller(await caller_uid(), job.guest.identity)
        job.cancel()

    async def inspect(self, pid: int, caller_uid: CallerUid) -> Inspection:
        """Who a process is and what is to be seen of it. Sends nothing.

        Raises InvalidArgs, NoSuchProcess, NotQemu, AccessDenied.
        """
        process = self._open(pid)
        try:
            self._check(process, await caller_uid(), None)
            process.set_label(await self._host.label(process.guest.identity))
            job = self.registry.running_for(process.guest.identity.key)
            evidence = job.assessment if job is not None else None
            return Inspection(process.guest, evidence or await self._look_twice(process), job)
        finally:
            process.close()

    async def plan(
        self, pid: int, flags: int, options: Mapping[str, Option], caller_uid: CallerUid
    ) -> tuple[Guest, Plan]:
        """What `terminate` would do. Sends nothing. Raises what `terminate` raises but Busy."""
        asked = _parse_flags(flags)
        given = _parse_options(options)
        found = await self.inspect(pid, caller_uid)
        identity = found.guest.identity
        if isinstance(start_time := given.get("start-time"), int):
            check_same(identity, start_time)
        configured = self.config.policy_for(found.guest.label.name)
        policy = policy_for(asked, configured, _spans(given))
        return found.guest, make_plan(identity, asked, policy, found.evidence, self._clock.now())

    async def guests(self) -> list[Guest]:
        """Every QEMU of this system that can be seen."""
        return [
            Guest(identity, await self._host.label(identity))
            for identity in self._host.identities()
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

    def _open(self, pid: int) -> Process:
        if pid == 0:
            raise InvalidArgs("0 is not the id of a process")
        return self._host.open(pid)

    def _check(self, process: Process, caller_uid: int, start_time: object) -> None:
        identity = process.guest.identity
        # The caller first: who may not touch a process does not learn what it is either.
        check_caller(caller_uid, identity)
        check_qemu(identity, self.config.executables, os.getpid())
        if isinstance(start_time, int):
            check_same(identity, start_time)


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
