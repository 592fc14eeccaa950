"""How qkilld-stop reacts to the daemon's replies and to its silence."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from qkilld.adapters import blockable, procfs
from qkilld.model.errors import Failed, InvalidArgs, NoSuchProcess, UnknownIdentity
from qkilld.model.guest import Unit
from qkilld.stop import daemon as stop_daemon
from qkilld.stop import finder
from qkilld.stop.daemon import DaemonStopper
from qkilld.stop.guest_stop import GuestStop
from qkilld.stop.limits import FIRST
from qkilld.stop.log import Log
from qkilld.stop.notifier import Notifier
from qkilld.stop.options import Options
from qkilld.stop.process import ProcessHandle
from qkilld.stop.run import StopRun
from qkilld.stop.targets import Targets
from qkilld.varlink.server import description
from tests.stop.fakes import Clock, FakeDaemon, FakeHandle, Notes, state, stop_of, stopper

DENIED = "org.varlink.service.PermissionDenied"


class Scene:
    """A stop of one process that a daemon has accepted."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.clock = Clock()
        self.notes = Notes()
        self.daemon = FakeDaemon(path)
        self.process = FakeHandle()
        self.stop = stop_of(self.process)
        self.stopper: DaemonStopper = stopper(path, self.notes, self.clock, **options)

    def start(self) -> None:
        self.stopper.start([self.stop])
        self.daemon.take()

    def begun(self) -> None:
        """Start the stop, and let the daemon report that its job has begun."""
        self.start()
        self.daemon.say(state=state())
        assert self.work() == [("heard", "terminate")]

    def exit(self) -> None:
        self.process.exit()
        self.stopper.note_exit(self.stop)

    def work(self, seconds: float = 0.0) -> list[tuple[str, ...]]:
        """Advance the clock; return the events since the last call."""
        self.clock.now += seconds
        self.stopper.work()
        said, self.notes.said = self.notes.said, []
        return said

    def end(self, result: str, **receipt: object) -> None:
        over = {"elapsedUSec": 5, "rungs": [], **receipt}
        self.daemon.say(continues=False, state=state(result=result, phase="done"), receipt=over)


@pytest.fixture
def scene(lab_dir: Path) -> Iterator[Scene]:
    made = Scene(lab_dir / "socket")
    yield made
    made.stopper.close()
    made.daemon.close()
    made.process.close()


def test_one_call_is_all(scene: Scene) -> None:
    scene.begun()
    scene.exit()
    scene.end("exited")
    assert scene.work() == [("ended", "exited")]
    ((method, given),) = scene.daemon.calls
    assert method == "Terminate"
    assert given == {
        "pid": 4711,
        "startTime": 17,
        "flags": ["powerdown"],
        "options": {"powerdownAsConfigured": True},
        "byUnit": True,
        "forceAsUnit": True,
    }
    described = description()
    described.check(json.loads(json.dumps(given)), described.methods[method].takes)
    assert not scene.stopper.descriptors()


def test_options_of_the_command_line_are_sent(lab_dir: Path) -> None:
    spans = dict.fromkeys(stop_daemon._SPANS, 5)
    scene = Scene(lab_dir / "socket", stops_unit=False, spans=spans, force=True)
    scene.start()
    ((_, given),) = scene.daemon.calls
    assert given["options"]["reason"] == "qkilld-stop" and "byUnit" not in given
    described = description()
    described.check(given, described.methods["Terminate"].takes)
    assert len(given["options"]) == len(spans) + 2
    scene.stopper.close()
    scene.daemon.close()
    scene.process.close()


@pytest.mark.parametrize(("all_guests", "seconds"), [(True, 20 * 60), (False, None)])
def test_asking_every_guest_of_a_host_has_a_limit(
    monkeypatch: pytest.MonkeyPatch, all_guests: bool, seconds: int | None
) -> None:
    """The limit leaves 5 of the 25 minutes of qkilld-guests.service for SIGTERM."""
    started: list[GuestStop] = []
    for name in ("_leave_to_keepers", "_start"):
        monkeypatch.setattr(StopRun, name, lambda self, stops: started.extend(stops))
    process = FakeHandle()
    StopRun(Options(all_guests=all_guests), Notifier(""), Log()).begin([process])
    ask_at_most = None if seconds is None else seconds * 1_000_000
    assert [stop.options.get("powerdownMaxUSec") for stop in started] == [ask_at_most]
    process.close()


