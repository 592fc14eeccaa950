"""Follow one wait from sample to sample: compare the values of its signs. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from qkilld.decision.connections import Connections
from qkilld.decision.server_signs import is_own_work
from qkilld.decision.signs import RISE, WINDOW, Sign, SignKind
from qkilld.decision.waits import Wait, WaitKind
from qkilld.model.dataclass import dataclass
from qkilld.model.sample import Thread

MAX_MARKS: Final = 256
"""If a wait has more marks than this, those of missing signs are forgotten. The readers limit the
number of present signs."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The value with which the next value of a sign is compared."""

    name: str
    value: int
    at: int
    """When the value was first read; for TRAFFIC, when its window began. CLOCK_MONOTONIC, µs."""
    switches: int | None = None
    """Sign.switches when the value was read. But if Sign.switches was unreadable then, or the count
    had begun again, the value of the mark before."""


@dataclass(frozen=True, slots=True)
class OpenWait:
    """A wait, tracked across samples. Times are CLOCK_MONOTONIC in µs."""

    key: str
    kind: WaitKind
    text: str
    since: int
    """When the wait was first seen."""
    moved_at: int | None
    """When a sign of the wait last moved; None for never."""
    moved_by: str
    """The description of the movement at `moved_at`; "" for none."""
    marks: tuple[Mark, ...]
    doubted_at: int | None
    """When a doubtful sign last moved; None for never."""
    doubted_by: str
    watched_at: int | None
    """When `watched` last increased."""
    watched: int = 0
    """The largest Wait.watched so far."""
    connections: Connections = Connections()
    certain: bool = False
    """Wait.certain in the last sample that showed the wait."""
    holds_sigterm: bool = False
    """Wait.holds_sigterm in the same sample."""
    calls: frozenset[str] = frozenset()
    """calls_of(Wait.threads) in the same sample."""
    by_server: bool = False
    """Whether only the own work of servers moved at `moved_at`."""


def new_wait(wait: Wait, at: int) -> OpenWait:
    """Return the wait as it is in its first sample, taken at `at` (µs)."""
    return OpenWait(
        key=wait.key,
        kind=wait.kind,
        text=wait.text,
        since=at,
        moved_at=None,
        moved_by="",
        marks=tuple(_mark(sign, at) for sign in wait.signs),
        doubted_at=None,
        doubted_by="",
        watched_at=at if wait.watched else None,
        watched=wait.watched,
        connections=Connections().follow(wait.connections, at),
        certain=wait.certain,
        holds_sigterm=wait.holds_sigterm,
        calls=calls_of(wait.threads),
    )


def update_wait(wait: Wait, old: OpenWait, at: int) -> OpenWait:
    """Return the wait after one more sample, taken at `at` (µs)."""
    marks = {mark.name: mark for mark in old.marks}
    movement, doubted = (old.moved_at, old.moved_by), (old.doubted_at, old.doubted_by)
    by_server = old.by_server
    connections = old.connections.follow(wait.connections, at)
    for sign in wait.signs:
        mark = marks.get(sign.name)
        if mark is not None and _has_moved(sign, mark):
            if sign.is_reply:
                connections = connections.answered()
            # With an unreadable mark, it is unknown whether the process has run since then.
            has_run = sign.switches is None or mark.switches is not None
            if sign.sure and has_run and (sign.is_reply or not connections.repeats):
                by_server = is_own_work(sign) and (by_server or movement[0] != at)
                movement = at, sign.text
            else:
                doubted = at, sign.text
        marks[sign.name] = _new_mark(sign, mark, at)
    kept_marks = tuple(marks.values())
    if len(kept_marks) > MAX_MARKS:
        # Otherwise, keep the marks of missing signs: a sign may reappear, for example if a server
        # was not read this time.
        present = {sign.name for sign in wait.signs}
        room = max(0, MAX_MARKS - len(present))
        missing = [mark for mark in kept_marks if mark.name not in present][:room]
        kept_marks = (*(mark for mark in kept_marks if mark.name in present), *missing)
    return OpenWait(
        key=wait.key,
        kind=wait.kind,
        text=wait.text,
        since=old.since,
        moved_at=movement[0],
        moved_by=movement[1],
        marks=kept_marks,
        doubted_at=doubted[0],
        doubted_by=doubted[1],
        watched_at=at if wait.watched > old.watched else old.watched_at,
        watched=max(wait.watched, old.watched),
        connections=connections,
        certain=wait.certain,
        holds_sigterm=wait.holds_sigterm,
        calls=calls_of(wait.threads),
        by_server=by_server,
    )


def calls_of(threads: Iterable[Thread]) -> frozenset[str]:
    """Return names of the threads that change if the threads run."""
    return frozenset(f"{thread.tid} {thread.switches}" for thread in threads)


def _mark(sign: Sign, at: int) -> Mark:
    return Mark(sign.name, sign.value, at, sign.switches)


def _has_moved(sign: Sign, mark: Mark) -> bool:
    if _must_wait(sign, mark):
        return False
    match sign.kind:
        case SignKind.COUNT | SignKind.TRAFFIC:
            # A counter that has fallen was reset, so this does not count as movement.
            return sign.value - mark.value >= sign.least
        case SignKind.CHANGE:
            return sign.value != mark.value
        case SignKind.LOW | SignKind.FALL:
            return mark.value - sign.value >= sign.least
        case SignKind.QUIET:
            return False


def _must_wait(sign: Sign, mark: Mark) -> bool:
    """Return whether the sign cannot move, because the process has not run."""
    return sign.switches is not None and sign.switches == mark.switches


def _new_mark(sign: Sign, mark: Mark | None, at: int) -> Mark:
    if mark is None:
        return _mark(sign, at)
    if _stays(mark, sign, at):
        return mark
    new = _mark(sign, at)
    if mark.switches is not None and sign.value < mark.value:
        # If the process has also run, the reply that made it run is not counted yet.
        return replace(new, switches=mark.switches)
    return new


def _stays(mark: Mark, sign: Sign, at: int) -> bool:
    """Return whether the next value of the sign is compared with the same mark."""
    grown = sign.value - mark.value
    if _must_wait(sign, mark) or (sign.switches is None and mark.switches is not None):
        return grown >= 0
    match sign.kind:
        case SignKind.COUNT:
            return 0 <= grown < sign.least
        case SignKind.CHANGE:
            return False
        case SignKind.LOW:
            return -grown < sign.least
        case SignKind.FALL:
            return -sign.least < grown < RISE
        case SignKind.TRAFFIC:
            return 0 <= grown < sign.least and at - mark.at < WINDOW
        case SignKind.QUIET:
            return grown == 0
