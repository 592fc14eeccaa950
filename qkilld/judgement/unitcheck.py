"""Judgement of a unit: what in it loses data when the guest in it is stopped, and what mends that.

Sources: systemd.service(5), systemd.kill(5), systemd.unit(5), systemd-system.conf(5); for signals
that QEMU takes as a request to exit: QEMU, os-posix.c, os_setup_signal_handling().
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Final

from qkilld.judgement.execstop import (
    check_helper,
    check_others,
    clock,
    corrected,
    has_helper,
    is_cut,
)
from qkilld.judgement.finding import Finding, Line, Severity
from qkilld.judgement.stopcommand import HELPER, is_helper
from qkilld.judgement.surroundings import Surroundings, main_is_qemu
from qkilld.judgement.unitstorage import check_storage
from qkilld.model.timespan import format_usec
from qkilld.model.unit import UnitFacts
from qkilld.model.words import INFINITY, USEC_PER_SEC

_POLITE: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_SHUTDOWN: Final = 30 * 60 * USEC_PER_SEC
"""What a shutdown takes at the most: JobTimeoutSec= of reboot.target and its like."""
_LOSES, _MAY, _ADVICE = Severity.LOSES, Severity.MAY_LOSE, Severity.ADVICE


def check(facts: UnitFacts, around: Surroundings) -> tuple[Finding, ...]:
    """Everything that is found, the worst first."""
    found = [
        *_check_killing(facts, around),
        *_check_unit(facts),
        *_check_manager(around),
        *check_storage(facts, around.storage),
    ]
    found += _check_scope(facts, around) if facts.is_scope else _check_service(facts, around)
    order = list(Severity)
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


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


def _check_manager(around: Surroundings) -> Iterator[Finding]:
    if around.manager_timeout < _SHUTDOWN:
        yield Finding(
            "manager-timeout",
            _ADVICE,
            f"{around.manager} has TimeoutStopSec={format_usec(around.manager_timeout)}",
            "at logout and at shutdown the system gives your manager no longer for all of its units"
            " together, which nothing in here extends: what a guest has yet to write then is lost",
            (
                Line(
                    "",
                    f"sudo systemctl edit {around.manager}  # TimeoutStopSec=30min",
                    by_hand=True,
                ),
            ),
        )


def _check_scope(facts: UnitFacts, around: Surroundings) -> Iterator[Finding]:
    if not around.is_guarded and is_cut(facts):
        yield Finding(
            "no-guard",
            _LOSES,
            f"it is a scope, which cannot have an ExecStop=, {clock(facts)}",
            "systemd sends SIGTERM, and what QEMU has not written by then is lost by SIGKILL;"
            " another unit that is stopped before the scope can wait in its place",
            (Line("", f"systemctl start {around.guard}", by_hand=True),) if around.guard else (),
        )


def _check_service(facts: UnitFacts, around: Surroundings) -> Iterator[Finding]:
    yield from check_helper(facts, around) if has_helper(facts) else check_others(facts, around)
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
            corrected(facts, around),
        )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