@pytest.mark.parametrize(
    ("uid", "force", "forced"),
    [(0, None, True), (1000, None, True), (1001, None, False), (0, False, False)],
)
def test_force_is_asked_for_only_by_who_may(
    monkeypatch: pytest.MonkeyPatch, uid: int, force: bool | None, forced: bool
) -> None:
    """If another user sent FORCE, the daemon would refuse the whole call, not only the flag."""
    monkeypatch.setattr("os.geteuid", lambda: uid)
    run, process = StopRun(Options(force=force), Notifier(""), Log()), FakeHandle()
    stop = stop_of(process)
    stop.state = state(uid=1000)
    told: dict[str, Any] = {
        "force": True,
        "extendable": True,
        "stayUSec": None,
        "askUSec": None,
        "warnings": [],
    }
    run.unit_known(told, [stop])
    assert ("force" in stop.flags) is forced
    process.close()


def test_a_process_that_is_exiting_is_waited_for_beside_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The unit runs another QEMU, and the first one still finishes its I/O."""
    notifier, begun = Mock(), list[ProcessHandle]()
    run = StopRun(Options(), notifier, Log())
    process, other = FakeHandle(), FakeHandle()
    stop = stop_of(process)
    run._stops.append(stop)
    run._stopper_of[stop] = Mock()
    monkeypatch.setattr(run.targets, "substitutes", lambda pids: [other])
    monkeypatch.setattr(run, "begin", begun.extend)
    run._handle_exit(stop)
    notifier.extend.assert_called_once_with(FIRST)  # The search may take several seconds.
    assert stop.running
    assert stop.leave_at is not None
    assert begun == [other]
    process.exit()
    run._handle_exit(stop)
    assert not stop.running
    process.close()
    other.close()


def test_a_pidfile_that_cannot_be_looked_for_is_not_missing(tmp_path: Path) -> None:
    with pytest.raises(NoSuchProcess, match="does not exist"):
        finder._of_pidfile(str(tmp_path / "pid"))
    with pytest.raises(InvalidArgs, match="File name too long"):
        finder._of_pidfile(str(tmp_path / ("x" * 300)))


def test_a_process_that_cannot_be_identified_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process may be a guest that still runs, so systemd must not run the next ExecStop=
    line."""
    run = StopRun(Options(all_guests=True), Notifier(""), Log())
    process = FakeHandle()
    run._stops.append(stop_of(process))
    run._stops[0].code = 0
    monkeypatch.setattr(
        procfs, "read_executables", lambda pids: [(pid, blockable.Unanswered()) for pid in pids]
    )
    pids = [os.getpid(), os.getppid()]
    run.targets.finder.unidentified = pids
    assert run.code == 1
    assert "whether process {} {} is a guest to stop".format(*pids) in capsys.readouterr().err
    run.targets.finder.unidentified = []
    assert run.code == 0
    process.close()


