"""Send signals about jobs. Implements engine.ports.Observer."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, Final

from qkilld.bus import interfaces
from qkilld.bus.job_object import PRIVATE, changing, job_path, properties
from qkilld.bus.server import Server
from qkilld.engine.long_replies import STEP_S
from qkilld.model.constants import MANAGER_PATH

if TYPE_CHECKING:
    from qkilld.engine.ports import ObservedJob

REPLIES_FIRST_S: Final = 0.001
"""Signals are delayed by this time, so that replies for which callers wait are sent first."""
MIN_INTERVAL_S: Final = 0.2
"""The shortest time between two PropertiesChanged signals of a job."""


class Announcer:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._announced_values: dict[int, tuple[Any, ...]] = {}
        """The values of the properties that change, as last announced for each running job."""
        self._due: OrderedDict[int, ObservedJob] = OrderedDict()
        """Jobs whose changes are to be announced now, the next one first."""
        self._ended: deque[ObservedJob] = deque()
        """Jobs whose end is to be announced now."""
        self._round: asyncio.Handle | None = None
        self._pauses: dict[int, asyncio.Handle] = {}
        """For each job: the timer of the pause after its last announcement."""
        self._announced_count = 0
        self._manager_pending: asyncio.Handle | None = None
        """The timer of the next announcement of the manager's properties, or the timer of the pause
        after the last announcement."""

    def adopt(self, job: ObservedJob) -> None:
        """Announce the changes of a running job. Its start was announced before this object
        existed."""
        self._announced_values[job.number] = tuple(changing(job, private=True).values())
        self._announced_count = len(self._announced_values)

    def job_new(self, job: ObservedJob) -> None:
        self._announced_values[job.number] = tuple(changing(job, private=True).values())
        self._emit("JobNew", job)
        # This signal is a broadcast, so it has no private values.
        values = properties(job, private=False)
        self._server.emit_added(job_path(job), interfaces.job(), values)
        self._manager_changed()

    def job_changed(self, job: ObservedJob) -> None:
        """Schedule one signal for all changes in this iteration of the loop."""
        if job.number in self._announced_values and job.number not in self._pauses:
            self._announce_soon(job)

    def job_ended(self, job: ObservedJob) -> None:
        """Schedule the signals about the end. They are not sent now, because they would delay
        the replies of Wait and, if thousands of jobs end at a time, the SIGKILL of other jobs."""
        self._ended.append(job)
        self._schedule(REPLIES_FIRST_S)

    def job_forgotten(self, job: ObservedJob) -> None:
        self._server.emit_removed(job_path(job), interfaces.job())

    async def drain(self) -> None:
        """Wait until JobRemoved has been sent for every job that has ended."""
        while self._ended:  # noqa: ASYNC110
            await asyncio.sleep(0)

    def close(self) -> None:
        self._due.clear()
        self._ended.clear()
        if self._round is not None:
            self._round.cancel()
            self._round = None
        for timer in self._pauses.values():
            timer.cancel()
        self._pauses.clear()
        if self._manager_pending is not None:
            self._manager_pending.cancel()
            self._manager_pending = None

    def _manager_changed(self) -> None:
        if self._manager_pending is None:
            loop = asyncio.get_running_loop()
            self._manager_pending = loop.call_soon(self._announce_manager)

    def _announce_manager(self) -> None:
        self._manager_pending = None
        running = len(self._announced_values)
        if running != self._announced_count:
            self._announced_count = running
            self._server.emit_changed(MANAGER_PATH, interfaces.manager(), {"NJobs": running}, ())
            loop = asyncio.get_running_loop()
            self._manager_pending = loop.call_later(MIN_INTERVAL_S, self._announce_manager)

    def _announce_soon(self, job: ObservedJob) -> None:
        self._pauses.pop(job.number, None)
        self._due[job.number] = job
        self._schedule(REPLIES_FIRST_S)

    def _schedule(self, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        if self._round is not None or not (self._ended or self._due):
            return
        if not self._ended and not self._server.has_room:
            # The bus does not read at the moment. Try again later; clients then get only the newest
            # values.
            delay_s = MIN_INTERVAL_S
        self._round = loop.call_later(delay_s, self._announce_due)

    def _announce_due(self) -> None:
        """Spend at most STEP_S on announcing ends and changes, because thousands of jobs may end or
        change at a time. The next round follows when the loop has handled other events."""
        self._round = None
        loop = asyncio.get_running_loop()
        end = time.monotonic() + STEP_S
        try:
            while self._ended or (self._due and self._server.has_room):
                if self._ended:
                    self._announce_end(self._ended.popleft())
                else:
                    number, job = self._due.popitem(last=False)
                    if self._announce_changes(job):
                        pause = loop.call_later(MIN_INTERVAL_S, self._announce_soon, job)
                        self._pauses[number] = pause
                if time.monotonic() >= end:
                    break
        finally:
            self._schedule(0)

    def _announce_end(self, job: ObservedJob) -> None:
        self._due.pop(job.number, None)
        if timer := self._pauses.pop(job.number, None):
            timer.cancel()
        # Announce the changes before the end: clients stop reading after JobRemoved.
        self._announce_changes(job)
        del self._announced_values[job.number]
        assert job.result is not None
        self._emit("JobRemoved", job, job.result.value)
        self._manager_changed()

    def _announce_changes(self, job: ObservedJob) -> bool:
        now = changing(job, private=True)
        announced = self._announced_values[job.number]
        both = zip(now.items(), announced, strict=True)
        if changed := {name: value for (name, value), before in both if before != value}:
            self._announced_values[job.number] = tuple(now.values())
            private = [name for name in PRIVATE if changed.pop(name, None) is not None]
            self._server.emit_changed(job_path(job), interfaces.job(), changed, private)
            return True
        return False

    def _emit(self, member: str, job: ObservedJob, *more: Any) -> None:
        pid = job.guest.identity.pid
        manager = interfaces.manager()
        self._server.emit(MANAGER_PATH, manager, member, job.number, job_path(job), pid, *more)
