"""Judgement of a service's ExecStop=: whether it waits for the guest, and the lines that make it.

Sources: systemd.service(5), ExecStop=, TimeoutStopSec= and NotifyAccess=.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

from qkilld.judgement.finding import Finding, Line, Severity
from qkilld.judgement.stopcommand import (
    HELPER,
    Kind,
    asks_guest,
    is_helper,
    kind_of,
    line_of,
    quoted,
)
from qkilld.judgement.surroundings import Surroundings
from qkilld.model.timespan import format_usec
from qkilld.model.unit import Command, UnitFacts
from qkilld.model.words import INFINITY, USEC_PER_SEC

START: Final = 30 * USEC_PER_SEC
"""So long may qkilld-stop take, with a slow disk and many others, until it first extends (µs)."""
DEFAULT_TIMEOUT: Final = "TimeoutStopSec=90s"
_LOSES, _MAY, _ADVICE = Severity.LOSES, Severity.MAY_LOSE, Severity.ADVICE


def check_helper(facts: UnitFacts, around: Surroundings) -> Iterator[Finding]:
    """With qkilld-stop among its ExecStop= lines."""
    policy, timeout = around.policy, facts.timeout_stop
    first = next(n for n, command in enumerate(facts.exec_stop) if is_helper(command))
    before = facts.exec_stop[:first]
    if any(kind_of(command) is Kind.KILLS for command in before):
        yield _kills(facts, around)
    elif any(not command.ignores_failure for command in before):
        yield Finding(
            "exec-stop-order",
            _MAY,
            f"an ExecStop= comes before {HELPER} and its failure is not ignored",
            f"where it fails systemd does not run {HELPER} but sends SIGTERM, and SIGKILL by the"
            " clock",
            corrected(facts, around),
        )
    if any(kind_of(command) is Kind.SENDS and asks_guest(command) for command in before):
        yield Finding(
            "powerdown-cut",
            _ADVICE,
            f"an ExecStop= before {HELPER} asks the guest to shut down and does not wait for it",
            f"{HELPER} follows with SIGTERM at once: what the disks have acknowledged is kept, what"
            " the guest's system still holds in its memory is not",
        )
    if any(kind_of(command) is Kind.UNKNOWN for command in before) and is_cut(facts):
        yield Finding(
            "exec-stop-slow",
            _ADVICE,
            f"an ExecStop= before {HELPER} has to end by itself, {clock(facts)}",
            f"where it takes longer systemd does not run {HELPER} any more and goes by the clock",
            (Line("Service", "TimeoutStopSec=… (more than it ever takes)", by_hand=True),),
        )
    if facts.notify_access not in ("exec", "all") and is_cut(facts):
        ladder = max(policy.grace, policy.stall, policy.storage_stall) + policy.reap
        short = (
            f", which is less than the {format_usec(ladder)} that storage may stand still"
            if timeout < ladder
            else ""
        )
        yield Finding(
            "notify-access",
            _LOSES,
            f"it has NotifyAccess={facts.notify_access}, {clock(facts)}{short}",
            f"systemd does not listen to {HELPER} when it extends the timeout, and ends the guest"
            " by the clock",
            (Line("Service", "NotifyAccess=exec"),),
        )
    if timeout < START:
        yield Finding(
            "timeout-stop",
            _MAY,
            f"it has TimeoutStopSec={format_usec(timeout)}",
            f"where the host is busy or its disk slow, {HELPER} may not have started by then to"
            " extend the timeout",
            (Line("Service", DEFAULT_TIMEOUT),),
        )


def check_others(facts: UnitFacts, around: Surroundings) -> Iterator[Finding]:
    """Without qkilld-stop."""
    kinds = [kind_of(command) for command in facts.exec_stop]
    mends = _helper_mends(facts, around)
    if not facts.exec_stop:
        if is_cut(facts):
            yield Finding(
                "no-exec-stop",
                _LOSES,
                f"it has no ExecStop=, {clock(facts)}",
                "systemd sends SIGTERM, and what QEMU has not written by then is lost by SIGKILL",
                mends,
            )
        else:
            yield Finding(
                "no-exec-stop",
                _ADVICE,
                "it has no ExecStop=, and no timeout that ends in SIGKILL",
                "nothing is cut off, and nothing tells a guest that still writes from one that is"
                " stuck for good and holds up every stop",
                mends,
            )
    elif Kind.KILLS in kinds:
        yield _kills(facts, around, *_listening(facts))
    else:
        why = (
            "its standard input is /dev/null, where it finds the end at once: it returns early, and"
            if Kind.READS in kinds
            else "it sends its request and returns; then"
            if Kind.SENDS in kinds
            else "it is not known to wait until the guest is gone; where it does not,"
        )
        yield Finding(
            "exec-stop-early",
            _LOSES if {Kind.READS, Kind.SENDS} & set(kinds) and is_cut(facts) else _MAY,
            f"its ExecStop= is {PurePosixPath(facts.exec_stop[-1].path).name}, {clock(facts)}",
            f"{why} systemd sends SIGTERM in the middle of what the guest does, and SIGKILL by the"
            " clock",
            mends,
        )


def has_helper(facts: UnitFacts) -> bool:
    return any(is_helper(command) for command in facts.exec_stop)


def helper_line(facts: UnitFacts, around: Surroundings) -> Line:
    """The ExecStop= of a service.

    `+` runs it outside of the unit's user, root directory and sandbox, which may hide the guest or
    the bus from it; not where a file that the unit's user may write sets its environment, and with
    that what a program of root's loads.
    """
    confined = facts.root or (facts.user and not facts.environment_files)
    return Line("Service", f"ExecStop={'+' if confined else ''}{quoted(around.helper)}")


def corrected(facts: UnitFacts, around: Surroundings) -> tuple[Line, ...]:
    """All of ExecStop= anew: the helper's line as it ought to be, in its place or at the end, and
    around it what was there, without what sends SIGKILL before it."""
    stops = facts.exec_stop
    place = next((n for n, command in enumerate(stops) if is_helper(command)), len(stops))
    before = (command for command in stops[:place] if kind_of(command) is not Kind.KILLS)
    after = (command for command in stops[place:] if not is_helper(command))
    return (
        Line("Service", "ExecStop="),
        *map(_repeated, before),
        helper_line(facts, around),
        *(Line("Service", f"ExecStop={line_of(command)}") for command in after),
    )


def is_cut(facts: UnitFacts) -> bool:
    """Whether the clock ends in SIGKILL."""
    return facts.timeout_stop != INFINITY and facts.sends_sigkill


def clock(facts: UnitFacts) -> str:
    """The unit's timeout, as the end of a sentence."""
    return f"and TimeoutStopSec={format_usec(facts.timeout_stop)}"


def _helper_mends(facts: UnitFacts, around: Surroundings) -> tuple[Line, ...]:
    lines: tuple[Line, ...] = (helper_line(facts, around),)
    if any(not command.ignores_failure for command in facts.exec_stop):
        lines = corrected(facts, around)
    return (*lines, *_listening(facts))


def _listening(facts: UnitFacts) -> Iterator[Line]:
    """So that systemd hears of an extension by the helper, which the unit does not have yet."""
    if facts.notify_access not in ("exec", "all"):
        yield Line("Service", "NotifyAccess=exec")
    if facts.timeout_stop < START:
        yield Line("Service", DEFAULT_TIMEOUT)


def _kills(facts: UnitFacts, around: Surroundings, *more: Line) -> Finding:
    return Finding(
        "exec-stop-kills",
        _LOSES,
        "its ExecStop= sends SIGKILL",
        "QEMU writes nothing out any more",
        (*corrected(facts, around), *more),
    )


def _repeated(command: Command) -> Line:
    """A line of the unit's own once more, so that what comes after it runs even where it fails."""
    return Line("Service", f"ExecStop={line_of(command, ignore_failure=True)}")
