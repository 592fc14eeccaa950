"""The service: the checks before a signal, and their order."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from signal import SIGTERM
from typing import Any, TypeVar

import pytest

from qkilld.engine import access, job_saver
from qkilld.engine.job_saver import JobSaver
from qkilld.engine.ports import JobState, Process
from qkilld.engine.service import Option, Service
from qkilld.engine.snapshot import Snapshot
from qkilld.model.access import Answer, PolkitAction
from qkilld.model.constants import INFINITY, Flag, Phase, Result
from qkilld.model.errors import (
    AccessDenied,
    BusError,
    Failed,
    InvalidArgs,
    NoSuchProcess,
    NoSuchUnit,
    NotQemu,
    ProcessChanged,
    QkilldError,
    UnknownIdentity,
)
from qkilld.model.event import MessageId, Priority
from qkilld.model.guest import Guest, Identity, Label, Unidentified, Unit
from qkilld.model.policy import JOB_SPANS, Config, Switches
from qkilld.model.timespan import ENDLESS
from qkilld.model.unit import UnitFacts

from .conftest import FakeProcess, World, make_guest

T = TypeVar("T")


class FakeHost:
    def __init__(self, *processes: FakeProcess) -> None:
        self.processes = {p.guest.identity.pid: p for p in processes}
        self.asked: list[str] = []
        self.unit: Unit | None = Unit()
        self.unidentified: list[Unidentified] = []
        self.exiting = False

    def open(self, pid: int) -> Process:
        self.asked.append("open")
        if pid not in self.processes:
            raise NoSuchProcess(f"No process has the id {pid}")
        process = self.processes[pid]
        if self.exiting:
            gone = replace(process.guest.identity, executable="", exiting=True)
            return FakeProcess(Guest(gone, process.guest.label))
        return process

    def open_unidentified(self, pid: int) -> Process:
        return self.open(pid)

    async def label(self, identity: Identity) -> Label:
        self.asked.append("label")
        return Label("web", unit=self.unit)

    async def labels(self, identities: Sequence[Identity]) -> list[Label]:
        return [await self.label(identity) for identity in identities]

    async def identities(self) -> tuple[list[Identity], list[Unidentified]]:
        known = [process.guest.identity for process in self.processes.values()]
        return known, self.unidentified


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


@dataclass
class FakeCaller:
    """A caller. polkit calls `meanwhile`, and then gives `answer`."""

    number: int
    answer: Answer = Answer.DENIED
    meanwhile: Callable[[], None] = lambda: None
    asked: list[tuple[PolkitAction, bool]] = field(default_factory=list)

    async def uid(self) -> int:
        return self.number

    async def may(self, action: PolkitAction, details: Mapping[str, str], *, ask: bool) -> Answer:
        self.asked.append((action, ask))
        await asyncio.sleep(0)
        self.meanwhile()
        return self.answer


ROOT = FakeCaller(0)
STRANGER = 1001


def make_service(world: World, *processes: FakeProcess) -> tuple[Service, FakeHost]:
    host = FakeHost(*processes)
    service = Service(Config(), host, world.registry, world.clock, world.sampler)
    return service, host


def test_the_pidfd_comes_before_the_caller_is_asked_for(world: World) -> None:
    service, host = make_service(world, FakeProcess())

    class RecordingCaller(FakeCaller):
        async def uid(self) -> int:
            host.asked.append("uid")
            return 0

    run(service.terminate(4711, 0, {}, RecordingCaller(0)))
    assert host.asked == ["open", "uid", "label"]


def test_a_process_that_executes_a_program_on_a_busy_host_is_identified_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened only once, so that another process that reuses the pid is not stopped."""
    monkeypatch.setattr(access, "_FIRST_PAUSE_S", 0.001)
    process = FakeProcess(unknown=2)
    service, host = make_service(world, process)
    assert run(service.terminate(4711, 0, {}, ROOT)).running
    assert host.asked.count("open") == 1
    process = FakeProcess(unknown=2)
    service, host = make_service(world, process)
    assert len(run(service.terminate_all(0, {}, ROOT))) == 1
    process.unknown = 2
    assert len(run(service.terminate_each([(4711, 99)], 0, {}, ROOT))) == 1
    assert host.asked.count("open") == 2
    # Reading the identity is not retried forever, and many processes share one time limit.
    monkeypatch.setattr(access, "IDENTITY_TIMEOUT_S", 0.1)
    process.unknown = 10**6
    began = time.monotonic()
    with pytest.raises(UnknownIdentity):
        run(service.inspect(4711, ROOT))
    many = run(service.terminate_each([(4711, 99)] * 200, 0, {}, ROOT))
    assert all(isinstance(error, UnknownIdentity) for error in many)
    assert time.monotonic() - began < 1


