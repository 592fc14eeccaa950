"""Targets: the words that users type, and the processes that these words mean.

`parse` and `find` are pure; `Resolver` asks the daemon.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

from qkilld.adapters import pidfile, procfs
from qkilld.adapters.blockable import Unanswered
from qkilld.bus.client import ManagerProxy
from qkilld.model.constants import JOB_PATH_PREFIX, ExitCode
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import (
    InvalidArgs,
    NoSuchJob,
    NoSuchProcess,
    NoSuchUnit,
    ProcessChanged,
    QkilldError,
    UnknownIdentity,
)
from qkilld.model.job_status import label
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.text import printable

UNIT_SUFFIXES: Final = (".service", ".scope")
MAX_CANDIDATES: Final = 10
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


class AmbiguousTarget(QkilldError):
    bus_name = "org.qkilld1.Client.AmbiguousTarget"
    exit_code = ExitCode.NOT_FOUND


class GuestRow(NamedTuple):
    """One row of ListGuests; "" for missing values."""

    pid: int
    name: str
    uuid: str
    uid: int
    unit: str


async def guest_rows(manager: ManagerProxy) -> list[GuestRow]:
    return [GuestRow(*row) for row in await manager.list_guests()]


def is_own(guest: GuestRow, uid: int) -> bool:
    """Return whether a caller with this uid may stop the guest without an authorization."""
    return uid in (0, guest.uid)


def labels(guests: Sequence[GuestRow]) -> str:
    return ", ".join(label(guest.pid, guest.name) for guest in guests)


class TargetKind(StrEnum):
    PID = "pid"
    NAME = "name"
    UUID = "uuid"
    PIDFILE = "pidfile"
    UNIT = "unit"
    JOB = "job"
    WORD = "word"
    """A guest's name or UUID, or a unit without its suffix."""


_PREFIXES: Final = frozenset(TargetKind) - {TargetKind.WORD}


@dataclass(frozen=True, slots=True)
class Target:
    kind: TargetKind
    value: str
    """Normalized: a decimal number for PID and JOB, a canonical UUID for UUID."""
    text: str
    """The target as the user typed it."""

    @property
    def shown(self) -> str:
        return printable(self.text)


def parse(text: str, *, jobs: bool = False) -> Target:
    """Parse a target; with `jobs` also `job:N` and a job's object path. Raises InvalidArgs."""
    kind, value = _split(text, jobs)
    try:
        value.encode()
    except UnicodeEncodeError:
        if kind is not TargetKind.PIDFILE:  # A path may contain any bytes.
            raise InvalidArgs(f'Target "{printable(text)}" is not valid UTF-8') from None
    if not value:
        raise InvalidArgs(
            f'Target "{printable(text)}" is empty: a pid, name, UUID, pidfile or unit is needed'
        )
    if kind in (TargetKind.PID, TargetKind.JOB):
        value = _number(kind, value)
    elif kind is TargetKind.UUID:
        value = _canonical_uuid(value)
    elif kind is TargetKind.UNIT and not value.endswith(UNIT_SUFFIXES):
        value += ".service"
    return Target(kind, value, text)


def _split(text: str, jobs: bool) -> tuple[TargetKind, str]:
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _PREFIXES and (jobs or prefix != TargetKind.JOB):
        return TargetKind(prefix), rest
    if jobs and text.startswith(JOB_PATH_PREFIX):
        return TargetKind.JOB, text.removeprefix(JOB_PATH_PREFIX)
    if "/" in text:
        return TargetKind.PIDFILE, text
    if text.isascii() and text.isdecimal():
        return TargetKind.PID, text
    if text.endswith(UNIT_SUFFIXES):
        return TargetKind.UNIT, text
    return TargetKind.WORD, text


def _number(kind: TargetKind, value: str) -> str:
    if not (value.isascii() and value.isdecimal()) or len(value) > 20 or int(value) >= 2**32:
        what = "a process id" if kind is TargetKind.PID else "a job's number"
        raise InvalidArgs(
            f'"{printable(value)}" is not {what}: a decimal number below 2^32 is needed'
        )
    return str(int(value))


def _canonical_uuid(value: str) -> str:
    try:
        return str(uuid.UUID(value))
    except ValueError:
        raise InvalidArgs(
            f'"{printable(value)}" is not a UUID: 32 hexadecimal digits are needed, '
            "such as 5f0c3c1e-6a0e-4a53-9f1a-0d6a4be4b6c5"
        ) from None


def matches(target: Target, guest: GuestRow) -> bool:
    """Return whether a guest matches a target of kind NAME, UUID, UNIT or WORD."""
    value = target.value
    match target.kind:
        case TargetKind.NAME:
            return guest.name == value
        case TargetKind.UUID:
            return guest.uuid.lower() == value
        case TargetKind.UNIT:
            return guest.unit == value
        case TargetKind.WORD:
            return (
                guest.name == value
                or (_UUID.fullmatch(value) is not None and guest.uuid.lower() == value.lower())
                or guest.unit == f"{value}.service"
            )
        case _:
            return False


