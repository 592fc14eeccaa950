"""Clients that do not read their replies, or that disconnect, leave nothing in the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qkilld.engine.ports import Process
from qkilld.engine.service import Service
from qkilld.engine.turns import Turns
from qkilld.model.access import Rank, Steerer
from qkilld.model.event import MessageId
from qkilld.model.guest import Identity, Label
from qkilld.model.policy import Config
from qkilld.varlink import streams
from qkilld.varlink.methods import VarlinkMethods
from qkilld.varlink.server import VarlinkServer
from tests.engine.conftest import FakeProcess, World, make_guest
from tests.engine.test_service import FakeHost
from tests.evidence.until import until
from tests.varlink.test_unit_queries import SlowUnits


class SlowHost(FakeHost):
    """Reading the name of a guest blocks until `goes_on` is set."""

    def __init__(self, *processes: FakeProcess) -> None:
        super().__init__(*processes)
        self.goes_on = asyncio.Event()

    def open(self, pid: int) -> Process:
        super().open(pid)
        return FakeProcess(self.processes[pid].guest)  # Each call closes its own descriptor.

    async def label(self, identity: Identity) -> Label:
        label = await super().label(identity)
        await self.goes_on.wait()
        return label


class Daemon:
    """The Varlink server for one guest, without a bus. Create it in a running loop."""

    def __init__(self, directory: Path) -> None:
        self.world = World()
        self.process = FakeProcess()
        self.host = SlowHost(self.process)
        self.streams = streams.Streams()
        self.turns = Turns(frozenset())
        service = Service(
            Config(), self.host, self.world.registry, self.world.clock, self.world.sampler
        )
        self.units = SlowUnits(service)
        methods = VarlinkMethods(service, self.streams, self.units, self.turns.limits)
        self.server = VarlinkServer(methods, self.turns, lambda what, error: None)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "s"))
        listener.listen()
        self.server.listen(listener)
        self._path = directory / "s"

    @contextlib.contextmanager
    def client(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._path))
            sock.setblocking(False)
            yield sock

    @property
    def guest_pid(self) -> int:
        return self.process.guest.identity.pid


def send(sock: socket.socket, method: str, *, more: bool = True, **parameters: Any) -> None:
    call = {"method": f"org.qkilld1.{method}", "more": more, "parameters": parameters}
    sock.send(json.dumps(call).encode() + b"\0")


def test_a_client_that_does_not_read(lab_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequent changes of the job take no more memory. The client gets the result when it reads."""
    monkeypatch.setattr(streams, "MIN_INTERVAL_S", 0.0)

    async def follow() -> None:
        daemon = Daemon(lab_dir)
        job = daemon.world.stop(daemon.process)
        with daemon.client() as client:
            send(client, "Wait", job=job.number)
            await asyncio.to_thread(until, lambda: daemon.streams._by_job, bool)
            (connection,) = daemon.server._connections
            while not connection.blocked:
                daemon.streams.job_changed(job)
                await asyncio.sleep(0)
            for _ in range(1000):
                daemon.streams.job_changed(job)
                await asyncio.sleep(0)
            assert len(connection._when_sent) == 1
            daemon.process.die()
            assert not job.running
            received = b""
            async with asyncio.timeout(30):
                while daemon.server.busy or not received.endswith(b"\0"):
                    received += await asyncio.get_running_loop().sock_recv(client, 1 << 20)
            assert "receipt" in json.loads(received.split(b"\0")[-2])["parameters"]
        daemon.server.close()

    asyncio.run(follow())


class SlowCall:
    """A call whose client reads when it is told to. Implements StreamingCall."""

    uid = 0

    def __init__(self) -> None:
        self.blocked = False
        self.replies: list[dict[str, Any]] = []
        self._waiting: list[Callable[[], None]] = []

    def when_sent(self, callback: Callable[[], None]) -> None:
        if self.blocked:
            self._waiting.append(callback)
        else:
            callback()

    def progress_encoded(self, parameters: bytes) -> None:
        self.replies.append(json.loads(parameters))

    def finish_encoded(self, parameters: bytes) -> None:
        self.progress_encoded(parameters)

    def abandon(self) -> None: ...

    def now_waits(self) -> None: ...

    def read(self) -> None:
        self.blocked = False
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()


def test_a_change_is_reported_although_the_job_that_changed_before_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "MIN_INTERVAL_S", 0.0)

    async def follow() -> None:
        world, every, call = World(), streams.Streams(), SlowCall()
        world.registry.observer = every
        processes = [FakeProcess(make_guest(pid)) for pid in (1, 2)]
        first, second = (world.stop(process) for process in processes)
        streams.JobStream(every, call, [first, second], changes=True)
        await asyncio.sleep(0.01)
        call.blocked = True
        for job in (first, second):
            job.hold(Steerer(0, Rank.ROOT))
            await asyncio.sleep(0.01)
        processes[0].die()
        call.read()
        async with asyncio.timeout(5):
            while len(call.replies) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
        end, change = call.replies
        assert end["receipt"] and end["state"]["job"] == first.number
        assert change["state"]["job"] == second.number and change["state"]["held"]

    asyncio.run(follow())


def test_a_client_that_leaves_before_its_job_begins(lab_dir: Path) -> None:
    """The daemon forgets the call at once, although the job still runs."""

    async def leave() -> None:
        daemon = Daemon(lab_dir)
        with daemon.client() as client:
            send(client, "Terminate", pid=daemon.guest_pid)
            await asyncio.to_thread(until, lambda: "label" in daemon.host.asked, bool)
        await asyncio.to_thread(until, lambda: daemon.server._connections, lambda all: not all)
        assert daemon.server.busy
        daemon.host.goes_on.set()
        await asyncio.to_thread(until, lambda: daemon.world.registry.running, bool)
        await asyncio.to_thread(until, lambda: not daemon.server.busy, bool)
        assert not daemon.streams._by_job and not daemon.turns.limits._running
        (job,) = daemon.world.registry
        assert job.running and not job._waiters._waiting
        assert MessageId.WAITER_GONE in daemon.world.journal.ids
        daemon.server.close()

    asyncio.run(leave())


def test_a_client_that_calls_by_its_unit_all_the_time(lab_dir: Path) -> None:
    """systemd is asked about one call after the other, not about all calls at the same time."""

    async def call() -> None:
        daemon = Daemon(lab_dir)
        daemon.host.goes_on.set()
        calls = 30
        with daemon.client() as client:
            for _ in range(calls):
                send(client, "Terminate", more=False, pid=daemon.guest_pid, byUnit=True)
            await asyncio.to_thread(until, lambda: daemon.units.count, bool)
            await asyncio.sleep(0.2)
            assert daemon.units.running.total() == 1
            daemon.units.goes_on.set()
            await asyncio.to_thread(until, lambda: daemon.units.count, lambda n: n == calls)
        daemon.server.close()

    asyncio.run(call())
