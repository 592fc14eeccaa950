"""Leave guests to their keepers: the units that shut them down at host shutdown.

The helper waits up to 2 minutes for a keeper's queued stop job to begin. While systemd stops the
keeper, the helper waits until the keeper's timeout has passed, and then for as long as the guest
writes. It waits about 20 minutes at most. Then the helper stops the guest itself.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qkilld.adapters import blockable, procfs
from qkilld.adapters.ancestors import ancestors, services_that_run
from qkilld.adapters.loop_thread import run_in_thread
from qkilld.debug_log import ignore, note
from qkilld.model.constants import INFINITY
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import QkilldError
from qkilld.model.unit import UnitFacts
from qkilld.unitcheck.keepers import (
    KeeperCandidates,
    keeper_names,
    keeper_targets,
    runtime_keepers,
)

if TYPE_CHECKING:
    from qkilld.bus.connection import Connection
    from qkilld.bus.systemd import Systemd
    from qkilld.stop.process import ProcessHandle

TICK_S: Final = 1.0
TIMEOUT_S: Final = 2.0
STALL_S: Final = 10.0
"""A guest that has written nothing for this long counts as stalled."""
LONGEST_S: Final = 20 * 60.0
"""The limit for each keeper, whatever its timeout is, because systemd limits a host shutdown to 30
minutes."""
QUEUED_S: Final = 120.0
"""How long a keeper's stop job may wait for other jobs before it runs."""


@dataclass
class _StoppingKeeper:
    facts: UnitFacts
    seen_at: float
    """When the keeper's stop job was first seen, time.monotonic()."""
    began: float | None = None
    """When the stop job was first seen running."""

    def has_time(self, now: float) -> bool:
        if self.began is None:
            return now - self.seen_at < QUEUED_S
        timeout = self.facts.timeout_stop
        limit = LONGEST_S if timeout == INFINITY else min(timeout / 1e6, LONGEST_S)
        return now - self.began < limit