def find(target: Target, guests: Sequence[GuestRow]) -> GuestRow:
    """Return the only guest that matches.

    Raises NoSuchProcess or NoSuchUnit if no guest matches, AmbiguousTarget if several do.
    Never guesses, because anyone can give a QEMU any name, and could thereby choose the guest.
    """
    candidates = [guest for guest in guests if matches(target, guest)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(
            f"{guest.pid} ({printable(guest.name) or 'no name'}, uid {guest.uid})"
            for guest in candidates[:MAX_CANDIDATES]
        )
        rest = len(candidates) - MAX_CANDIDATES
        more = f" and {rest} more" if rest > 0 else ""
        raise AmbiguousTarget(
            f'"{target.shown}" matches {len(candidates)} guests, so nothing was done: '
            f"pids {names}{more}. Name one guest by its pid"
        )
    value = printable(target.value)
    match target.kind:
        case TargetKind.NAME:
            raise NoSuchProcess(f'No running guest has the name "{value}": see `qkillctl list`')
        case TargetKind.UUID:
            raise NoSuchProcess(f"No running guest has the UUID {value}: see `qkillctl list`")
        case TargetKind.UNIT:
            raise NoSuchUnit(f"No running guest belongs to the unit {value}: see `qkillctl list`")
        case _:
            raise NoSuchProcess(
                f'No running guest has the name, UUID or unit "{value}": see `qkillctl list`'
            )


@dataclass(frozen=True, slots=True)
class TargetProcess:
    pid: int
    name: str = ""
    start_time: int | None = None
    """Clock ticks since boot; None if it was not read."""


class Resolver:
    """Finds the processes of several targets, reading the list of guests once."""

    def __init__(self, manager: ManagerProxy) -> None:
        self._manager = manager
        self._guests: list[GuestRow] | None = None
        self._listing = asyncio.Lock()

    async def find(self, target: Target) -> TargetProcess:
        """Raises the exceptions of `find`, of `pidfile.read` and of calls on the bus."""
        match target.kind:
            case TargetKind.PID:
                return TargetProcess(int(target.value))
            case TargetKind.PIDFILE:
                if self._manager.is_remote:
                    raise InvalidArgs(
                        f'"{target.shown}" is a file on this machine, but the guest runs on another'
                        " one: give the guest's name, UUID, unit or process id"
                    )
                named = pidfile.read(target.value)
                return TargetProcess(named.pid, start_time=named.start_time)
            case TargetKind.JOB:
                raise InvalidArgs(f'"{target.shown}" is a job, not a guest')
            case _:
                guest = find(target, await self.guests())
                return TargetProcess(guest.pid, guest.name)

    async def pin(self, target: Target) -> TargetProcess:
        """Find the process and its start time, so that a reuse of its pid is noticed. The start
        time is None if the target is a pid.

        Raises what `find` raises, and ProcessChanged if the pid was reused already.
        """
        process = await self.find(target)
        if target.kind in (TargetKind.PID, TargetKind.PIDFILE):
            return process
        # Read the start time, then list the guests again. If the pid was reused before the start
        # time was read, the new list shows another process.
        start_time = await self._start_time(target, process.pid)
        guests = await guest_rows(self._manager)
        guest = next(
            (g for g in guests if g.pid == process.pid), GuestRow(process.pid, "", "", 0, "")
        )
        if not matches(target, guest):
            raise ProcessChanged(
                f'Process {process.pid} was "{target.shown}" a moment ago, and is another process '
                "now: nothing was done. See `qkillctl list`"
            )
        return TargetProcess(process.pid, process.name, start_time)

    async def _start_time(self, target: Target, pid: int) -> int:
        if self._manager.is_remote:
            return int((await self._manager.inspect(pid))["start-time"])
        try:
            return procfs.read_stat_patiently(pid).start_time
        except Unanswered as error:
            raise UnknownIdentity.blocked(pid, error.strerror) from None
        except OSError:
            raise NoSuchProcess(f'"{target.shown}", process {pid}, has just exited') from None

    async def guests(self) -> list[GuestRow]:
        async with self._listing:
            if self._guests is None:
                self._guests = await guest_rows(self._manager)
        return self._guests

    async def job(self, target: Target) -> str:
        """Return the path of the job that the target names, or of the newest job of its process.

        Raises NoSuchJob.
        """
        if target.kind is not TargetKind.JOB:
            return await self._manager.job_by_pid((await self.find(target)).pid)
        for number, path, *_ in await self._manager.list_jobs():
            if number == int(target.value):
                return path
        raise NoSuchJob(
            f"There is no job {target.value} (any more): a job is kept for 60 s after its end. "
            "See `qkillctl jobs`"
        )
