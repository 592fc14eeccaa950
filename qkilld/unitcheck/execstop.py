"""Judge whether a service's ExecStop= waits for the guest, and find the lines that make it wait.

Sources: systemd.service(5), ExecStop=, TimeoutStopSec= and NotifyAccess=.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from qkilld.model.constants import INFINITY, USEC_PER_SEC
from qkilld.model.timespan import format_usec
from qkilld.model.unit import UnitFacts
from qkilld.unitcheck.command import HELPER, helper_arguments, is_helper, line_of, quoted
from qkilld.unitcheck.command_text import helper_arguments_of, ignoring_failure
from qkilld.unitcheck.context import (
    Surroundings,
    can_ask,
    forces,
    helper_fault,
    helper_hurry,
    helper_limit,
    helper_reach,
    hides_bus,
    hides_helper,
    stop_lines,
)
from qkilld.unitcheck.finding import Finding, Line, Severity
from qkilld.unitcheck.programs import IGNORED
from qkilld.unitcheck.stop_act import ActKind
from qkilld.unitcheck.stop_line import StopLine
from qkilld.unitcheck.stop_outcome import Helper

_ENDING: Final = (ActKind.TERMINATES, ActKind.KILLS, ActKind.WAITS, ActKind.SLEEPS)
START: Final = 30 * USEC_PER_SEC
"""The longest time (µs) until qkilld-stop first extends the timeout, if the disk is slow and
busy."""
DEFAULT_TIMEOUT: Final = "TimeoutStopSec=90s"
_LOSES, _MAY, _ADVICE = Severity.LOSES, Severity.MAY_LOSE, Severity.ADVICE


def check_helper(facts: UnitFacts, surroundings: Surroundings) -> Iterator[Finding]:
    """Check a unit with qkilld-stop in ExecStop=."""
    first = next(n for n, command in enumerate(facts.exec_stop) if is_helper(command))
    before, lines = facts.exec_stop[:first], stop_lines(facts, surroundings)[:first]
    if any(line.has(ActKind.KILLS) for line in lines):
        yield _kills(facts, surroundings)
    elif any(not command.ignores_failure for command in before):
        yield Finding(
            "exec-stop-order",
            _MAY,
            f"the failure of an ExecStop= before {HELPER} is not ignored",
            f"after a failure, systemd does not run {HELPER} but sends SIGTERM, and SIGKILL at the"
            " timeout",
            corrected(facts, surroundings),
        )
    if _goes_on_without_helper(facts):
        kills = any(line.has(ActKind.KILLS) for line in stop_lines(facts, surroundings)[first:])
        yield Finding(
            "exec-stop-order",
            _LOSES if kills else _MAY,
            f"the failure of {HELPER} is ignored, and another ExecStop= follows it",
            f"if {HELPER} is cancelled or cannot stop the guest, systemd runs that line while the"
            " guest still runs",
            corrected(facts, surroundings),
        )
    yield from _check_by_name(stop_lines(facts, surroundings))
    if can_ask(facts, surroundings) is not True and any(_asks_and_returns(line) for line in lines):
        yield Finding(
            "powerdown-cut",
            _ADVICE,
            f"an ExecStop= before {HELPER} asks the guest to shut down and does not wait for it",
            f"if {HELPER} cannot ask the guest itself, it sends SIGTERM at once: data that the "
            "disks have acknowledged is kept, data in the guest's memory is not",
        )
    if any(not line.is_understood for line in lines) and is_cut(facts):
        program = next(line.shown for line in lines if not line.is_understood)
        yield Finding(
            "exec-stop-slow",
            _ADVICE,
            f"{program}, an ExecStop= before {HELPER}, has to return in time, {timeout_of(facts)}",
            f"if it takes longer, systemd does not run {HELPER} but sends SIGTERM, and SIGKILL at"
            " the timeout",
            (Line("Service", "TimeoutStopSec=… (more than it ever takes)", by_hand=True),),
        )
    yield from _check_arguments(facts, surroundings)
    yield from _check_listening(facts, surroundings)
    yield from _check_sandbox(facts, surroundings)


def _goes_on_without_helper(facts: UnitFacts) -> bool:
    """Return whether a line of qkilld-stop ignores failures, and other lines follow it."""
    return any(
        is_helper(command) and command.ignores_failure and not _is_last(facts, number)
        for number, command in enumerate(facts.exec_stop)
    )


def _is_last(facts: UnitFacts, number: int) -> bool:
    return all(map(is_helper, facts.exec_stop[number + 1 :]))


def _check_listening(facts: UnitFacts, surroundings: Surroundings) -> Iterator[Finding]:
    policy, timeout = surroundings.policy, facts.timeout_stop
    if facts.notify_access not in ("exec", "all") and is_cut(facts):
        ladder = max(policy.grace, policy.stall, policy.storage_stall) + policy.reap
        short = (
            f", less than the {format_usec(ladder)} for which storage may stand still"
            if timeout < ladder
            else ""
        )
        yield Finding(
            "notify-access",
            _LOSES,
            f"it has NotifyAccess={facts.notify_access}, {timeout_of(facts)}{short}",
            f"systemd ignores the extensions of {HELPER}, and kills the guest at the timeout",
            (Line("Service", "NotifyAccess=exec"),),
        )
    if timeout < START:
        yield Finding(
            "timeout-stop",
            _MAY,
            f"it has TimeoutStopSec={format_usec(timeout)}",
            f"if the host is busy or its disk slow, {HELPER} may start too late to extend the"
            " timeout",
            (Line("Service", DEFAULT_TIMEOUT),),
        )


def _check_sandbox(facts: UnitFacts, surroundings: Surroundings) -> Iterator[Finding]:
    helpers = [command for command in facts.exec_stop if is_helper(command)]
    hiding = hides_helper(facts)
    if hiding and not facts.root and not any("privileged" in each.flags for each in helpers):
        yield Finding(
            "helper-sandbox",
            _LOSES,
            f"with its {hiding}, {HELPER} cannot run or sees no guest, {timeout_of(facts)}",
            "systemd sends SIGTERM at once, and SIGKILL at the timeout. With the prefix +, "
            f"{HELPER} runs outside of the sandbox",
            corrected(facts, surroundings),
        )
        return
    hiding = hides_bus(facts)
    if hiding and is_cut(facts) and not any("privileged" in each.flags for each in helpers):
        yield Finding(
            "helper-sandbox",
            _LOSES,
            f"its {hiding} hides the bus and systemd's notify socket from {HELPER}, "
            f"{timeout_of(facts)}",
            f"{HELPER} can neither ask qkilld to stop the guest nor extend the timeout, at which "
            f"systemd kills the guest. With the prefix +, {HELPER} runs outside of the sandbox",
            corrected(facts, surroundings),
        )


def _check_arguments(facts: UnitFacts, surroundings: Surroundings) -> Iterator[Finding]:
    policy = surroundings.policy
    prefix = "+" if facts.user and not _may_be_theirs(facts) else ""
    plain = (Line("Service", f"ExecStop={prefix}{quoted(surroundings.helper)}", by_hand=True),)
    for command in facts.exec_stop:
        if not is_helper(command):
            continue
        if fault := helper_fault(facts, surroundings, command):
            yield Finding(
                "helper-target",
                _LOSES,
                f"its {HELPER} {fault}",
                "systemd then sends SIGTERM to the unit's own guest, and SIGKILL at the timeout",
                plain,
            )
            continue
        limit = helper_limit(command, policy)
        if limit and (is_cut(facts) or forces(command)):
            yield Finding(
                "helper-max",
                _MAY,
                f"its {HELPER} has {limit}",
                "after this time, the guest is killed, or left to systemd's signals, even while it "
                "still writes"
                if limit.startswith("--max")
                else "this is shorter than configured: the guest is killed, or left to systemd's "
                "signals, while a slow disk may still write its data",
                plain,
            )
        if hurry := helper_hurry(command, policy):
            yield Finding(
                "helper-powerdown",
                _ADVICE,
                f"its {HELPER} has {hurry}",
                "the guest's operating system is not asked to shut down, or not as long as "
                "configured: data in its memory may be lost",
                plain,
            )


def _check_by_name(lines: Sequence[StopLine]) -> Iterator[Finding]:
    for line in lines:
        if line.is_by_name:
            yield Finding(
                "exec-stop-by-name",
                _ADVICE,
                f"its ExecStop= is {line.shown}, which signals processes by their name",
                "guests of other units whose process has the same name get the signal too, and"
                " their ExecStop= does not run",
                (Line("Service", "ExecStop=… (leave that line out)", by_hand=True),),
            )


def check_others(facts: UnitFacts, surroundings: Surroundings) -> Iterator[Finding]:
    lines = stop_lines(facts, surroundings)
    fixes = _helper_fixes(facts, surroundings)
    yield from _check_by_name(lines)
    if not lines:
        if is_cut(facts):
            yield Finding(
                "no-exec-stop",
                _LOSES,
                f"it has no ExecStop=, {timeout_of(facts)}",
                "systemd sends SIGTERM, and then SIGKILL, which loses the data that QEMU has "
                "not written",
                fixes,
            )
        else:
            yield Finding(
                "no-exec-stop",
                # A timeout does not end in SIGKILL here, so a guest may still run after the
                # timeout, and lose its storage later.
                _ADVICE if facts.timeout_stop == INFINITY else _MAY,
                "it has no ExecStop=, and no timeout that ends in SIGKILL",
                "no guest is killed too early, but a guest that hangs forever delays every stop",
                fixes,
            )
    elif any(line.has(ActKind.KILLS) for line in lines):
        yield _kills(facts, surroundings, *_listening(facts))
    elif indirect := next((line for line in lines if line.has(ActKind.HELPER)), None):
        yield Finding(
            "exec-stop-indirect",
            _MAY,
            f"its {indirect.shown} in ExecStop= starts {HELPER}",
            "systemd extends the timeout only for the process that it has started itself; a line"
            f" that is just {HELPER}, or ends with exec {HELPER} in a shell, is such a process",
            fixes,
        )
    elif waits_for_guest(facts, lines):
        if is_cut(facts):
            yield Finding(
                "exec-stop-clock",
                _MAY,
                f"its guest is asked to shut down, {timeout_of(facts)}",
                "at the timeout, the guest is killed, and data that the guest or QEMU has not "
                "written by then is lost",
                fixes,
            )
    else:
        yield _returns_early_finding(facts, lines, fixes)


def _returns_early_finding(
    facts: UnitFacts, lines: Sequence[StopLine], fixes: tuple[Line, ...]
) -> Finding:
    why = "it may return before the guest is gone; then"
    if any(line.reads for line in lines):
        why = "it reads its standard input, /dev/null, and so returns at once; then"
    elif all(line.is_understood for line in lines):
        why = "it returns before the guest is gone; then"
    is_certain = all(line.is_understood for line in lines) and is_cut(facts)
    program = lines[-1].shown
    return Finding(
        "exec-stop-early",
        _LOSES if is_certain else _MAY,
        f"its ExecStop= is {program}, {timeout_of(facts)}",
        f"{why} systemd sends SIGTERM while the guest still works, and SIGKILL at the timeout",
        fixes,
    )


def waits_for_guest(facts: UnitFacts, lines: Sequence[StopLine]) -> bool:
    """Return whether the guest is asked to shut down, and gets time for that: a line asks the
    guest, and either a line waits or sleeps, or systemd waits because QEMU ignores KillSignal=. The
    order of the lines does not matter."""
    asks = any(line.is_understood and line.has(ActKind.ASKS) for line in lines)
    waits = facts.kill_signal in IGNORED or any(
        line.is_understood and line.has(ActKind.WAITS, ActKind.SLEEPS) for line in lines
    )
    return asks and waits


def _asks_and_returns(line: StopLine) -> bool:
    return line.has(ActKind.ASKS) and not line.has(ActKind.WAITS, ActKind.SLEEPS)


def has_helper(facts: UnitFacts) -> bool:
    return any(is_helper(command) for command in facts.exec_stop)


def helper_line(
    facts: UnitFacts,
    surroundings: Surroundings,
    number: int | None = None,
    *,
    is_last: bool = True,
) -> Line:
    """Return the line for a service's ExecStop= that runs qkilld-stop, the helper. `number`: the
    index of the existing line that this line replaces.

    The line gets the prefix `-`, so that systemd stops the unit with SIGTERM if the helper is
    missing. With `-`, systemd ignores the helper's exit status, so the helper reports failures in
    the journal. If other lines follow, the line gets no `-`, because they must not run after a
    failure. The helper's arguments are kept.

    If the unit has a user, a root directory, or a sandbox that hides the guest or the bus, the line
    gets the prefix `+`, which runs the helper without these. If the unit has a user and an
    environment file, the line gets no `+`, because a user who can write the file could choose
    libraries for a root process. If the unit has a root directory, the line gets `+` in any case.
    """
    hidden = helper_reach(facts) is not Helper.EXTENDS
    confined = facts.root or ((facts.user or hidden) and not _may_be_theirs(facts))
    prefix = ("-" if is_last else "") + ("+" if confined else "")
    arguments, is_resolved = "", False
    if number is not None and surroundings.stop_texts:
        arguments = helper_arguments_of(surroundings.stop_texts[number])
    elif number is not None:
        arguments = helper_arguments(facts.exec_stop[number])
        is_resolved = bool(arguments)
    return Line(
        "Service",
        f"ExecStop={prefix}{quoted(surroundings.helper)} {arguments}".rstrip(),
        repeats=number,
        is_resolved=is_resolved,
    )


def _may_be_theirs(facts: UnitFacts) -> bool:
    """Return whether the unit's user may be able to write a file that sets the environment."""
    return bool(facts.user and facts.environment_files)


