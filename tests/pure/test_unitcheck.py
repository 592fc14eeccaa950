"""The findings for a safe unit, and for everything that makes a unit unsafe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qkilld.bus.systemd import _denied_calls
from qkilld.model.constants import INFINITY
from qkilld.model.policy import Policy
from qkilld.model.unit import Command, UnitFacts
from qkilld.unitcheck.check import check
from qkilld.unitcheck.command import line_of, quoted
from qkilld.unitcheck.context import Surroundings, hides_helper
from qkilld.unitcheck.finding import Severity
from qkilld.unitcheck.storage import Storage, escaped, mount_unit

S = 1_000_000
LOSES, MAY, ADVICE = Severity.LOSES, Severity.MAY_LOSE, Severity.ADVICE
QEMU = Command("/usr/bin/qemu-system-x86_64", ("/usr/bin/qemu-system-x86_64", "-M", "pc"))
SHELL = Command("/bin/sh", ("/bin/sh", "-c", "qemu-system-x86_64; true"))
STOP = Command("/usr/bin/qkilld-stop", ("/usr/bin/qkilld-stop",))
AROUND = Surroundings()
SAFE = UnitFacts(
    "web.service",
    after=("basic.target",),
    timeout_stop=90 * S,
    type="simple",
    notify_access="exec",
    exec_start=(QEMU,),
    exec_stop=(STOP,),
)
SCOPE = UnitFacts("run-1.scope", timeout_stop=90 * S)
GUARD = "qkilld-scope@run-1.scope.service"
NFS = Storage(mount_point="/srv/vm images", unit="srv-vm\\x20images.mount")


def line(text: str) -> Command:
    """Return an ExecStop= command with a shell line."""
    return Command("/bin/sh", ("/bin/sh", "-c", text))


def found(
    facts: UnitFacts, surroundings: Surroundings = AROUND
) -> dict[str, tuple[Severity, list[str]]]:
    return {
        finding.key: (finding.severity, [str(fix) for fix in finding.fixes])
        for finding in check(facts, surroundings)
    }


def test_the_manager_of_a_user_has_a_limit_of_its_own() -> None:
    surroundings = replace(AROUND, manager="user@1000.service", manager_timeout=120 * S)
    severity, (fix,) = found(SAFE, surroundings)["manager-timeout"]
    assert severity is ADVICE
    assert fix == "sudo systemctl edit user@1000.service  # TimeoutStopSec=30min"
    assert found(SAFE, replace(surroundings, manager_timeout=1800 * S)) == {}


def test_a_guest_that_cannot_be_asked_is_told_with_the_line_to_add() -> None:
    surroundings = replace(AROUND, unasked=("the guest has no monitor",) * 2)
    severity, fixes = found(SAFE, surroundings)["no-monitor"]
    assert severity is ADVICE
    assert fixes == [
        "[Service] ExecStart=… -qmp unix:%t/%N/qmp,server=on,wait=off",
        "[Service] RuntimeDirectory=%N",
    ]
    (fix,) = found(SCOPE, surroundings)["no-monitor"][1]
    assert "-qmp unix:PATH,server=on,wait=off" in fix


POWERDOWN = line("echo system_powerdown | socat - unix:/run/m")


@pytest.mark.parametrize(
    "facts",
    [
        SAFE,
        replace(SAFE, notify_access="all"),
        replace(SAFE, notify_access="none", timeout_stop=INFINITY),
        replace(SAFE, kill_mode="mixed"),
        replace(SAFE, kill_signal=2),
        replace(SAFE, kill_signal=1),
        replace(SAFE, exec_start=(SHELL,)),
        replace(SAFE, exec_stop=(replace(line("rm -f /run/x"), ignores_failure=True), STOP)),
        replace(SAFE, exec_stop=(STOP, line("rm -f /run/x"))),
        replace(SAFE, exec_stop=(replace(STOP, ignores_failure=True), STOP)),
        replace(SAFE, type="forking", pid_file="/run/web.pid"),
        replace(SAFE, type="oneshot", remain_after_exit=True),
        replace(SAFE, restart="on-failure"),
        replace(SAFE, exec_stop=(Command("/opt/python3", ("/opt/python3", "-m", "qkilld.stop")),)),
    ],
)
def test_units_without_findings(facts: UnitFacts) -> None:
    assert found(facts) == {}


@pytest.mark.parametrize(
    ("change", "key", "severity", "fixes"),
    [
        (
            {"exec_stop": (), "notify_access": "main"},
            "no-exec-stop",
            LOSES,
            ["[Service] ExecStop=-/usr/bin/qkilld-stop", "[Service] NotifyAccess=exec"],
        ),
        (
            {"exec_stop": (), "timeout_stop": INFINITY},
            "no-exec-stop",
            ADVICE,
            ["[Service] ExecStop=-/usr/bin/qkilld-stop"],
        ),
        (
            {"exec_stop": (line("logger stop; qkilld-stop"),)},
            "exec-stop-indirect",
            MAY,
            [
                "[Service] ExecStop=",
                '[Service] ExecStop=-/bin/sh -c "logger stop; qkilld-stop"',
                "[Service] ExecStop=-/usr/bin/qkilld-stop",
            ],
        ),
        (
            {"exec_stop": (line("echo quit | nc -U /run/m"),), "timeout_stop": 5 * S},
            "exec-stop-early",
            LOSES,
            [
                "[Service] ExecStop=",
                "[Service] ExecStop=-/usr/bin/qkilld-stop",
                "[Service] TimeoutStopSec=90s",
            ],
        ),
        (
            {"exec_stop": (Command("/opt/vm-stop", ("/opt/vm-stop", "100%"), True),)},
            "exec-stop-early",
            MAY,
            ["[Service] ExecStop=-/usr/bin/qkilld-stop"],
        ),
        (
            {"exec_stop": (Command("/bin/kill", ("/bin/kill", "-9", "$MAINPID")),)},
            "exec-stop-kills",
            LOSES,
            ["[Service] ExecStop=", "[Service] ExecStop=-/usr/bin/qkilld-stop"],
        ),
        (
            {
                "exec_stop": (line("echo x | nc -U /run/m"), line("kill -9 $MAINPID")),
                "notify_access": "main",
                "timeout_stop": 5 * S,
            },
            "exec-stop-kills",
            LOSES,
            [
                "[Service] ExecStop=",
                '[Service] ExecStop=-/bin/sh -c "echo x | nc -U /run/m"',
                "[Service] ExecStop=-/usr/bin/qkilld-stop",
                "[Service] NotifyAccess=exec",
                "[Service] TimeoutStopSec=90s",
            ],
        ),
        (
            {"exec_stop": (Command("/bin/kill", ("/bin/kill", "-s", "KILL", "$MAINPID")), STOP)},
            "exec-stop-kills",
            LOSES,
            ["[Service] ExecStop=", "[Service] ExecStop=-/usr/bin/qkilld-stop"],
        ),
        (
            {"exec_stop": (line("socat x y"), line("kill -9 1"), STOP, line("cleanup"))},
            "exec-stop-kills",
            LOSES,
            [
                "[Service] ExecStop=",
                '[Service] ExecStop=-/bin/sh -c "socat x y"',
                "[Service] ExecStop=/usr/bin/qkilld-stop",
                "[Service] ExecStop=/bin/sh -c cleanup",
            ],
        ),
        (
            {"exec_stop": (line("socat x y"), STOP)},
            "exec-stop-order",
            MAY,
            [
                "[Service] ExecStop=",
                '[Service] ExecStop=-/bin/sh -c "socat x y"',
                "[Service] ExecStop=-/usr/bin/qkilld-stop",
            ],
        ),
        (
            {"exec_stop": (replace(STOP, ignores_failure=True), line("rm /run/x"))},
            "exec-stop-order",
            MAY,
            [
                "[Service] ExecStop=",
                "[Service] ExecStop=/usr/bin/qkilld-stop",
                '[Service] ExecStop=/bin/sh -c "rm /run/x"',
            ],
        ),
        (
            {"exec_stop": (replace(STOP, ignores_failure=True), line("kill -9 $MAINPID"))},
            "exec-stop-order",
            LOSES,
            [
                "[Service] ExecStop=",
                "[Service] ExecStop=/usr/bin/qkilld-stop",
                '[Service] ExecStop=/bin/sh -c "kill -9 $MAINPID"',
            ],
        ),
        (
            {"exec_stop": (replace(POWERDOWN, ignores_failure=True), STOP)},
            "powerdown-cut",
            ADVICE,
            [],
        ),
        (
            {"exec_stop": (Command("/opt/vm-stop", ("/opt/vm-stop",), True), STOP)},
            "exec-stop-slow",
            ADVICE,
            ["[Service] TimeoutStopSec=… (more than it ever takes)"],
        ),
        ({"notify_access": "none"}, "notify-access", LOSES, ["[Service] NotifyAccess=exec"]),
        ({"notify_access": "main"}, "notify-access", LOSES, ["[Service] NotifyAccess=exec"]),
        ({"timeout_stop": 5 * S}, "timeout-stop", MAY, ["[Service] TimeoutStopSec=90s"]),
        ({"kill_mode": "none"}, "kill-mode", LOSES, ["[Service] KillMode=control-group"]),
        ({"kill_mode": "process"}, "kill-mode", ADVICE, ["[Service] KillMode=control-group"]),
        (
            {"kill_mode": "process", "exec_start": (SHELL,)},
            "kill-mode",
            LOSES,
            ["[Service] KillMode=control-group"],
        ),
        (
            {"kill_mode": "mixed", "exec_start": (SHELL,)},
            "kill-mode",
            MAY,
            ["[Service] KillMode=control-group"],
        ),
        ({"sends_sigkill": False}, "send-sigkill", MAY, ["[Service] SendSIGKILL=yes"]),
        ({"kill_signal": 9}, "kill-signal", LOSES, ["[Service] KillSignal=SIGTERM"]),
        ({"kill_signal": 3}, "kill-signal", LOSES, ["[Service] KillSignal=SIGTERM"]),
        ({"kill_signal": 40}, "kill-signal", LOSES, ["[Service] KillSignal=SIGTERM"]),
        (
            {"final_kill_signal": 6},
            "final-kill-signal",
            ADVICE,
            ["[Service] FinalKillSignal=SIGKILL"],
        ),
        (
            {"timeout_failure_mode": "kill"},
            "timeout-failure-mode",
            MAY,
            ["[Service] TimeoutStopFailureMode=terminate"],
        ),
        ({"runtime_max": 3600 * S}, "runtime-max", ADVICE, ["[Service] RuntimeMaxSec=infinity"]),
        (
            {"default_dependencies": False},
            "default-dependencies",
            LOSES,
            ["[Unit] DefaultDependencies=yes"],
        ),
        (
            {"job_timeout": 60 * S},
            "job-timeout",
            MAY,
            ["[Unit] JobTimeoutSec=infinity", "[Unit] JobRunningTimeoutSec=infinity"],
        ),
        ({"type": "oneshot"}, "type-oneshot", LOSES, ["[Service] Type=exec"]),
        (
            {"type": "forking"},
            "forking-pid-file",
            ADVICE,
            ["[Service] PIDFile=/run/… (and the same with -pidfile)"],
        ),
        ({"restart": "always"}, "restart", ADVICE, ["[Service] Restart=on-failure"]),
        (
            {"root": "/srv/root"},
            "root-directory",
            LOSES,
            ["[Service] ExecStop=", "[Service] ExecStop=-+/usr/bin/qkilld-stop"],
        ),
    ],
)
def test_each_by_itself(
    change: dict[str, Any], key: str, severity: Severity, fixes: list[str]
) -> None:
    findings = found(replace(SAFE, **change))
    assert findings == {key: (severity, fixes)}


def test_the_helper_runs_outside_of_a_sandbox_but_not_on_a_users_environment() -> None:
    own = replace(SAFE, exec_stop=(), user="vm")
    assert found(own)["no-exec-stop"][1] == ["[Service] ExecStop=-+/usr/bin/qkilld-stop"]
    theirs = replace(own, environment_files=("/home/vm/env",))
    assert found(theirs)["no-exec-stop"][1] == ["[Service] ExecStop=-/usr/bin/qkilld-stop"]


def test_mixed_kills_the_guest_behind_a_shell_at_once_without_a_helper() -> None:
    unit = replace(SAFE, kill_mode="mixed", exec_start=(SHELL,), exec_stop=())
    assert found(unit)["kill-mode"][0] is LOSES
    # The running main process is QEMU, because the shell has executed it.
    running = replace(AROUND, main_executable="/usr/bin/qemu-system-x86_64")
    assert "kill-mode" not in found(unit, running)


def test_the_texts_have_the_units_own_values() -> None:
    (finding,) = check(replace(SAFE, exec_stop=(), timeout_stop=7 * S), AROUND)
    assert finding.problem == "it has no ExecStop=, and TimeoutStopSec=7s"
    (finding, _) = check(replace(SAFE, notify_access="none", timeout_stop=5 * S), AROUND)
    assert "less than the 1min 5s for which storage may stand still" in finding.problem
    quick = replace(AROUND, policy=Policy(grace=S, stall=S, storage_stall=S, reap=S))
    (finding, _) = check(replace(SAFE, notify_access="none", timeout_stop=5 * S), quick)
    assert finding.problem == "it has NotifyAccess=none, and TimeoutStopSec=5s"


def test_a_scope_needs_a_guard() -> None:
    surroundings = replace(AROUND, guard=GUARD)
    assert found(SCOPE, surroundings) == {
        "no-guard": (LOSES, [f"systemctl start {GUARD}"]),
    }
    assert found(SCOPE, replace(surroundings, is_guarded=True)) == {}
    assert found(replace(SCOPE, timeout_stop=INFINITY), surroundings) == {}
    guarded = replace(surroundings, is_guarded=True)
    assert found(replace(SCOPE, runtime_max=S), guarded)["runtime-max"][0] is MAY


@pytest.mark.parametrize(
    ("storage", "after", "expected"),
    [
        (NFS, (), {"storage-order": (LOSES, ['[Unit] RequiresMountsFor="/srv/vm images"'])}),
        (NFS, ("network-online.target",), {"storage-order"}),
        (NFS, ("remote-fs.target",), set()),
        (NFS, (NFS.unit,), set()),
        (
            Storage(protocol="nbd"),
            (),
            {"network-order": (LOSES, ["[Unit] After=network.target network-online.target"])},
        ),
        (Storage(protocol="nbd"), ("network-online.target",), set()),
        (Storage(protocol="nbd"), ("network.target",), set()),
    ],
)
def test_the_order_after_network_storage(
    storage: Storage, after: tuple[str, ...], expected: object
) -> None:
    findings = found(replace(SAFE, after=after), replace(AROUND, storage=(storage,)))
    assert (findings if isinstance(expected, dict) else set(findings)) == expected


def test_the_worst_comes_first() -> None:
    facts = replace(SAFE, restart="always", kill_mode="none", sends_sigkill=False)
    assert [finding.severity for finding in check(facts, AROUND)] == [LOSES, MAY, ADVICE]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("plain-word_1.x", "plain-word_1.x"),
        ("two words", '"two words"'),
        ('a"b\\c', '"a\\"b\\\\c"'),
        ("100%", "100%%"),
        ("${MAINPID}", "${MAINPID}"),
        (";", '";"'),
        ("", '""'),
        ("a\n[Service]\nExecStart=/bin/evil", '"a\\x0a[Service]\\x0aExecStart=/bin/evil"'),
        ("ü\udcff", '"\\xc3\\xbc\\xff"'),
    ],
)
def test_words_of_unit_files(word: str, expected: str) -> None:
    assert quoted(word) == expected


def test_a_command_as_a_line() -> None:
    command = Command("/bin/sh", ("sh", "-c", "x y"), True, ("privileged",))
    assert line_of(command) == '-+@/bin/sh sh -c "x y"'


def test_names_as_systemd_escapes_them() -> None:
    assert mount_unit("/srv/vm images") == "srv-vm\\x20images.mount"
    assert mount_unit("/") == "-.mount"
    assert escaped("run-r1.scope") == "run\\x2dr1.scope"
    assert escaped(".x") == "\\x2ex"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("", ""),
        ("--no-force --reason=x --debug", ""),
        ("--pid $MAINPID", ""),
        ("--pid=${MAINPID}", ""),
        ("--unit web", ""),
        ("--unit=web.service", ""),
        ("--pidfile /run/web.pid", ""),
        ("--max infinity", ""),
        ("--max 3s", "helper-max"),
        ("--max $MAX", "helper-max"),
        ("--storage-stall 1s --stall 1s --force", "helper-max"),
        ("--grace=2s", "helper-max"),
        ("--storage-stall 1h --stall=1min --grace infinity", ""),
        ("--no-powerdown", ""),
        ("--dry-run", "helper-target"),
        ("--all --force", "helper-target"),
        ("--pid 1", "helper-target"),
        # qkilld-stop refuses these.
        ("$MAINPID", "helper-target"),
        ("--timeout 5min", "helper-target"),
        ("--pid $MAINPID --pidfile /run/web.pid", "helper-target"),
        ("--unit db", "helper-target"),
        ("--pidfile /run/db.pid", "helper-target"),
    ],
)
def test_arguments_of_the_helper(words: str, key: str) -> None:
    check_arguments(Command("/usr/bin/qkilld-stop", ("/usr/bin/qkilld-stop", *words.split())), key)
    if "$MAX" not in words:  # In a shell, $MAX may become several words.
        shell = line(f"exec qkilld-stop {words.replace('$MAINPID', '$$MAINPID')}")
        check_arguments(shell, key, words)


def check_arguments(command: Command, key: str, words: str | None = None) -> None:
    words = " ".join(command.arguments[1:]) if words is None else words
    start = ("/usr/bin/qemu-system-x86_64", "-pidfile", "/run/web.pid")
    facts = replace(SAFE, exec_start=(Command(start[0], start),), exec_stop=(command,))
    keys = [finding.key for finding in check(facts, AROUND) if finding.is_unsafe]
    assert keys == ([key] if key else [])
    # If adopt corrects the line, it keeps the arguments.
    sandboxed = replace(facts, address_families=("AF_INET",))
    lines = [
        line.text
        for finding in check(sandboxed, AROUND)
        if finding.key == "helper-sandbox"
        for line in finding.fixes
    ]
    assert lines == ["ExecStop=", f"ExecStop=-+/usr/bin/qkilld-stop {words}".rstrip()]


def test_a_line_for_a_guest_of_another_setting() -> None:
    path = "/run/second.pid"
    second = ("ExecStartPost=", Command("/usr/bin/kvm", ("kvm", "-daemonize", "-pidfile", path)))
    stops = Command("/usr/bin/qkilld-stop", ("qkilld-stop", "--pidfile", path)), STOP
    assert "helper-target" in found(replace(SAFE, exec_stop=stops))
    assert "helper-target" not in found(replace(SAFE, exec_stop=stops, other_commands=(second,)))
    # A line that removes the pidfile does not write it.
    for setting in ("ExecStartPre=", "ExecStopPost="):
        removes = (setting, Command("/bin/rm", ("rm", "-f", path)))
        assert "helper-target" in found(replace(SAFE, exec_stop=stops, other_commands=(removes,)))


@pytest.mark.parametrize(
    ("words", "timeout", "key"),
    [
        ("--max 3s", INFINITY, ""),
        # qkilld-stop would send SIGKILL, although systemd would not.
        ("--force --max 3s", INFINITY, "helper-max"),
        ("--force --stall 1s", INFINITY, "helper-max"),
        ("--force", INFINITY, ""),
        ("--no-powerdown", 90 * S, "helper-powerdown"),
        ("--powerdown-sec 1s", 90 * S, "helper-powerdown"),
        ("--powerdown-sec 1h", 90 * S, ""),
    ],
)
def test_a_helper_that_is_in_a_hurry(words: str, timeout: int, key: str) -> None:
    command = Command("/usr/bin/qkilld-stop", ("/usr/bin/qkilld-stop", *words.split()))
    facts = replace(SAFE, exec_stop=(command,), timeout_stop=timeout)
    assert list(found(facts)) == ([key] if key else [])
    # Options may set longer times than the configuration.
    quick = Policy(grace=S, stall=S, storage_stall=S, max=2 * S, powerdown=S)
    assert found(facts, replace(AROUND, policy=quick)) == (
        found(facts) if words == "--no-powerdown" else {}
    )


def test_a_restart_has_a_signal_of_its_own() -> None:
    facts = replace(SAFE, exec_stop=(), timeout_stop=INFINITY, restart_kill_signal=9)
    (finding,) = [each for each in check(facts, AROUND) if each.is_unsafe]
    assert finding.key == "restart-kill-signal"
    assert [line.text for line in finding.fixes] == ["RestartKillSignal=SIGTERM"]


@pytest.mark.parametrize(
    ("denied", "allowed", "hides"),
    [
        ((), (), False),
        (("/",), (), True),
        (("/",), ("/usr",), False),
        (("/",), ("/usr/bin/qemu-system-x86_64",), True),
        (("/srv",), (), False),
        (("/usr/bin",), ("/",), True),
    ],
)
def test_paths_at_which_nothing_can_be_executed(
    denied: tuple[str, ...], allowed: tuple[str, ...], hides: bool
) -> None:
    facts = replace(SAFE, noexec_paths=denied, exec_paths=allowed)
    assert bool(hides_helper(facts)) is hides
    assert hides_helper(replace(SAFE, private_pids=True)) == "PrivatePIDs="
    assert hides_helper(replace(SAFE, private_users=True)) == "PrivateUsers="


@pytest.mark.parametrize(
    ("allowed", "names", "denied"),
    [
        (False, [], ()),
        (False, ["mount", "pidfd_getfd"], ()),
        (False, ["pidfd_send_signal"], ("pidfd_send_signal",)),
        (False, ["pidfd_open:EACCES"], ("pidfd_open",)),
        (True, ["pidfd_open", "pidfd_send_signal", "read"], ()),
        (True, ["pidfd_open:EPERM", "pidfd_send_signal"], ("pidfd_open",)),
        (True, ["read"], ("pidfd_open", "pidfd_send_signal")),
    ],
)
def test_system_calls_without_which_qkilld_stop_cannot_work(
    allowed: bool, names: list[str], denied: tuple[str, ...]
) -> None:
    assert _denied_calls(allowed, names) == denied
    hidden = hides_helper(replace(SAFE, denied_calls=denied))
    assert hidden == ("SystemCallFilter=" if denied else "")


def test_signals_by_name_outside_of_exec_stop() -> None:
    kill = Command("/usr/bin/pkill", ("pkill", "-9", "qemu"), True)
    facts = replace(SAFE, other_commands=(("ExecStopPost=", kill),))
    (finding,) = [each for each in check(facts, AROUND) if each.is_unsafe]
    assert finding.key == "exec-by-name" and "ExecStopPost=" in finding.problem
    own = Command("/bin/rm", ("rm", "-f", "/run/web"))
    assert not [e for e in check(replace(SAFE, other_commands=(("ExecStopPost=", own),)), AROUND)
                if e.is_unsafe]  # fmt: skip