def test_retries_of_many_calls_do_not_block_the_loop(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one retry is made in each turn of the loop."""
    monkeypatch.setattr(access, "IDENTITY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(access, "_FIRST_PAUSE_S", 0.01)
    service, _ = make_service(world, FakeProcess())
    turn, reads = 0, Counter[int]()

    def read() -> None:
        reads[turn] += 1
        raise UnknownIdentity.blocked(4711, "busy")

    async def count() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    async def many() -> None:
        counting = asyncio.create_task(count())
        calls = (service._access.identified(read, None) for _ in range(100))
        await asyncio.gather(*calls, return_exceptions=True)
        counting.cancel()

    run(many())
    first, *retries = sorted(reads.values(), reverse=True)
    assert first == 100 and len(retries) >= 100 and max(retries) == 1


def test_a_stranger_is_denied_and_learns_nothing(world: World) -> None:
    shell = Guest(replace(make_guest().identity, executable="/bin/sh"), Label())
    for answer in (Answer.DENIED, Answer.CHALLENGE):
        said = set()
        for process in (FakeProcess(), FakeProcess(shell)):
            service, _ = make_service(world, process)
            caller = FakeCaller(STRANGER, answer)
            for options in ({}, {"start-time": Option("t", 98)}):
                with pytest.raises(AccessDenied, match="4711 is not yours") as caught:
                    run(service.terminate(4711, 0, options, caller))
                said.add((type(caught.value), str(caught.value)))
            assert process.closed
            assert process.sent == []
            # polkit shows no dialog if the process is not a QEMU or is not the requested process.
            is_qemu = process.guest.identity.executable != "/bin/sh"
            assert caller.asked == [
                (PolkitAction.TERMINATE, is_qemu),
                (PolkitAction.TERMINATE, False),
            ]
        assert len(said) == 1


def test_an_authorized_caller_gets_details(world: World) -> None:
    shell = Guest(replace(make_guest().identity, executable="/bin/sh"), Label())
    process = FakeProcess(shell)
    service, _ = make_service(world, process)
    with pytest.raises(NotQemu):
        run(service.terminate(4711, 0, {}, FakeCaller(STRANGER, Answer.GRANTED)))
    assert process.closed
    assert process.sent == []


def test_each_call_asks_for_its_polkit_action(world: World) -> None:
    service, _ = make_service(world, FakeProcess())
    caller = FakeCaller(STRANGER, Answer.GRANTED)
    run(service.inspect(4711, caller))
    service, _ = make_service(world, FakeProcess())
    job = run(service.terminate(4711, 0, {}, caller))
    assert job.request.uid == STRANGER
    service, _ = make_service(world, FakeProcess())
    assert run(service.terminate(4711, Flag.FORCE, {}, caller)) is job  # joins it
    run(service.cancel(job, caller))
    assert [action.value.removeprefix("org.qkilld1.") for action, _ in caller.asked] == [
        *("inspect", "terminate", "force", "terminate")
    ]
    assert job.result is Result.CANCELLED


def test_joining_with_force_is_denied(world: World) -> None:
    service, _ = make_service(world, FakeProcess())
    job = run(service.terminate(4711, 0, {}, FakeCaller(STRANGER, Answer.GRANTED)))
    service, _ = make_service(world, FakeProcess())
    with pytest.raises(AccessDenied):
        run(service.terminate(4711, Flag.FORCE, {}, FakeCaller(STRANGER)))
    with pytest.raises(AccessDenied):
        run(service.cancel(job, FakeCaller(STRANGER)))
    assert job.flags == Flag(0)
    assert job.running


def test_a_process_that_is_exiting(world: World) -> None:
    """The kernel no longer shows its executable, so only the existing job of the process can be
    joined."""
    service, host = make_service(world, FakeProcess())
    host.exiting = True
    with pytest.raises(NoSuchProcess, match="4711 is exiting"):
        run(service.terminate(4711, 0, {}, ROOT))
    with pytest.raises(AccessDenied):  # others do not learn that it exits
        run(service.terminate(4711, 0, {}, FakeCaller(STRANGER)))
    host.exiting = False
    job = run(service.terminate(4711, 0, {}, ROOT))
    host.exiting = True
    with pytest.raises(ProcessChanged):
        run(service.terminate(4711, Flag.FORCE, {"start-time": Option("t", 98)}, ROOT))
    with pytest.raises(AccessDenied):
        run(service.terminate(4711, Flag.FORCE, {}, FakeCaller(STRANGER)))
    with pytest.raises(NoSuchProcess):
        caller = FakeCaller(STRANGER, Answer.GRANTED, job.cancel)
        run(service.terminate(4711, Flag.FORCE, {}, caller))
    assert job.flags == Flag(0)
    service, host = make_service(World(), FakeProcess())
    job = run(service.terminate(4711, 0, {}, ROOT))
    host.exiting = True
    assert run(service.terminate(4711, Flag.FORCE, {"start-time": Option("t", 99)}, ROOT)) is job
    assert job.flags == Flag.FORCE


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"executable": "/bin/sh"}, NotQemu),
        ({"uid": 0}, ProcessChanged),
        ({"uid": STRANGER}, ProcessChanged),
    ],
)
def test_a_process_that_changes_while_polkit_is_asked(
    world: World, change: dict[str, Any], error: type[Exception]
) -> None:
    process = FakeProcess()
    service, _ = make_service(world, process)

    def swap() -> None:
        process.guest = Guest(replace(process.guest.identity, **change), process.guest.label)

    with pytest.raises(error):
        run(service.terminate(4711, 1, {}, FakeCaller(STRANGER, Answer.GRANTED, swap)))
    assert process.closed
    assert process.sent == []


def test_all_of_ones_own_and_of_others_where_polkit_says_so(world: World) -> None:
    for uid, answer, expected, questions in (
        (0, Answer.DENIED, [1, 2, 3], 0),
        (8, Answer.DENIED, [2, 3], 1),
        (8, Answer.CHALLENGE, [2, 3], 1),
        (8, Answer.GRANTED, [1, 2, 3], 1),
    ):
        processes = [FakeProcess(make_guest(pid, uid=u)) for pid, u in ((11, 7), (12, 8), (13, 8))]
        service, _ = make_service(World(), *processes)
        caller = FakeCaller(uid, answer)
        jobs = run(service.terminate_all(1, {}, caller))
        assert [job.guest.identity.pid - 10 for job in jobs] == expected
        assert caller.asked == [(PolkitAction.FORCE, True)] * questions
        assert [bool(process.sent) for process in processes] == [n in expected for n in (1, 2, 3)]
    service, _ = make_service(world, FakeProcess(make_guest(11, uid=7)))
    with pytest.raises(AccessDenied):
        run(service.terminate_all(0, {}, FakeCaller(8)))
    assert run(make_service(world)[0].terminate_all(0, {}, FakeCaller(8))) == []
    with pytest.raises(InvalidArgs, match="start-time"):
        run(service.terminate_all(0, {"start-time": Option("t", 1)}, ROOT))


def test_one_of_all_that_fails_stops_no_other(world: World) -> None:
    gone, stays = FakeProcess(make_guest(11), dead=True), FakeProcess(make_guest(12))
    service, _ = make_service(world, gone, stays)
    (job,) = run(service.terminate_all(0, {}, ROOT))
    assert job.guest.identity.pid == 12
    (event,) = [event for event in world.journal.events if event.id is MessageId.NOT_STOPPED]
    assert event.guest is not None
    assert event.guest.identity.pid == 11


@pytest.mark.parametrize(
    ("uid", "answer", "named"),
    [
        (0, Answer.DENIED, "process 21 (unit: web.service), 22 (unit: unknown) for"),
        (7, Answer.DENIED, "process 21 (unit: web.service) for"),
        (7, Answer.GRANTED, "process 21 (unit: web.service), 22 (unit: unknown) for"),
        (9, Answer.DENIED, None),
    ],
)
def test_what_cannot_be_identified_is_reported_to_who_stops_all(
    world: World, uid: int, answer: Answer, named: str | None
) -> None:
    service, host = make_service(world, *(FakeProcess(make_guest(n, uid=n)) for n in (7, 8, 9)))
    host.unidentified = [Unidentified(21, 7, Unit("web.service")), Unidentified(22, -1, None)]
    run(service.terminate_all(0, {}, FakeCaller(uid, answer)))
    found = [event for event in world.journal.events if event.id is MessageId.NOT_IDENTIFIED]
    assert [event.priority for event in found] == [Priority.WARNING] * (named is not None)
    assert all(named is not None and named in event.message for event in found)


class FakeUnits:
    def __init__(self, facts: UnitFacts | QkilldError) -> None:
        self.facts = facts

    async def unit(self, name: str) -> UnitFacts:
        if isinstance(self.facts, QkilldError):
            raise self.facts
        return self.facts


@pytest.mark.parametrize(
    ("afterwards", "error"), [(Unit("other.service"), ProcessChanged), (None, Failed)]
)
def test_a_unit_that_its_process_leaves(
    world: World, afterwards: Unit | None, error: type[QkilldError]
) -> None:
    """The process moves to another unit during the checks, or its unit becomes unreadable."""
    process = FakeProcess()
    service, host = make_service(world, process)
    host.unit = Unit("web.service")
    service = Service(
        Config(),
        host,
        world.registry,
        world.clock,
        units=FakeUnits(UnitFacts("web.service", main_pid=4711, control_group="/x/web.service")),
    )

    def move() -> None:
        host.unit = afterwards

    with pytest.raises(error, match=r"web\.service"):
        caller = FakeCaller(STRANGER, Answer.GRANTED, move)
        run(service.terminate_unit("web.service", 0, caller))
    assert process.closed
    assert process.sent == []


@pytest.mark.parametrize("error", [BusError("x"), Failed("y")])
def test_a_unit_where_systemd_does_not_answer(world: World, error: QkilldError) -> None:
    process = FakeProcess()
    host = FakeHost(process)
    host.unit = Unit("web.service")
    service = Service(Config(), host, world.registry, world.clock, units=FakeUnits(error))
    assert run(service.terminate_unit("web.service", 0, ROOT)).guest.label.unit == host.unit
    with pytest.raises(NoSuchUnit):
        run(service.terminate_unit("db.service", 0, ROOT))


@pytest.mark.parametrize("change", [{"executable": "/bin/sh"}, {"uid": 0}])
def test_a_process_that_changes_while_it_is_looked_at(world: World, change: dict[str, Any]) -> None:
    """Between the first check and the signal, the process executes another program or changes its
    user."""

    class ChangingProcess(FakeProcess):
        identified = False

        def identify(self) -> Identity:
            if self.identified:
                self.guest = Guest(replace(self.guest.identity, **change), self.guest.label)
            self.identified = True
            return self.guest.identity

    process = ChangingProcess()
    service, _ = make_service(world, process)

    with pytest.raises((NotQemu, ProcessChanged)):
        run(service.terminate(4711, Flag.FORCE | Flag.NOWAIT, {}, FakeCaller(1000)))
    assert process.closed
    assert process.sent == []


def test_a_caller_that_cannot_be_named_gets_nothing(world: World) -> None:
    process = FakeProcess()
    service, _ = make_service(world, process)

    class LostCaller(FakeCaller):
        async def uid(self) -> int:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        run(service.terminate(4711, 0, {}, LostCaller(0)))
    assert process.closed
    assert process.sent == []


def test_arguments_are_checked_before_a_process_is_touched(world: World) -> None:
    service, host = make_service(world, FakeProcess())
    for flags, options in (
        (16, {}),
        (4 | 8, {}),
        (4 | 2 | 1, {}),
        (4, {"thaw": Option("s", "yes")}),
        (1, {"powerdown-only": Option("b", True)}),
        (4, dict.fromkeys(("powerdown-only", "powerdown-as-configured"), Option("b", True))),
        (0, {"what": Option("s", "x")}),
        (0, {"start-time": Option("s", "x")}),
    ):
        with pytest.raises(InvalidArgs):
            run(service.terminate(4711, flags, options, ROOT))
    with pytest.raises(InvalidArgs):
        run(service.terminate(0, 0, {}, ROOT))
    assert host.asked == []


@pytest.mark.parametrize("asks", [True, False])
def test_asking_may_be_left_to_the_configuration(world: World, asks: bool) -> None:
    process = FakeProcess()
    config = Config(guest_switches={"web": Switches(powerdown=asks)})
    service = Service(config, FakeHost(process), world.registry, world.clock, world.sampler)
    left = {"powerdown-as-configured": Option("b", True)}
    _, plan = run(service.plan(4711, Flag.POWERDOWN, left, ROOT))
    assert ("ask" in [rung.action for rung in plan.rungs]) is asks
    process = FakeProcess()
    service = Service(config, FakeHost(process), world.registry, world.clock, world.sampler)
    job = run(service.terminate(4711, Flag.POWERDOWN, left, ROOT))
    assert (Flag.POWERDOWN in job.flags) is asks


def test_a_plan_tells_when_asking_ends(world: World) -> None:
    service, host = make_service(world, FakeProcess())
    most = {"powerdown-max-usec": Option("t", 7_000_000)}
    _, plan = run(service.plan(4711, Flag.POWERDOWN, most, ROOT))
    assert [(rung.action, rung.after) for rung in plan.rungs] == [
        ("ask", 0),
        ("SIGTERM", 7_000_000),
    ]
    host.processes = {4711: FakeProcess()}
    only = {"powerdown-only": Option("b", True)}
    _, plan = run(service.plan(4711, Flag.POWERDOWN, only, ROOT))
    assert [rung.action for rung in plan.rungs] == ["ask"]
    assert plan.gives_up_after == 60_000_000


def test_start_time(world: World) -> None:
    process = FakeProcess()
    service, _ = make_service(world, process)
    with pytest.raises(ProcessChanged):
        run(service.terminate(4711, 0, {"start-time": Option("t", 98)}, ROOT))
    assert process.closed
    again = FakeProcess()
    service, _ = make_service(world, again)
    run(service.terminate(4711, 0, {"start-time": Option("t", 99)}, ROOT))
    assert again.sent == [SIGTERM]


def test_a_reason_is_made_printable(world: World) -> None:
    service, _ = make_service(world, FakeProcess())
    options = {"reason": Option("s", "two\nlines\x1b[2J")}
    job = run(service.terminate(4711, 0, options, ROOT))
    assert job.request.reason == "two\N{REPLACEMENT CHARACTER}lines\N{REPLACEMENT CHARACTER}[2J"


def test_guests_are_those_that_match(world: World) -> None:
    shell = Guest(replace(make_guest(pid=5).identity, executable="/bin/sh"), Label())
    service, _ = make_service(world, FakeProcess(), FakeProcess(shell))
    assert [guest.identity.pid for guest in run(service.guests())] == [4711]


def test_inspect_lets_go_of_the_process(world: World) -> None:
    process = FakeProcess()
    service, _ = make_service(world, process)
    assert run(service.inspect(4711, ROOT)).guest.label.name == "web"
    assert process.closed


class FakeStore:
    """A store that writes only when the test says so."""

    def __init__(self) -> None:
        self.saved: list[Phase] = []
        self.waiting: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self.blocks = False

    def store_fd(self, number: int, process: Process) -> None: ...

    def store_monitor(self, number: int, fd: int) -> None: ...

    def save(self, state: JobState) -> None:
        assert isinstance(state, Snapshot)
        self.saved.append(state.phase)

    def when_written(self, callback: Callable[[], None]) -> None:
        if not self.blocks:
            self.waiting.put_nowait(callback)

    def write_first(self, number: int, callback: Callable[[], None]) -> None:
        self.when_written(callback)

    def drop_fd(self, number: int) -> None: ...

    def drop_monitor(self, number: int) -> None: ...

    def forget(self, number: int) -> None: ...


def test_an_answer_waits_until_the_job_is_written_down(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_saver, "ANSWER_TIMEOUT_S", 60)
    store = FakeStore()
    world.registry.saver = JobSaver(store, world.clock)
    service, _ = make_service(world, FakeProcess())

    async def ask() -> None:
        asked = asyncio.create_task(service.terminate(4711, 0, {}, ROOT))
        written = await store.waiting.get()
        assert store.saved == [Phase.TERMINATE]
        await asyncio.sleep(0)
        assert not asked.done()
        written()
        job = await asked
        for steer in (service.hold, service.release, service.cancel):
            steering = asyncio.create_task(steer(job, ROOT))
            written = await store.waiting.get()
            assert not steering.done()
            written()
            await steering

    run(ask())
    assert MessageId.NOT_WRITTEN not in world.journal.ids


def test_but_not_for_ever(world: World) -> None:
    store = FakeStore()
    store.blocks = True
    world.registry.saver = JobSaver(store, world.clock)
    service, _ = make_service(world, FakeProcess())
    job = run(service.terminate(4711, 0, {}, ROOT))
    assert job.running
    assert world.journal.ids.count(MessageId.NOT_WRITTEN) == 1


@pytest.mark.parametrize("usec", [ENDLESS, 2**62, 2**63, INFINITY])
def test_a_span_of_a_hundred_years_is_infinite(world: World, usec: int) -> None:
    service, _ = make_service(world, FakeProcess())
    names = [span.bus_option for span in JOB_SPANS]
    options = {name: Option("t", usec) for name in (*names, "powerdown-max-usec")}
    job = run(service.terminate(4711, Flag.FORCE | Flag.POWERDOWN, options, ROOT))
    assert {getattr(job.policy, span.field) for span in JOB_SPANS} == {INFINITY}
    assert job.request.ask_at_most == INFINITY
    run(service.extend(job, usec, ROOT))
    assert job.control.not_before == INFINITY


def test_a_shorter_span_is_not(world: World) -> None:
    service, _ = make_service(world, FakeProcess())
    job = run(service.terminate(4711, Flag.FORCE, {"max-usec": Option("t", ENDLESS - 1)}, ROOT))
    run(service.extend(job, ENDLESS - 1, ROOT))
    assert job.policy.max == ENDLESS - 1
    assert job.control.not_before == world.clock.now() + ENDLESS - 1