def corrected(facts: UnitFacts, surroundings: Surroundings) -> tuple[Line, ...]:
    """Return the whole ExecStop= list with a correct helper line at _helper_place().

    The other lines keep their order. Lines that kill the guest or that the helper replaces
    (_is_replaced) are left out, unless they follow an existing helper. Each existing helper
    remains.
    """
    stops = facts.exec_stop
    place = _helper_place(facts, surroundings)
    left_out = _left_out(facts, surroundings)
    first = next((number for number, command in enumerate(stops) if is_helper(command)), None)
    after = [number for number in range(place, len(stops)) if number not in left_out]
    is_last = all(is_helper(stops[number]) for number in after)
    lines = [Line("Service", "ExecStop=")]
    for number in range(place):
        if number not in left_out:
            lines.append(_repeated(facts, surroundings, number, ignore_failure=True))
    lines.append(helper_line(facts, surroundings, first, is_last=is_last))
    for number in after:
        if is_helper(stops[number]):
            more = helper_line(facts, surroundings, number, is_last=_is_last(facts, number))
            lines.append(more)
        else:
            lines.append(_repeated(facts, surroundings, number, ignore_failure=False))
    return tuple(lines)


def _helper_place(facts: UnitFacts, surroundings: Surroundings) -> int:
    """Return the index of the line before which the helper must run.

    The helper takes the place of the first line that is left out. If no line is left out, the
    helper runs after the last line that stops the guest, waits or sleeps. Lines after the helper
    may need the guest to be gone, for example to copy its image. Lines before the helper get the
    prefix `-`, so systemd no longer skips a line after an earlier one fails. If a line that is
    skipped without adoption may need the guest to be gone, the helper runs before that line. It
    does not do so if it would then also precede a line that affects the guest.
    """
    lines = stop_lines(facts, surroundings)
    if left_out := _left_out(facts, surroundings):
        place = min(left_out)
    else:
        place = max(
            (n for n, line in enumerate(lines, 1) if line.has(*_ENDING)), default=len(lines)
        )
    first = _first_skipped(facts, surroundings, place)
    return first if all(map(_ignores_guest, lines[first:place])) else place


