"""/org/qkilld1: the interface org.qkilld1.Manager, and the tree of objects below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dbus_next.signature import Variant

from qkilld import __version__
from qkilld.bus import interfaces
from qkilld.bus.evidence import evidence_dict
from qkilld.bus.job import JobObject, job_path
from qkilld.bus.requester import Requester
from qkilld.bus.server import BusObject, Caller, Method, Server
from qkilld.engine.service import Option, Service
from qkilld.model.errors import NoSuchJob
from qkilld.model.guest import Guest
from qkilld.model.text import printable
from qkilld.model.words import JOB_PATH_PREFIX, MANAGER_PATH


class ManagerObject:
    """Implements bus.server.BusObject."""

    def __init__(self, service: Service) -> None:
        self.interface = interfaces.manager()
        self.server: Server
        self._service = service
        self.methods: Mapping[str, Method] = {
            "Terminate": self._terminate,
            "TerminateWithOptions": self._terminate,
            "TerminateUnit": self._terminate_unit,
            "TerminateAll": self._terminate_all,
            "Inspect": self._inspect,
            "Plan": self._plan,
            "ListGuests": self._list_guests,
            "ListJobs": self._list_jobs,
            "GetJobByPID": self._get_job_by_pid,
        }

    def property(self, name: str) -> Any:
        policy = self._service.config.policy
        match name:
            case "Version":
                return __version__
            case "NJobs":
                return self._service.registry.running
            case "GraceUSec":
                return policy.grace
            case "StallUSec":
                return policy.stall
            case "StorageStallUSec":
                return policy.storage_stall
            case "MaxUSec":
                return policy.max
            case "ReapUSec":
                return policy.reap
        raise KeyError(name)

    async def _terminate(
        self, caller: Caller, pid: int, flags: int, options: dict[str, Variant] | None = None
    ) -> list[Any]:
        given = _given(options or {})
        job = await self._service.terminate(pid, flags, given, self._from(caller))
        return [job_path(job)]

    async def _terminate_unit(self, caller: Caller, unit: str, flags: int) -> list[Any]:
        return [job_path(await self._service.terminate_unit(unit, flags, self._from(caller)))]

    async def _terminate_all(
        self, caller: Caller, flags: int, options: dict[str, Variant]
    ) -> list[Any]:
        jobs = await self._service.terminate_all(flags, _given(options), self._from(caller))
        return [[[job.guest.identity.pid, job_path(job)] for job in jobs]]

    async def _inspect(self, caller: Caller, pid: int) -> list[Any]:
        found = await self._service.inspect(pid, self._from(caller))
        shown = _identity(found.guest)
        if found.evidence is not None:
            shown |= evidence_dict(found.evidence)
        else:
            shown["verdict"] = Variant("s", "unknown")
            shown["reasons"] = Variant("as", ["looking at it did not come to an end"])
        if found.job is not None:
            shown["job"] = Variant("o", job_path(found.job))
        return [shown]

    async def _plan(
        self, caller: Caller, pid: int, flags: int, options: dict[str, Variant]
    ) -> list[Any]:
        guest, plan = await self._service.plan(pid, flags, _given(options), self._from(caller))
        rungs = [[rung.phase.value, rung.signal.name, rung.after] for rung in plan.rungs]
        return [
            {
                **_identity(guest),
                "rungs": Variant("a(sst)", rungs),
                "gives-up-usec": Variant("t", plan.gives_up_after),
                "warnings": Variant("as", list(plan.warnings)),
            }
        ]

    async def _list_guests(self, caller: Caller) -> list[Any]:
        return [
            [
                [
                    guest.identity.pid,
                    guest.label.name,
                    guest.label.uuid,
                    guest.identity.uid,
                    guest.label.unit.name,
                ]
                for guest in await self._service.guests()
            ]
        ]

    async def _list_jobs(self, caller: Caller) -> list[Any]:
        return [
            [
                [
                    job.number,
                    job_path(job),
                    job.guest.identity.pid,
                    job.phase.value,
                    job.verdict.value,
                ]
                for job in self._service.registry
            ]
        ]

    async def _get_job_by_pid(self, caller: Caller, pid: int) -> list[Any]:
        return [job_path(self._service.registry.by_pid(pid))]

    def _from(self, caller: Caller) -> Requester:
        return Requester(self.server, caller)


class Tree:
    """Implements bus.server.Tree."""

    def __init__(self, manager: ManagerObject, service: Service) -> None:
        self._manager = manager
        self._service = service

    def find(self, path: str) -> BusObject | None:
        if path == MANAGER_PATH:
            return self._manager
        if not path.startswith(JOB_PATH_PREFIX):
            return None
        number = path.removeprefix(JOB_PATH_PREFIX)
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise NoSuchJob("A job's path ends in its number")
        return JobObject(
            self._service.registry.get(int(number)), self._service, self._manager.server
        )

    def children(self, path: str) -> list[str]:
        match path:
            case "/":
                return ["org"]
            case "/org":
                return ["qkilld1"]
            case "/org/qkilld1":
                return ["job"]
            case "/org/qkilld1/job":
                return [str(job.number) for job in self._service.registry]
        return []


def _given(options: dict[str, Variant]) -> dict[str, Option]:
    return {name: Option(v.signature, v.value) for name, v in options.items()}


def _identity(guest: Guest) -> dict[str, Variant]:
    identity, label = guest.identity, guest.label
    return {
        "pid": Variant("u", identity.pid),
        "start-time": Variant("t", identity.start_time),
        "uid": Variant("u", identity.uid),
        "command": Variant("s", identity.command),
        "executable": Variant("s", printable(identity.executable, 4096)),
        "executable-deleted": Variant("b", identity.executable_deleted),
        "state": Variant("s", identity.state),
        "name": Variant("s", label.name),
        "uuid": Variant("s", label.uuid),
        "unit": Variant("s", label.unit.name),
    }
