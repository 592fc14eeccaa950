"""A job that another registry resumes makes the same decisions, or safer ones."""

from __future__ import annotations

import json
import typing
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from signal import SIGCONT, SIGKILL, SIGTERM
from typing import Any

import pytest

from qkilld.decision.ladder import Promise
from qkilld.engine.job import Job
from qkilld.engine.snapshot import VERSION, Snapshot, SnapshotError, decode
from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import INFINITY, Flag, GuestAsked, Phase, Result, Verdict
from qkilld.model.event import MessageId
from qkilld.model.job import Control, Request, Risk
from qkilld.model.policy import Policy
from qkilld.model.sample import Io, Mount, Peer, Sample, Socket, Thread

from .conftest import IDLE, FakeProcess, S, World, make_guest

FORCE, NOWAIT, FIXED = Flag.FORCE, Flag.NOWAIT, Flag.FIXED
WAITING = replace(IDLE, threads=(Thread(7, "worker", "D", 75, True, "folio_wait_bit"),))

Shows = Callable[[int], Sample | None]
START = 1_000 * S
ADMIN = Steerer(1001, Rank.AUTHORIZED)
IDLES: Shows = lambda now: IDLE  # noqa: E731
WAITS: Shows = lambda now: WAITING  # noqa: E731
BLIND: Shows = lambda now: Sample(now, "S")  # noqa: E731


def flushes_for(seconds: float) -> Shows:
    """Return samples of a process that waits for storage, and that writes during the first
    `seconds`."""
    end = START + int(seconds * S)
    return lambda now: replace(WAITING, io=Io(0, 0, 0, 0, 0, min(now, end), 0))


def passed_on(past: Snapshot) -> Snapshot:
    return decode(json.loads(json.dumps(past.to_json())))


def crash(world: World, job: Job, process: FakeProcess, down: float = 0) -> tuple[World, Job]:
    """Return the world of the next daemon, `down` seconds after a crash, and the resumed job."""
    after = World()
    after.clock.advance((world.clock.now() - START) / S + down)
    after.sampler.shows = world.sampler.shows
    process._callback = None
    return after, after.registry.resume(process, passed_on(job.snapshot()))


def ends(world: World, process: FakeProcess) -> tuple[int | None, int]:
    """Return the times of SIGKILL and of the job's end, in µs since the start."""
    (job,) = world.registry
    while job.running and world.clock.now() < START + 400 * S:
        world.clock.advance(0.05)
    killed = [rung.at - START for rung in job.rungs if rung.action == "SIGKILL"]
    assert job.ended is not None
    return (killed[0] if killed else None), job.ended - START


@pytest.mark.parametrize("flags", [FORCE, Flag(0), FORCE | FIXED, FIXED])
@pytest.mark.parametrize("cut", [0.02, 0.3, 4.7, 9.99, 10.01, 12, 14.99, 40, 64.9])
@pytest.mark.parametrize("shows", [IDLES, WAITS, BLIND, flushes_for(7), flushes_for(35)])
def test_a_crash_at_any_time_ends_as_none_at_all(flags: Flag, cut: float, shows: Shows) -> None:
    """The next daemon starts at once. The rungs come at the same times, or later if the process was
    making progress or no sample had been taken."""
    world, process = World(), FakeProcess(dies_of=())
    world.sampler.shows = shows
    job = world.stop(process, flags, spans={"stall": 8 * S})
    unbroken = World()
    unbroken.sampler.shows = shows
    unbroken.stop(FakeProcess(dies_of=()), flags, spans={"stall": 8 * S})
    kill, end = ends(unbroken, process)
    world.clock.advance(cut)
    if not job.running:
        return
    unsure = (job.assessment is None or job.verdict is Verdict.FLUSHING) and FIXED not in flags
    sent = list(process.sent)
    after, resumed = crash(world, job, process)
    assert process.sent[: len(sent)] == sent
    assert resumed.number == job.number
    if not unsure:
        assert resumed.deadline == job.deadline
    kill_after, end_after = ends(after, process)
    assert process.sent.count(SIGTERM) == 1
    assert process.sent.count(SIGKILL) == (kill is not None)
    assert (kill_after is None) == (kill is None)
    if unsure:
        # A crash never makes SIGKILL earlier, apart from a shift of the sample times by up to 1 s.
        # It delays SIGKILL by at most `cut` and StorageStallSec=, because progress may be unseen.
        assert (kill or 0) - S < (kill_after or 0)
        assert end - S < end_after <= end + int(cut * S) + 60 * S
    else:
        assert (kill_after, end_after) == (kill, end)


