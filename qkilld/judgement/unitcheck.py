"""Judgement of a unit: what in it loses data when the guest in it is stopped, and what mends that.

Sources: systemd.service(5), systemd.kill(5), systemd.unit(5), systemd-system.conf(5); for signals
that QEMU takes as a request to exit: QEMU, os-posix.c, os_setup_signal_handling().
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from qkilld.judgement.target import is_qemu
from qkilld.judgement.unitstorage import Storage, check_storage
from qkilld.model.policy import DEFAULT_EXECUTABLES, Policy
from qkilld.model.timespan import format_usec
from qkilld.model.unit import Command, UnitFacts
from qkilld.model.words import INFINITY, USEC_PER_SEC

START: Final = 30 * USEC_PER_SEC
"""So long may qkilld-stop take, with a slow disk and many others, until it first extends (µs)."""
DEFAULT_TIMEOUT: Final = "TimeoutStopSec=90s"
_POLITE: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_LOSES, _MAY, _ADVICE = Severity.LOSES, Severity.MAY_LOSE, Severity.ADVICE


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is to be known beside the unit itself."""

    policy: Policy = field(default_factory=Policy)
    executables: tuple[str, ...] = DEFAULT_EXECUTABLES
    """Globs of what is a QEMU."""
    helper: str = f"/usr/bin/{HELPER}"
    """Where it is installed."""
    main_executable: str = ""
    """Of the main process that runs, "" where there is none or it cannot be read."""
    storage: tuple[Storage, ...] = ()
    """What the disks of the guest lie on."""
    guard: str = ""
    """Of a scope: the unit that would guard it."""
    is_guarded: bool = False
    """That unit is active."""


def check(facts: UnitFacts, around: Surroundings) -> tuple[Finding, ...]:
    """Everything that is found, the worst first."""
    found = [
        *_check_killing(facts, around),
        *_check_unit(facts),
        *check_storage(facts, around.storage),
    ]
    found += _check_scope(facts, around) if facts.is_scope else _check_service(facts, around)
    order = list(Severity)
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


def has_helper(facts: UnitFacts) -> bool:
    return any(is_helper(command) for command in facts.exec_stop)


def main_is_qemu(facts: UnitFacts, around: Surroundings) -> bool:
    """False also where that cannot be told."""
    if around.main_executable:
        return is_qemu(around.main_executable, around.executables)
    starts = facts.exec_start
    return len(starts) == 1 and is_qemu(starts[0].path, around.executables)


def helper_line(facts: UnitFacts, around: Surroundings) -> Line:
    """The ExecStop= of a service.

    `+` runs it outside of the unit's user, root directory and sandbox, which may hide the guest or
    the bus from it; not where a file that the unit's user may write sets its environment, and with
    that what a program of root's loads.
    """
    confined = facts.root or (facts.user and not facts.environment_files)
    return Line("Service", f"ExecStop={'+' if confined else ''}{quoted(around.helper)}")


def _check_killing(facts: UnitFacts, around: Surroundings) -> Iterator[Finding]:
    section = "Scope" if facts.is_scope else "Service"
    number = facts.kill_signal
    if number not in _POLITE:
        yield Finding(
            "kill-signal",
            _LOSES,
            f"it has KillSignal={_name(number)}",
            "QEMU takes SIGTERM, SIGINT and SIGHUP as the request to write out what it holds and"
            " exit; any other signal ends it at once or does nothing until SIGKILL",
            (Line(section, "KillSignal=SIGTERM"),),
        )
    if facts.final_kill_signal != signal.SIGKILL:
        yield Finding(
            "final-kill-signal",
            _ADVICE,
            f"it has FinalKillSignal={_name(facts.final_kill_signal)}",
            "what ends a guest with a core dump writes all its memory to a disk that is slow"
            " already, and what does not end it leaves it running",
            (Line(section, "FinalKillSignal=SIGKILL"),),
        )
    if not facts.sends_sigkill:
        yield Finding(
            "send-sigkill",
            _MAY,
            "it has SendSIGKILL=no",
            "a guest that outlives the timeout is left running by itself, while its network and"
            " storage go away and the unit may be started a second time on the same disks",
            (Line(section, "SendSIGKILL=yes"),),
        )
    yield from _check_kill_mode(facts, around, section)


