"""Which other guests of a unit are stopped by a line of ExecStop= that names one guest."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from qkilld.adapters import procfs
from qkilld.model.constants import INFINITY
from qkilld.model.errors import InvalidArgs, NoSuchProcess, UnknownIdentity
from qkilld.model.guest import Unit
from qkilld.model.policy import Config, Policy
from qkilld.model.unit import Command, UnitFacts
from qkilld.stop import run as stop_run
from qkilld.stop import systemd_units
from qkilld.stop.finder import ProcessFinder
from qkilld.stop.log import Log
from qkilld.stop.notifier import Notifier
from qkilld.stop.options import Options
from qkilld.stop.run import StopRun
from qkilld.stop.targets import Targets
from qkilld.unitcheck.command import HELPER
from tests.stop.fakes import FakeHandle, stop_of

A: dict[str, Any] = {"pidfile": "a"}
LAUNCHER = Command("/usr/lib/qkilld/qemu-guest", ("qemu-guest", "web"))
DAEMONIZED = Command("/usr/bin/qemu-system-x86_64", ("qemu-system-x86_64", "-daemonize"))


def stopping(*lines: str, **settings: Any) -> UnitFacts:
    """Return the unit of a QEMU with these lines of ExecStop=: arguments of qkilld-stop, or a path
    and a command of a shell.

    If a line begins with "- ", a failure is ignored. The line that begins with "> " runs now. If
    no line begins with it, the first line runs now.
    """
    start = Command("/usr/bin/qemu-system-x86_64", ())
    given: dict[str, Any] = {"type": "simple", "exec_start": (start,)}
    running = next((n for n, line in enumerate(lines) if line.startswith("> ")), 0)
    stops = []
    for number, line in enumerate(lines):
        text = line.removeprefix("> ").removeprefix("- ")
        words = text.split(maxsplit=2 if " -c " in text else -1)
        if not text.startswith("/"):
            words.insert(0, HELPER)
        pid = 101 + number if number <= running else 0
        stops.append(Command(words[0], tuple(words), "- " in line[:4], pid=pid))
    given |= {"exec_stop": tuple(stops), "control_pid": 101 + running}
    return UnitFacts("web.service", **(given | settings))


@pytest.mark.parametrize(
    ("kill_mode", "options", "lines", "stopped", "code"),
    [
        ("control-group", {}, [""], True, 0),
        # If this line fails, systemd does not run the next one.
        ("control-group", A, ["--pidfile a", "--pidfile b"], True, 3),
        ("control-group", A, ["- --pidfile a", "- --pidfile b"], False, 3),
        ("mixed", {}, [""], True, 0),
        ("process", {}, [""], False, 0),
        ("none", {}, [""], False, 0),
        ("", {}, [], False, 4),  # Unknown.
        # With several lines, each has options of its own. The last one stops the rest.
        ("control-group", A, ["--pidfile a"], True, 0),
        ("control-group", A, ["--pidfile a", "--pidfile b"], False, 0),
        ("control-group", A, ["--pidfile b", "> --pidfile a"], True, 0),
        ("control-group", A, ["--pidfile a", "--unit db", "--pidfile=b --dry-run"], True, 0),
        # systemd may have expanded the pidfile in any way.
        ("control-group", A, ["--pidfile b", "> --pidfile ${UNSET}a"], True, 0),
        ("control-group", A, ["--pidfile ${UNSET}a", "--pidfile b"], False, 0),
        ("control-group", A, ["--pidfile a", "--pidfile b", "--pidfile a"], False, 0),
        ("control-group", A, ["--pidfile a", "--pidfile b", "> --pidfile a"], True, 0),
        # It is not certain that these lines stop other guests of the unit.
        ("control-group", A, ["--pidfile a", "/opt/stop-b"], True, 0),
        ("control-group", A, ["--pidfile a", "/bin/sh -c qkilld-stop --pidfile b || x"], True, 0),
        ("control-group", A, ["--pidfile a", "/bin/timeout 9 qkilld-stop --pidfile b"], True, 0),
        ("control-group", A, ["--pidfile a", "/bin/timeout 9 qkilld-stop --unit b"], True, 0),
        ("control-group", A, ["--pidfile a", "/bin/sh -c exec qkilld-stop --unit b"], True, 0),
        ("control-group", A, ["--pidfile a", "$OPTS"], True, 0),
        ("control-group", A, ["--pidfile a", "--pidfile $FILE"], True, 0),
        ("control-group", A, ["--pidfile a", "--max soon"], True, 0),
        # Such a line may lack the rights or the program that the running line has.
        ("control-group", A, ["--pidfile a", "/bin/sh -c exec qkilld-stop --pidfile b"], True, 0),
        ("control-group", A, ["--pidfile a", "/no/qkilld-stop --pidfile b"], True, 0),
        # systemd runs no later line if a line between them fails.
        ("control-group", A, ["--pidfile a", "/bin/rm a", "--pidfile b"], True, 0),
        ("control-group", A, ["--pidfile a", "- /bin/rm a", "--pidfile b"], False, 0),
        ("control-group", A, ["--pidfile a", "--bogus", "--pidfile b"], True, 0),
        ("control-group", A, ["--pidfile a", "--unit db", "--pidfile b"], True, 0),
        # A line between them may take long, or harm the guests.
        ("control-group", A, ["--pidfile a", "- /bin/kill -9 7", "--pidfile b"], True, 0),
        ("control-group", A, ["--pidfile a", "- /bin/sleep 60", "--pidfile b"], True, 0),
        ("control-group", A, ["--pidfile a", "- /opt/x", "--pidfile b"], True, 0),
        ("control-group", A, ["--pidfile a", "- /bin/sh -c $X", "--pidfile b"], True, 0),
        # It is unknown what a script does later, and whether it fails.
        ("control-group", A, ["/opt/stop"], True, 0),
        ("control-group", A, ["/opt/stop", "--pidfile b"], True, 0),
        ("control-group", A, ["/bin/sh -c qkilld-stop --pidfile a; qkilld-stop"], True, 0),
        ("control-group", {"pid": 4}, ["--pid $MAINPID", "--pidfile b"], False, 0),
        ("control-group", {"pid": 4}, ["--pid $MAINPID"], True, 0),
        ("process", A, ["--pidfile a"], False, 0),
        ("", A, [], False, 0),
    ],
)
def test_another_guest_of_the_unit_that_may_have_to_stay(
    monkeypatch: pytest.MonkeyPatch,
    kill_mode: str,
    options: dict[str, Any],
    lines: list[str],
    stopped: bool,
    code: int,
) -> None:
    monkeypatch.setenv("MAINPID", "4")
    monkeypatch.setenv("NAME", "a")
    run = StopRun(Options(**options, force=True), Notifier(""), Log())
    run._stops_unit = True
    processes = FakeHandle(4), FakeHandle(5)
    run._stops.append(stop_of(processes[0]))
    run._stops[0].code = 3 if code == 3 else 0
    run.targets.finder.stops_unit = True
    monkeypatch.setattr(stop_run, "has_others", lambda pids: True)
    monkeypatch.setattr(run.targets, "substitutes", lambda pids: [processes[1]])
    facts = stopping(*lines, kill_mode=kill_mode) if kill_mode else None
    monkeypatch.setattr(systemd_units, "on_bus", lambda what, user: facts)
    monkeypatch.setattr(run, "_start", Mock())
    assert run._stop_others() is stopped
    assert len(run._stops) == 1 + stopped
    for stop in run._stops[1:]:
        assert stop.forced is (len(lines) == 1 and not lines[0].startswith("/"))
        stop.code = 0
    assert run.code == code
    assert (processes[1].pidfd == -1) is not stopped
    for process in processes:
        process.close()


@pytest.mark.parametrize(
    ("ours", "lines", "is_left"),
    [
        ("--pidfile a", ["--pidfile a", "--pidfile b"], True),
        ("--pidfile b", ["--pidfile a", "--pidfile b"], False),
        ("--pidfile a --max 3", ["--pidfile a $OPTIONS", "--pidfile b"], True),
        ("--pidfile a", ["--pidfile a $OPTIONS", "--pidfile b"], True),
        ("--pidfile a", ["--pidfile ${DIR}a", "--pidfile b"], True),
        ("--pid 4", ["--pid $MAINPID", "--pidfile b"], True),
        ("--pidfile a", ["/opt/stop", "--pidfile b"], False),
        # Each of the first two lines may be the running one.
        ("--pidfile a", ["--pidfile a", "--pidfile a", "--pidfile b"], False),
    ],
)
def test_a_line_that_systemd_forgot_in_a_reload(
    monkeypatch: pytest.MonkeyPatch, ours: str, lines: list[str], is_left: bool
) -> None:
    facts = stopping(*lines, control_pid=os.getpid())
    monkeypatch.setattr(sys, "argv", [HELPER, *ours.split()])
    assert systemd_units.later_line_stops(facts, fails=False) is is_left
    assert not systemd_units.is_only_line(facts)
    assert not systemd_units.later_line_stops(replace(facts, control_pid=999), fails=False)


def test_a_later_line_with_other_rights() -> None:
    first, second = stopping("--pidfile a", "--pidfile b").exec_stop
    for ours in ((), ("privileged",)):
        for theirs in ((), ("privileged",), ("no-setuid",)):
            lines = replace(first, flags=ours), replace(second, flags=theirs)
            facts = replace(stopping(""), exec_stop=lines)
            assert systemd_units.later_line_stops(facts, fails=False) is (ours == theirs)


def test_a_later_line_through_a_shell() -> None:
    shell = "/bin/sh -c exec qkilld-stop --pidfile"
    facts = stopping(f"{shell} a", f"{shell} b")
    assert systemd_units.later_line_stops(facts, fails=False)


def test_the_only_line() -> None:
    assert systemd_units.is_only_line(stopping("--pidfile a"))
    assert systemd_units.is_only_line(stopping("/bin/sh -c exec qkilld-stop --pidfile a"))
    for lines in (["/opt/stop"], ["--pidfile a", "/bin/logger x"], ["/bin/logger x", "> --max 3"]):
        assert not systemd_units.is_only_line(stopping(*lines))


def test_a_line_of_exec_stop_post() -> None:
    lines = [
        ("ExecStopPost=", Command(HELPER, (HELPER, "--pidfile", name), pid=pid))
        for name, pid in (("a", 999), ("b", 0))
    ]
    facts = stopping("--pidfile a", "--pidfile b", control_pid=999)
    for given, is_left in ((lines, True), (lines[:1], False)):
        facts = replace(facts, other_commands=tuple(given))
        assert systemd_units.later_line_stops(facts, fails=False) is is_left
        assert not systemd_units.later_line_stops(facts, fails=True)


@pytest.mark.parametrize(
    ("lines", "fails", "is_own"),
    [
        (["--pidfile a"], False, True),
        (["--pidfile a"], True, True),
        # The other guest has a line of its own, which systemd will not run.
        (["--pidfile a", "--pidfile b"], True, False),
        # Its own line did not find it.
        (["--pidfile b", "> --pidfile a"], False, False),
        (["--pidfile a", "/opt/stop-b"], False, False),
        (["/opt/stop"], False, False),
        (None, False, False),
    ],
)
def test_the_options_for_guests_that_a_line_does_not_name(
    monkeypatch: pytest.MonkeyPatch, lines: list[str] | None, fails: bool, is_own: bool
) -> None:
    facts = None if lines is None else stopping(*lines)
    monkeypatch.setattr(systemd_units, "on_bus", lambda what, user: facts)
    configured = Config(Policy(grace=5, stall=9), guests={"b": Policy(grace=5, stall=20)})
    for force, powerdown in ((True, False), (False, True), (None, None)):
        spans = {"grace": 9, "stall": 10, "max": 1}
        options = Options(**A, force=force, powerdown=powerdown, spans=spans, reason="x")
        targets, other = Targets(options), FakeHandle(5)
        targets._config = configured
        assert targets.left_to_us([other], fails=fails) == [other]
        if is_own:
            assert (options.force, options.powerdown) == (force, powerdown)
            assert options.spans == spans
        else:
            assert options.force is (None if force else force)
            assert options.powerdown is (powerdown or None)
            assert options.spans == {"grace": 9, "stall": 20, "max": INFINITY}
        assert options.reason == "x"
        other.close()


@pytest.mark.parametrize(
    ("lines", "kept"),
    [(["--force"], True), (["- --pidfile a --no-force", "> --force"], False), (["/opt/x"], False)],
)
@pytest.mark.parametrize("had_main", [True, False])
def test_the_options_of_a_line_without_a_target(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], kept: bool, had_main: bool
) -> None:
    """If the main process is a shell, another line may have been for one of the guests."""
    monkeypatch.setenv("MAINPID", "4" if had_main else "")
    monkeypatch.delenv("EXIT_CODE", raising=False)
    options = Options(force=True, powerdown=False, spans={"max": 1})
    targets, guest = Targets(options), FakeHandle(5)
    targets.finder = ProcessFinder(options, os.environ)
    targets.finder.stops_unit = True
    facts = stopping(*lines, type="oneshot")
    monkeypatch.setattr(systemd_units, "on_bus", lambda what, user: facts)
    monkeypatch.setattr(targets.finder, "in_unit", lambda globs: [guest])
    monkeypatch.setattr(procfs, "read_executable", lambda pid: ("/bin/sh", False))
    if had_main:
        assert targets.judge_not_qemu(4, "Process 4 is not a QEMU", [guest]) == (0, [guest])
    else:
        assert targets.choose() == [guest]
    assert options.force is (True if kept else None)
    assert options.powerdown is (False if kept else None)
    assert options.spans == {"max": 1 if kept else INFINITY}
    guest.close()


@pytest.mark.parametrize(
    ("options", "is_missing", "stopped"),
    [(A, False, False), (A, True, True), ({}, False, True), ({"pid": 4}, False, False)],
)
def test_a_guest_beside_the_main_process_if_systemd_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], is_missing: bool, stopped: bool
) -> None:
    """The line is for a guest beside the main process, which systemd stops. But if the pidfile is
    missing, every guest may be the one that the line is for."""
    monkeypatch.setenv("MAINPID", "9")
    monkeypatch.setattr(stop_run, "RESTART_S", 0)
    run = StopRun(Options(**options), Notifier(""), Log())
    targets, first, other = run.targets, FakeHandle(4), FakeHandle(5)
    run._stops_unit = targets.finder.stops_unit = True
    gone = NoSuchProcess("gone") if is_missing else None
    monkeypatch.setattr(targets.finder, "named", Mock(side_effect=gone, return_value=first))
    monkeypatch.setattr(targets, "substitutes", lambda pids: [other] if pids else [first])
    monkeypatch.setattr(systemd_units, "on_bus", lambda what, user: None)
    monkeypatch.setattr(run, "_start", Mock())
    assert targets.choose() == [first]
    run._stops.append(stop_of(first))
    run._stops[0].code = 0
    assert run._stop_others() is stopped
    first.close()
    other.close()


def test_a_guest_that_cannot_be_identified_before_the_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If this line failed, systemd would not run the line that names the guest."""
    targets = Targets(Options(**A))
    targets.finder.stops_unit = True
    monkeypatch.setattr(targets.finder, "read_unidentified_again", lambda globs: None)
    targets.finder.unidentified = [6]
    for lines, codes in ((("--pidfile a", "--pidfile b"), []), (("--pidfile a",), [1])):
        facts = stopping(*lines)
        monkeypatch.setattr(systemd_units, "on_bus", lambda what, user, facts=facts: facts)
        assert targets.codes() == codes