def test_a_substitute_that_cannot_be_identified_is_not_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The main process was a shell, and has exited."""
    targets = Targets(Options())
    chosen = targets.finder
    monkeypatch.setattr(finder.ProcessFinder, "in_own_unit", True)
    monkeypatch.setattr(chosen, "named", Mock(side_effect=NoSuchProcess("gone")))

    def in_unit(globs: object) -> list[ProcessHandle]:
        chosen.unidentified = [5]
        raise chosen.unknown_identity()

    monkeypatch.setattr(chosen, "in_unit", in_unit)
    with pytest.raises(UnknownIdentity, match="process 5 is"):
        targets.choose()
    assert targets.substitutes([4]) == []


@pytest.mark.parametrize("there", [Unit("web.service"), Unit("db.service"), None])
def test_a_process_of_the_unit_that_may_not_be_seen_is_not_taken_for_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], there: Unit | None
) -> None:
    own = Unit("web.service")
    targets = Targets(Options())
    targets.finder.unit = own
    monkeypatch.setattr(finder.ProcessFinder, "in_own_unit", True)
    monkeypatch.setattr(procfs, "pids", lambda: [5])
    monkeypatch.setattr(procfs, "read_executables", lambda pids: [(5, PermissionError())])
    monkeypatch.setattr(procfs, "read_unit", lambda pid: there)
    if there != own:
        assert targets.finder.in_unit([]) == []
        return
    with pytest.raises(Failed, match=r"process 5 in the unit is a QEMU: .* not permitted"):
        targets.substitutes([])
    assert targets.substitutes([4]) == []
    assert targets.substitutes([4]) == []
    assert targets.judge_not_qemu(4, "Process 4 (sh) is not a QEMU", []) == (5, [])
    said = capsys.readouterr().err
    assert said.count("not permitted") == 1 and "has no other" not in said


@pytest.mark.parametrize(
    ("name", "threads", "may_be_guest"),
    [(b"(sd-pam)", 1, False), (b"(sd-pam)", 3, True), (b"sudo", 1, True)],
)
def test_a_process_that_may_not_be_seen_but_is_no_guest(
    monkeypatch: pytest.MonkeyPatch, name: bytes, threads: int, may_be_guest: bool
) -> None:
    own = finder.ProcessFinder(Options(), {})
    own.unit = Unit("web.service")
    stat = procfs.Stat(name, "S", 1, False, 0, threads, 1, 0)
    monkeypatch.setattr(procfs, "pids", lambda: [5])
    monkeypatch.setattr(procfs, "read_executables", lambda pids: [(5, PermissionError())])
    monkeypatch.setattr(procfs, "read_unit", lambda pid: own.unit)
    monkeypatch.setattr(procfs, "read_stat", lambda pid: stat)
    with pytest.raises(Failed) if may_be_guest else contextlib.nullcontext():
        assert own.in_unit([]) == []


def test_a_missing_daemon_is_lost(lab_dir: Path) -> None:
    notes, process = Notes(), FakeHandle()
    stopper(lab_dir / "nothing", notes, Clock()).start([stop_of(process)])
    assert notes.said == [("lost", "qkilld cannot be reached: No such file or directory")]
    process.close()


def test_somebody_else_serves_there(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of another user is not trusted."""
    monkeypatch.setattr("qkilld.stop.daemon.struct.unpack", lambda *_: (1, 1234, 0))
    scene.stopper.start([scene.stop])
    [(event, why)] = scene.work()
    assert event == "lost"
    assert why.startswith("qkilld cannot be reached: uid 1234 serves /")


def test_it_has_read_the_call_and_is_busy(scene: Scene) -> None:
    scene.start()
    assert scene.work(3.1) == []
    assert scene.work(11.9) == []
    assert scene.work(0.2) == [("lost", "qkilld does not answer within 15 s")]


def test_it_does_not_read(scene: Scene) -> None:
    scene.stopper.start([scene.stop])
    assert scene.work(2.9) == []
    assert scene.stopper.deadline() == pytest.approx(scene.clock.now + 0.1)
    assert scene.work(0.2) == [("lost", "qkilld does not answer within 3 s")]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("org.qkilld1.NoSuchProcess", ("refused", "NoSuchProcess")),
        ("org.qkilld1.NotQemu", ("refused", "NotQemu")),
        ("org.qkilld1.Failed", ("refused", "Failed")),
        (DENIED, ("refused", "AccessDenied")),
        ("org.varlink.service.MethodNotFound", ("lost", "qkilld says: no")),
    ],
)
def test_it_refuses(scene: Scene, error: str, said: tuple[str, str]) -> None:
    scene.start()
    scene.daemon.refuse(error, "no")
    assert scene.work() == [said]


