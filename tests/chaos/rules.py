"""Check each guest after a run. Sources are the guest's own log and the events of its client.

All times are seconds of the same CLOCK_MONOTONIC. Signals are recorded after they were sent, and
calls are recorded before they take effect. So every span measured here is longer than the daemon's
own. A measured span that is too short is therefore an error, even on a busy host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from signal import SIGTERM
from typing import Any, Final

from tests.chaos.plan import (
    EXTEND_S,
    FORCE,
    STALL_S,
    Fault,
    Guest,
    Incident,
    Kind,
)

SAVED_S: Final = 1.0
"""When /run has space again, jobs are saved within this time."""

Lasted = tuple[Incident, float, float]
"""An incident with its start and end."""


@dataclass
class Record:
    """What is known about one guest."""

    guest: Guest
    signals: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, signal number, uid of the sender) of each signal except SIGKILL, according to the
    guest's own log."""
    writes: list[float] = field(default_factory=list)
    asked: dict[str, list[float]] = field(default_factory=dict)
    """The times of the client's calls, by member."""
    answered: dict[str, list[float]] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(member, error name)."""
    result: str = ""
    gone: float | None = None
    """When the guest exited."""
    killed: bool = False
    """Whether SIGKILL ended the guest."""
    status: int = 0
    """The guest's exit code, or the signal that killed it."""
    pid: int = 0
    sent: dict[str, float] = field(default_factory=dict)
    """When the daemon first took each action, in seconds after the start of the job."""
    started: float = 0.0
    """The start of the job, as the daemon announced it."""
    due: float = 0.0
    """When SIGKILL was due, according to the daemon's last announcement; 0 for never."""
    looks: list[tuple[float, float]] = field(default_factory=list)
    """(time, duration) of each call for the job's properties."""
    faults: list[str] = field(default_factory=list)
    """Errors of the agent."""

    def first(self, member: str) -> float:
        """Return the time of the first call of a member; infinity if there was none."""
        return min(self.asked.get(member, []), default=float("inf"))

    def done(self, member: str) -> float:
        """Return the time of the first reply to a member; infinity if there was none."""
        return min(self.answered.get(member, []), default=float("inf"))


def outcome(record: Record, incidents: Sequence[Lasted]) -> str:
    """Return how the job ended; "" if this is unknown."""
    if record.guest.kind is Kind.BYSTANDER:
        return "untouched"
    if record.result == "exited" and record.killed and _unsaved(record.gone, incidents):
        return "killed, which could not be saved"
    if record.result:
        return record.result
    missing = ("Terminate", "org.qkilld1.Error.NoSuchProcess") in record.refused
    if record.gone is not None and missing:
        # The call that stopped the guest got no reply, and the next call found no process.
        return "gone before an answer"
    if any(_unsaved(at, incidents) for times in record.answered.values() for at in times):
        return "unfinished, because it could not be saved"
    return ""


def _unsaved(at: float | None, incidents: Sequence[Lasted]) -> bool:
    """Return whether, at that time, the daemon could not save its state, and reported so.

    In this case, the daemon continues its jobs, but the next daemon has only the state that was
    saved last.
    """
    return at is not None and any(
        incident.fault is Fault.FULL and begin <= at <= end + SAVED_S
        for incident, begin, end in incidents
    )


def broken(record: Record, incidents: Sequence[Lasted]) -> Iterator[str]:
    """Yield a message for each rule that is broken."""
    guest = record.guest
    if guest.kind is Kind.BYSTANDER:
        if record.signals or record.gone is not None:
            yield f"a bystander got {record.signals}, gone: {record.gone}"
        return
    yield from _signals(record)
    yield from _fate(record)
    if not (word := outcome(record, incidents)):
        yield f"the job is not accounted for: refused {record.refused}, gone {record.gone}"
        yield from record.faults
    elif word == "exited" and (record.killed or record.gone is None):
        yield f'the result is "exited"; killed: {record.killed}, gone: {record.gone}'
    elif word == "killed" and not record.killed:
        yield 'the result is "killed", but the process was not killed'


def _signals(record: Record) -> Iterator[str]:
    """Check the signals that the guest recorded."""
    began = record.first("Terminate")
    for at, number, uid in record.signals:
        if number != SIGTERM:
            yield f"it got signal {number}"
        if uid != 0:
            yield f"it got a signal from uid {uid}"
        if at < began:
            yield f"it got SIGTERM {began - at:.3f} s before it was asked for"


def _fate(record: Record) -> Iterator[str]:
    """Check that SIGKILL was allowed, and not sent too early."""
    guest, at = record.guest, record.gone
    if not record.killed:
        if at is not None and record.status != 0:
            yield f"it exited with code {record.status}"
        return
    assert at is not None
    if record.status != 9:
        yield f"it was ended by signal {record.status}"
    if not guest.flags & FORCE:
        yield "it was killed without FORCE"
        return
    if (span := at - record.first("Terminate")) < guest.least_s:
        yield f"it was killed {span:.3f} s after the first call, and not {guest.least_s:g}"
    if record.writes and (span := at - record.writes[-1]) < STALL_S:
        yield f"it was killed {span:.3f} s after it had written"
    if at > record.done("Cancel"):
        yield "it was killed after the job was cancelled"
    if record.done("Hold") < at < record.first("Release"):
        yield "it was killed while it was held"
    if (span := at - record.first("Extend")) < EXTEND_S and at > record.done("Extend"):
        yield f"it was killed {span:.3f} s after it was extended by {EXTEND_S:g}"


def record_of(guest: Guest, events: Sequence[Any], log: str) -> Record:
    """Combine the agent's events about the guest with the guest's own log."""
    record = Record(guest)
    for event in events:
        detail = event.detail
        match event.what:
            case "asked":
                record.asked.setdefault(detail["member"], []).append(event.at)
            case "answered":
                record.answered.setdefault(detail["member"], []).append(event.at)
            case "refused":
                record.refused.append((detail["member"], detail["name"]))
            case "started":
                record.pid = detail["pid"]
            case "looked":
                record.looks.append((event.at - detail["took"], detail["took"]))
                record.due = detail["due"] or record.due
                record.started = detail["started"]
            case "result":
                record.result = detail["result"]
                record.sent = dict(reversed(detail["rungs"]))
            case "gone":
                record.gone, record.killed = event.at, detail["signal"]
                record.status = detail["status"]
            case "fault" | "lost":
                record.faults.append(f"its client gave up: {detail}")
    for line in log.splitlines():
        word, *numbers = line.split()
        at = int(numbers[0]) / 1e9
        if word == "SIGNAL":
            record.signals.append((at, int(numbers[1]), int(numbers[2])))
        elif word == "WROTE":
            record.writes.append(at)
    return record
