"""/org/qkilld1/job/N: the interface org.qkilld1.Job."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from signal import SIGKILL
from typing import Any

from dbus_next.signature import Variant

from qkilld.bus import interfaces
from qkilld.bus.requester import Requester
from qkilld.bus.server import Caller, Method, Server, Unanswered
from qkilld.engine.job import Job
from qkilld.engine.service import Service
from qkilld.model.words import JOB_PATH_PREFIX, UNKNOWN


class JobObject:
    """Implements bus.server.BusObject; made anew for each call, the job itself has the state."""

    def __init__(self, job: Job, service: Service, server: Server) -> None:
        self.interface = interfaces.job()
        self._job = job
        self._service = service
        self._server = server
        self.methods: Mapping[str, Method] = {
            "Wait": self._wait,
            "Cancel": self._cancel,
            "Extend": self._extend,
            "Hold": self._hold,
            "Release": self._release,
            "Force": self._force,
        }

    def property(self, name: str) -> Any:
        return properties(self._job)[name]

    async def _wait(self, caller: Caller) -> list[Any]:
        if not caller.wants_reply:
            raise Unanswered
        job = self._job
        if job.running:
            left = False
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            settle = functools.partial(_settle, ended)
            job.when_ended(settle)
            try:
                await self._server.notice_disconnect(caller)
                await ended
            except asyncio.CancelledError:
                left = not self._server.draining
                raise
            finally:
                job.no_longer(settle, left=left)
        if job.result is None:
            raise Unanswered
        return [job.result.value, receipt(job)]

    async def _cancel(self, caller: Caller) -> list[Any]:
        await self._service.cancel(self._job, Requester(self._server, caller))
        return []

    async def _extend(self, caller: Caller, usec: int) -> list[Any]:
        await self._service.extend(self._job, usec, Requester(self._server, caller))
        return []

    async def _hold(self, caller: Caller) -> list[Any]:
        await self._service.hold(self._job, Requester(self._server, caller))
        return []

    async def _release(self, caller: Caller) -> list[Any]:
        await self._service.release(self._job, Requester(self._server, caller))
        return []

    async def _force(self, caller: Caller) -> list[Any]:
        await self._service.force(self._job, Requester(self._server, caller))
        return []


def job_path(job: Job) -> str:
    return f"{JOB_PATH_PREFIX}{job.number}"


def properties(job: Job) -> dict[str, Any]:
    """Every property of the interface."""
    identity, label = job.guest.identity, job.guest.label
    return {
        "Id": job.number,
        "PID": identity.pid,
        "StartTime": identity.start_time,
        "Name": label.name,
        "UUID": label.uuid,
        "Unit": label.unit.name,
        "UID": identity.uid,
        "StartedUSec": job.started,
        **changing(job),
    }


def changing(job: Job) -> dict[str, Any]:
    """The properties that PropertiesChanged tells of."""
    evidence = job.assessment
    return {
        "Flags": int(job.flags),
        "Phase": job.phase.value,
        "Verdict": job.verdict.value,
        "Result": job.result.value if job.result else "",
        "DeadlineUSec": job.deadline,
        "LastProgressUSec": (evidence and evidence.progress_at) or 0,
        "BytesWritten": _known(evidence.written if evidence else None),
        "BytesPending": _known(evidence.pending if evidence else None),
        "Held": job.control.held,
        "NotBeforeUSec": job.control.not_before,
    }


def receipt(job: Job) -> dict[str, Variant]:
    """The receipt of a job that has ended, as Wait gives it."""
    rungs = [[r.phase.value, r.signal.name, r.at - job.started] for r in job.rungs]
    found = {
        "elapsed-usec": Variant("t", job.elapsed),
        "rungs": Variant("a(sst)", rungs),
        "verdict": Variant("s", job.verdict.value),
        "requested-by": Variant("u", job.request.uid),
    }
    evidence = job.assessment
    if evidence is not None:
        turns = [[t.verdict.value, t.at - job.started, list(t.reasons)] for t in job.history]
        found["verdicts"] = Variant("a(stas)", turns)
        if evidence.written is not None:
            found["bytes-written"] = Variant("t", evidence.written)
        if evidence.pending is not None:
            found["bytes-pending"] = Variant("t", evidence.pending)
        if evidence.progress_at is not None:
            found["last-progress-usec"] = Variant("t", evidence.progress_at)
    if job.rungs and job.rungs[-1].signal is SIGKILL and job.standing.by_evidence:
        found["data-at-risk"] = Variant("b", job.data_at_risk)
    if job.request.reason:
        found["reason"] = Variant("s", job.request.reason)
    if job.error:
        found["error"] = Variant("s", job.error)
    return found


def _known(number: int | None) -> int:
    return UNKNOWN if number is None else number


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