def line_after_failure(facts: UnitFacts, surroundings: Surroundings) -> StopLine | None:
    """Of the lines before the helper, return the first that systemd now skips after a failure.
    After adoption, systemd would run it while the guest still runs. Lines that only ask the guest
    or wait do not count."""
    place = _helper_place(facts, surroundings)
    first = _first_skipped(facts, surroundings, place)
    return stop_lines(facts, surroundings)[first] if first < place else None


def _first_skipped(facts: UnitFacts, surroundings: Surroundings, place: int) -> int:
    """Of the lines before `place`, return the index of the first that may need the guest to be
    gone, and that systemd now skips if an earlier line fails. If there is none, return `place`."""
    can_fail = False
    for number, line in enumerate(stop_lines(facts, surroundings)[:place]):
        if can_fail and (line.changes or not line.is_understood):
            return number
        can_fail = can_fail or not line.ignores_failure
    return place


def _ignores_guest(line: StopLine) -> bool:
    return all(each.kind is ActKind.NOTHING for each in line.acts)


def _left_out(facts: UnitFacts, surroundings: Surroundings) -> set[int]:
    """Return the indexes of the lines that adopt does not repeat."""
    helpers = [number for number, command in enumerate(facts.exec_stop) if is_helper(command)]
    lines = stop_lines(facts, surroundings)
    helper_asks = can_ask(facts, surroundings) is True
    removed = {
        number
        for number, line in enumerate(lines[: helpers[0] if helpers else len(lines)])
        if line.has(ActKind.KILLS) or _is_replaced(line, lines, helper_asks=helper_asks)
    }
    return removed.union(helpers[:1])


