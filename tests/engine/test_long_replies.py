"""Replies about thousands of jobs do not block the loop.

The tests measure processor time, which does not depend on other load of the machine.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qkilld.adapters.clock import LoopClock
from qkilld.adapters.process import open_process
from qkilld.bus import job_signals
from qkilld.bus.connection import Connection
from qkilld.bus.framing import IncomingMessage, MessageKind
from qkilld.bus.guest_objects import GuestSignals
from qkilld.bus.interfaces import OBJECT_MANAGER, OBJECT_MANAGER_GIVES
from qkilld.bus.job_signals import Announcer
from qkilld.bus.library import encode_body
from qkilld.bus.manager_object import ManagerObject, ManagerTree
from qkilld.bus.server import Server
from qkilld.bus.values import parse
from qkilld.engine import guest_watch
from qkilld.engine.call_limits import MAX_READS, MAX_WAITS, Cost
from qkilld.engine.job import Job
from qkilld.engine.long_replies import LongReplies
from qkilld.engine.registry import MAX_JOBS_PER_UID
from qkilld.engine.service import Service
from qkilld.engine.snapshot import Snapshot
from qkilld.engine.turns import Turns
from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import MANAGER_PATH, Flag, Phase, Result
from qkilld.model.guest import Guest
from qkilld.model.job import Request
from qkilld.model.policy import Policy
from qkilld.varlink.connection import VarlinkConnection
from qkilld.varlink.methods import VarlinkMethods
from qkilld.varlink.server import VarlinkCall, VarlinkServer
from qkilld.varlink.streams import Streams
from tests.engine.test_service import FakeCaller, make_service
from tests.lab.process import spawn, wait_gone

from .conftest import FakeProcess, S, World, make_guest

UID = 1000
MAX_SHARE = 1 / 6
"""The limit for the longest step, as a share of the processor time of MAX_READS calls. If each call
were answered in a single step, its share would be 1 / MAX_READS."""


def service_with(world: World, jobs: int) -> Service:
    for number in range(1, jobs + 1):
        snapshot = Snapshot.of_signals(
            make_guest(number, uid=UID, name="n" * 20),
            Request(Flag.NOWAIT, {}, "", UID),
            Policy(),
            number=number,
            started=world.clock.now() - 2 * S,
        )
        ended = replace(
            snapshot, result=Result.SIGNALLED, phase=Phase.DONE, ended=world.clock.now() - S
        )
        world.registry.resume(None, ended)
    # VarlinkMethods needs these methods, but no test calls them.
    steering = dict.fromkeys(("cancel", "hold", "release", "force"))
    return cast(Service, SimpleNamespace(registry=world.registry, **steering))


def call_of(serial: int, interface: str, member: str, *, sender: str) -> IncomingMessage:
    """Return a call of the manager without arguments."""
    return IncomingMessage(
        MessageKind.CALL,
        0,
        serial,
        "<",
        path=MANAGER_PATH,
        interface=interface,
        member=member,
        sender=sender,
    )


async def longest_share(work: Awaitable[None]) -> float:
    """Return the longest processor time between two turns of the loop, as a share of the processor
    time of the whole work."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            before = time.process_time()
            await asyncio.sleep(0)
            longest = max(longest, time.process_time() - before)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0)
    gc.disable()
    start = time.process_time()
    try:
        await work
        await asyncio.sleep(0)
    finally:
        gc.enable()
        ticking.cancel()
    return longest / (time.process_time() - start)


class FakeBus:
    def __init__(self) -> None:
        self.connected = True
        self.on_call: Callable[[IncomingMessage], None]
        self.replies: list[tuple[int, str, bytes]] = []
        self.changed: list[str] = []
        """The path of each signal."""
        self.room = asyncio.Event()
        self.room.set()

    def watch_names(self, handler: object) -> None: ...

    async def request_bus(self, *_: object) -> list[bool]:
        return [True]

    def tell_bus(self, *_: object) -> None: ...

    def emit(self, path: str, interface: str, member: str, signature: str, body: list[Any]) -> None:
        encode_body(signature, body)
        self.changed.append(path)

    async def uid_of(self, name: str) -> int:
        return UID

    @property
    def has_room(self) -> bool:
        return self.room.is_set()

    async def wait_for_room(self) -> None:
        await self.room.wait()

    def reply(self, call: IncomingMessage, signature: str, body: bytearray) -> None:
        self.replies.append((call.serial, signature, bytes(body)))


