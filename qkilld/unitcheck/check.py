"""Find the settings of a unit that make a stop lose data, and how to fix them.

Sources: systemd.service(5), systemd.kill(5), systemd.unit(5), systemd-system.conf(5); for the
signals on which QEMU exits: QEMU, os-posix.c, os_setup_signal_handling().
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Final

from qkilld.model.constants import INFINITY, USEC_PER_SEC
from qkilld.model.timespan import format_usec
from qkilld.model.unit import UnitFacts
from qkilld.unitcheck.command import HELPER, is_helper
from qkilld.unitcheck.context import Surroundings, main_is_qemu, outlives, stop_lines
from qkilld.unitcheck.execstop import (
    check_helper,
    check_others,
    corrected,
    has_helper,
    is_cut,
    timeout_of,
    waits_for_guest,
)
from qkilld.unitcheck.finding import Finding, Line, Severity
from qkilld.unitcheck.programs import IGNORED, POLITE
from qkilld.unitcheck.stop_act import ActKind
from qkilld.unitcheck.stop_line import read_line
from qkilld.unitcheck.storage import check_storage

_SHUTDOWN: Final = 30 * 60 * USEC_PER_SEC
"""The longest possible shutdown of the host: JobTimeoutSec= of reboot.target and similar
targets."""
_LOSES, _MAY, _ADVICE = Severity.LOSES, Severity.MAY_LOSE, Severity.ADVICE


def check(facts: UnitFacts, surroundings: Surroundings) -> tuple[Finding, ...]:
    """Return all findings, the worst first."""
    findings = [
        *_check_killing(facts, surroundings),
        *_check_unit(facts),
        *_check_coverage(facts, surroundings),
        *_check_manager(surroundings),
        *check_storage(facts, surroundings.storage),
        *_check_asking(facts, surroundings),
    ]
    findings += (
        _check_scope(facts, surroundings) if facts.is_scope else _check_service(facts, surroundings)
    )
    order = list(Severity)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))


def _check_coverage(facts: UnitFacts, surroundings: Surroundings) -> Iterator[Finding]:
    """Check a unit with several guests. If qkilld recognises none of them, `compare` says so."""
    stays = facts.kill_mode in ("process", "none") and main_is_qemu(facts, surroundings)
    if surroundings.guests and not stays and not outlives(facts, surroundings):
        for path in surroundings.uncovered:
            yield Finding(
                "executables",
                _LOSES,
                f"another QEMU in it is {path}, which Executables= does not cover",
                "qkilld does not stop it: systemd sends SIGTERM, and SIGKILL at the timeout",
                (Line("Target", f"Executables=… {path} (in qkilld.conf)", by_hand=True),),
            )


def _check_killing(facts: UnitFacts, surroundings: Surroundings) -> Iterator[Finding]:
    if facts.is_scope and surroundings.is_guarded:
        return  # The guard (qkilld-scope@.service) stops the guest before systemd signals it.
    section = "Scope" if facts.is_scope else "Service"
    number = facts.kill_signal
    # A signal that QEMU ignores does no harm if the guest was asked to shut down, because the
    # guest can then do so until the timeout.
    waits = number in IGNORED and waits_for_guest(facts, stop_lines(facts, surroundings))
    if number not in POLITE and not waits:
        yield Finding(
            "kill-signal",
            _LOSES,
            f"it has KillSignal={_name(number)}",
            "on SIGTERM, SIGINT and SIGHUP, QEMU writes out its data and exits; any other signal "
            "ends QEMU at once, or has no effect until SIGKILL",
            (Line(section, "KillSignal=SIGTERM"),),
        )
    restart_number = facts.restart_kill_signal or number
    if restart_number != number and restart_number not in POLITE:
        yield Finding(
            "restart-kill-signal",
            _LOSES,
            f"it has RestartKillSignal={_name(restart_number)}",
            "at a restart of the unit, it is sent instead of KillSignal=, and ends QEMU at once or "
            "has no effect until SIGKILL",
            (Line(section, "RestartKillSignal=SIGTERM"),),
        )
    if facts.final_kill_signal != signal.SIGKILL:
        yield Finding(
            "final-kill-signal",
            _ADVICE,
            f"it has FinalKillSignal={_name(facts.final_kill_signal)}",
            "a signal that dumps core writes all of QEMU's memory to a disk that is already slow, "
            "and a signal that does not end QEMU leaves it running",
            (Line(section, "FinalKillSignal=SIGKILL"),),
        )
    if not facts.sends_sigkill:
        yield Finding(
            "send-sigkill",
            _MAY,
            "it has SendSIGKILL=no",
            "a guest that survives the timeout keeps running outside of the unit: its network and "
            "storage go away, and the unit may be started again on the same disks",
            (Line(section, "SendSIGKILL=yes"),),
        )
    yield from _check_kill_mode(facts, surroundings, section)


def _check_kill_mode(
    facts: UnitFacts, surroundings: Surroundings, section: str
) -> Iterator[Finding]:
    if outlives(facts, surroundings):
        return
    mode, fix = facts.kill_mode, (Line(section, "KillMode=control-group"),)
    qemu = main_is_qemu(facts, surroundings)
    if mode == "none":
        yield Finding(
            "kill-mode",
            _LOSES,
            "it has KillMode=none",
            "if ExecStop= has not ended the guest, the guest keeps running, and no unit stops it "
            "any more; at host shutdown its storage goes away before it gets SIGKILL",
            fix,
        )
    elif mode == "process":
        yield Finding(
            "kill-mode",
            _ADVICE if qemu else _LOSES,
            "it has KillMode=process",
            "programs that QEMU has started (a TPM, a file server) keep running without QEMU"
            if qemu
            else "SIGTERM goes to the main process alone, which is not known to be QEMU: the "
            "guest keeps running until SIGKILL ends it at host shutdown",
            fix,
        )
    elif mode == "mixed" and not facts.is_scope and not qemu:
        yield Finding(
            "kill-mode",
            _MAY if has_helper(facts) else _LOSES,
            "it has KillMode=mixed",
            "its main process is not known to be QEMU: when that process exits, everything else in "
            "the unit gets SIGKILL, including the guest",
            fix,
        )


def _check_unit(facts: UnitFacts) -> Iterator[Finding]:
    section = "Scope" if facts.is_scope else "Service"
    if not facts.default_dependencies:
        yield Finding(
            "default-dependencies",
            _LOSES,
            "it has DefaultDependencies=no",
            "at host shutdown, systemd does not stop it in order: the guest runs until its storage "
            "is gone and all remaining processes get SIGTERM and SIGKILL",
            (Line("Unit", "DefaultDependencies=yes"),),
        )
    if facts.job_timeout != INFINITY:
        yield Finding(
            "job-timeout",
            _MAY,
            f"it has JobTimeoutSec= or JobRunningTimeoutSec={format_usec(facts.job_timeout)}",
            "after this time, systemd no longer waits until the unit has stopped, and a shutdown "
            "continues while the guest still writes",
            (Line("Unit", "JobTimeoutSec=infinity"), Line("Unit", "JobRunningTimeoutSec=infinity")),
        )
    if facts.runtime_max != INFINITY:
        yield Finding(
            "runtime-max",
            _MAY if facts.is_scope else _ADVICE,
            f"it has RuntimeMaxSec={format_usec(facts.runtime_max)}",
            "systemd stops the guest after this time, whatever it is doing",
            (Line(section, "RuntimeMaxSec=infinity", by_hand=True),),
        )


def _check_asking(facts: UnitFacts, surroundings: Surroundings) -> Iterator[Finding]:
    option = "-qmp unix:%t/%N/qmp,server=on,wait=off"
    fixes: tuple[Line, ...] = (
        Line("Service", f"ExecStart=… {option}", by_hand=True),
        Line("Service", "RuntimeDirectory=%N", by_hand=True),
    )
    if facts.is_scope:
        fixes = (Line("", "qemu-system-… -qmp unix:PATH,server=on,wait=off", by_hand=True),)
    for why in dict.fromkeys(surroundings.unasked):
        yield Finding(
            "no-monitor",
            _ADVICE,
            f"its guest cannot be asked to shut down: {why}",
            "on SIGTERM, QEMU writes out its own data, but data that the guest's operating system "
            "has not written yet is lost",
            fixes,
        )


def _check_manager(surroundings: Surroundings) -> Iterator[Finding]:
    timeout = surroundings.manager_timeout
    if timeout < _SHUTDOWN:
        yield Finding(
            "manager-timeout",
            _ADVICE,
            f"{surroundings.manager} has TimeoutStopSec={format_usec(timeout)}",
            "at logout and at shutdown, your user manager gets only this time to stop all of its "
            "units, and no unit can extend the time: data that a guest has not written by then "
            "is lost",
            (
                Line(
                    "",
                    f"sudo systemctl edit {surroundings.manager}  # TimeoutStopSec=30min",
                    by_hand=True,
                ),
            ),
        )


def _check_scope(facts: UnitFacts, surroundings: Surroundings) -> Iterator[Finding]:
    if not surroundings.is_guarded and is_cut(facts):
        yield Finding(
            "no-guard",
            _LOSES,
            f"it is a scope, which cannot have an ExecStop=, {timeout_of(facts)}",
            "systemd sends SIGTERM, and then SIGKILL, which loses the data that QEMU has not "
            "written; a guard, a unit that is stopped before the scope, can wait for the guest",
            (Line("", f"systemctl start {surroundings.guard}", by_hand=True),)
            if surroundings.guard
            else (Line("", "systemd-run --user … (a service, without --scope)", by_hand=True),),
        )


def _check_service(facts: UnitFacts, surroundings: Surroundings) -> Iterator[Finding]:
    yield from (
        check_helper(facts, surroundings)
        if has_helper(facts)
        else check_others(facts, surroundings)
    )
    yield from _check_type(facts, surroundings)
    yield from _check_other_commands(facts)
    if facts.timeout_failure_mode != "terminate":
        yield Finding(
            "timeout-failure-mode",
            _MAY,
            f"it has TimeoutStopFailureMode={facts.timeout_failure_mode}",
            "processes that survive the timeout of ExecStop= are aborted or killed without SIGTERM",
            (Line("Service", "TimeoutStopFailureMode=terminate"),),
        )
    if facts.restart in ("always", "on-success"):
        yield Finding(
            "restart",
            _ADVICE,
            f"it has Restart={facts.restart}",
            "a guest that is stopped by anything but `systemctl stop`, for example by `qkillctl "
            "terminate`, is started again",
            (Line("Service", "Restart=on-failure", by_hand=True),),
        )


def _check_other_commands(facts: UnitFacts) -> Iterator[Finding]:
    for setting, command in facts.other_commands:
        line = read_line(command)
        if line.is_by_name:
            yield Finding(
                "exec-by-name",
                _MAY if line.has(ActKind.KILLS) else _ADVICE,
                f"its {setting} is {line.shown}, which signals processes by their name",
                "guests of other units whose process has the same name get the signal too, and"
                " their ExecStop= does not run",
                (Line("Service", f"{setting}… (leave that line out)", by_hand=True),),
            )


def _check_type(facts: UnitFacts, surroundings: Surroundings) -> Iterator[Finding]:
    if facts.type == "oneshot" and not facts.remain_after_exit:
        yield Finding(
            "type-oneshot",
            _LOSES,
            "it has Type=oneshot without RemainAfterExit=yes",
            "while its command runs, the unit is still starting, and a stop sends SIGTERM without "
            "running ExecStop=",
            (Line("Service", "Type=exec", by_hand=True),),
        )
    if facts.type == "forking" and not facts.pid_file:
        yield Finding(
            "forking-pid-file",
            _ADVICE,
            "it has Type=forking without PIDFile=",
            "systemd has to guess the main process; if it cannot, it does not notice when the "
            f"guest exits, and {HELPER} has to search the unit for the guest",
            (Line("Service", "PIDFile=/run/… (and the same with -pidfile)", by_hand=True),),
        )
    if facts.root and any(
        is_helper(command) and "privileged" not in command.flags for command in facts.exec_stop
    ):
        yield Finding(
            "root-directory",
            _LOSES,
            f"it has a root directory of its own, {facts.root}",
            f"{HELPER} is not in that directory and cannot be started",
            corrected(facts, surroundings),
        )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