def test_the_time_for_the_last_questions() -> None:
    """systemd may be asked, and may answer late."""
    run, notifier = StopRun(Options(), Mock(), Log()), Mock()
    run._notifier, notifier.targets.codes = notifier, Mock(return_value=[1])
    run._targets = notifier.targets
    assert run.code == 1
    assert [call[0] for call in notifier.mock_calls] == ["extend", "targets.codes"]


@pytest.mark.parametrize("by_name", [True, False])
def test_a_guest_that_cannot_be_identified_if_nothing_else_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by_name: bool
) -> None:
    targets = Targets(Options(**A) if by_name else Options(pid=0))
    targets.finder.stops_unit = True
    named = Mock(side_effect=NoSuchProcess("gone")) if by_name else Mock(return_value=None)
    monkeypatch.setattr(targets.finder, "named", named)
    monkeypatch.setattr(targets.finder, "in_unit", Mock(side_effect=UnknownIdentity("process 6")))
    targets.finder.unidentified = [6]
    for lines, error in (("--pidfile a", "--pidfile b"), NoSuchProcess), (("",), UnknownIdentity):
        facts = stopping(*lines)
        monkeypatch.setattr(systemd_units, "on_bus", lambda what, user, facts=facts: facts)
        with pytest.raises(error):
            targets.choose()
        assert ("process 6" in capsys.readouterr().err) is (error is NoSuchProcess)