def fault(doing: str, error: BaseException) -> None:
    raise AssertionError(doing) from error


@pytest.mark.parametrize(
    ("interface", "member", "gives", "jobs"),
    [
        (OBJECT_MANAGER, "GetManagedObjects", OBJECT_MANAGER_GIVES, 1000),
        ("org.qkilld1.Manager", "ListJobs", "a(uouss)", 6000),
    ],
)
def test_calls_on_the_bus(world: World, interface: str, member: str, gives: str, jobs: int) -> None:
    bus, service = FakeBus(), service_with(world, jobs)

    async def work() -> None:
        tree = ManagerTree(ManagerObject(service), service)
        server = Server(cast(Connection, bus), tree, fault, Turns(frozenset({0})))

        async def call_all() -> None:
            for serial in range(1, MAX_READS + 1):
                bus.on_call(call_of(serial, interface, member, sender=f":1.{serial % 2}"))
            while server.busy:  # noqa: ASYNC110
                await asyncio.sleep(0)

        assert await longest_share(call_all()) < MAX_SHARE

    asyncio.run(work())
    assert sorted(serial for serial, *_ in bus.replies) == list(range(1, MAX_READS + 1))
    for _, signature, body in bus.replies:
        assert signature == gives
        (listed,) = parse(gives, body)
        assert len(listed) == jobs


def test_a_bus_that_does_not_read_delays_nobody_on_varlink(world: World) -> None:
    bus, service = FakeBus(), service_with(world, 10)

    async def work() -> None:
        turns = Turns(frozenset({0}))
        server = Server(
            cast(Connection, bus), ManagerTree(ManagerObject(service), service), fault, turns
        )

        def call(serial: int) -> None:
            bus.on_call(call_of(serial, "org.qkilld1.Manager", "ListJobs", sender=":1.1"))

        async def varlink_turn(uid: int) -> None:
            async with asyncio.timeout(5), turns.long_replies.turn(uid):
                pass

        bus.room.clear()
        call(1)
        await asyncio.sleep(0.01)
        await varlink_turn(UID)
        # Before this call gets its turn, the socket is full again.
        async with turns.long_replies.turn(UID + 1):
            bus.room.set()
            await asyncio.sleep(0.01)
            bus.room.clear()
        await asyncio.sleep(0.01)
        await varlink_turn(UID)
        assert not bus.replies
        bus.room.set()
        async with asyncio.timeout(5):
            while server.busy:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert [serial for serial, *_ in bus.replies] == [1]

    asyncio.run(work())


def test_calls_on_varlink(world: World) -> None:
    service = service_with(world, 6000)
    sent: list[bytes] = []

    class FakeConnection:
        uid, pid, blocked = UID, 1, False

        def send_encoded(self, message: bytes) -> None:
            sent.append(message)

        def when_sent(self, callback: Callable[[], None]) -> None: ...

    async def work() -> None:
        turns = SimpleNamespace(long_replies=LongReplies(frozenset({0})))
        server = cast(VarlinkServer, SimpleNamespace(turns=turns))
        methods = VarlinkMethods(service, *[cast(Any, None)] * 3)

        async def call() -> None:
            connection = cast(VarlinkConnection, FakeConnection())
            await methods.find("ListJobs")(VarlinkCall(server, connection, b"", []), {})

        async def call_all() -> None:
            await asyncio.gather(*(call() for _ in range(MAX_READS)))

        assert await longest_share(call_all()) < MAX_SHARE

    asyncio.run(work())
    assert len(sent) == MAX_READS
    for message in sent:
        assert len(json.loads(message)["parameters"]["jobs"]) == 6000