def _is_replaced(line: StopLine, lines: Sequence[StopLine], *, helper_asks: bool) -> bool:
    """Return whether the helper replaces the line. The helper replaces a line that only asks QEMU
    to exit, because the helper asks the guest first. A line that signals processes by name is kept.
    The helper replaces a line that waits for the guest, because the helper waits without a fixed
    timeout.

    A line that waits is kept if other lines ask the guest and the helper may be unable to ask it.
    """
    if not line.is_by_name and line.acts and all(a.kind is ActKind.TERMINATES for a in line.acts):
        return True
    is_asked = any(each.has(ActKind.ASKS) for each in lines)
    return line.is_understood and line.has(ActKind.WAITS) and (helper_asks or not is_asked)


def is_cut(facts: UnitFacts) -> bool:
    """Return whether systemd sends SIGKILL after the timeout."""
    return facts.timeout_stop != INFINITY and facts.sends_sigkill


def timeout_of(facts: UnitFacts) -> str:
    """Return the end of a sentence: "and TimeoutStopSec=…"."""
    return f"and TimeoutStopSec={format_usec(facts.timeout_stop)}"


def _helper_fixes(facts: UnitFacts, surroundings: Surroundings) -> tuple[Line, ...]:
    lines: tuple[Line, ...] = (helper_line(facts, surroundings),)
    stops = facts.exec_stop
    if (
        any(not command.ignores_failure for command in stops)
        or _left_out(facts, surroundings)
        or _helper_place(facts, surroundings) < len(stops)
    ):
        lines = corrected(facts, surroundings)
    return (*lines, *_listening(facts))


