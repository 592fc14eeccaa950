"""Serve /org/qkilld1: the interface org.qkilld1.Manager, and the tree of objects below it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from qkilld import __version__
from qkilld.bus import interfaces
from qkilld.bus.guest_objects import GuestObject, Guests, guest_path
from qkilld.bus.inspection import evidence_dict
from qkilld.bus.job_object import JobObject, job_path
from qkilld.bus.library import Variant
from qkilld.bus.listing import Listing
from qkilld.bus.server import BusCaller, BusObject, Method, variants
from qkilld.bus.values import VariantValue
from qkilld.engine.job import Job
from qkilld.engine.registry import Registry
from qkilld.engine.service import Option, Service
from qkilld.model.constants import GUEST_PATH_PREFIX, JOB_PATH_PREFIX, MANAGER_PATH
from qkilld.model.errors import NoSuchJob
from qkilld.model.guest import Guest
from qkilld.model.policy import SPANS
from qkilld.model.text import printable

_NUMBER: Final = re.compile("[1-9][0-9]{0,8}")


class ManagerObject:
    """Implements bus.server.BusObject."""

    def __init__(self, service: Service) -> None:
        self.interface = interfaces.manager()
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

    def properties(self, uid: int) -> Mapping[str, Any]:
        policy = self._service.config.policy
        return {
            "Version": __version__,
            "NowUSec": time.monotonic_ns() // 1000,
            "NJobs": self._service.registry.running,
            **{span.bus_property: getattr(policy, span.field) for span in SPANS},
        }

    async def _terminate(
        self,
        caller: BusCaller,
        pid: int,
        flags: int,
        options: dict[str, VariantValue] | None = None,
    ) -> list[Any]:
        parsed_options = _given(options or {})
        job = await self._service.terminate(pid, flags, parsed_options, caller)
        return [job_path(job)]

    async def _terminate_unit(self, caller: BusCaller, unit: str, flags: int) -> list[Any]:
        return [job_path(await self._service.terminate_unit(unit, flags, caller))]

    async def _terminate_all(
        self, caller: BusCaller, flags: int, options: dict[str, VariantValue]
    ) -> list[Any]:
        jobs = await self._service.terminate_all(flags, _given(options), caller)
        return [[[job.guest.identity.pid, job_path(job)] for job in jobs]]

    async def _inspect(self, caller: BusCaller, pid: int) -> list[Any]:
        inspection = await self._service.inspect(pid, caller)
        answer = _identity(inspection.guest)
        if inspection.evidence is not None:
            answer |= evidence_dict(inspection.evidence)
        else:
            answer["verdict"] = Variant("s", "unknown")
            answer["reasons"] = Variant("as", ["sampling did not finish in time"])
        if inspection.job is not None:
            answer["job"] = Variant("o", job_path(inspection.job))
        return [answer]

    async def _plan(
        self, caller: BusCaller, pid: int, flags: int, options: dict[str, VariantValue]
    ) -> list[Any]:
        guest, plan = await self._service.plan(pid, flags, _given(options), caller)
        rungs = [[rung.phase.value, rung.action, rung.after] for rung in plan.rungs]
        return [
            {
                **_identity(guest),
                "rungs": Variant("a(sst)", rungs),
                "gives-up-usec": Variant("t", plan.gives_up_after),
                "warnings": Variant("as", list(plan.warnings)),
                "ways": Variant("as", list(plan.ways)),
            }
        ]

    async def _list_guests(self, caller: BusCaller) -> Listing:
        guests = {str(guest.identity.pid): guest for guest in await self._service.guests()}

        def row(pid: str) -> list[Any] | None:
            if (guest := guests.get(pid)) is None:
                return None
            identity, label = guest.identity, guest.label
            return [[identity.pid, label.shown_name, label.uuid, identity.uid, label.unit_name]]

        return Listing(lambda: guests, row)

    async def _list_jobs(self, caller: BusCaller) -> Listing:
        registry = self._service.registry

        def row(path: str) -> list[Any] | None:
            if (job := _job_at(path, registry)) is None:
                return None
            pid = job.guest.identity.pid
            return [[job.number, path, pid, job.phase.value, job.verdict.value]]

        return Listing(lambda: map(job_path, registry), row)

    async def _get_job_by_pid(self, caller: BusCaller, pid: int) -> list[Any]:
        return [job_path(self._service.registry.by_pid(pid))]


class ManagerTree:
    """The objects of the manager, its jobs and the guests. Implements bus.server.ObjectTree."""

    def __init__(self, manager: ManagerObject, service: Service) -> None:
        self._manager = manager
        self._service = service
        self.guests: Guests | None = None
        """None until there is a server to send the signals about guests."""

    def find(self, path: str) -> BusObject | None:
        if path == MANAGER_PATH:
            return self._manager
        if path.startswith(GUEST_PATH_PREFIX):
            return self._find_guest(path.removeprefix(GUEST_PATH_PREFIX))
        job = _job_at(path, self._service.registry)
        return None if job is None else JobObject(job, self._service)

    def _find_guest(self, number: str) -> BusObject | None:
        if self.guests is None or not _NUMBER.fullmatch(number):
            return None
        guest = self.guests.watch.get(int(number))
        return None if guest is None else GuestObject(guest)

    async def managed(self, sender: str, uid: int) -> Listing:
        """Return all jobs and guests. The caller gets signals about guests from now on."""
        if self.guests is not None:
            self.guests.watchers.add(sender, uid)
            await self.guests.watch.guests()

        def described(path: str) -> dict[str, Any] | None:
            found = None if path == MANAGER_PATH else self.find(path)
            if found is None:
                return None
            return {path: {found.interface.name: variants(found.interface, found.properties(uid))}}

        return Listing(self._managed_paths, described)

    def _managed_paths(self) -> Iterable[str]:
        guests = () if self.guests is None else self.guests.watch.known
        return [*map(guest_path, guests), *map(job_path, self._service.registry)]

    def children(self, path: str) -> list[str]:
        match path:
            case "/":
                return ["org"]
            case "/org":
                return ["qkilld1"]
            case "/org/qkilld1":
                # Leave out nodes without children, because they have no objects of their own.
                nodes = ("guest", "job")
                return [name for name in nodes if self.children(f"/org/qkilld1/{name}")]
            case "/org/qkilld1/job":
                return [str(job.number) for job in self._service.registry]
            case "/org/qkilld1/guest" if self.guests is not None:
                return [str(guest.number) for guest in self.guests.watch.known]
        return []


def _job_at(path: str, registry: Registry) -> Job | None:
    """Return the job at that path; None if the path does not begin with JOB_PATH_PREFIX. Raises
    NoSuchJob."""
    if not path.startswith(JOB_PATH_PREFIX):
        return None
    # Each job has exactly one path, so reject 007 for job 7.
    if not _NUMBER.fullmatch(number := path.removeprefix(JOB_PATH_PREFIX)):
        raise NoSuchJob("A job's path ends in its number")
    return registry.get(int(number))


def _given(options: dict[str, VariantValue]) -> dict[str, Option]:
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
        "name": Variant("s", label.shown_name),
        "uuid": Variant("s", label.uuid),
        "unit": Variant("s", label.unit_name),
    }