@pytest.mark.parametrize("main", ["pidfile", "main process", "gone at the start", "gone by name"])
@pytest.mark.parametrize(
    ("settings", "lines", "left"),
    [
        ({}, ["--pidfile a"], {4, 5}),
        # With KillMode=process or none, the other guests are meant to outlive their unit.
        ({"kill_mode": "process"}, ["--pidfile a"], {4}),
        ({"kill_mode": "none"}, ["--pidfile a"], {4}),
        ({"kill_mode": "process", "exec_start": (LAUNCHER,)}, ["--pidfile a"], {4}),
        ({"kill_mode": "process", "type": "oneshot"}, ["--pidfile a"], {4, 5}),
        ({"kill_mode": "process", "exec_start": (DAEMONIZED,)}, ["--pidfile a"], {4, 5}),
        ({"kill_mode": "process", "exec_start": (Command("/bin/sh", ()),)}, [""], {4, 5}),
        # The next line stops them.
        ({}, ["--pidfile a", "--pidfile b"], set()),
        ({}, ["--pid $MAINPID", "--pidfile b"], set()),
        (None, [], {4, 5}),
    ],
)
def test_the_others_of_a_main_process_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
    main: str,
    settings: dict[str, Any] | None,
    lines: list[str],
    left: set[int],
) -> None:
    """The process that is gone was a shell that ran the other guests, or a QEMU beside them."""
    options = {"pidfile": A, "gone by name": {"pid": 0}}.get(main, {})
    named_by = {"--pidfile": "pidfile", "--pid": "gone by name"}
    if len(lines) == 2 and named_by[lines[0].split()[0]] != main:
        return  # The first line is not the one that runs now.
    targets = Targets(Options(**options))
    others = [FakeHandle(4), FakeHandle(5)]
    named = Mock(side_effect=NoSuchProcess("gone"), return_value=None)
    if main.startswith("gone"):
        named.side_effect = None
    monkeypatch.setattr(targets.finder, "named", named)
    monkeypatch.setattr(targets.finder, "in_unit", lambda globs: list(others))
    targets.finder.stops_unit = True
    # If systemd never knew the main process (Type=forking), there is no EXIT_CODE.
    if main != "gone by name":
        monkeypatch.setenv("EXIT_CODE", "exited")
    facts = None if settings is None else stopping(*lines, main_pid=4, **settings)
    monkeypatch.setattr(systemd_units, "on_bus", lambda what, user: facts)
    if left:
        assert {process.pid for process in targets.choose()} == left
    else:
        with pytest.raises(NoSuchProcess):
            targets.choose()
    for process in others:
        assert (process.pidfd >= 0) is (process.pid in left)
        process.close()