class KeeperWatch:
    """Watches the keepers of all guests of a run."""

    def __init__(self, systemd: Systemd) -> None:
        self._systemd = systemd
        self._keepers: dict[str, _StoppingKeeper] = {}
        self._read_at: dict[str, float] = {}
        self._own: UnitFacts | None = None
        self._services: dict[frozenset[str], dict[str, str]] = {}
        """The result of services_that_run() for each set of programs."""

    async def leave(self, process: ProcessHandle, on_keeper: Callable[[str], None]) -> None:
        """Wait until the process is gone, or until none of its keepers is being stopped.

        After the keepers' time is over, also return if the guest makes no progress, or if LONGEST_S
        has passed.

        If a keeper is being stopped, `on_keeper` is called once, with the name of the keeper.
        """
        names = await self._names(process.pid)
        is_reported = False
        start = moved_at = time.monotonic()
        written = _written(process.pid)
        while names and not process.exited():
            working = [each for name in names if (each := await self._at_work(name)) is not None]
            if not working:
                return
            if not is_reported:
                on_keeper(working[0].facts.id)
                is_reported = True
            now = time.monotonic()
            if (latest := _written(process.pid)) != written:
                written, moved_at = latest, now
            if not any(each.has_time(now) for each in working):
                # Before a keeper's stop job runs, writes of the guest do not show that the guest is
                # shutting down.
                runs = any(each.began is not None for each in working)
                if not runs or now - moved_at >= STALL_S or now - start >= LONGEST_S:
                    return
            with ignore("waiting for a keeper", TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await _wait_exit(process)

    async def _names(self, pid: int) -> list[str]:
        """Find the keepers of a guest, whether or not they are being stopped."""
        unit = procfs.read_unit(pid)
        if unit is None or unit.user:
            return []
        try:
            candidates = await self._candidates(pid, unit.system)
            self._own = self._own or await self._systemd.unit_of(0)
        except QkilldError as error:
            note(f"asking systemd who shuts down the guest in {unit.system or 'no unit'}", error)
            return []
        known = []
        for name in candidates.names:
            # Skip units in our After=, because systemd stops them only after our unit.
            if name not in self._own.after:
                with ignore(f"asking systemd for {name}", QkilldError):
                    known.append(await self._systemd.unit(name))
        return [keeper.unit for keeper in candidates.keepers(known)]

    async def _candidates(self, pid: int, unit: str) -> KeeperCandidates:
        """`unit`: "" for none."""
        runtime: dict[str, str] = {}
        with ignore(f"reading what runs the guest of process {pid}", TimeoutError):
            async with asyncio.timeout(TIMEOUT_S):
                runtime = await run_in_thread(lambda: runtime_keepers(ancestors(pid), self._search))
        if not unit:
            return KeeperCandidates(runtime=runtime)
        facts = await self._systemd.unit(unit)
        targets = [await self._systemd.units_after(name) for name in keeper_targets(facts)]
        return KeeperCandidates(tuple(keeper_names(facts)), tuple(chain(*targets)), runtime)

    def _search(self, programs: Collection[str]) -> dict[str, str]:
        key = frozenset(programs)
        if key not in self._services:
            self._services[key] = services_that_run(key)
        return self._services[key]

    async def _at_work(self, name: str) -> _StoppingKeeper | None:
        now = time.monotonic()
        if now - self._read_at.get(name, -TICK_S) < TICK_S / 2:
            return self._keepers.get(name)
        self._read_at[name] = now
        try:
            facts = await self._systemd.unit(name)
            stopping = facts.active_state == "deactivating"
            queued = bool(facts.job) and await self._systemd.job_type(name) == "stop"
        except QkilldError as error:
            note(f"asking systemd for {name}", error)
            return self._keepers.get(name)
        if not (stopping or queued):
            self._keepers.pop(name, None)
            return None
        keeper = self._keepers.setdefault(name, _StoppingKeeper(facts, now))
        if stopping and keeper.began is None:
            keeper.began = now
        return keeper


async def leave_all(
    connection: Connection | str,
    processes: Sequence[ProcessHandle],
    on_keeper: Callable[[ProcessHandle, str], None],
    release: Callable[[Sequence[ProcessHandle]], None],
) -> None:
    """Release a process at once if none of its keepers is being stopped. Release the others when
    `KeeperWatch.leave` returns for them.

    `on_keeper` is called with each process that is not released at once, and its keeper's name.
    """
    if isinstance(connection, str):
        release(processes)
        return
    from qkilld.bus.systemd import Systemd

    watch = KeeperWatch(Systemd(connection, timeout_s=TIMEOUT_S))
    events = {process: asyncio.Event() for process in processes}
    """Each event is set as soon as it is known whether a keeper of its process is being stopped."""
    remaining = set(processes)

    async def leave(process: ProcessHandle) -> None:
        def note_keeper(keeper: str) -> None:
            on_keeper(process, keeper)
            events[process].set()

        try:
            await watch.leave(process, note_keeper)
        finally:
            if events[process].is_set():
                remaining.discard(process)
                release([process])
            events[process].set()

    tasks = {process: asyncio.create_task(leave(process)) for process in processes}
    try:
        await asyncio.gather(*(event.wait() for event in events.values()))
        await asyncio.sleep(0)
        free = [process for process in processes if process in remaining and tasks[process].done()]
        remaining.difference_update(free)
        if free:
            release(free)
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    finally:
        # End the tasks if this coroutine is cancelled, or `release` raises.
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    if remaining:
        release(list(remaining))


async def _wait_exit(process: ProcessHandle) -> None:
    exit_event = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Duplicate the pidfd: an event loop has only one reader for each descriptor, so a second wait
    # for the same process would replace the first one's reader.
    pidfd = os.dup(process.pidfd)
    loop.add_reader(pidfd, exit_event.set)
    try:
        await exit_event.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def _written(pid: int) -> tuple[int, ...]:
    """Return counters that increase with writes; empty if unreadable."""
    wanted = ("wchar", "syscw", "write_bytes")
    with ignore(f"reading what process {pid} has written", OSError, ValueError):
        text = blockable.shared.one(f"/proc/{pid}", lambda path: Path(path, "io").read_text())
        pairs = (line.split(":") for line in text.splitlines())
        return tuple(int(value) for name, value in pairs if name in wanted)
    return ()