def _check_kill_mode(facts: UnitFacts, around: Surroundings, section: str) -> Iterator[Finding]:
    mode, mend = facts.kill_mode, (Line(section, "KillMode=control-group"),)
    qemu = main_is_qemu(facts, around)
    if mode == "none":
        yield Finding(
            "kill-mode",
            _LOSES,
            "it has KillMode=none",
            "where ExecStop= has not ended the guest it runs on by itself, is in no unit's care any"
            " more, and at host shutdown loses its storage and then gets SIGKILL",
            mend,
        )
    elif mode == "process":
        yield Finding(
            "kill-mode",
            _ADVICE if qemu else _LOSES,
            "it has KillMode=process",
            "what QEMU has started (a TPM, a file server) is left running without it"
            if qemu
            else "SIGTERM goes to the main process alone, which is not known to be the QEMU: the"
            " guest runs on by itself until SIGKILL ends it at host shutdown",
            mend,
        )
    elif mode == "mixed" and not facts.is_scope and not qemu:
        yield Finding(
            "kill-mode",
            _MAY if has_helper(facts) else _LOSES,
            "it has KillMode=mixed",
            "its main process is not known to be the QEMU: as soon as that one has ended everything"
            " else in the unit gets SIGKILL, the guest as well",
            mend,
        )


def _check_unit(facts: UnitFacts) -> Iterator[Finding]:
    section = "Scope" if facts.is_scope else "Service"
    if not facts.default_dependencies:
        yield Finding(
            "default-dependencies",
            _LOSES,
            "it has DefaultDependencies=no",
            "at host shutdown it is not stopped in order: it runs until storage is gone and"
            " everything that is left gets SIGTERM and SIGKILL",
            (Line("Unit", "DefaultDependencies=yes"),),
        )
    if facts.job_timeout != INFINITY:
        yield Finding(
            "job-timeout",
            _MAY,
            f"it has JobTimeoutSec= or JobRunningTimeoutSec={format_usec(facts.job_timeout)}",
            "after that systemd waits for its stop no longer, and a shutdown goes on while the"
            " guest still writes",
            (Line("Unit", "JobTimeoutSec=infinity"), Line("Unit", "JobRunningTimeoutSec=infinity")),
        )
    if facts.runtime_max != INFINITY:
        yield Finding(
            "runtime-max",
            _MAY if facts.is_scope else _ADVICE,
            f"it has RuntimeMaxSec={format_usec(facts.runtime_max)}",
            "systemd stops the guest after that time, whatever it is doing",
            (Line(section, "RuntimeMaxSec=infinity", by_hand=True),),
        )


def _check_scope(facts: UnitFacts, around: Surroundings) -> Iterator[Finding]:
    if not around.is_guarded and _is_cut(facts):
        yield Finding(
            "no-guard",
            _LOSES,
            f"it is a scope, which cannot have an ExecStop=, {_clock(facts)}",
            "systemd sends SIGTERM, and what QEMU has not written by then is lost by SIGKILL;"
            " another unit that is stopped before the scope can wait in its place",
            (Line("", f"systemctl start {around.guard}", by_hand=True),) if around.guard else (),
        )


def _check_service(facts: UnitFacts, around: Surroundings) -> Iterator[Finding]:
    yield from _check_helper(facts, around) if has_helper(facts) else _check_others(facts, around)
    yield from _check_type(facts, around)
    if facts.timeout_failure_mode != "terminate":
        yield Finding(
            "timeout-failure-mode",
            _MAY,
            f"it has TimeoutStopFailureMode={facts.timeout_failure_mode}",
            "what outlives the timeout of ExecStop= is aborted or killed without a SIGTERM before",
            (Line("Service", "TimeoutStopFailureMode=terminate"),),
        )
    if facts.restart in ("always", "on-success"):
        yield Finding(
            "restart",
            _ADVICE,
            f"it has Restart={facts.restart}",
            "a guest that is stopped by anything but `systemctl stop`, by qkillctl terminate say,"
            " is started again",
            (Line("Service", "Restart=on-failure", by_hand=True),),
        )