def test_streams_of_many_jobs(world: World) -> None:
    """One call stops many jobs. The test covers all replies to it, from the first one to the
    results of all jobs."""
    count, sent = 3000, list[bytes]()

    class FakeConnection:
        uid, pid, blocked, closed = UID, 1, False, False

        def send_encoded(self, message: bytes) -> None:
            sent.append(message)

        def when_sent(self, callback: Callable[[], None]) -> None:
            callback()

        def next_call(self) -> None: ...

    async def work() -> None:
        processes = [FakeProcess(make_guest(pid, uid=UID)) for pid in range(1, count + 1)]
        jobs = [world.stop(process) for process in processes]

        async def terminate_all(*_: object) -> list[Job]:
            return jobs

        service = service_with(world, 0)
        cast(Any, service).terminate_all = terminate_all
        streams, turns = Streams(), Turns(frozenset({0}))
        methods = VarlinkMethods(service, streams, cast(Any, None), turns.limits)
        server = SimpleNamespace(turns=turns, ended=lambda call: None)
        connection = cast(VarlinkConnection, FakeConnection())
        call = VarlinkCall(cast(VarlinkServer, server), connection, b"", [])
        call.more = True

        async def until_sent(messages: int) -> None:
            while len(sent) < messages:  # noqa: ASYNC110
                await asyncio.sleep(0)

        async def begin() -> None:
            await methods.find("TerminateAll")(call, {})
            await until_sent(1)

        # A single step registers the call with every job, which takes 1 µs for each.
        assert await longest_share(begin()) < 1 / 4
        assert len(json.loads(sent[0])["parameters"]["states"]) == count
        for job in jobs:
            streams.job_changed(job)
        assert await longest_share(until_sent(1 + count)) < MAX_SHARE
        for process in processes:
            process.die()
        assert await longest_share(until_sent(1 + 2 * count)) < MAX_SHARE
        ends = [json.loads(message) for message in sent[1 + count :]]
        assert [end["parameters"]["state"]["job"] for end in ends] == [job.number for job in jobs]
        assert [end.get("continues", False) for end in ends] == [True] * (count - 1) + [False]
        assert not turns.limits._running

    asyncio.run(work())


def test_jobs_that_have_begun_are_reported_although_too_many_are_followed(world: World) -> None:
    sent = list[bytes]()

    class FakeConnection:
        uid, pid, blocked, closed = UID, 1, False, False

        def send_encoded(self, message: bytes) -> None:
            sent.append(message)

        def when_sent(self, callback: Callable[[], None]) -> None:
            callback()

        def next_call(self) -> None: ...

    async def work() -> None:
        jobs = [world.stop(FakeProcess(make_guest(pid, uid=UID))) for pid in range(1, 41)]

        async def terminate_all(*_: object) -> list[Job]:
            return jobs

        service = service_with(world, 0)
        cast(Any, service).terminate_all = terminate_all
        turns = Turns(frozenset({0}))
        for _ in range(MAX_WAITS - 5):
            turns.limits.begin(UID, Cost.WAIT)
        methods = VarlinkMethods(service, Streams(), cast(Any, None), turns.limits)
        server = SimpleNamespace(turns=turns, ended=lambda call: None)
        connection = cast(VarlinkConnection, FakeConnection())
        call = VarlinkCall(cast(VarlinkServer, server), connection, b"", [])
        call.more = True
        await methods.find("TerminateAll")(call, {})
        (reply,) = map(json.loads, sent)
        assert len(reply["parameters"]["states"]) == 40
        assert "continues" not in reply
        assert turns.limits._running[UID, Cost.WAIT] == MAX_WAITS - 5

    asyncio.run(work())


def test_a_search_among_many_programs(world: World) -> None:
    """Any user can execute thousands of files with different names."""
    others = [make_guest(pid, uid=UID) for pid in range(2, 6000)]
    found = [
        FakeProcess(Guest(replace(one.identity, executable=f"/home/u/{pid}"), one.label))
        for pid, one in enumerate(others)
    ]
    service, _ = make_service(world, *found, FakeProcess(make_guest(7000)))

    async def search() -> None:
        (guest,) = await service.guests()
        assert guest.identity.pid == 7000

    assert asyncio.run(longest_share(search())) < MAX_SHARE


