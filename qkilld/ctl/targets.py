"""Targets: what people call a guest, and which process that is.

`parse` and `find` are pure; `Resolver` asks the daemon.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from qkilld.adapters import pidfile
from qkilld.bus.client import Manager
from qkilld.model.errors import (
    InvalidArgs,
    NoSuchJob,
    NoSuchProcess,
    NoSuchUnit,
    ProcessChanged,
    QkilldError,
)
from qkilld.model.text import printable
from qkilld.model.words import JOB_PATH_PREFIX, ExitCode

UNIT_SUFFIXES: Final = (".service", ".scope")
MAX_CANDIDATES: Final = 10
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


class AmbiguousTarget(QkilldError):
    """More than one guest answers to a target."""

    bus_name = "org.qkilld1.Client.AmbiguousTarget"
    exit_code = ExitCode.NOT_FOUND


class Guest(NamedTuple):
    """One row of ListGuests; "" where there is none."""

    pid: int
    name: str
    uuid: str
    uid: int
    unit: str


class Kind(StrEnum):
    PID = "pid"
    NAME = "name"
    UUID = "uuid"
    PIDFILE = "pidfile"
    UNIT = "unit"
    JOB = "job"
    WORD = "word"
    """A guest's name or UUID, or a unit without its suffix."""


_PREFIXES: Final = frozenset(Kind) - {Kind.WORD}


@dataclass(frozen=True, slots=True)
class Target:
    kind: Kind
    value: str
    """Normalized: a decimal number for PID and JOB, a canonical UUID for UUID."""
    text: str
    """As it was given."""

    @property
    def shown(self) -> str:
        return printable(self.text)


def parse(text: str, *, jobs: bool = False) -> Target:
    """What kind of target `text` is. With `jobs` it may be `job:N` or a job's object path, too.

    Raises InvalidArgs.
    """
    kind, value = _split(text, jobs)
    try:
        value.encode()
    except UnicodeEncodeError:
        if kind is not Kind.PIDFILE:  # a path may be any bytes
            raise InvalidArgs(f'Target "{printable(text)}" is not valid UTF-8') from None
    if not value:
        raise InvalidArgs(
            f'Target "{printable(text)}" is empty: a pid, name, UUID, pidfile or unit is needed'
        )
    if kind in (Kind.PID, Kind.JOB):
        value = _number(kind, value)
    elif kind is Kind.UUID:
        value = _canonical_uuid(value)
    elif kind is Kind.UNIT and not value.endswith(UNIT_SUFFIXES):
        value += ".service"
    return Target(kind, value, text)


def _split(text: str, jobs: bool) -> tuple[Kind, str]:
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _PREFIXES and (jobs or prefix != Kind.JOB):
        return Kind(prefix), rest
    if jobs and text.startswith(JOB_PATH_PREFIX):
        return Kind.JOB, text.removeprefix(JOB_PATH_PREFIX)
    if "/" in text:
        return Kind.PIDFILE, text
    if text.isascii() and text.isdecimal():
        return Kind.PID, text
    if text.endswith(UNIT_SUFFIXES):
        return Kind.UNIT, text
    return Kind.WORD, text


def _number(kind: Kind, value: str) -> str:
    if not (value.isascii() and value.isdecimal()) or len(value) > 20 or int(value) >= 2**32:
        what = "a process id" if kind is Kind.PID else "a job's number"
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


def matches(target: Target, guest: Guest) -> bool:
    """Whether a guest answers to a target of the kinds NAME, UUID, UNIT and WORD."""
    value = target.value
    match target.kind:
        case Kind.NAME:
            return guest.name == value
        case Kind.UUID:
            return guest.uuid.lower() == value
        case Kind.UNIT:
            return guest.unit == value
        case Kind.WORD:
            return (
                guest.name == value
                or (_UUID.fullmatch(value) is not None and guest.uuid.lower() == value.lower())
                or guest.unit == f"{value}.service"
            )
        case _:
            return False


