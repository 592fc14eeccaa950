"""The commands that look: list, jobs, status and inspect."""

from __future__ import annotations

import asyncio
from typing import Any, Final, NamedTuple

from qkilld.bus.client import Manager
from qkilld.ctl.follow import monotonic_usec
from qkilld.ctl.output import user_name
from qkilld.ctl.session import Session
from qkilld.ctl.targets import Guest, Kind, Resolver, Target
from qkilld.model.errors import NoSuchJob, QkilldError
from qkilld.model.jobview import JobView, flag_names, known, label
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec
from qkilld.model.words import ExitCode, Phase

MAX_CALLS: Final = 32
"""Calls under way at a time; the system bus allows 128 unanswered ones for each connection."""

_POLICY: Final = (
    ("GraceUSec", "grace", "least time between SIGTERM and SIGKILL"),
    ("StallUSec", "stall", "no progress and nothing outstanding for so long before SIGKILL"),
    ("StorageStallUSec", "storage stall", "storage not moving for so long before SIGKILL"),
    ("MaxUSec", "max", "SIGKILL after so long in any case"),
    ("ReapUSec", "reap", "time to go after SIGKILL"),
)


async def list_guests(session: Session) -> int:
    guests = [Guest(*row) for row in await session.manager.list_guests()]
    if session.json:
        session.output.json([guest_as_json(guest) for guest in guests])
    elif guests:
        session.output.table(
            ("PID", "NAME", "UUID", "USER", "UNIT"),
            [(str(g.pid), g.name, g.uuid, user_name(g.uid), g.unit) for g in guests],
        )
    else:
        session.output.line("No QEMU guests found.")
    return ExitCode.OK


async def list_jobs(session: Session) -> int:
    jobs = await _jobs(session.manager)
    if session.json:
        session.output.json([job.as_json() for job in jobs])
    elif jobs:
        _job_table(session, jobs)
    else:
        session.output.line("No jobs.")
    return ExitCode.OK


async def overview(session: Session) -> int:
    """status without a target."""
    properties = await session.manager.properties()
    running = [job for job in await _jobs(session.manager) if job.phase != Phase.DONE]
    if session.json:
        policy = {
            f"{title.replace(' ', '_')}_usec": known(properties[key]) for key, title, _ in _POLICY
        }
        jobs = [job.as_json() for job in running]
        session.output.json({"version": properties["Version"], "policy": policy, "jobs": jobs})
        return ExitCode.OK
    output = session.output
    output.line(f"qkilld {printable(properties['Version'])} on the {printable(session.bus.title)}")
    output.fields(
        (title, f"{format_usec(properties[key])} ({what})") for key, title, what in _POLICY
    )
    if running:
        output.line()
        _job_table(session, running)
    else:
        output.line("No job is running.")
    return ExitCode.OK


async def status(session: Session, target: Target) -> int:
    """status of a target or job: who it is, and its job."""
    resolver = Resolver(session.manager)
    view: JobView | None
    if target.kind is Kind.JOB:
        view = await _view(session.manager, await resolver.job(target))
        guest = Guest(
            view.pid, view.name, view.properties["UUID"], view.uid, view.properties["Unit"]
        )
    else:
        found = await resolver.find(target)
        guest = await _who(session.manager, resolver, found.pid)
        try:
            view = await _view(session.manager, await session.manager.job_by_pid(found.pid))
        except NoSuchJob:
            view = None
    if session.json:
        session.output.json(
            {"guest": guest_as_json(guest), "job": view.as_json() if view else None}
        )
        return ExitCode.OK
    session.output.line(label(guest.pid, guest.name))
    fields = [("uuid", guest.uuid), ("user", user_name(guest.uid)), ("unit", guest.unit)]
    session.output.fields(fields + (_job_fields(view) if view else [("job", "none")]))
    return ExitCode.OK


async def inspect(session: Session, target: Target) -> int:
    found = await Resolver(session.manager).find(target)
    seen = await session.manager.inspect(found.pid)
    seen["user"] = user_name(seen["uid"])
    if session.json:
        session.output.json({key.replace("-", "_"): value for key, value in seen.items()})
        return ExitCode.OK
    session.output.line(label(found.pid, seen["name"]))
    session.output.fields(
        (key.replace("-", " "), _value(value)) for key, value in seen.items() if key != "pid"
    )
    return ExitCode.OK


def guest_as_json(guest: Guest) -> dict[str, Any]:
    return guest._asdict() | {"user": user_name(guest.uid)}


async def _who(manager: Manager, resolver: Resolver, pid: int) -> Guest:
    for guest in await resolver.guests():
        if guest.pid == pid:
            return guest
    # Why it is not listed, the daemon says best.
    seen = await manager.inspect(pid)
    return Guest(pid, seen["name"], seen["uuid"], seen["uid"], seen["unit"])


class _Listed(NamedTuple):
    """One row of ListJobs."""

    id: int
    path: str
    pid: int
    phase: str
    verdict: str
    view: JobView | None
    """None where it was forgotten since it was listed."""

    @property
    def name(self) -> str:
        return self.view.name if self.view else ""

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "path": self.path,
            "pid": self.pid,
            "name": self.name,
            "phase": self.phase,
            "verdict": self.verdict,
            "held": self.view.held if self.view else None,
            "deadline_usec": known(self.view.deadline) if self.view else None,
        }


async def _jobs(manager: Manager) -> list[_Listed]:
    slots = asyncio.Semaphore(MAX_CALLS)

    async def view(path: str) -> JobView | None:
        try:
            async with slots:
                return await _view(manager, path)
        except QkilldError:
            return None

    jobs = await manager.list_jobs()
    views = await asyncio.gather(*(view(path) for _, path, *_ in jobs))
    return [_Listed(*job, view) for job, view in zip(jobs, views, strict=True)]


async def _view(manager: Manager, path: str) -> JobView:
    return JobView(path, await manager.job(path).properties())


def _job_table(session: Session, jobs: list[_Listed]) -> None:
    now = monotonic_usec()
    session.output.table(
        ("ID", "PID", "NAME", "PHASE", "VERDICT", "NEXT"),
        [
            (
                *(str(job.id), str(job.pid), job.name, job.phase, job.verdict),
                job.view.outlook(now) if job.view else "",
            )
            for job in jobs
        ],
    )


def _job_fields(view: JobView) -> list[tuple[str, str]]:
    now = monotonic_usec()
    fields = [
        ("job", f"{view.id} ({view.path})"),
        ("flags", ", ".join(flag_names(view.properties["Flags"]))),
        ("phase", view.phase),
        ("verdict", view.verdict),
    ]
    if view.result:
        return [*fields, ("result", view.result)]
    for key, title in (("BytesWritten", "written"), ("BytesPending", "pending")):
        if (count := known(view.properties[key])) is not None:
            fields.append((title, f"{count} bytes"))
    return [*fields, ("running for", view.elapsed(now)), ("next", view.outlook(now))]


def _value(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case dict():
            return ", ".join(f"{key.replace('_', ' ')} {number}" for key, number in value.items())
        case list():
            return "; ".join(_value(item) for item in value) or "none"
        case tuple():
            return " ".join(_value(item) for item in value)
    return str(value)