@pytest.mark.parametrize("uid", [0, UID])
def test_stopping_many_guests(world: World, uid: int) -> None:
    """A user other than root can have only MAX_JOBS_PER_UID jobs, so most guests are refused."""
    pids = range(5_000_000, 5_003_000)  # above the pids of real processes, such as this one
    processes = [FakeProcess(make_guest(pid, uid=UID)) for pid in pids]
    service, _ = make_service(world, *processes)

    async def work() -> None:
        await service.guests()
        jobs = list[Job]()

        async def stop_all() -> None:
            jobs.extend(await service.terminate_all(Flag.NOWAIT, {}, FakeCaller(uid)))

        assert await longest_share(stop_all()) < MAX_SHARE
        assert len(jobs) == (len(processes) if uid == 0 else MAX_JOBS_PER_UID)
        assert [job.guest.identity.pid for job in jobs] == list(pids[: len(jobs)])

    asyncio.run(work())


def test_calls_of_wait_for_one_job(world: World) -> None:
    """A user may have a thousand such calls open."""
    bus = FakeBus()

    async def work() -> None:
        process = FakeProcess(make_guest(1, uid=UID))
        job = world.stop(process)
        service = service_with(world, 0)
        cast(Any, service).extend = None
        tree = ManagerTree(ManagerObject(service), service)
        server = Server(cast(Connection, bus), tree, fault, Turns(frozenset({0})))
        for serial in range(1, 1001):
            call = call_of(serial, "org.qkilld1.Job", "Wait", sender=":1.1")
            bus.on_call(replace(call, path="/org/qkilld1/job/1"))
        while len(job._waiters._waiting) < 1000:  # noqa: ASYNC110
            await asyncio.sleep(0)

        async def until_answered() -> None:
            process.die()
            while server.busy:  # noqa: ASYNC110
                await asyncio.sleep(0)

        assert await longest_share(until_answered()) < MAX_SHARE

    asyncio.run(work())
    assert sorted(serial for serial, *_ in bus.replies) == list(range(1, 1001))


def busy_for(calls: list[int], number: int) -> None:
    """Take as much processor time as the end of a job."""
    end = time.process_time() + 0.0003
    while time.process_time() < end:
        pass
    calls.append(number)


def test_many_processes_that_end_at_a_time() -> None:
    """No step takes long, and users take turns."""
    count, calls = 400, list[int]()

    async def work(pid: int, end: Callable[[], None]) -> None:
        processes = [open_process(pid) for _ in range(count)]
        for number, process in enumerate(processes):
            uid = UID + (number >= count - 20)
            process.guest = Guest(replace(process.identity, uid=uid), process.guest.label)
            process.watch(partial(busy_for, calls, number))
        processes[0].watch(partial(busy_for, calls, count))
        processes[1].close()
        end()
        assert wait_gone(processes[2].fileno(), 30)

        async def until_called() -> None:
            while len(calls) < count - 1:  # noqa: ASYNC110
                await asyncio.sleep(0)

        assert await longest_share(until_called()) < MAX_SHARE
        for process in processes:
            process.close()

    with spawn(["sleep", "600"]) as sleeper:
        asyncio.run(work(sleeper.pid, sleeper.kill))
    assert sorted(calls) == [*range(2, count + 1)]
    assert calls.index(count - 1) < count // 2