def test_the_others_if_systemd_cannot_be_asked_for_any_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets, process = Targets(Options()), FakeHandle(4)
    targets.finder.stops_unit = True
    monkeypatch.setattr(targets.finder, "named", Mock(side_effect=NoSuchProcess("gone")))
    monkeypatch.setattr(targets.finder, "in_unit", lambda globs: [process])
    monkeypatch.setattr(systemd_units, "on_bus", Mock(side_effect=OSError("no more files")))
    assert targets.choose() == [process]
    process.close()


@pytest.mark.parametrize(("inside", "forced"), [(True, True), (False, False)])
def test_a_substitute_that_begins_after_the_units_were_read(
    monkeypatch: pytest.MonkeyPatch, inside: bool, forced: bool
) -> None:
    """The main process was a shell, so the settings for the QEMU that it ran have not been read."""
    run = StopRun(Options(), Notifier(""), Log())
    process = FakeHandle(4)
    monkeypatch.setattr(run, "_start", Mock())
    run._is_unit_settled = True
    run.begin([process])
    assert not run._is_unit_settled
    own = Unit("web.service")
    run.targets.finder.unit = own
    monkeypatch.setattr(procfs, "read_unit", lambda pid: own if inside else Unit("db.service"))
    facts = UnitFacts(
        "web.service",
        main_pid=3,
        control_pid=os.getpid(),
        timeout_stop=90_000_000,
        notify_access="exec",
    )
    run._facts_known(facts, {3: facts})
    assert run._stops[0].forced is forced
    process.close()