def test_movement_between_two_daemons_is_progress() -> None:
    world, process = World(), FakeProcess()
    world.sampler.shows = WAITS
    job = world.stop(process, FORCE)
    world.clock.advance(50)
    assert job.verdict is Verdict.STORAGE_WAIT
    moved = replace(WAITING, io=Io(0, 0, 0, 0, 0, 4096, 0))
    world.sampler.shows = lambda now: moved
    after, resumed = crash(world, job, process, down=30)
    after.clock.advance(0.2)
    assert process.sent == [SIGTERM]
    assert resumed.verdict is Verdict.FLUSHING
    assert resumed.deadline >= after.clock.now() + 59 * S


@pytest.mark.parametrize("cut", [0.15, 1, 8, 30])
def test_a_deadline_does_not_become_earlier_in_the_next_daemon(cut: float) -> None:
    """The process waited for storage until 0.2 s after SIGTERM, and is idle since then."""
    world, process = World(), FakeProcess()
    job = world.stop(process, FORCE)
    world.sampler.shows = lambda now: WAITING if now < START + S // 5 else IDLE
    world.clock.advance(cut)
    assert job.deadline == START + 60 * S
    after, resumed = crash(world, job, process)
    assert resumed.deadline == job.deadline
    assert ends(after, process)[0] == 60 * S


def test_no_sigkill_on_one_look_after_a_long_absence() -> None:
    """No sample was taken before the crash, so the process may have made progress until then."""
    world, process = World(), FakeProcess()
    job = world.stop(process, FORCE)
    after, _ = crash(world, job, process, down=120)
    after.clock.advance(9.9)
    assert process.sent == [SIGTERM]
    after.clock.advance(1)
    assert process.sent == [SIGTERM, SIGKILL]


def test_right_before_sigkill_it_looks_once_more() -> None:
    world, process = World(), FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(8)
    after, _ = crash(world, job, process, down=4)
    assert after.sampler.looks == 1
    assert process.sent == [SIGTERM]
    after.clock.advance(4)
    assert after.sampler.looks > 1
    assert process.sent == [SIGTERM, SIGKILL]


@pytest.mark.parametrize(("shows", "expected"), [(IDLES, 68), (lambda now: None, 118)])
def test_a_longer_time_without_looks_does_not_count(shows: Shows, expected: int) -> None:
    """Of the 60 s without a daemon, only the usual interval between two samples counts."""
    world, process = World(), FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(5)
    world.sampler.shows = shows
    after, _ = crash(world, job, process, down=60)
    assert process.sent == [SIGTERM]
    killed, _ = ends(after, process)
    assert killed == pytest.approx(expected * S, abs=3 * S)


def test_a_job_goes_on_reaping() -> None:
    world, process = World(), FakeProcess(dies_of=())
    job = world.stop(process, FORCE | FIXED)
    world.clock.advance(12)
    after, resumed = crash(world, job, process, down=1)
    assert (resumed.phase, resumed.deadline) == (Phase.REAP, START + 15 * S)
    assert after.journal.ids == [MessageId.JOB_RESUMED]
    process.die()
    assert resumed.result is Result.KILLED
    assert process.sent == [SIGTERM, SIGKILL]


def test_one_that_was_killed_meanwhile_reaps_though_its_phase_was_not_noted() -> None:
    world, process = World(), FakeProcess(dies_of=())
    job = world.stop(process, FORCE | FIXED)
    world.clock.advance(10)
    past = replace(job.snapshot(), phase=Phase.KILL)
    after = World()
    after.clock.advance(11)
    assert after.registry.resume(process, past).phase is Phase.REAP


@pytest.mark.parametrize(("at", "result"), [(3, Result.EXITED), (11, Result.KILLED)])
@pytest.mark.parametrize("held", [True, False])
def test_a_process_that_went_meanwhile(at: int, result: Result, held: bool) -> None:
    world, process = World(), FakeProcess(dies_of=())
    job = world.stop(process, FORCE | FIXED)
    world.clock.advance(at)
    process.dead = True
    after = World()
    after.clock.advance(at + 2)
    resumed = after.registry.resume(process if held else None, passed_on(job.snapshot()))
    assert (resumed.result, resumed.ended) == (result, after.clock.now())
    assert after.journal.ids == [MessageId.JOB_RESUMED, MessageId.JOB_ENDED]
    assert after.registry.running == 0
    after.clock.advance(61)
    assert list(after.registry) == []