def test_the_daemon_ends_before_it_replies_and_returns(scene: Scene) -> None:
    scene.start()
    scene.daemon.hang_up()
    assert scene.work() == []
    assert scene.work() == []
    scene.daemon.take()
    first, second = scene.daemon.calls
    # The new daemon, too, has to tell what the unit allows.
    assert second == first and first[1]["byUnit"] and first[1]["forceAsUnit"]
    scene.daemon.say(state=state())
    scene.exit()
    scene.end("exited")
    assert scene.work() == [("heard", "terminate"), ("ended", "exited")]


def test_it_ends_again_and_again(scene: Scene) -> None:
    scene.start()
    said = []
    for _ in range(200):
        scene.daemon.hang_up()
        said += scene.work(0.025)
        if scene.daemon.called:
            continue
    assert said == [("lost", "qkilld went away")]
    # There is one attempt every 50 ms for 3 s.
    assert 10 < len(scene.daemon.calls) < 70


def test_it_restarts_during_the_stop(scene: Scene) -> None:
    scene.begun()
    scene.daemon.close()
    assert scene.work() == []
    assert scene.work(1) == []
    scene.daemon.open()
    assert scene.work(0.1) == []
    assert scene.daemon.take() == ("Wait", {"job": 7})
    scene.daemon.say(state=state(phase="kill"))
    assert scene.work(1) == [("heard", "kill")]
    scene.exit()
    scene.end("killed")
    assert scene.work(4) == [("ended", "killed")]


def test_it_does_not_come_back(scene: Scene) -> None:
    scene.begun()
    scene.daemon.close()
    said = [each for _ in range(100) for each in scene.work(0.05)]
    assert said == [("lost", "qkilld went away")]
    assert scene.stop.state == state()


def test_the_daemon_returns_but_does_not_reply(scene: Scene) -> None:
    scene.begun()
    scene.daemon.hang_up()
    said = [each for _ in range(100) for each in scene.work(0.05)]
    assert said == [("lost", "qkilld does not answer within 3 s")]


def test_the_new_one_does_not_know_the_job(scene: Scene) -> None:
    scene.begun()
    scene.daemon.hang_up()
    scene.work()
    scene.work()
    scene.daemon.take()
    scene.daemon.refuse("org.qkilld1.NoSuchJob", "There is no job 7")
    why = "qkilld went away, and the new one says: There is no job 7"
    assert scene.work() == [("lost", why)]


def test_the_new_one_means_another_process(scene: Scene) -> None:
    scene.begun()
    scene.daemon.hang_up()
    scene.work()
    scene.work()
    scene.daemon.take()
    scene.daemon.say(state=state(startTime=18))
    ((what, why),) = scene.work()
    assert what == "lost" and "no job for the guest" in why


def test_the_guest_is_gone_when_it_is_back(scene: Scene) -> None:
    scene.begun()
    scene.daemon.hang_up()
    scene.exit()
    scene.work()
    scene.work()
    scene.daemon.take()
    scene.daemon.refuse("org.qkilld1.NoSuchJob", "There is no job 7")
    assert scene.work() == [("ended", "exited")]


@pytest.mark.parametrize(("phase", "result"), [("terminate", "exited"), ("reap", "killed")])
def test_the_guest_is_gone_and_nobody_says_how(scene: Scene, phase: str, result: str) -> None:
    scene.begun()
    scene.daemon.say(state=state(phase=phase))
    scene.work()
    scene.exit()
    assert scene.work(1.9) == []
    assert scene.work(0.2) == [("ended", result)]


def test_it_falls_silent(scene: Scene) -> None:
    scene.begun()
    assert scene.work(4.9) == []
    assert scene.work(0.2) == []
    assert scene.daemon.take()[0] == "GetStatus"
    scene.daemon.say(continues=False, version="1", jobs=1)
    assert scene.work(1) == []
    assert scene.work(5) == []
    assert scene.daemon.take()[0] == "GetStatus"
    assert scene.work(1.9) == []
    assert scene.work(0.2) == [("lost", "qkilld does not answer any more")]
    assert scene.stop.state is not None


