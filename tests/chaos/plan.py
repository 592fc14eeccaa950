"""Generate everything that happens in a run from one seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

GRACE_S: Final = 5.0
STALL_S: Final = 3.0
STORAGE_STALL_S: Final = 8.0
CONFIG: Final = f"""\
[Policy]
GraceSec={GRACE_S:g}s
StallSec={STALL_S:g}s
StorageStallSec={STORAGE_STALL_S:g}s
"""
FIXED_S: Final = 10.0
"""Time before SIGKILL with FIXED."""
EXTEND_S: Final = 12.0
HOLD_S: Final = 8.0
FORCE, NOWAIT, FIXED = 1, 2, 8


class Kind(StrEnum):
    """What a guest does, and how it is stopped."""

    POLITE = "exits on SIGTERM"
    QEMU = "a real QEMU"
    FLUSHING = "flushes, FORCE"
    FORCED = "ignores SIGTERM, FORCE"
    FIXED = "ignores SIGTERM, FORCE and FIXED"
    SPARED = "ignores SIGTERM, no FORCE"
    NOWAIT = "ignores SIGTERM, NOWAIT"
    CANCELLED = "ignores SIGTERM, FORCE, cancelled"
    HELD = "ignores SIGTERM, FORCE, held"
    EXTENDED = "ignores SIGTERM, FORCE, extended"
    BYSTANDER = "nobody stops it"


JOIN_S: Final = 10.0
"""In the plans with only one kind of fault: the first stops are requested within this time, before
the faults begin."""
KILL_GAP_S: Final = (0.1, 1.0)
"""The shortest and the longest time between two kills. If the average were shorter, systemd would
refuse to start the daemon again."""
KILL_RETRY_S: Final = 20.0
READY_S: Final = 1.0
LOOK_S: Final = 1.0
MARGIN_S: Final = 3.0
"""No signal is due for this time (s) before the incident ends, and for the same time after that."""
COMPARED_S: Final = 18.0
"""How long signals are measured after the incident, for comparison."""

_FLAGS: Final = {
    Kind.FLUSHING: FORCE,
    Kind.FORCED: FORCE,
    Kind.FIXED: FORCE | FIXED,
    Kind.NOWAIT: NOWAIT,
    Kind.CANCELLED: FORCE,
    Kind.HELD: FORCE,
    Kind.EXTENDED: FORCE,
}


_LONG: Final = (Kind.FORCED, Kind.FIXED, Kind.SPARED, Kind.HELD, Kind.EXTENDED)
"""The kinds of guests whose jobs run as long as their clients allow."""
_SHORT: Final = (Kind.POLITE, Kind.FLUSHING, Kind.NOWAIT, Kind.CANCELLED)


@dataclass(frozen=True)
class Act:
    """Another call of a client for its job."""

    after: float
    """Seconds after the reply to the call that started the job."""
    member: str
    usec: int | None = None


@dataclass(frozen=True)
class Guest:
    """A process, and its job."""

    number: int
    kind: Kind
    start: float
    """When the stop is requested: seconds after the start of the run."""
    flags: int
    milliseconds: int
    """How long the process takes to exit after SIGTERM."""
    acts: Sequence[Act] = ()
    grace_s: float = 0.0
    """The grace that the client requests. If it is 0, GRACE_S or FIXED_S applies."""
    look_s: float = 0.0
    """The interval (s) at which the client reads the properties of the job; 0 if it never does."""

    @property
    def least_s(self) -> float:
        """The shortest time from the request to SIGKILL."""
        return self.grace_s or (FIXED_S if self.flags & FIXED else GRACE_S)

    @property
    def mode(self) -> str:
        """The mode of the stand-in."""
        if self.kind in (Kind.POLITE, Kind.FLUSHING):
            return self.kind.name.lower()
        return "stubborn"


class Fault(StrEnum):
    """Something that fails."""

    KILL = "SIGKILL to the daemon"
    STOP = "SIGSTOP to the daemon"
    BUS = "a restart of the bus"
    JOURNALD = "SIGSTOP to journald"
    FULL = "/run is full"
    REEXEC = "systemd executes itself anew"
    CLOCK = "the clock jumps"


_LASTS: Final = {Fault.STOP: (0.3, 4.0), Fault.JOURNALD: (1.0, 6.0), Fault.FULL: (0.5, 3.0)}
"""The shortest and the longest duration (s) of the faults that the lab must end."""


@dataclass(frozen=True)
class Incident:
    at: float
    """Seconds after the start of the run."""
    fault: Fault
    lasts: float = 0.0
    shift: int = 0
    """Change of the clock, in seconds."""
    retry_s: float = 0.0
    """If no daemon runs: how long to wait for one, in order to kill it."""
    ready_s: float | None = None
    """Kill the daemon this long after it is ready. None: kill it at once, even while it starts."""
    fills: bool = False
    """Whether to fill journald's socket, so that every service that logs must wait."""


@dataclass(frozen=True)
class Plan:
    guests: Sequence[Guest]
    incidents: Sequence[Incident]
    seconds: float
    """The end of the last incident, in seconds after the start of the run."""
    patience_s: float = 150.0
    """How long to wait for jobs after `seconds`."""
    realtime: bool = False
    """Whether the daemon gets a real-time priority, so that other load of the host does not affect
    the figures."""


