"""Serve /org/qkilld1/job/N: the interface org.qkilld1.Job."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from qkilld.bus import interfaces
from qkilld.bus.library import Variant
from qkilld.bus.server import BusCaller, Method, NoReply
from qkilld.engine.job import Job
from qkilld.engine.outlook import outlook, reasons
from qkilld.engine.report import may_see, receipt_values
from qkilld.engine.service import Service
from qkilld.engine.steps import job_steps
from qkilld.model.constants import JOB_PATH_PREFIX, UNKNOWN

if TYPE_CHECKING:
    from qkilld.engine.ports import ObservedJob

REPLY_S: Final = 0.00015
"""The time to prepare a reply to Wait (0.15 ms, measured)."""
PRIVATE: Final = ("BytesWritten", "BytesPending", "Rate", "Reasons", "Receipt")
"""Properties that only some callers may read. PropertiesChanged lists them as invalidated."""
_RECEIPT_TYPES: Final = {
    "elapsed-usec": "t",
    "rungs": "a(sst)",
    "verdict": "s",
    "requested-by": "u",
    "guest-asked": "s",
    "verdicts": "a(stas)",
    "bytes-written": "t",
    "bytes-pending": "t",
    "last-progress-usec": "t",
    "data-at-risk": "b",
    "at-risk": "a(ss)",
    "flush": "s",
    "flush-reason": "s",
    "reason": "s",
    "error": "s",
    "error-name": "s",
}


class JobObject:
    """Implements bus.server.BusObject. A new one is made for each call, because all state is in the
    job."""

    def __init__(self, job: Job, service: Service) -> None:
        self.interface = interfaces.job()
        self._job = job
        self._service = service
        self.methods: Mapping[str, Method] = {
            "Wait": self._wait,
            "Cancel": self._cancel,
            "Extend": self._extend,
            "Hold": self._hold,
            "Release": self._release,
            "Force": self._force,
        }

    def properties(self, uid: int) -> Mapping[str, Any]:
        return properties(self._job, private=may_see(self._job, uid))

    async def _wait(self, caller: BusCaller) -> list[Any]:
        if not caller.wants_reply:
            raise NoReply
        job, uid = self._job, await caller.uid()
        if job.running:
            disconnected = False
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            settle = functools.partial(_settle_soon, ended, uid)
            job.when_ended(settle, uid)
            try:
                await caller.end_call_with_connection()
                await ended
            except asyncio.CancelledError:
                disconnected = caller.disconnected
                raise
            finally:
                job.forget_waiter(settle, disconnected=disconnected)
        if job.result is None:
            raise NoReply
        return [job.result.value, receipt(job, private=may_see(job, uid))]

    async def _cancel(self, caller: BusCaller) -> list[Any]:
        await self._service.cancel(self._job, caller)
        return []

    async def _extend(self, caller: BusCaller, usec: int) -> list[Any]:
        await self._service.extend(self._job, usec, caller)
        return []

    async def _hold(self, caller: BusCaller) -> list[Any]:
        await self._service.hold(self._job, caller)
        return []

    async def _release(self, caller: BusCaller) -> list[Any]:
        await self._service.release(self._job, caller)
        return []

    async def _force(self, caller: BusCaller) -> list[Any]:
        await self._service.force(self._job, caller)
        return []


def job_path(job: ObservedJob) -> str:
    return f"{JOB_PATH_PREFIX}{job.number}"


def properties(job: ObservedJob, *, private: bool) -> dict[str, Any]:
    """Return every property of the interface. For `private`, see `changing`."""
    identity, label = job.guest.identity, job.guest.label
    return {
        "Id": job.number,
        "PID": identity.pid,
        "StartTime": identity.start_time,
        "Name": label.shown_name,
        "UUID": label.uuid,
        "Unit": label.unit_name,
        "UID": identity.uid,
        "StartedUSec": job.started,
        **changing(job, private=private),
    }


def changing(job: ObservedJob, *, private: bool) -> dict[str, Any]:
    """Return the properties that change. Unless `private` is set, Receipt contains only what Wait
    returns to any caller, and the other properties in PRIVATE are unknown or empty."""
    evidence = job.assessment if private else None
    progress_at = job.assessment.progress_at if job.assessment else None
    next_rung = outlook(job)
    return {
        "Flags": int(job.flags),
        "Phase": job.phase.value,
        "Verdict": job.verdict.value,
        "Result": job.result.value if job.result else "",
        "DeadlineUSec": job.deadline,
        "NextRung": next_rung.rung.value,
        "NextRungStallUSec": next_rung.standstill,
        "LastProgressUSec": progress_at or 0,
        "Reasons": list(reasons(job)) if private else [],
        "BytesWritten": _number_or_unknown(evidence.written if evidence else None),
        "BytesPending": _number_or_unknown(evidence.pending if evidence else None),
        "Rate": _number_or_unknown(evidence.rate if evidence else None),
        "Held": job.control.held,
        "NotBeforeUSec": job.control.not_before,
        "GuestAsked": job.guest_asked.value,
        "PowerdownOnly": job.request.powerdown_only,
        "Reason": job.request.reason,
        "RequestedBy": job.request.uid,
        "EndedUSec": job.ended or 0,
        "Receipt": receipt(job, private=private) if job.result is not None else {},
    }


def receipt(job: ObservedJob, *, private: bool) -> dict[str, Variant]:
    """Return the receipt of an ended job, as Wait returns it."""
    values = receipt_values(job, private=private)
    return {name: Variant(_RECEIPT_TYPES[name], value) for name, value in values.items()}


def _number_or_unknown(number: int | None) -> int:
    return UNKNOWN if number is None else number


def _settle_soon(future: asyncio.Future[None], uid: int) -> None:
    """Settle the future soon, in a step of the loop (engine.steps). Each user can have a thousand
    calls of Wait for one job, and preparing all replies at once would block the loop."""
    steps = job_steps()

    def settle() -> bool:
        steps.add_time(REPLY_S)
        _settle(future)
        return False

    steps.put(uid, settle)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