@pytest.mark.parametrize(
    ("name", "kill_mode", "options", "code", "left"),
    [
        ("/opt/my/qemu-kvm", "mixed", {}, 5, False),
        ("/opt/my/qemu-kvm", "process", {}, 5, True),
        ("/opt/run-qemu", "process", {}, 0, False),
        # The next line names the other guest.
        ("/opt/run-qemu", "mixed", {"pid": 4}, 0, True),
    ],
)
def test_a_main_process_that_is_a_qemu_which_executables_does_not_cover(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    kill_mode: str,
    options: dict[str, Any],
    code: int,
    left: bool,
) -> None:
    """Unlike a shell that runs the other guest, such a QEMU does not exit with that guest."""
    monkeypatch.setenv("MAINPID", "4")
    lines = ["--pid $MAINPID", "--pidfile b"] if options else [""]
    facts = stopping(*lines, kill_mode=kill_mode, main_pid=4)
    monkeypatch.setattr(systemd_units, "on_bus", lambda what, user: facts)
    run, main = StopRun(Options(**options), Notifier(""), Log()), FakeHandle(4)
    other = FakeHandle(5)
    run.targets.finder.stops_unit = True
    run._stops.append(stop_of(main))
    monkeypatch.setattr(run.targets, "substitutes", lambda pids: [other])
    monkeypatch.setattr(run, "_start", Mock())
    monkeypatch.setattr(procfs, "read_executable", lambda pid: (name, False))
    run._stop_substitutes(run._stops[0], "Process 4 is not a QEMU")
    assert [stop.code for stop in run._stops] == ([code] if left else [code, None])
    assert (other.pidfd == -1) is left
    assert ("is left to systemd" in capsys.readouterr().err) is bool(code)
    main.close()
    other.close()


