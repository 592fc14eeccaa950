"""The commands list, jobs, status and inspect."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Final

from qkilld.bus.client import ManagerProxy
from qkilld.ctl.follow import monotonic_usec
from qkilld.ctl.process_stats import ProcessStats
from qkilld.ctl.session import Session
from qkilld.ctl.targets import GuestRow, Resolver, Target, TargetKind, guest_rows
from qkilld.debug_log import note
from qkilld.model.constants import INFINITY, UNKNOWN, ExitCode, Flag, Phase
from qkilld.model.errors import NoSuchJob, QkilldError
from qkilld.model.job_status import JobStatus, ending, flag_names, known, label, rounded
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.policy import SPANS
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec

_INSPECTED: Final = {
    "waiting_threads": ("tid", "name", "state", "function"),
    "devices": ("name", "number", "bytes_written", "in_flight"),
    "sockets": ("family", "connected", "send_queue_bytes", "unacknowledged"),
    "mounts": ("type", "answers"),
}
"""The keys of Inspect whose values are lists of structures, and the JSON keys for the members of
each structure."""
MAX_CALLS: Final = 32
"""The maximum number of concurrent calls, well below the 128 that the system bus allows."""


async def list_guests(session: Session) -> int:
    guests = await guest_rows(session.manager)
    uncovered = None
    if session.bus.is_system_bus:
        # List uncovered guests only for the system's daemon on this host, because other daemons may
        # use other configuration files.
        from qkilld.ctl.uncovered import UncoveredGuests
        from qkilld.ctl.unit_context import config_of

        uncovered = UncoveredGuests((await config_of(session)).executables)
    if session.json:
        rows = [
            guest_as_json(session, guest, session.process_stats(guest.pid, guest.uid))
            | {"covered": True}
            for guest in guests
        ]
        session.output.json([*rows, *(uncovered.as_json() if uncovered else ())])
        return ExitCode.OK
    if guests:
        session.output.table(
            ("PID", "NAME", "UUID", "USER", "CPU", "MEMORY", "UPTIME", "UNIT"),
            [_guest_cells(session, guest) for guest in guests],
        )
    else:
        session.output.line("No QEMU guests found.")
    if uncovered:
        uncovered.show(session.output)
    return ExitCode.OK


def _guest_cells(session: Session, guest: GuestRow) -> tuple[str, ...]:
    stats = session.process_stats(guest.pid, guest.uid)
    user = session.user_name(guest.uid)
    return (str(guest.pid), guest.name, guest.uuid, user, *stats.cells(), guest.unit)


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
    properties = await session.manager.properties()
    running = [job for job in await _jobs(session.manager) if job.phase != Phase.DONE]
    if session.json:
        policy = {f"{span.field}_usec": known(properties[span.bus_property]) for span in SPANS}
        jobs = [job.as_json() for job in running]
        session.output.json({"version": properties["Version"], "policy": policy, "jobs": jobs})
        return ExitCode.OK
    output = session.output
    output.line(f"qkilld {printable(properties['Version'])} on the {printable(session.bus.title)}")
    output.fields(
        (span.words, f"{format_usec(properties[span.bus_property])} ({span.help})")
        for span in SPANS
    )
    if running:
        output.line()
        _job_table(session, running)
    else:
        output.line("No job is running.")
    return ExitCode.OK


async def status(session: Session, target: Target) -> int:
    resolver = Resolver(session.manager)
    job: JobStatus | None
    if target.kind is TargetKind.JOB:
        job = await _with_receipt(session.manager, await resolver.job(target))
        guest = GuestRow(job.pid, job.name, job.uuid, job.uid, job.unit)
    else:
        process = await resolver.find(target)
        guest = await _who(session.manager, resolver, process.pid)
        try:
            path = await session.manager.job_by_pid(process.pid)
            job = await _with_receipt(session.manager, path)
        except NoSuchJob:
            job = None
    # Read no statistics for an ended job, because another process may have its pid.
    ended = target.kind is TargetKind.JOB and job is not None and bool(job.result)
    stats = ProcessStats() if ended else session.process_stats(guest.pid, guest.uid)
    if session.json:
        document = {
            "guest": guest_as_json(session, guest, stats),
            "job": job.as_json() if job else None,
        }
        session.output.json(document)
        return ExitCode.OK
    session.output.line(label(guest.pid, guest.name))
    fields = [("uuid", guest.uuid), ("user", session.user_name(guest.uid)), ("unit", guest.unit)]
    if not ended:
        fields += zip(("processor time", "memory", "uptime"), stats.cells(), strict=True)
    session.output.fields(fields + (_job_fields(job) if job else [("job", "none")]))
    return ExitCode.OK


async def inspect(session: Session, target: Target) -> int:
    process = await Resolver(session.manager).find(target)
    answer = await session.manager.inspect(process.pid)
    answer["user"] = session.user_name(answer["uid"])
    if session.json:
        session.output.json(inspection_as_json(answer))
        return ExitCode.OK
    session.output.line(label(process.pid, answer["name"]))
    session.output.fields(
        (key.replace("-", " "), _value(value)) for key, value in answer.items() if key != "pid"
    )
    return ExitCode.OK


def inspection_as_json(answer: dict[str, Any]) -> dict[str, Any]:
    """Convert the reply of Inspect for --json. Each member of a D-Bus structure gets a key."""
    document = {key.replace("-", "_"): value for key, value in answer.items()}
    for key, columns in _INSPECTED.items():
        if key in document:
            document[key] = [dict(zip(columns, row, strict=True)) for row in document[key]]
    for mount in document.get("mounts", ()):
        mount["answers"] = known(mount["answers"])
    return document


def guest_as_json(session: Session, guest: GuestRow, stats: ProcessStats) -> dict[str, Any]:
    return guest._asdict() | {"user": session.user_name(guest.uid)} | stats.as_json()


async def _who(manager: ManagerProxy, resolver: Resolver, pid: int) -> GuestRow:
    for guest in await resolver.guests():
        if guest.pid == pid:
            return guest
    # The process is not listed. Inspect it, because the daemon's error explains why.
    answer = await manager.inspect(pid)
    return GuestRow(pid, answer["name"], answer["uuid"], answer["uid"], answer["unit"])


class _JobRow(NamedTuple):
    """One row of ListJobs."""

    id: int
    path: str
    pid: int
    phase: str
    verdict: str
    status: JobStatus | None
    """None if the daemon forgot the job after the list was read."""

    @property
    def name(self) -> str:
        return self.status.name if self.status else ""

    @property
    def result(self) -> str:
        """ "" while the job runs."""
        return self.status.result if self.status else ""

    def as_json(self) -> dict[str, Any]:
        """Return the same document as `qkillctl status`. If the daemon has forgotten the job,
        values that are not in the list are null."""
        if self.status is not None:
            return self.status.as_json()
        listed = JobStatus(
            path=self.path,
            id=self.id,
            pid=self.pid,
            flags=Flag(0),
            phase=self.phase,
            verdict=self.verdict,
            started=0,
            deadline=INFINITY,
        )
        kept = {"id", "path", "pid", "phase", "verdict"}
        return {key: value if key in kept else None for key, value in listed.as_json().items()}


async def _jobs(manager: ManagerProxy) -> list[_JobRow]:
    slots = asyncio.Semaphore(MAX_CALLS)

    async def status(path: str) -> JobStatus | None:
        try:
            async with slots:
                return await _job_status(manager, path)
        except QkilldError as error:
            note(f"reading {path}, which may be forgotten by now", error)
            return None

    jobs = await manager.list_jobs()
    statuses = await asyncio.gather(*(status(path) for _, path, *_ in jobs))
    return [_JobRow(*job, status) for job, status in zip(jobs, statuses, strict=True)]


async def _job_status(manager: ManagerProxy, path: str) -> JobStatus:
    return await manager.job(path).status()


async def _with_receipt(manager: ManagerProxy, path: str) -> JobStatus:
    """Return the status of a job, with its receipt if it has ended."""
    status = await _job_status(manager, path)
    if not status.result:
        return status
    _, receipt = await manager.job(path).wait()  # Returns at once.
    return replace(status, receipt=receipt)


def _job_table(session: Session, jobs: list[_JobRow]) -> None:
    now = monotonic_usec()
    session.output.table(
        ("ID", "PID", "NAME", "PHASE", "VERDICT", "RESULT", "NEXT"),
        [
            (
                *(str(job.id), str(job.pid), job.name, job.phase, job.verdict, job.result),
                job.status.outlook(now) if job.status else "",
            )
            for job in jobs
        ],
    )


def _job_fields(job: JobStatus) -> list[tuple[str, str]]:
    now = monotonic_usec()
    fields = [
        ("job", f"{job.id} ({job.path})"),
        ("flags", ", ".join(flag_names(job.flags))),
        ("phase", job.phase),
        ("verdict", job.verdict),
        *([("reasons", "; ".join(job.reasons))] if job.reasons else []),
    ]
    if job.result:
        return [*fields, ("result", job.result), *_receipt_fields(job)]
    for title, count in (("written", job.bytes_written), ("pending", job.bytes_pending)):
        if count is not None:
            fields.append((title, f"{count} bytes"))
    return [*fields, ("running for", job.elapsed(now)), ("next", job.outlook(now))]


def _receipt_fields(job: JobStatus) -> list[tuple[str, str]]:
    receipt = job.receipt or {}
    rungs = [
        f"{printable(str(action))} after {format_usec(rounded(int(at)))}"
        for _, action, at in receipt.get("rungs", ())
    ]
    return [("end", ending(job.result, receipt)), ("rungs", "; ".join(rungs) or "none")]


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
        case int() if value == UNKNOWN:
            return "unknown"
    return str(value)