def _listening(facts: UnitFacts) -> Iterator[Line]:
    """Yield the missing settings that the helper needs to extend the timeout in time."""
    if facts.notify_access not in ("exec", "all"):
        yield Line("Service", "NotifyAccess=exec")
    if facts.timeout_stop < START:
        yield Line("Service", DEFAULT_TIMEOUT)


def _kills(facts: UnitFacts, surroundings: Surroundings, *more: Line) -> Finding:
    return Finding(
        "exec-stop-kills",
        _LOSES,
        "its ExecStop= sends SIGKILL",
        "SIGKILL ends QEMU before it has written out its data",
        (*corrected(facts, surroundings), *more),
    )


def _repeated(
    facts: UnitFacts, surroundings: Surroundings, number: int, *, ignore_failure: bool
) -> Line:
    """Return a line of the unit, as written in its files if that text is known. `ignore_failure`
    adds the prefix `-`."""
    command = facts.exec_stop[number]
    if surroundings.stop_texts:
        text = surroundings.stop_texts[number]
        text = ignoring_failure(text) if ignore_failure else text
    else:
        text = line_of(command, ignore_failure=ignore_failure)
    resolved = not surroundings.stop_texts
    return Line("Service", f"ExecStop={text}", repeats=number, is_resolved=resolved)