def test_many_timers_at_a_time() -> None:
    """With max-usec, a user can make thousands of jobs due at the same time."""
    count, calls = 400, list[int]()

    async def work() -> None:
        clock = LoopClock()
        due = clock.now() + S // 10
        timers = [
            clock.call_at(due, partial(busy_for, calls, number), UID + (number >= count - 20))
            for number in range(count)
        ]
        timers[0].cancel()
        timers[1].cancel()
        clock.call_at(due - S // 100, timers[2].cancel)
        time.sleep(0.2)  # Wait until all timers are due.  # noqa: ASYNC251

        async def until_called() -> None:
            while len(calls) < count - 3:  # noqa: ASYNC110
                await asyncio.sleep(0)

        assert await longest_share(until_called()) < MAX_SHARE

    asyncio.run(work())
    assert sorted(calls) == [*range(3, count)]
    assert calls.index(count - 1) < count // 2


def test_changes_and_ends_of_many_jobs(world: World) -> None:
    """This happens while a host shuts down."""
    bus = FakeBus()

    async def work() -> None:
        server = Server(cast(Connection, bus), cast(Any, None), fault, Turns(frozenset({0})))
        announcer = Announcer(server)
        jobs = [world.stop(FakeProcess(make_guest(pid))) for pid in range(1, 1501)]
        for job in jobs:
            announcer.adopt(job)
            job.hold(Steerer(0, Rank.ROOT))

        async def announce_all() -> None:
            for job in jobs:
                announcer.job_changed(job)
                announcer.job_changed(job)
            while len(bus.changed) < len(jobs):  # noqa: ASYNC110
                await asyncio.sleep(0)

        paths = [f"/org/qkilld1/job/{number}" for number in range(1, 1501)]
        assert await longest_share(announce_all()) < MAX_SHARE
        assert bus.changed == paths
        for job in jobs:
            job.cancel()

        async def announce_ends() -> None:
            for job in jobs:
                announcer.job_changed(job)
                announcer.job_ended(job)
            await announcer.drain()

        bus.changed.clear()
        assert await longest_share(announce_ends()) < MAX_SHARE
        assert {path for path in bus.changed if path != MANAGER_PATH} == set(paths)
        assert bus.changed.count(MANAGER_PATH) >= len(jobs)  # JobRemoved.
        announcer.close()

    asyncio.run(work())


def test_the_end_of_a_job_is_announced_after_the_reply_to_wait(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signals take long to encode, and nobody waits for them."""
    monkeypatch.setattr(job_signals, "REPLIES_FIRST_S", 0.1)  # The machine may be busy.
    bus, process = FakeBus(), FakeProcess()

    async def work() -> None:
        service = cast(Service, SimpleNamespace(registry=world.registry))
        tree = ManagerTree(ManagerObject(service), service)
        server = Server(cast(Connection, bus), tree, fault, Turns(frozenset({0})))
        announcer = Announcer(server)
        world.registry.observer = announcer
        world.stop(process)
        call = call_of(1, "org.qkilld1.Job", "Wait", sender=":1.1")
        call.path = "/org/qkilld1/job/1"
        bus.on_call(call)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not bus.replies
        bus.changed.clear()
        process.die()
        while not bus.replies:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not bus.changed
        await announcer.drain()
        assert bus.changed.count(MANAGER_PATH)  # JobRemoved.
        announcer.close()

    asyncio.run(work())


def test_a_bus_that_does_not_read_gets_only_the_newest_changes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the bus got every change, unsent signals would fill the memory while the job changes."""
    monkeypatch.setattr(job_signals, "MIN_INTERVAL_S", 0.0)
    bus = FakeBus()

    async def work() -> None:
        server = Server(cast(Connection, bus), cast(Any, None), fault, Turns(frozenset({0})))
        announcer = Announcer(server)
        job = world.stop(FakeProcess())
        announcer.adopt(job)
        bus.room.clear()
        for _ in range(100):
            for change in (job.hold, job.release, job.hold):
                change(Steerer(0, Rank.ROOT))
                announcer.job_changed(job)
                await asyncio.sleep(0)
        assert not bus.changed
        bus.room.set()
        async with asyncio.timeout(5):
            while not bus.changed:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert len(bus.changed) == 1
        announcer.close()

    asyncio.run(work())


def test_many_guests_that_come_and_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_watch, "SCAN_INTERVAL_S", 0)
    bus = FakeBus()
    guests: list[Guest] = []

    async def find() -> list[Guest]:
        return list(guests)

    async def is_wanted() -> bool:
        return True

    async def work() -> None:
        server = Server(cast(Connection, bus), cast(Any, None), fault, Turns(frozenset({0})))
        watch = guest_watch.GuestWatch(find, None, GuestSignals(server), is_wanted, fault)
        assert list(await watch.guests()) == []

        async def change_to(found: list[Guest], signals: int) -> None:
            guests[:] = found
            while len(bus.changed) < signals:  # noqa: ASYNC110
                await asyncio.sleep(0)

        new = [make_guest(pid) for pid in range(1, 4001)]
        assert await longest_share(change_to(new, 4000)) < MAX_SHARE
        assert [watch.get(one.number) for one in watch.known] == list(watch.known)
        numbers = [one.number for one in watch.known]
        assert len(numbers) == 4000
        assert await longest_share(change_to([], 8000)) < MAX_SHARE
        assert set(map(watch.get, numbers)) == {None}
        watch.close()

    asyncio.run(work())