@pytest.mark.parametrize(
    ("kill_mode", "lines", "left", "code"),
    [
        ("mixed", ["--pidfile a"], {4, 5}, 0),
        # The last line stops every guest, and systemd runs that line only if this one succeeds.
        ("mixed", ["--pidfile a", "--pidfile b"], set(), 0),
        # The guest with this pidfile may be the one that stays.
        ("process", ["--pidfile a"], {4}, 2),
        # systemd runs no later line after a failure.
        ("process", ["--pidfile a", "--pid $MAINPID"], {4}, 2),
        ("process", ["- --pidfile a", "--pid $MAINPID"], set(), 2),
        ("mixed", ["/opt/stop"], {4, 5}, 0),
        ("mixed", [], {4, 5}, 0),  # systemd cannot be asked.
    ],
)
@pytest.mark.parametrize("force", [True, False])
def test_an_unusable_pidfile(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kill_mode: str,
    lines: list[str],
    left: set[int],
    code: int,
    force: bool,
) -> None:
    """If the helper gave up, systemd would end the guests of the unit with SIGTERM and SIGKILL."""
    options = Options(**A, force=force, spans={"max": INFINITY})
    targets, processes = Targets(options), [FakeHandle(4), FakeHandle(5)]
    monkeypatch.setattr(targets.finder, "named", Mock(side_effect=InvalidArgs("a is no pidfile")))
    monkeypatch.setattr(targets.finder, "in_unit", lambda globs: list(processes))
    facts = stopping(*lines, kill_mode=kill_mode, main_pid=4) if lines else None
    monkeypatch.setattr(systemd_units, "on_bus", lambda what, user: facts)
    with pytest.raises(InvalidArgs):
        targets.choose()  # Not started by systemd.
    targets.finder.stops_unit = True
    if left:
        assert {process.pid for process in targets.choose()} == left
        assert targets.codes() == ([code] if code else [])
        assert "a is no pidfile" in capsys.readouterr().err
        assert options.force is (None if force and lines != ["--pidfile a"] else force)
        assert options.spans == {"max": INFINITY}
    else:
        with pytest.raises(InvalidArgs if code else NoSuchProcess):
            targets.choose()
        # If the error itself is raised, the caller prints it.
        assert ("a is no pidfile" in capsys.readouterr().err) is (code == 0)
    for process in processes:
        process.close()