def test_everything_of_a_job_comes_through() -> None:
    world, process = World(), FakeProcess(dies_of=())
    world.sampler.shows = lambda now: replace(flushes_for(40)(now) or IDLE, state="T")
    job = world.stop(process, reason="host upgrade", uid=1000, spans={"grace": 3 * S})
    world.clock.advance(2)
    job.join(Request(FORCE, {"max": 50 * S}))
    world.sampler.shows = WAITS
    world.clock.advance(2)
    past = job.snapshot()
    assert {rung.action for rung in past.rungs} == {"SIGTERM", "SIGCONT"}
    assert len(past.history) >= 2
    assert past.flags == FORCE
    again = passed_on(past)
    assert past.assessment is not None
    assert again.assessment is not None
    assert again.assessment.written == past.assessment.written
    first = past.assessment.first
    assert replace(again, assessment=replace(again.assessment, first=first)) == past
    _, resumed = crash(world, job, process)
    assert resumed.facts.term_at == START
    assert resumed.facts.continued_at == past.sent_at(SIGCONT)
    assert (resumed.request, resumed.policy) == (job.request, job.policy)


def test_a_finished_job_is_kept_for_the_rest_of_its_minute() -> None:
    world, process = World(), FakeProcess()
    job = world.stop(process, FORCE)
    world.clock.advance(1)
    process.die()
    world.clock.advance(20)
    after = World()
    after.clock.advance(25)
    resumed = after.registry.resume(None, passed_on(job.snapshot()))
    assert (resumed.result, resumed.elapsed, resumed.rungs) == (Result.EXITED, 1 * S, job.rungs)
    assert after.journal.ids == []
    assert after.registry.running == 0
    after.clock.advance(35)
    assert after.registry.get(job.number) is resumed
    after.clock.advance(2)
    assert list(after.registry) == []
    assert after.stop(FakeProcess()).number == 2


def test_a_survivor_stays_watched() -> None:
    world, process = World(), FakeProcess()
    job = world.stop(process)
    world.clock.advance(20)
    assert job.result is Result.SURVIVED
    after, _ = crash(world, job, process, down=200)
    after.clock.advance(1)
    assert list(after.registry) == []
    process.die()
    assert after.journal.ids == [MessageId.SURVIVOR_GONE]
    after, _ = crash(world, job, FakeProcess(dead=True))
    assert after.journal.ids == [MessageId.SURVIVOR_GONE]


def test_a_newer_job_has_a_survivor_taken_over() -> None:
    world, process = World(), FakeProcess()
    survived = world.stop(process)
    world.clock.advance(20)
    past = survived.snapshot()
    newer = world.stop(FakeProcess(), FORCE | FIXED)
    after, first, second = World(), FakeProcess(), FakeProcess()
    after.clock.advance(21)
    after.registry.resume(first, past)
    after.registry.resume(second, newer.snapshot())
    assert first.closed
    second.die()
    assert after.journal.ids == [MessageId.JOB_RESUMED, MessageId.JOB_ENDED]


def test_a_running_and_a_survived_job_of_one_process() -> None:
    """Two daemons may have left these jobs. Each job closes only its own process."""
    world = World()
    job = world.stop(FakeProcess())
    running = job.snapshot()
    world.clock.advance(20)
    survived = replace(job.snapshot(), number=2)
    after, first, second = World(), FakeProcess(), FakeProcess()
    after.clock.advance(21)
    resumed = after.registry.resume(first, running)
    after.registry.resume(second, survived)
    after.clock.advance(300)
    assert resumed.result is Result.SURVIVED
    second.die()
    first.die()
    assert after.journal.ids.count(MessageId.SURVIVOR_GONE) == 2


YEAR = 31_557_600 * S