def _check_helper(facts: UnitFacts, around: Surroundings) -> Iterator[Finding]:
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
            (Line("Service", "ExecStop="), *map(_repeated, before), helper_line(facts, around)),
        )
    if any(kind_of(command) is Kind.SENDS and asks_guest(command) for command in before):
        yield Finding(
            "powerdown-cut",
            _ADVICE,
            f"an ExecStop= before {HELPER} asks the guest to shut down and does not wait for it",
            f"{HELPER} follows with SIGTERM at once: what the disks have acknowledged is kept, what"
            " the guest's system still holds in its memory is not",
        )
    if any(kind_of(command) is Kind.UNKNOWN for command in before) and _is_cut(facts):
        yield Finding(
            "exec-stop-slow",
            _ADVICE,
            f"an ExecStop= before {HELPER} has to end by itself, {_clock(facts)}",
            f"where it takes longer systemd does not run {HELPER} any more and goes by the clock",
            (Line("Service", "TimeoutStopSec=… (more than it ever takes)", by_hand=True),),
        )
    if facts.notify_access not in ("exec", "all") and _is_cut(facts):
        ladder = max(policy.grace, policy.stall, policy.storage_stall) + policy.reap
        short = (
            f", which is less than the {format_usec(ladder)} that storage may stand still"
            if timeout < ladder
            else ""
        )
        yield Finding(
            "notify-access",
            _LOSES,
            f"it has NotifyAccess={facts.notify_access}, {_clock(facts)}{short}",
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


def _check_others(facts: UnitFacts, around: Surroundings) -> Iterator[Finding]:
    """Without qkilld-stop."""
    kinds = [kind_of(command) for command in facts.exec_stop]
    mends = _helper_mends(facts, around)
    if not facts.exec_stop:
        if _is_cut(facts):
            yield Finding(
                "no-exec-stop",
                _LOSES,
                f"it has no ExecStop=, {_clock(facts)}",
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
        yield _kills(facts, around)
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
            _LOSES if {Kind.READS, Kind.SENDS} & set(kinds) and _is_cut(facts) else _MAY,
            f"its ExecStop= is {PurePosixPath(facts.exec_stop[-1].path).name}, {_clock(facts)}",
            f"{why} systemd sends SIGTERM in the middle of what the guest does, and SIGKILL by the"
            " clock",
            mends,
        )


def _helper_mends(facts: UnitFacts, around: Surroundings) -> tuple[Line, ...]:
    lines = [helper_line(facts, around)]
    if any(not command.ignores_failure for command in facts.exec_stop):
        lines = [Line("Service", "ExecStop="), *map(_repeated, facts.exec_stop), *lines]
    if facts.notify_access not in ("exec", "all"):
        lines.append(Line("Service", "NotifyAccess=exec"))
    if facts.timeout_stop < START:
        lines.append(Line("Service", DEFAULT_TIMEOUT))
    return tuple(lines)


def _kills(facts: UnitFacts, around: Surroundings) -> Finding:
    return Finding(
        "exec-stop-kills",
        _LOSES,
        "its ExecStop= sends SIGKILL",
        "QEMU writes nothing out any more",
        (Line("Service", "ExecStop="), helper_line(facts, around)),
    )


def _repeated(command: Command) -> Line:
    """A line of the unit's own once more, so that what comes after it runs even where it fails."""
    return Line("Service", f"ExecStop={line_of(command, ignore_failure=True)}")


def _check_type(facts: UnitFacts, around: Surroundings) -> Iterator[Finding]:
    if facts.type == "oneshot" and not facts.remain_after_exit:
        yield Finding(
            "type-oneshot",
            _LOSES,
            "it has Type=oneshot without RemainAfterExit=yes",
            "as long as its command runs the unit is still starting, and what is stopped then gets"
            " SIGTERM without any ExecStop=",
            (Line("Service", "Type=exec", by_hand=True),),
        )
    if facts.type == "forking" and not facts.pid_file:
        yield Finding(
            "forking-pid-file",
            _ADVICE,
            "it has Type=forking without PIDFile=",
            "systemd guesses which process is the main one, and takes none where it cannot; then it"
            f" does not see the guest end, and {HELPER} looks for it in the unit",
            (Line("Service", "PIDFile=/run/… (and the same with -pidfile)", by_hand=True),),
        )
    if facts.root and any(
        is_helper(command) and "privileged" not in command.flags for command in facts.exec_stop
    ):
        yield Finding(
            "root-directory",
            _LOSES,
            f"it has a root directory of its own, {facts.root}",
            f"{HELPER} is not in there and cannot be started",
            _again(facts, around),
        )


def _again(facts: UnitFacts, around: Surroundings) -> tuple[Line, ...]:
    """The helper's line as it ought to be, in place of the one that is there."""
    others = (command for command in facts.exec_stop if not is_helper(command))
    return (Line("Service", "ExecStop="), *map(_repeated, others), helper_line(facts, around))


def _is_cut(facts: UnitFacts) -> bool:
    """Whether the clock ends in SIGKILL."""
    return facts.timeout_stop != INFINITY and facts.sends_sigkill


def _clock(facts: UnitFacts) -> str:
    return f"and TimeoutStopSec={format_usec(facts.timeout_stop)}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
