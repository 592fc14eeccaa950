"""Signals about jobs. Implements engine.ports.Observer."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from qkilld.bus import interfaces
from qkilld.bus.job import changing, job_path
from qkilld.bus.server import Server
from qkilld.engine.job import Job
from qkilld.model.words import MANAGER_PATH

MIN_INTERVAL_S: Final = 0.2
"""PropertiesChanged at most five times a second a job."""


class Announcer:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._told: dict[int, dict[str, Any]] = {}
        """What callers know of each running job."""
        self._pending: dict[int, asyncio.TimerHandle] = {}

    def adopt(self, job: Job) -> None:
        """Tell from now on of a running job that was announced elsewhere."""
        self._told[job.number] = changing(job)

    def job_new(self, job: Job) -> None:
        self.adopt(job)
        self._emit("JobNew", job)

    def job_changed(self, job: Job) -> None:
        if job.number in self._told and job.number not in self._pending:
            self._tell(job)

    def job_ended(self, job: Job) -> None:
        if timer := self._pending.pop(job.number, None):
            timer.cancel()
        # The last change is not held back: it would come after JobRemoved.
        self._tell_changes(job)
        del self._told[job.number]
        assert job.result is not None
        self._emit("JobRemoved", job, job.result.value)

    def _tell(self, job: Job) -> None:
        if self._tell_changes(job):
            loop = asyncio.get_running_loop()
            self._pending[job.number] = loop.call_later(MIN_INTERVAL_S, self._again, job)

    def _again(self, job: Job) -> None:
        del self._pending[job.number]
        self._tell(job)

    def _tell_changes(self, job: Job) -> bool:
        now = changing(job)
        told = self._told[job.number]
        if changed := {name: value for name, value in now.items() if told[name] != value}:
            self._told[job.number] = now
            self._server.emit_changed(job_path(job), interfaces.job(), changed)
        return bool(changed)

    def _emit(self, member: str, job: Job, *more: Any) -> None:
        pid = job.guest.identity.pid
        manager = interfaces.manager()
        self._server.emit(MANAGER_PATH, manager, member, job.number, job_path(job), pid, *more)