def find(target: Target, guests: Sequence[Guest]) -> Guest:
    """The one guest that answers to `target`.

    Raises NoSuchProcess or NoSuchUnit where there is none, AmbiguousTarget where there are more:
    anyone may give a QEMU any name, so that a guess would be an attacker's choice.
    """
    found = [guest for guest in guests if matches(target, guest)]
    if len(found) == 1:
        return found[0]
    if found:
        candidates = ", ".join(
            f"{guest.pid} ({printable(guest.name) or 'no name'}, uid {guest.uid})"
            for guest in found[:MAX_CANDIDATES]
        )
        more = f" and {len(found) - MAX_CANDIDATES} more" if len(found) > MAX_CANDIDATES else ""
        raise AmbiguousTarget(
            f'"{target.shown}" fits {len(found)} guests, so nothing was done: '
            f"pids {candidates}{more}. Name the one you mean by its pid"
        )
    value = printable(target.value)
    match target.kind:
        case Kind.NAME:
            raise NoSuchProcess(f'No running guest has the name "{value}": see `qkillctl list`')
        case Kind.UUID:
            raise NoSuchProcess(f"No running guest has the UUID {value}: see `qkillctl list`")
        case Kind.UNIT:
            raise NoSuchUnit(f"No running guest belongs to the unit {value}: see `qkillctl list`")
        case _:
            raise NoSuchProcess(
                f'No running guest has the name, UUID or unit "{value}": see `qkillctl list`'
            )


@dataclass(frozen=True, slots=True)
class Found:
    """The process that a target stands for."""

    pid: int
    name: str = ""
    start_time: int | None = None
    """Clock ticks since boot; None where the caller named the process by its pid alone."""


class Resolver:
    """Finds the processes of several targets, with one look at the list of guests for all."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._guests: list[Guest] | None = None
        self._listing = asyncio.Lock()

    async def find(self, target: Target) -> Found:
        """Raises as `find` and `pidfile.read` do, and what the bus raises."""
        match target.kind:
            case Kind.PID:
                return Found(int(target.value))
            case Kind.PIDFILE:
                named = pidfile.read(target.value)
                return Found(named.pid, start_time=named.start_time)
            case Kind.JOB:
                raise InvalidArgs(f'"{target.shown}" is a job, not a guest')
            case _:
                guest = find(target, await self.guests())
                return Found(guest.pid, guest.name)

    async def pin(self, target: Target) -> Found:
        """As `find`, and for good: the pid cannot pass to another process before it is used.

        Raises ProcessChanged where it has passed to another already.
        """
        found = await self.find(target)
        if target.kind in (Kind.PID, Kind.PIDFILE):
            return found
        try:
            # Read before it is listed again: a pid that changes hands in between no longer matches.
            start_time = pidfile.start_time_of(found.pid)
        except OSError:
            raise NoSuchProcess(f'"{target.shown}", process {found.pid}, has just gone') from None
        guests = [Guest(*row) for row in await self._manager.list_guests()]
        guest = next((g for g in guests if g.pid == found.pid), Guest(found.pid, "", "", 0, ""))
        if not matches(target, guest):
            raise ProcessChanged(
                f'Process {found.pid} was "{target.shown}" a moment ago and is another one by now: '
                "nothing was done. See `qkillctl list`"
            )
        return Found(found.pid, found.name, start_time)

    async def guests(self) -> list[Guest]:
        async with self._listing:
            if self._guests is None:
                self._guests = [Guest(*row) for row in await self._manager.list_guests()]
        return self._guests

    async def job(self, target: Target) -> str:
        """The path of the job that the target names, or of the newest job of its process.

        Raises NoSuchJob.
        """
        if target.kind is not Kind.JOB:
            return await self._manager.job_by_pid((await self.find(target)).pid)
        for number, path, *_ in await self._manager.list_jobs():
            if number == int(target.value):
                return path
        raise NoSuchJob(
            f"There is no job {target.value} (any more): a job is kept for 60 s after its end. "
            "See `qkillctl jobs`"
        )