@pytest.mark.parametrize(
    ("lines", "left", "code"),
    [
        (["--pidfile a"], {4}, 5),
        (["--pidfile a", "--pid $MAINPID"], {4}, 5),
        (["- --pidfile a", "--pid $MAINPID"], set(), 5),
        (["/opt/stop"], {4}, 5),
    ],
)
def test_a_pidfile_of_another_program_with_kill_mode_process(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: list[str],
    left: set[int],
    code: int,
) -> None:
    targets, processes = Targets(Options(**A)), [FakeHandle(4), FakeHandle(5)]
    targets.finder.stops_unit = True
    facts = stopping(*lines, kill_mode="process", main_pid=4)
    monkeypatch.setattr(systemd_units, "on_bus", lambda what, user: facts)
    monkeypatch.setattr(procfs, "read_executable", lambda pid: ("/bin/sleep", False))
    _, others = targets.judge_not_qemu(7, "Process 7 is not a QEMU", list(processes))
    assert {process.pid for process in others} == left
    assert targets.codes() == [code]
    assert "Process 7 is not a QEMU" in capsys.readouterr().err
    for process in processes:
        process.close()


@pytest.mark.parametrize("stops", [True, False])
def test_a_program_of_the_unit_that_names_no_guest(stops: bool) -> None:
    """systemd has started the program's unit, but may not be stopping it."""
    environment = {"SYSTEMD_EXEC_PID": str(os.getpid())}
    if stops:
        assert ProcessFinder(Options(), environment | {"SERVICE_RESULT": "success"}).named() is None
        return
    with pytest.raises(InvalidArgs, match="nothing to stop is named"):
        ProcessFinder(Options(), environment).named()
