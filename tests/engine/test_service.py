"""The service: what is checked, in which order, before anything is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from signal import SIGTERM
from typing import Any, TypeVar

import pytest

from qkilld.engine.ports import Process
from qkilld.engine.service import Option, Service
from qkilld.model.errors import AccessDenied, InvalidArgs, NoSuchProcess, NotQemu, ProcessChanged
from qkilld.model.guest import Guest, Identity, Label
from qkilld.model.policy import Config
from qkilld.model.words import Flag

from .conftest import FakeProcess, World, make_guest

T = TypeVar("T")


class FakeHost:
    def __init__(self, *processes: FakeProcess) -> None:
        self.processes = {p.guest.identity.pid: p for p in processes}
        self.asked: list[str] = []

    def open(self, pid: int) -> Process:
        self.asked.append("open")
        if pid not in self.processes:
            raise NoSuchProcess(f"No process has the id {pid}")
        return self.processes[pid]

    async def label(self, identity: Identity) -> Label:
        self.asked.append("label")
        return Label("web")

    def identities(self) -> list[Identity]:
        return [process.guest.identity for process in self.processes.values()]


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


async def root() -> int:
    return 0


async def stranger() -> int:
    return 1001


def make_service(world: World, *processes: FakeProcess) -> tuple[Service, FakeHost]:
    host = FakeHost(*processes)
    service = Service(Config(), host, world.registry, world.clock, world.sampler)
    return service, host


def test_the_pidfd_comes_before_the_caller_is_asked_for(world: World) -> None:
    service, host = make_service(world, FakeProcess())

    async def uid() -> int:
        host.asked.append("uid")
        return 0

    run(service.terminate(4711, 0, {}, uid))
    assert host.asked == ["open", "uid", "label"]


def test_a_stranger_is_denied_and_learns_nothing(world: World) -> None:
    shell = Guest(replace(make_guest().identity, executable="/bin/sh"), Label())
    for process in (FakeProcess(), FakeProcess(shell)):
        service, _ = make_service(world, process)
        with pytest.raises(AccessDenied, match="4711 is not yours"):
            run(service.terminate(4711, 0, {}, stranger))
        assert process.closed
        assert process.sent == []


@pytest.mark.parametrize("change", [{"executable": "/bin/sh"}, {"uid": 0}])
def test_a_process_that_changes_while_it_is_looked_at(world: World, change: dict[str, Any]) -> None:
    """Between the first look and the signal it executes another program, or gains rights."""

    class Changing(FakeProcess):
        def identify(self) -> Identity:
            self.guest = Guest(replace(self.guest.identity, **change), self.guest.label)
            return self.guest.identity

    process = Changing()
    service, _ = make_service(world, process)

    async def its_user() -> int:
        return 1000

    with pytest.raises((NotQemu, AccessDenied)):
        run(service.terminate(4711, Flag.FORCE | Flag.NOWAIT, {}, its_user))
    assert process.closed
    assert process.sent == []


def test_a_caller_that_cannot_be_named_gets_nothing(world: World) -> None:
    process = FakeProcess()
    service, _ = make_service(world, process)

    async def gone() -> int:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        run(service.terminate(4711, 0, {}, gone))
    assert process.closed
    assert process.sent == []


def test_arguments_are_checked_before_a_process_is_touched(world: World) -> None:
    service, host = make_service(world, FakeProcess())
    for flags, options in (
        (16, {}),
        (4, {}),
        (0, {"what": Option("s", "x")}),
        (0, {"start-time": Option("s", "x")}),
    ):
        with pytest.raises(InvalidArgs):
            run(service.terminate(4711, flags, options, root))
    with pytest.raises(InvalidArgs):
        run(service.terminate(0, 0, {}, root))
    assert host.asked == []


def test_start_time(world: World) -> None:
    process = FakeProcess()
    service, _ = make_service(world, process)
    with pytest.raises(ProcessChanged):
        run(service.terminate(4711, 0, {"start-time": Option("t", 98)}, root))
    assert process.closed
    again = FakeProcess()
    service, _ = make_service(world, again)
    run(service.terminate(4711, 0, {"start-time": Option("t", 99)}, root))
    assert again.sent == [SIGTERM]


def test_a_reason_is_made_printable(world: World) -> None:
    service, _ = make_service(world, FakeProcess())
    options = {"reason": Option("s", "two\nlines\x1b[2J")}
    job = run(service.terminate(4711, 0, options, root))
    assert job.request.reason == "two\N{REPLACEMENT CHARACTER}lines\N{REPLACEMENT CHARACTER}[2J"


def test_guests_are_those_that_match(world: World) -> None:
    shell = Guest(replace(make_guest(pid=5).identity, executable="/bin/sh"), Label())
    service, _ = make_service(world, FakeProcess(), FakeProcess(shell))
    assert [guest.identity.pid for guest in run(service.guests())] == [4711]


def test_inspect_lets_go_of_the_process(world: World) -> None:
    process = FakeProcess()
    service, _ = make_service(world, process)
    assert run(service.inspect(4711, root)).guest.label.name == "web"
    assert process.closed
