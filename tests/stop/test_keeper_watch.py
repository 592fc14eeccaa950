"""How long a guest is left to keepers that are at work."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from qkilld.bus.systemd import Systemd
from qkilld.model.constants import INFINITY, USEC_PER_SEC
from qkilld.model.guest import Unit
from qkilld.model.unit import Command, UnitFacts
from qkilld.stop import keepers
from tests.stop.fakes import FakeHandle

STOP = (Command("/usr/bin/keep", ("keep",)),)


class FakeSystemd:
    """keeper.service is being stopped, or its stop job waits for other jobs."""

    def __init__(self, *, runs: bool, timeout: int) -> None:
        self._state = "deactivating" if runs else "active"
        self._timeout = timeout

    async def unit(self, name: str) -> UnitFacts:
        if name == "web.scope":
            return UnitFacts(name, before=("keeper.service",))
        return UnitFacts(
            name, active_state=self._state, job=1, exec_stop=STOP, timeout_stop=self._timeout
        )

    async def unit_of(self, pid: int) -> UnitFacts:
        return UnitFacts("qkilld-guests.service")

    async def job_type(self, name: str) -> str:
        return "stop"


@pytest.mark.parametrize(
    ("runs", "timeout_s", "writes", "limit"),
    [
        (True, 30, False, 30),
        (True, None, False, keepers.LONGEST_S),
        # A guest that writes may be shutting down, but systemd forces a shutdown after 30 minutes.
        (True, 30, True, keepers.LONGEST_S),
        # The keeper has not asked the guest yet, so the guest's writes do not matter.
        (False, 30, True, keepers.QUEUED_S),
    ],
    ids=["until its timeout", "no timeout", "the guest writes", "queued"],
)
def test_the_wait_for_a_keeper_ends(
    monkeypatch: pytest.MonkeyPatch, runs: bool, timeout_s: int | None, writes: bool, limit: float
) -> None:
    now = [0.0]

    async def wait_exit(process: Any) -> None:
        now[0] += keepers.TICK_S
        assert now[0] < 3 * keepers.LONGEST_S

    def written(pid: int) -> tuple[int, ...]:
        return (int(now[0]),) if writes else ()

    monkeypatch.setattr(keepers, "_wait_exit", wait_exit)
    monkeypatch.setattr(keepers, "_written", written)
    monkeypatch.setattr("qkilld.adapters.procfs.read_unit", lambda pid: Unit("web.scope"))
    monkeypatch.setattr(keepers, "ancestors", lambda pid: [])
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    timeout = INFINITY if timeout_s is None else timeout_s * USEC_PER_SEC
    systemd = FakeSystemd(runs=runs, timeout=timeout)
    told: list[str] = []
    process = FakeHandle(1)
    try:
        watch = keepers.KeeperWatch(cast(Systemd, systemd))
        asyncio.run(watch.leave(process, told.append))
    finally:
        process.close()
    assert told == ["keeper.service"]
    assert limit <= now[0] <= limit + keepers.STALL_S + 2