@pytest.mark.parametrize(
    ("span", "read"),
    [
        (0, 0),
        (INFINITY // 2 - 1, INFINITY // 2 - 1),
        (INFINITY // 2, INFINITY),
        (584_542 * YEAR - 1, INFINITY),
        (584_542 * YEAR, INFINITY),
        (INFINITY - 1, INFINITY),
        (INFINITY, INFINITY),
    ],
)
def test_every_span_that_a_caller_may_give_comes_through(span: int, read: int) -> None:
    spans = {"grace": span, "stall": span, "storage_stall": span, "max": span}
    job = World().stop(FakeProcess(), FORCE, spans=spans)
    past = passed_on(job.snapshot())
    assert (past.policy.stall, past.policy.max) == (read, read)
    assert past.request == job.request


def test_numbers_and_processes_are_not_taken_twice(world: World) -> None:
    past = world.stop(FakeProcess()).snapshot()
    for wrong, why in (
        (past, "number"),
        (replace(past, number=7), "process"),
        (replace(past, number=7, started=START + S), "times in the future"),
    ):
        process = FakeProcess()
        with pytest.raises(SnapshotError, match=why):
            world.registry.resume(process, wrong)
        assert process.closed
    world.registry.resume(
        FakeProcess(make_guest(pid=5)), replace(past, number=7, guest=make_guest(5))
    )
    assert world.stop(FakeProcess(make_guest(pid=6))).number == 8


@pytest.mark.parametrize("progress", [None, 65])
def test_a_job_of_which_only_its_signals_are_known(progress: int | None) -> None:
    """When the daemon exits, a client knows only the signals of a job, and perhaps when it last
    made progress. The job sends no second SIGTERM, and assumes that the process may have made
    progress until now."""
    after, process = World(), FakeProcess()
    after.clock.advance(70)
    after.sampler.shows = WAITS
    past = Snapshot.of_signals(
        make_guest(),
        Request(FORCE),
        Policy(),
        number=3,
        started=START,
        progress_at=progress and START + progress * S,
    )
    job = after.registry.resume(process, passed_on(past))
    last = 70 if progress is None else progress
    after.clock.advance(last + 60 - 70 - 0.1)
    assert process.sent == []
    assert job.deadline == START + (last + 60) * S
    after.clock.advance(0.2)
    assert process.sent == [SIGKILL]
    asking = Snapshot.of_signals(
        make_guest(1),
        Request(FORCE | Flag.POWERDOWN),
        Policy(),
        number=4,
        started=START,
        guest_asked=GuestAsked.IGNORED,
    )
    assert (asking.phase, asking.sent_at(SIGTERM)) == (Phase.POWERDOWN, None)
    assert [rung.action for rung in asking.rungs] == ["button"]
    unasked = replace(asking, rungs=(), guest_asked=GuestAsked.NOT_ASKED)
    assert decode(unasked.to_json()) == unasked
    killed = Snapshot.of_signals(
        make_guest(1), Request(FORCE), Policy(), number=4, started=START, kill_at=START + 60 * S
    )
    assert after.registry.resume(None, killed).result is Result.KILLED


def good() -> dict[str, Any]:
    world = World()
    job = world.stop(FakeProcess(), FORCE)
    world.clock.advance(1)
    document: dict[str, Any] = json.loads(json.dumps(job.snapshot().to_json()))
    return document


def changed(path: str, value: object) -> dict[str, Any]:
    document = at = good()
    *way, last = path.split("/")
    for key in way:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return document


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {},
        changed("version", VERSION + 1),
        changed("version", True),
        changed("format", "qkilld-trace"),
        changed("number", 0),
        changed("number", 10**9),
        changed("number", "1"),
        changed("guest/identity/pid", -1),
        changed("guest/identity/executable", None),
        changed("guest/label/unit/user", None),
        changed("request/spans", {"grace": "x"}),
        changed("flags", ["force", "murder"]),
        changed("policy/grace", None),
        changed("policy/grace", "soon"),
        changed("policy/more", "1s"),
        changed("control", None),
        changed("control/held", 1),
        changed("forced", 1),
        changed("control/not_before", -1),
        changed("phase", "done"),
        changed("result", "exited"),
        changed("rungs", []) | {"phase": "reap"},
        changed("rungs/0/at", -1),
        changed("rungs/0/signal", "SIGTERM"),
        changed("history/0/reasons", "x"),
        changed("assessment/seen/io", None),
        changed("assessment/outstanding", 0),
        changed("assessment/progress_at", INFINITY),
        changed("promise/due", -1),
        changed("promise/due", INFINITY + 1),
        changed("promise/unsampled", -1),
        changed("storage/stuck", "dead"),
        changed("unknown", 1),
    ],
)
def test_a_malformed_snapshot_is_refused(wrong: object) -> None:
    with pytest.raises(SnapshotError) as refused:
        decode(wrong)
    assert "murder" not in str(refused.value)


def test_a_good_one_is_not_refused() -> None:
    assert decode(good()).to_json() == good()


