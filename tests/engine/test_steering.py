"""Who may steer a job: callers of the same rank as its requester, or a higher one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest

from qkilld.engine.job import Job
from qkilld.engine.ports import Caller
from qkilld.engine.service import Service
from qkilld.engine.steering import OWNER_EXTENSION
from qkilld.model.access import Answer, PolkitAction, Rank, Steerer
from qkilld.model.constants import INFINITY, Flag, Result
from qkilld.model.errors import AccessDenied, Failed
from qkilld.model.event import MessageId
from qkilld.model.policy import Config, Policy

from .conftest import FakeProcess, S, World
from .test_service import FakeCaller, make_service
from .test_snapshot import crash

FORCE, FIXED, NOWAIT = Flag.FORCE, Flag.FIXED, Flag.NOWAIT
OWNER, STRANGER = 1000, 1001
BY_OWNER, BY_ROOT = Steerer(OWNER, Rank.OWNER), Steerer(0, Rank.ROOT)

Act = Callable[[Service, Job, Caller], Coroutine[Any, Any, None]]
STEER: dict[str, Act] = {
    "cancel": lambda service, job, caller: service.cancel(job, caller),
    "hold": lambda service, job, caller: service.hold(job, caller),
    "release": lambda service, job, caller: service.release(job, caller),
    "force": lambda service, job, caller: service.force(job, caller),
    "extend far": lambda service, job, caller: service.extend(job, INFINITY, caller),
}


@pytest.mark.parametrize("uid", [0, STRANGER])
@pytest.mark.parametrize("act", STEER)
def test_the_owner_cannot_steer_a_job_of_root(world: World, act: str, uid: int) -> None:
    service, _ = make_service(world)
    process = FakeProcess()
    job = world.stop(process, FORCE, uid=uid)
    owner = FakeCaller(OWNER)
    with pytest.raises(AccessDenied, match="The stop of process 4711 is not yours"):
        asyncio.run(STEER[act](service, job, owner))
    wanted = PolkitAction.FORCE if act == "force" else PolkitAction.TERMINATE
    assert owner.asked == [(wanted, True)]  # the owner may also be an administrator
    world.clock.advance(10)
    assert process.sent == [SIGTERM, SIGKILL]


@pytest.mark.parametrize("uid", [0, STRANGER])
def test_root_and_polkit_do(world: World, uid: int) -> None:
    service, _ = make_service(world)
    job = world.stop(FakeProcess(), FORCE, uid=uid)
    for caller in (FakeCaller(0), *(FakeCaller(u, Answer.GRANTED) for u in (OWNER, STRANGER))):
        asyncio.run(service.hold(job, caller))
        assert job.control.held
        asyncio.run(service.release(job, caller))
        asyncio.run(service.extend(job, 3600 * S, caller))
    assert job.control.not_before == world.clock.now() + 3600 * S


def test_the_owner_steers_their_own(world: World) -> None:
    service, _ = make_service(world)
    job = world.stop(FakeProcess(), FORCE, uid=OWNER)
    owner = FakeCaller(OWNER)
    for act in ("hold", "release", "extend far", "cancel"):
        asyncio.run(STEER[act](service, job, owner))
    assert owner.asked == []
    assert job.result is Result.CANCELLED


@pytest.mark.parametrize("longest", [INFINITY, 60 * S])
def test_the_owner_extends_up_to_a_bound(longest: int) -> None:
    world = World(Config(Policy(max=longest)))
    service, _ = make_service(world)
    process = FakeProcess()
    job = world.stop(process, FORCE, uid=0)
    bound = job.started + (OWNER_EXTENSION if longest == INFINITY else longest)
    owner = FakeCaller(OWNER)
    world.clock.advance(5)
    asyncio.run(service.extend(job, 20 * S, owner))
    asyncio.run(service.extend(job, bound - world.clock.now(), owner))
    with pytest.raises(AccessDenied):
        asyncio.run(service.extend(job, bound - world.clock.now() + 1, owner))
    job.extend(INFINITY, BY_OWNER)
    assert job.control.not_before == bound
    world.clock.advance((bound - world.clock.now()) / S - 1)
    assert process.sent == [SIGTERM]
    world.clock.advance(1)
    assert process.sent == [SIGTERM, SIGKILL]


@pytest.mark.parametrize("flags", [FORCE, FORCE | FIXED])
@pytest.mark.parametrize("restart", [False, True])
def test_a_hold_of_the_owner_ends_with_maxsec(flags: Flag, restart: bool) -> None:
    world, process = World(), FakeProcess()
    job = world.stop(process, flags, uid=OWNER, spans={"max": 60 * S})
    job.hold(BY_OWNER)
    assert job.deadline == job.started + 60 * S
    if restart:
        world, job = crash(world, job, process)
    world.clock.advance(59)
    assert (process.sent, job.control.held) == ([SIGTERM], True)
    world.clock.advance(3)
    assert (process.sent, job.control.held) == ([SIGTERM, SIGKILL], False)
    (event,) = [e for e in world.journal.events if e.id is MessageId.JOB_RELEASED]
    assert event.message.startswith("MaxSec released the stop of")


def test_a_hold_of_roots_does_not(world: World) -> None:
    world = World(Config(Policy(max=60 * S)))
    process = FakeProcess()
    job = world.stop(process, FORCE, uid=OWNER)
    job.hold(BY_OWNER)
    job.hold(BY_ROOT)
    assert job.deadline == INFINITY
    world.clock.advance(3600)
    assert process.sent == [SIGTERM]


@pytest.mark.parametrize("flags", [FORCE, FORCE | FIXED])
def test_root_takes_a_job_over(world: World, flags: Flag) -> None:
    """Root may run `qkilld-stop --force --max 5s` after the owner has made the stop endless."""
    process = FakeProcess()
    spans = {"grace": INFINITY, "max": INFINITY}
    job = world.stop(process, flags, uid=OWNER, spans=spans)
    job.hold(BY_OWNER)
    job.extend(INFINITY, BY_OWNER)
    world.clock.advance(2)
    assert world.stop(FakeProcess(), FORCE, uid=0, spans={"max": 5 * S}) is job
    assert (job.rank, job.request.uid, job.control.held) == (Rank.ROOT, 0, False)
    assert FIXED not in job.flags
    assert job.deadline == job.control.not_before == job.started + 5 * S
    world.clock.advance(3)
    assert process.sent == [SIGTERM, SIGKILL]
    (event,) = [e for e in world.journal.events if e.id is MessageId.JOB_JOINED]
    assert event.message.startswith("Uid 0 took over the stop of")


def test_holds_and_extensions_of_root_outlive_a_takeover(world: World) -> None:
    job = world.stop(FakeProcess(), FORCE, uid=OWNER)
    job.extend(30 * S, BY_ROOT)
    job.extend(INFINITY, BY_OWNER)
    job.hold(BY_ROOT)
    world.stop(FakeProcess(), FORCE, uid=0, spans={"max": 5 * S})
    assert job.control.held
    assert job.control.not_before == job.started + 30 * S


def test_root_forces_a_job_that_its_owner_holds(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, uid=OWNER)
    job.hold(BY_OWNER)
    job.extend(1 * S, BY_OWNER)
    with pytest.raises(Failed, match="held or extended"):
        world.stop(FakeProcess(), FORCE | NOWAIT, uid=OWNER)
    world.stop(FakeProcess(), FORCE | NOWAIT, uid=0)
    assert process.sent == [SIGTERM, SIGKILL]


def test_a_request_that_fails_takes_nothing_over(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, uid=OWNER)
    job.hold(BY_ROOT)
    with pytest.raises(Failed, match="held or extended"):
        world.stop(FakeProcess(), FORCE | NOWAIT, uid=0)
    assert (job.request.uid, job.flags, process.sent) == (OWNER, Flag(0), [SIGTERM])
    assert world.registry._per_user == {OWNER: 1}


def test_the_owner_cannot_lengthen_a_job_of_root(world: World) -> None:
    process = FakeProcess()
    job = world.stop(process, uid=0)
    world.stop(FakeProcess(), FORCE, uid=OWNER, spans={"grace": INFINITY})
    assert (job.policy.grace, job.flags, job.request.uid) == (10 * S, FORCE, 0)
    # A user whom polkit has authorized can change the grace.
    world.stop(FakeProcess(), uid=STRANGER, spans={"grace": 20 * S})
    assert (job.policy.grace, job.request.uid) == (20 * S, 0)


def test_a_job_taken_over_counts_for_its_new_requester(world: World) -> None:
    process = FakeProcess()
    world.stop(process, uid=OWNER)
    assert world.registry._per_user == {OWNER: 1}
    world.stop(FakeProcess(), uid=0)
    assert world.registry._per_user == {0: 1}
    process.die()
    world.clock.advance(600)
    assert not world.registry._per_user
