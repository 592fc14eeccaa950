"""Derive the state of a run at each time from its schedule, and the right results from the state.

Times are seconds from the request to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from qkilld.model.constants import Verdict
from tests.campaign.spec import HOST, PROCESS, Change, Disk, Spec

INFINITY: Final = float("inf")


class State(Enum):
    """The state of what QEMU needs in order to exit, the worst first."""

    STOPPED = "the process cannot run"
    BLOCKED = "it waits for something other than storage"
    STILL = "storage does nothing"
    GAPS = "storage moves now and then"
    SLOW = "storage moves"
    BROKEN = "storage fails"
    FAST = "nothing is slow"


RIGHT: Final = {
    State.STOPPED: frozenset({Verdict.STOPPED}),
    State.BLOCKED: frozenset({Verdict.BLOCKED, Verdict.UNKNOWN, Verdict.STORAGE_WAIT}),
    State.STILL: frozenset({Verdict.STORAGE_WAIT}),
    State.GAPS: frozenset({Verdict.FLUSHING, Verdict.STORAGE_WAIT}),
    State.SLOW: frozenset({Verdict.FLUSHING}),
}
"""The right verdicts in each state. In other states, any verdict is right."""
RETRY_S: Final = 17.0
"""QEMU reconnects within this time after a server has come back."""
GIVES_UP_S: Final = 13.0
"""QEMU closes the connection to a silent iSCSI target after this time (three NOPs, 5 s apart). Then
QEMU may write to its other disks before it waits for the next reply."""
SETTLES_S: Final = 16.0
"""Within this time after GIVES_UP_S, QEMU closes the connection, and may therefore write to another
disk."""
BOUNDED: Final = frozenset({State.STOPPED, State.BLOCKED, State.STILL})
"""States without movement, in which it is wrong to wait forever."""


@dataclass(frozen=True)
class Span:
    since: float
    """At least 0."""
    until: float
    state: State
    mixed: bool = False
    """Whether QEMU may also be in another state, because another disk moves at the same time, or
    because the server is back but QEMU has not reconnected yet."""
    reconnects: bool = False
    """Whether `mixed` is true because QEMU may close an iSCSI connection, and then write to another
    disk."""

    def __contains__(self, at: float) -> bool:
        return self.since <= at < self.until


@dataclass(frozen=True)
class Truth:
    spec: Spec
    spans: Sequence[Span]
    pauses: Sequence[tuple[float, float]]
    """The intervals in which the whole host was paused."""
    changes: Sequence[float]

    def at(self, when: float) -> Span:
        return next(span for span in self.spans if when in span)

    def looked(self, since: float, until: float) -> float:
        """Return the seconds between these times in which the host was not paused."""
        paused = sum(max(0.0, min(until, end) - max(since, begin)) for begin, end in self.pauses)
        return until - since - paused

    def stands_since(self, span: Span) -> float:
        """Return the start of the standstill that contains the span. A standstill may consist of
        several spans that differ only in `mixed`."""
        since = span.since
        for before in reversed([other for other in self.spans if other.until <= span.since]):
            if before.state is not span.state or before.until != since:
                break
            since = before.since
        return since

    def earliest_kill(self, span: Span) -> float:
        """Return the earliest correct SIGKILL, in seconds after the start of the span."""
        if span.state is State.STOPPED:
            return max(self.spec.stall, self.spec.grace)
        return self.spec.storage_stall if span.state in BOUNDED else INFINITY


def truth(spec: Spec, applied: Sequence[tuple[float, Change]]) -> Truth:
    """Derive the truth from the changes and their actual times, oldest first."""
    states = [State.FAST] * len(spec.disks)
    slow = [False] * len(spec.disks)
    process = State.FAST
    spans: list[Span] = []
    pauses: list[tuple[float, float]] = []
    for number, (at, change) in enumerate(applied):
        until = applied[number + 1][0] if number + 1 < len(applied) else INFINITY
        returned = at
        if change.of == PROCESS:
            process = _PROCESS.get(change.what, State.FAST)
        elif change.of == HOST:
            if change.what == "pause":
                pauses.append((at, INFINITY))
            else:
                pauses[-1] = (pauses[-1][0], at)
        else:
            of = change.of
            if change.what in ("slow", "fast"):
                slow[of] = change.what == "slow"
            if change.what == "back":
                returned = min(until, at + RETRY_S)
                _add(spans, at, returned, states, process, mixed=True)
            states[of] = _disk_state(spec.disks[of], change, slow[of])
            if spec.disks[of].kind == "iscsi" and states[of] is State.STILL and len(states) > 1:
                for edge, gives_up in ((GIVES_UP_S, False), (GIVES_UP_S + SETTLES_S, True)):
                    _add(spans, returned, min(until, at + edge), states, process, gives_up=gives_up)
                    returned = max(returned, min(until, at + edge))
        _add(spans, returned, until, states, process)
    if not spans or spans[0].since > 0:
        until = applied[0][0] if applied else INFINITY
        spans.insert(0, Span(0, until, State.FAST))
    return Truth(spec, spans, pauses, [at for at, _ in applied])


def _add(
    spans: list[Span],
    since: float,
    until: float,
    states: Sequence[State],
    process: State,
    *,
    mixed: bool = False,
    gives_up: bool = False,
) -> None:
    since, until = max(0.0, since), max(0.0, until)
    if until <= since:
        return
    state = min([*states, process], key=list(State).index)
    mixed = mixed or (state is State.STILL and bool({State.SLOW, State.GAPS} & set(states)))
    gives_up = gives_up and not mixed
    kind = (state, mixed or gives_up, gives_up)
    if spans and (spans[-1].state, spans[-1].mixed, spans[-1].reconnects) == kind:
        since = spans.pop().since
    spans.append(Span(since, until, *kind))


_PROCESS: Final = {"frozen": State.STOPPED, "trace": State.STOPPED, "pipe": State.BLOCKED}
"""The state of the process after each of these changes. `stop` is missing, because qkilld sends
SIGCONT at once."""


def _disk_state(disk: Disk, change: Change, slow: bool) -> State:
    match change.what:
        case "freeze" | "dead":
            return State.STILL
        case "hang":
            return State.GAPS if change.value else State.STILL
        case "leave":
            # A proxy that loses its server continues to run, and answers with errors.
            reconnects = disk.kind == "nbd" and disk.reconnect and not disk.proxy
            waits = disk.kind == "iscsi" or reconnects
            return State.STILL if waits else State.BROKEN
        case "fail":
            return State.BROKEN
    return State.SLOW if slow else State.FAST
