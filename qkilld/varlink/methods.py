"""The methods of org.qkilld1 over Varlink. They convert parameters for engine.service, and its
results to replies."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from qkilld import __version__
from qkilld.debug_log import note
from qkilld.engine.call_limits import CallLimits, Cost
from qkilld.engine.job import Job
from qkilld.engine.service import Option, Service
from qkilld.engine.unit_stop import UnitStops
from qkilld.model.errors import Busy, QkilldError
from qkilld.model.policy import SPANS
from qkilld.varlink import values
from qkilld.varlink.server import Method, VarlinkCall, VarlinkCaller
from qkilld.varlink.streams import FirstReply, JobStream, Streams
from qkilld.varlink.unit_queries import UnitQueries

UNIT_AFTER_S: Final = 0.3
"""Delay before the unit's settings are read. Most idle guests exit earlier, even if many are
stopped at the same time. The delay is short enough for a unit with TimeoutStopSec=1."""
OPEN_AFTER_S: Final = 0.1
"""With `byUnit`, the first of several replies is delayed by at most this long, because one reply is
enough if the jobs end within this time. A longer delay would be unsafe: if the daemon crashed
before this reply, the caller would not know of the job, and would send SIGTERM again."""
JOBS_OF_WAIT: Final = 4
"""This many jobs of one call count as one Wait. The reply about the end of a job takes 1.5 kB until
the client reads it."""
_READS: Final = frozenset({"Inspect", "Plan", "ListGuests", "ListJobs"})


class VarlinkMethods:
    """Implements server.Methods."""

    def __init__(
        self, service: Service, streams: Streams, units: UnitStops, limits: CallLimits
    ) -> None:
        self._service = service
        self._streams = streams
        self._units = units
        self._unit_queries = UnitQueries(units, limits)
        self._methods: Mapping[str, Method] = {
            "GetStatus": self._get_status,
            "Terminate": self._terminate,
            "TerminateUnit": self._terminate_unit,
            "TerminateAll": self._terminate_all,
            "Plan": self._plan,
            "Inspect": self._inspect,
            "ListGuests": self._list_guests,
            "ListJobs": self._list_jobs,
            "GetJobByPID": self._get_job_by_pid,
            "Wait": self._wait,
            "Cancel": self._steer(service.cancel),
            "Extend": self._extend,
            "Hold": self._steer(service.hold),
            "Release": self._steer(service.release),
            "Force": self._steer(service.force),
        }

    def find(self, name: str) -> Method:
        return self._methods[name]

    def costs(self, name: str, parameters: Mapping[str, Any]) -> list[Cost]:
        if name == "Wait":
            return [Cost.WAIT]
        # Each named process is as much work as one Terminate call.
        processes = parameters.get("processes") or ()
        return [Cost.READ if name in _READS else Cost.OTHER] * max(1, len(processes))

    async def _get_status(self, call: VarlinkCall, parameters: dict[str, Any]) -> dict[str, Any]:
        policy = self._service.config.policy
        spans = {
            values.camel_case(span.bus_option): values.finite(getattr(policy, span.field))
            for span in SPANS
        }
        return {"version": __version__, "jobs": self._service.registry.running, **spans}

    async def _terminate(self, call: VarlinkCall, parameters: dict[str, Any]) -> None:
        flags, options = self._unit_order(call, parameters)
        passed = None
        if (index := parameters.get("monitorIndex")) is not None:
            passed = call.take_descriptor(index)
        job = await self._service.terminate(
            parameters["pid"], flags, options, call.caller, passed=passed
        )
        self._started(call, parameters, job)

    async def _terminate_unit(self, call: VarlinkCall, parameters: dict[str, Any]) -> None:
        flags = values.flags_from(parameters.get("flags"))
        job = await self._service.terminate_unit(parameters["unit"], flags, call.caller)
        self._started(call, {}, job)

    async def _terminate_all(self, call: VarlinkCall, parameters: dict[str, Any]) -> None:
        flags, options = self._unit_order(call, parameters)
        refused: list[dict[str, Any]] = []
        if (processes := parameters.get("processes")) is None:
            jobs = await self._service.terminate_all(flags, options, call.caller)
        else:
            outcomes = await self._service.terminate_each(
                [(process["pid"], process.get("startTime")) for process in processes],
                flags,
                options,
                call.caller,
            )
            jobs = [each for each in outcomes if isinstance(each, Job)]
            refused = [
                values.refusal(process["pid"], error)
                for process, error in zip(processes, outcomes, strict=True)
                if isinstance(error, QkilldError)
            ]

        if call.more and jobs and _may_follow(call, len(jobs)):
            self._stream(call, parameters, FirstReply(jobs, {"refused": refused}))
            return
        states = (values.state(job, call.uid) for job in jobs)
        await call.finish_list("states", states, refused=refused)
        if parameters.get("byUnit"):
            self._obey_unit(call, parameters, jobs, None)

    def _started(self, call: VarlinkCall, parameters: dict[str, Any], job: Job) -> None:
        """Reply with the state of a job that has begun. If the call has `more`, send the job's
        progress and result, too."""
        if call.more:
            call.now_waits()
            self._stream(call, parameters, FirstReply([job]))
            return
        call.finish({"state": values.state(job, call.uid)})
        if parameters.get("byUnit"):
            self._obey_unit(call, parameters, [job], None)

    def _stream(self, call: VarlinkCall, parameters: dict[str, Any], first: FirstReply) -> None:
        """Reply with `first`, then with the progress and results of its jobs. With `byUnit`, reply
        only after OPEN_AFTER_S: most guests exit in this time, so one reply is enough."""
        jobs = first.jobs
        stream = self._follow(call, jobs, first)
        if parameters.get("byUnit"):
            asyncio.get_running_loop().call_later(OPEN_AFTER_S, stream.open)
            self._obey_unit(call, parameters, jobs, stream)
        else:
            stream.open()

    def _follow(
        self,
        call: VarlinkCall,
        jobs: Sequence[Job],
        first: FirstReply | None = None,
    ) -> JobStream:
        stream = JobStream(self._streams, call, jobs, changes=call.more, first=first)

        def disconnect() -> None:
            stream.close(disconnected=True)
            call.end()

        call.on_disconnect = disconnect
        if call.connection.closed:
            disconnect()  # The client left before the job began.
        return stream

    def _unit_order(
        self, call: VarlinkCall, parameters: dict[str, Any]
    ) -> tuple[int, dict[str, Option]]:
        flags, options = _order(parameters)
        if parameters.get("byUnit") and "reason" not in options:
            options["reason"] = Option("s", self._units.reason(call.caller.pid))
        return flags, options

    def _obey_unit(
        self,
        call: VarlinkCall,
        parameters: dict[str, Any],
        jobs: Sequence[Job],
        stream: JobStream | None,
    ) -> None:
        """Apply the settings of the caller's unit to jobs that still run after UNIT_AFTER_S."""
        force = bool(parameters.get("forceAsUnit"))

        def ask() -> None:
            if running := [job for job in jobs if job.running and not job.process_exited]:
                loop = asyncio.get_running_loop()
                self._units.keep(loop.create_task(self._report_unit(call, running, stream, force)))

        asyncio.get_running_loop().call_later(UNIT_AFTER_S, ask)

    async def _report_unit(
        self, call: VarlinkCall, jobs: Sequence[Job], stream: JobStream | None, force: bool
    ) -> None:
        settings = await self._unit_queries.limit(jobs, call.caller.pid, call.uid, force=force)
        name, limits, why = settings
        if stream is None:
            return
        if limits is not None:
            stream.open(unit=values.limits_value(name, limits))
        else:
            stream.open(unitError=why)

    async def _plan(self, call: VarlinkCall, parameters: dict[str, Any]) -> dict[str, Any]:
        flags, options = _order(parameters)
        guest, plan = await self._service.plan(parameters["pid"], flags, options, call.caller)
        return {
            "guest": values.guest_value(guest),
            "rungs": [
                {
                    "phase": rung.phase.value,
                    "action": rung.action,
                    "afterUSec": values.finite(rung.after),
                }
                for rung in plan.rungs
            ],
            "givesUpUSec": values.finite(plan.gives_up_after),
            "warnings": list(plan.warnings),
            "ways": list(plan.ways),
        }

    async def _inspect(self, call: VarlinkCall, parameters: dict[str, Any]) -> dict[str, Any]:
        inspection = await self._service.inspect(parameters["pid"], call.caller)
        evidence = inspection.evidence
        return {
            "guest": values.guest_value(inspection.guest),
            "verdict": evidence.verdict.value if evidence else "unknown",
            "reasons": list(evidence.reasons) if evidence else ["sampling did not finish in time"],
            "job": inspection.job.number if inspection.job else None,
        }

    async def _list_guests(self, call: VarlinkCall, parameters: dict[str, Any]) -> None:
        await call.finish_list("guests", map(values.guest_value, await self._service.guests()))

    async def _list_jobs(self, call: VarlinkCall, parameters: dict[str, Any]) -> None:
        await call.finish_list(
            "jobs", (values.state(job, call.uid) for job in self._service.registry)
        )

    async def _get_job_by_pid(
        self, call: VarlinkCall, parameters: dict[str, Any]
    ) -> dict[str, Any]:
        return {"state": values.state(self._service.registry.by_pid(parameters["pid"]), call.uid)}

    async def _wait(self, call: VarlinkCall, parameters: dict[str, Any]) -> None:
        job = self._service.registry.get(parameters["job"])
        if job.running:
            call.progress({"state": values.state(job, call.uid)})
        call.now_waits()
        self._follow(call, [job])

    async def _extend(self, call: VarlinkCall, parameters: dict[str, Any]) -> dict[str, Any]:
        job = self._service.registry.get(parameters["job"])
        values.check_span("usec", parameters["usec"])
        await self._service.extend(job, parameters["usec"], call.caller)
        return {}

    def _steer(self, act: Callable[[Job, VarlinkCaller], Awaitable[None]]) -> Method:
        async def method(call: VarlinkCall, parameters: dict[str, Any]) -> dict[str, Any]:
            await act(self._service.registry.get(parameters["job"]), call.caller)
            return {}

        return method


def _may_follow(call: VarlinkCall, jobs: int) -> bool:
    """Count the cost of a call that waits for this many jobs. If there are too many such calls,
    return False instead of raising Busy, because the jobs have begun."""
    try:
        for _ in range(1, math.ceil(jobs / JOBS_OF_WAIT)):
            call.charge(Cost.WAIT)
    except Busy as error:
        note("following the jobs of TerminateAll", error)
        return False
    return True


def _order(parameters: Mapping[str, Any]) -> tuple[int, dict[str, Option]]:
    """Return the flags and the options for engine.service."""
    options = values.options_from(parameters.get("options") or {})
    if (start_time := parameters.get("startTime")) is not None:
        options["start-time"] = Option("t", start_time)
    return values.flags_from(parameters.get("flags")), options