def make(seed: int, *, jobs: int, seconds: float, qemus: int, bystanders: int = 5) -> Plan:
    """Return a plan whose jobs and incidents begin within `seconds`."""
    rng = random.Random(seed)
    kinds = [kind for kind in Kind if kind not in (Kind.QEMU, Kind.BYSTANDER)]
    chosen = [Kind.QEMU] * qemus + [kinds[i % len(kinds)] for i in range(jobs - qemus)]
    rng.shuffle(chosen)
    guests = [_guest(rng, number, kind, seconds) for number, kind in enumerate(chosen)]
    guests += [Guest(jobs + i, Kind.BYSTANDER, 0.0, 0, 0) for i in range(bystanders)]
    incidents = _incidents(rng, seconds)
    end = max(incident.at + incident.lasts for incident in incidents)
    return Plan(tuple(guests), tuple(incidents), end)


def kills(seed: int, *, jobs: int, count: int, qemus: int, realtime: bool = False) -> Plan:
    """Return a plan in which the daemon is killed `count` times, and nothing else fails.

    At the start, `jobs` guests that ignore SIGTERM are stopped. Their SIGKILL is due in the second
    half of the run, so all these jobs run at least that long. Half as many other guests, and the
    QEMUs, are stopped at random times.
    """
    rng = random.Random(seed)
    at = JOIN_S
    incidents: list[Incident] = []
    for _ in range(count):
        # Kill some daemons only when they are ready. On a busy machine, the start takes long, and
        # if every daemon were killed while it starts, no job would end.
        ready_s = rng.uniform(0.0, READY_S) if len(incidents) % 2 else None
        at += rng.uniform(*KILL_GAP_S)
        incidents.append(Incident(at, Fault.KILL, retry_s=KILL_RETRY_S, ready_s=ready_s))
        at += ready_s or 0.0
    guests = []
    for number in range(jobs):
        guest = _guest(rng, number, _LONG[number % len(_LONG)], 0.0)
        grace_s = max(GRACE_S, rng.uniform(at / 2, at))
        guests.append(replace(guest, start=rng.uniform(0.0, JOIN_S), grace_s=grace_s))
    others = [_SHORT[i % len(_SHORT)] for i in range(jobs // 2)] + [Kind.QEMU] * qemus
    guests += [_guest(rng, jobs + i, kind, at) for i, kind in enumerate(others)]
    guests += [Guest(len(guests) + i, Kind.BYSTANDER, 0.0, 0, 0) for i in range(5)]
    # Wait long for the end, because on a busy machine, each planned SIGKILL may be delayed until
    # the daemon is ready.
    return Plan(tuple(guests), tuple(incidents), at, patience_s=150.0 + 2 * at, realtime=realtime)


def journald(seed: int, *, jobs: int, lasts: float, realtime: bool = False) -> Plan:
    """Return a plan in which journald does not read for `lasts` seconds.

    During this time, SIGKILL is due for `jobs` guests that ignore SIGTERM, and half as many other
    guests are stopped. Afterwards, the same is done with half the number of both kinds, for
    comparison.
    """
    rng = random.Random(seed)
    begin, end = JOIN_S, JOIN_S + lasts
    guests: list[Guest] = []

    def add(count: int, since: float, until: float) -> None:
        """Add guests whose SIGTERM or SIGKILL is due between these times."""
        for i in range(count + jobs // 2):
            kind = Kind.POLITE if i >= count else (Kind.FORCED, Kind.FIXED)[i % 2]
            guest = _guest(rng, len(guests), kind, 0.0)
            due, start = rng.uniform(since, until), rng.uniform(0.0, JOIN_S)
            if kind is Kind.POLITE:
                guests.append(replace(guest, start=due, look_s=LOOK_S))
            else:
                guests.append(replace(guest, start=start, grace_s=due - start, look_s=LOOK_S))

    add(jobs, begin + GRACE_S, end - MARGIN_S)
    add(jobs // 2, end + MARGIN_S, end + COMPARED_S)
    incident = Incident(begin, Fault.JOURNALD, lasts, fills=True)
    return Plan(tuple(guests), (incident,), end, realtime=realtime)


def _guest(rng: random.Random, number: int, kind: Kind, seconds: float) -> Guest:
    flags = _FLAGS.get(kind, rng.choice((0, FORCE)) if kind in (Kind.POLITE, Kind.QEMU) else 0)
    acts: list[Act] = []
    if kind is Kind.CANCELLED:
        acts.append(Act(rng.uniform(0.1, 3.0), "Cancel"))
    elif kind is Kind.HELD:
        begin = rng.uniform(0.1, 2.0)
        acts += [Act(begin, "Hold"), Act(begin + HOLD_S, "Release")]
    elif kind is Kind.EXTENDED:
        acts.append(Act(rng.uniform(0.1, 2.0), "Extend", int(EXTEND_S * 1e6)))
    takes = rng.randint(50, 800) if kind is Kind.POLITE else rng.randint(6_000, 14_000)
    return Guest(number, kind, rng.uniform(0.0, seconds * 0.8), flags, takes, tuple(acts))


def _incidents(rng: random.Random, seconds: float) -> list[Incident]:
    """Generate incidents. If time allows, every fault occurs at least once. Incidents of the same
    lasting fault do not overlap."""
    found: list[Incident] = []
    free: dict[Fault, float] = {}
    turns = [fault for fault in Fault for _ in range(3 if fault is Fault.KILL else 1)]
    order: list[Fault] = []
    at = 0.5
    while at < seconds:
        if not order:
            order = rng.sample(turns, len(turns))
        fault = order.pop()
        if free.get(fault, 0.0) <= at:
            lasts = rng.uniform(*_LASTS.get(fault, (0.0, 0.0)))
            shift = rng.choice((-3600, 3600, -86_400, 40, 0)) if fault is Fault.CLOCK else 0
            found.append(Incident(at, fault, lasts, shift))
            free[fault] = at + lasts + 0.5
        at += rng.uniform(0.2, 1.4)
    return found