@pytest.mark.parametrize("result", ["exited", "killed"])
def test_a_false_report_of_an_exit_counts_as_a_lost_daemon(scene: Scene, result: str) -> None:
    scene.begun()
    scene.end(result)
    assert scene.work() == []
    assert scene.work(0.9) == []
    assert scene.work(0.2) == [("lost", "qkilld reports the guest as exited, but it has not")]
    # Nothing that the daemon reported about the job is used.
    assert scene.stop.state is None


def test_our_pidfd_is_later_than_its(scene: Scene) -> None:
    scene.begun()
    scene.end("exited")
    assert scene.work(0.1) == []
    scene.exit()
    assert scene.work(0.1) == [("ended", "exited")]


def test_somebody_cancels(scene: Scene) -> None:
    scene.begun()
    scene.end("cancelled")
    assert scene.work() == []
    assert scene.work(1.1) == [("ended", "cancelled")]


def test_the_daemon_is_stopped_and_cancels_its_jobs(scene: Scene) -> None:
    """A daemon that is stopped cancels its jobs, so the helper must continue."""
    scene.begun()
    scene.end("cancelled")
    assert scene.work() == []
    scene.daemon.hang_up()
    assert scene.work(0.3) == [("lost", "qkilld was stopped")]
    assert scene.stop.state is not None


@pytest.mark.parametrize("result", ["survived", "failed", "signalled"])
def test_it_gives_up(scene: Scene, result: str) -> None:
    scene.begun()
    scene.end(result)
    assert scene.work() == [("ended", result)]


def test_a_process_that_becomes_another_program(scene: Scene) -> None:
    scene.begun()
    scene.end("failed", errorName="org.qkilld1.Error.ProcessChanged", error="no QEMU by now")
    assert scene.work() == [("refused", "ProcessChanged")]


def test_the_unit(scene: Scene) -> None:
    scene.begun()
    limits = {"name": "web.service", "force": True, "extendable": True, "stayUSec": None}
    scene.daemon.say(unit=limits)
    scene.daemon.say(unitError="no bus")
    assert scene.work() == [("unit", "web.service"), ("no unit", "no bus")]


def test_many_in_one_call(lab_dir: Path) -> None:
    clock, notes, server = Clock(), Notes(), FakeDaemon(lab_dir / "socket")
    processes = [FakeHandle(pid) for pid in range(101, 104)]
    stops = [stop_of(process) for process in processes]
    stopping = stopper(lab_dir / "socket", notes, clock)
    stopping.start(stops)
    method, given = server.take()
    described = description()
    described.check(given, described.methods[method].takes)
    assert (method, [each["pid"] for each in given["processes"]]) == (
        "TerminateAll",
        [101, 102, 103],
    )
    refusal = {"pid": 102, "name": "NotQemu", "message": "no"}
    server.say(states=[state(101), state(103, job=8)], refused=[refusal])
    stopping.work()
    assert notes.said == [("refused", "NotQemu"), ("heard", "terminate"), ("heard", "terminate")]
    notes.said.clear()
    # The daemon exits, and the helper asks the next one about each remaining process.
    processes[0].exit()
    server.say(state=state(101, result="exited"), receipt={})
    stopping.work()
    assert notes.said == [("ended", "exited")]
    server.hang_up()
    stopping.work()
    stopping.work()
    assert server.take() == ("Wait", {"job": 8})
    stopping.close()
    server.close()
    for process in processes:
        process.close()


def test_an_unreadable_reply_counts_as_a_lost_daemon(scene: Scene) -> None:
    scene.begun()
    scene.daemon.connections[-1].sendall(b"{nonsense\0")
    scene.daemon.close()
    said = [each for _ in range(100) for each in scene.work(0.05)]
    assert said == [("lost", "qkilld went away")]


def test_flags_that_have_become_known(scene: Scene) -> None:
    scene.begun()
    scene.stop.forced = True
    scene.stopper.amend(scene.stop)
    method, given = scene.daemon.take()
    assert (method, given["flags"]) == ("Terminate", ["force", "powerdown"])
    scene.daemon.say(continues=False, state=state())
    assert scene.work() == []