def test_those_of_the_versions_before_are_not_refused() -> None:
    document = changed("version", 12)
    del document["servers"], document["promise"]
    assert decode(document).promise == Promise()
    document = changed("version", 11)
    del document["earlier_risks"]
    assert decode(document).earlier_risks == 0
    document["assessment"] |= {"idle_at": 5, "idle_unsampled": 0}
    assert decode(document).assessment is not None
    document = changed("version", 9)
    del document["storage"], document["cut_off"]
    assert decode(document).cut_off == frozenset()
    document = changed("version", 7)
    del document["forced"]
    assert decode(document).forced is False
    document = changed("version", 6)
    del document["assessment"]["last"]["missed"]
    assert decode(document).assessment is not None
    document = changed("version", 5)
    assert decode(document).guest.label.remote is False
    del document["guest"]["label"]["remote"]
    assert decode(document).guest.label.remote is True
    document["version"] = 4
    del document["flush"]
    assert decode(document).guest.label.remote is True
    document["version"] = 2
    del document["guest"]["identity"]["exiting"]
    assert decode(document).guest.identity.exiting is False
    document["version"] = 1
    del document["control"]
    assert decode(document).control == Control()


def test_a_kill_that_was_not_sent_leaves_the_earlier_risks() -> None:
    ended, stuck = Risk("unknown", "its server ended"), Risk("unknown", "unread")
    snapshot = replace(decode(good()), risks=(ended, stuck, Risk("killed-io", "x")))
    assert snapshot.without_kill().risks == ()
    assert replace(snapshot, earlier_risks=1).without_kill().risks == (ended,)
    with pytest.raises(SnapshotError):
        decode(changed("earlier_risks", -1))


def fields_of(kind: Any, known: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the names of the fields of all classes in a type."""
    for inner in typing.get_args(kind):
        fields_of(inner, known)
    if is_dataclass(kind) and isinstance(kind, type) and kind.__name__ not in known:
        known[kind.__name__] = [one.name for one in fields(kind)]
        for hint in typing.get_type_hints(kind).values():
            fields_of(hint, known)
    return known


def test_a_new_field_needs_a_new_version() -> None:
    """With the old version, jobs that earlier builds saved would be refused, because they lack the
    field."""
    classes = fields_of(Snapshot, {})
    text = json.dumps({name: sorted(classes[name]) for name in sorted(classes)})
    assert (VERSION, zlib.crc32(text.encode())) == (13, 2869732288), "increase snapshot.VERSION"


def test_a_wait_that_version_7_has_saved(world: World) -> None:
    world.sampler.shows = WAITS
    job = world.stop(FakeProcess(), FORCE)
    world.clock.advance(1)
    document: dict[str, Any] = {**json.loads(json.dumps(job.snapshot().to_json())), "version": 7}
    for wait in document["assessment"]["waits"]:
        del wait["certain"]
        for mark in wait["marks"]:
            del mark["switches"]
    evidence = decode(document).assessment
    assert evidence is not None and evidence.waits[0].marks


def test_holds_and_extensions_survive_a_crash(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, FORCE)
    job.hold(ADMIN)
    job.extend(60 * S, ADMIN)
    after, resumed = crash(world, job, process, down=20)
    assert resumed.control == job.control
    assert (job.control.held, job.control.not_before) == (True, START + 60 * S)
    after.clock.advance(600)
    assert process.sent == [SIGTERM]
    resumed.release(ADMIN)
    assert process.sent == [SIGTERM, SIGKILL]
    (before, now) = (World(), FakeProcess())
    job = before.stop(now, FORCE)
    job.extend(60 * S, ADMIN)
    after, _ = crash(before, job, now, down=20)
    assert ends(after, now)[0] == 60 * S


def test_servers_are_not_saved() -> None:
    """A sample may have hundreds of servers."""
    peer = Peer(90, "nbdkit", (), 0, None, ())
    socket = Socket(7, "unix", True, 0, 0, peer=replace(peer, behind=(peer,)))
    mount = Mount("fuse.sshfs", None, None, servers=(peer,))
    shown = replace(WAITING, sockets=(socket,), mounts=(mount,))
    world, process = World(), FakeProcess(dies_of=())
    world.sampler.shows = lambda now: replace(shown, at=now)
    job = world.stop(process, FORCE)
    world.clock.advance(3)
    assert job.assessment is not None
    assert job.assessment.last.sockets == (socket,)
    assert "nbdkit" not in json.dumps(job.snapshot().to_json())
    saved = passed_on(job.snapshot()).assessment
    assert saved is not None
    assert saved.last.sockets == (replace(socket, peer=None),)
