"""How the flags and options of a call combine with those of the job that it joins."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest

from qkilld.decision.unit_limits import Limits
from qkilld.engine.job_saver import JobSaver
from qkilld.engine.snapshot import decode
from qkilld.engine.unit_stop import ControlProcess, UnitStops
from qkilld.model.constants import INFINITY, Flag, GuestAsked, Result
from qkilld.model.errors import NoSuchUnit
from qkilld.model.guest import Unit
from qkilld.model.guest_state import Button, GuestObservation, GuestOrder
from qkilld.model.unit import UnitFacts
from tests.engine.conftest import FakeProcess, S, World
from tests.engine.test_kill_written_down import SlowStore
from tests.engine.test_powerdown import UP
from tests.engine.test_service import make_service

POWERDOWN, FORCE, NOWAIT = Flag.POWERDOWN, Flag.FORCE, Flag.NOWAIT
OWNER, ROOT, STRANGER = 1000, 0, 1001
IN_DOUBT = replace(UP, button=Button.NOT_LISTENED, requests=None)
"""A guest that is observed for a while before it is asked."""
SIGNALS: dict[str, Any] = {"flags": POWERDOWN}
FORCED: dict[str, Any] = {"flags": POWERDOWN | FORCE}
ONLY: dict[str, Any] = {"flags": POWERDOWN, "powerdown_only": True}
PRESS: dict[str, Any] = {"flags": POWERDOWN | NOWAIT}


def world_of(seen: GuestObservation) -> World:
    world = World()
    world.monitors.shows = lambda now: seen
    return world


@pytest.mark.parametrize("uid", [OWNER, ROOT, STRANGER])
@pytest.mark.parametrize(("first", "signals"), [(SIGNALS, [SIGTERM]), (FORCED, [SIGTERM, SIGKILL])])
@pytest.mark.parametrize("second", [ONLY, PRESS])
def test_a_call_without_signals_takes_none_back(
    first: dict[str, Any], signals: list[int], second: dict[str, Any], uid: int
) -> None:
    world, process = world_of(UP), FakeProcess()
    job = world.stop(process, uid=OWNER, **first)
    world.clock.advance(2)
    assert world.stop(FakeProcess(), uid=uid, **second) is job
    assert not job.request.powerdown_only
    world.clock.advance(61)
    assert process.sent == [SIGTERM]
    world.clock.advance(120)
    assert process.sent == signals


@pytest.mark.parametrize("uid", [OWNER, ROOT])
@pytest.mark.parametrize(("first", "second"), [(ONLY, PRESS), (PRESS, ONLY), (ONLY, ONLY)])
def test_no_signal_follows_if_neither_call_allows_one(
    first: dict[str, Any], second: dict[str, Any], uid: int
) -> None:
    world, process = world_of(IN_DOUBT), FakeProcess()
    job = world.stop(process, uid=OWNER, **first)
    world.clock.advance(1)
    assert world.stop(FakeProcess(), uid=uid, **second) is job
    world.monitors.shows = lambda now: UP
    world.clock.advance(5)
    assert world.monitors.orders[0] is GuestOrder.BUTTON
    assert job.running and job.request.powerdown_only
    world.clock.advance(100)
    assert (job.result, job.guest_asked) == (Result.SURVIVED, GuestAsked.IGNORED)
    assert process.sent == []


@pytest.mark.parametrize("uid", [OWNER, ROOT])
def test_two_single_orders_remain_one(uid: int) -> None:
    world, process = world_of(IN_DOUBT), FakeProcess()
    job = world.stop(process, uid=OWNER, **PRESS)
    world.clock.advance(1)
    assert world.stop(FakeProcess(), uid=uid, **PRESS) is job
    world.monitors.shows = lambda now: UP
    world.clock.advance(5)
    assert (job.result, process.sent) == (Result.SIGNALLED, [])


def test_a_job_that_is_taken_over_keeps_its_help_and_its_monitor() -> None:
    world = world_of(UP)
    job = world.stop(
        FakeProcess(),
        POWERDOWN,
        uid=OWNER,
        help=(GuestOrder.RESUME, GuestOrder.WAKE),
        qmp_socket="/run/web/qmp",
    )
    more = (GuestOrder.WAKE, GuestOrder.THAW)
    assert world.stop(FakeProcess(), POWERDOWN, uid=ROOT, reason="reboot", help=more) is job
    request = decode(job.snapshot().to_json()).request
    assert request.help == (GuestOrder.RESUME, GuestOrder.WAKE, GuestOrder.THAW)
    assert (request.uid, request.reason, request.qmp_socket) == (ROOT, "reboot", "/run/web/qmp")


@pytest.mark.parametrize(
    ("first", "sent"), [(SIGNALS, [SIGTERM]), (ONLY, []), (PRESS, [])], ids=repr
)
def test_the_limits_of_a_unit_add_no_signal(first: dict[str, Any], sent: list[int]) -> None:
    world, process = world_of(IN_DOUBT), FakeProcess()
    service, _ = make_service(world)
    job = world.stop(process, uid=ROOT, **first)
    units = UnitStops(service, lambda pid: None, user=False)
    control = ControlProcess(Unit("web.service"), S)
    units._join(job, Limits(ask=3 * S, force=True), control, ROOT, force=False)
    world.clock.advance(4)
    assert process.sent == sent


class OneScope:
    """A fake systemd with a scope and its guard, whose ExecStop= is running."""

    def __init__(self, scope: UnitFacts | None) -> None:
        self.scope = scope

    async def unit(self, name: str) -> UnitFacts:
        if name == GUARD:
            return UnitFacts(
                GUARD, active_state="deactivating", control_pid=7, timeout_stop=90 * S,
                notify_access="exec",
            )  # fmt: skip
        if self.scope is None or name != self.scope.id:
            raise NoSuchUnit(name)
        return self.scope


GUARD = "qkilld-scope@web.scope.service"
SCOPE = UnitFacts("web.scope", active_state="active", job=9, timeout_stop=90 * S)


@pytest.mark.parametrize(
    ("scope", "uid", "force", "kills", "sent"),
    [
        (SCOPE, ROOT, True, True, [SIGTERM, SIGKILL]),
        (SCOPE, OWNER, True, True, [SIGTERM, SIGKILL]),
        (SCOPE, STRANGER, True, True, [SIGTERM]),
        (SCOPE, ROOT, False, True, [SIGTERM]),
        (replace(SCOPE, timeout_stop=INFINITY), ROOT, True, False, [SIGTERM]),
        (replace(SCOPE, sends_sigkill=False), ROOT, True, False, [SIGTERM]),
        (replace(SCOPE, job=0), ROOT, True, False, [SIGTERM]),
        (None, ROOT, True, False, [SIGTERM]),
    ],
)
def test_a_guard_forces_only_if_its_scope_would_kill(
    scope: UnitFacts | None, uid: int, force: bool, kills: bool, sent: list[int]
) -> None:
    """The job gets FORCE only if the caller requests it and is root or the owner, because polkit
    has allowed others only SIGTERM. All callers learn what systemd would do."""
    world, process = world_of(UP), FakeProcess()
    service, _ = make_service(world)
    service.units = OneScope(scope)
    job = world.stop(process, uid=uid)
    described = {7: Unit(GUARD), job.guest.identity.pid: Unit("web.scope")}
    units = UnitStops(service, lambda pid: ControlProcess(described[pid], S), user=False)
    found = asyncio.run(units.limit([job], 7, uid, force=force))
    assert found.limits is not None and found.limits.force is kills
    world.clock.advance(200)
    assert process.sent == sent


@pytest.mark.parametrize("force", [True, False])
def test_the_main_process_is_forced_in_whatever_scope_unless_the_caller_says_no(
    force: bool,
) -> None:
    """A forking guest may be in the scope of a session (pam_systemd)."""
    world, process = world_of(UP), FakeProcess()
    service, _ = make_service(world)
    job = world.stop(process, uid=0)
    pid = job.guest.identity.pid

    class OneService(OneScope):
        async def unit(self, name: str) -> UnitFacts:
            facts = await super().unit(name)
            return replace(facts, main_pid=pid) if name == GUARD else facts

    service.units = OneService(replace(SCOPE, job=0))
    described = {7: Unit(GUARD), pid: Unit("web.scope")}
    units = UnitStops(service, lambda pid: ControlProcess(described[pid], S), user=False)
    found = asyncio.run(units.limit([job], 7, 0, force=force))
    assert found.limits is not None and found.limits.force
    world.clock.advance(200)
    assert process.sent == ([SIGTERM, SIGKILL] if force else [SIGTERM])


def test_the_limits_are_reported_once_force_is_saved(world: World) -> None:
    """If the reply came earlier, a crash after it would lose FORCE."""
    store = SlowStore()
    world.registry.saver = JobSaver(store, world.clock)
    service, _ = make_service(world)
    service.units = OneScope(SCOPE)
    job = world.stop(FakeProcess(), uid=0)
    store.write()
    described = {7: Unit(GUARD), job.guest.identity.pid: Unit("web.scope")}
    units = UnitStops(service, lambda pid: ControlProcess(described[pid], S), user=False)

    async def ask() -> None:
        asking = asyncio.create_task(units.limit([job], 7, 0, force=True))
        while FORCE not in job.flags:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not asking.done()
        store.write()
        assert (await asking).limits is not None

    asyncio.run(ask())
    assert store.newest is not None and FORCE in store.newest.flags
