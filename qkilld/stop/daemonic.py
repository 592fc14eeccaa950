"""The stop of one process through the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from qkilld.bus.client import Job, Manager
from qkilld.bus.connection import Connection
from qkilld.model.errors import BusError, NoSuchJob, QkilldError
from qkilld.model.words import (
    INFINITY,
    JOB_PATH_PREFIX,
    UNKNOWN,
    Flag,
    Phase,
    Result,
    Verdict,
)
from qkilld.stop.target import Target

if TYPE_CHECKING:
    from qkilld.model.jobview import JobView

ANSWER_TIMEOUT_S: Final = 3.0
"""The daemon answers in milliseconds, and where it has to be started first within a second."""
RETURN_TIMEOUT_S: Final = 3.0
"""systemd has a daemon that died back within a second."""
LOOK_AFTER_S: Final = 0.15
"""An idle guest is gone before: nothing need be known of its job then."""
SILENCE_S: Final = 5.0
"""A running job tells something new every second; a daemon that is silent for so long is asked
whether it still lives."""
CHECK_TIMEOUT_S: Final = 2.0
ENDING_S: Final = 1.0
"""A daemon that ends has left the bus so long after its last answer."""


class Lost(Exception):
    """The daemon cannot be reached, or not any more; the text says why, to go after a colon."""


class DaemonJob:
    """The job of one target. Every method may raise Lost."""

    def __init__(
        self,
        connection: Connection,
        target: Target,
        options: dict[str, int | str],
        on_change: Callable[[JobView], None],
    ) -> None:
        """`options` are those of TerminateWithOptions."""
        self._connection = connection
        self._manager = Manager(connection)
        self._target = target
        self._options = options
        if target.start_time is not None:
            options["start-time"] = target.start_time
        self._on_change = on_change
        self._path = ""
        self._flags = Flag(0)
        """Those that the daemon has taken."""
        self._wanted = Flag(0)
        self._started = 0
        """When the daemon had sent SIGTERM at the latest; CLOCK_MONOTONIC, µs."""
        self._owner = ""
        self.view: JobView | None = None
        """What was last heard of it."""

    async def start(self, flags: Flag) -> None:
        """Have the daemon stop it. Raises what it refuses with: NotQemu, AccessDenied, …"""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                self._path = await self._manager.terminate(self._target.pid, flags, self._options)
            self._flags |= flags
            self._started = self._started or time.monotonic_ns() // 1000
        except TimeoutError:
            raise Lost(f"qkilld does not answer within {ANSWER_TIMEOUT_S:g} s") from None
        except BusError as error:
            raise Lost(str(error)) from None

    async def add(self, flags: Flag) -> None:
        """Add flags to the job: at once where it runs, else when it has run for a moment.

        Asked for twice before there is a job, the daemon may answer the first call when the second
        has had its effect: by refusing what is gone.
        """
        self._wanted |= flags
        if self._path and self._wanted & ~self._flags:
            # Whoever waits for the job hears of what goes wrong with it.
            with contextlib.suppress(QkilldError, Lost):
                await self.start(self._wanted)

    def last_known(self) -> JobView | None:
        """The job at its last sign of life; None where there is none that we know of.

        One that was lost before it was looked at has at least sent its SIGTERM.
        """
        if self.view is not None or not self._path:
            return self.view
        from qkilld.model.jobview import JobView

        properties = {
            "Id": int(self._path.removeprefix(JOB_PATH_PREFIX)),
            "PID": self._target.pid,
            "Name": "",
            "UID": 0,
            "Flags": int(self._flags),
            "Phase": Phase.TERMINATE,
            "Verdict": Verdict.UNKNOWN,
            "Result": "",
            "StartedUSec": self._started,
            "DeadlineUSec": INFINITY,
            "LastProgressUSec": 0,
            "BytesWritten": UNKNOWN,
            "BytesPending": UNKNOWN,
            "Held": False,
            "NotBeforeUSec": 0,
        }
        return JobView(self._path, properties)

    async def follow(self) -> str:
        """The result of the job, when it has ended."""
        gone = asyncio.create_task(self._target.gone())
        try:
            while True:
                with contextlib.suppress(BusError):
                    return await self._wait(gone)
                # A new daemon goes on with the jobs of the old one.
                await self._find_again()
        finally:
            gone.cancel()

    async def _wait(self, gone: asyncio.Task[None]) -> str:
        """Raises BusError where the daemon goes away."""
        job = self._manager.job(self._path)
        ended = asyncio.create_task(_result(job))
        watching: asyncio.Task[None] | None = None
        try:
            self._owner = await self._manager.owner()
            await asyncio.wait((ended, gone), timeout=LOOK_AFTER_S, return_when=FIRST_COMPLETED)
            if not ended.done() and not gone.done():
                await self.add(Flag(0))
                watching = asyncio.create_task(self._watch(job))
                await asyncio.wait((ended, gone, watching), return_when=FIRST_COMPLETED)
            if watching is not None and watching.done():
                watching.result()  # raises
            if not ended.done():
                # Gone: the daemon sees it too, and says how it came about, if it still lives.
                await asyncio.wait((ended,), timeout=CHECK_TIMEOUT_S)
            if not ended.done():
                return self._guess()
            result = ended.result()
            if (
                result == Result.CANCELLED
                and not self._target.exited()
                and await self._daemon_ends()
            ):
                raise Lost("qkilld was stopped")
            return result
        finally:
            for task in (ended, watching):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

    async def _watch(self, job: Job) -> None:
        """Keeps the view fresh; ends only with BusError or Lost."""
        heard = asyncio.Event()

        def on_change(changes: dict[str, Any]) -> None:
            self._hear(changes)
            heard.set()

        async with job.watch(on_change):
            while True:
                heard.clear()
                try:
                    async with asyncio.timeout(SILENCE_S):
                        await heard.wait()
                except TimeoutError:
                    self._hear(await self._ask(job))

    async def _ask(self, job: Job) -> dict[str, Any]:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                return await job.properties()
        except TimeoutError:
            raise Lost("qkilld does not answer any more") from None

    async def _find_again(self) -> None:
        if not self._connection.connected:
            raise Lost("the connection to the bus is lost")
        try:
            if not await self._manager.appears(RETURN_TIMEOUT_S):
                raise Lost("qkilld went away")
            self._path = await self._running_path()
        except QkilldError as error:
            raise Lost(f"qkilld went away, and the new one says: {error}") from None

    async def _running_path(self) -> str:
        """Of the new daemon's job for the process. Raises NoSuchJob where it has none."""
        path = await self._manager.job_by_pid(self._target.pid)
        properties = await self._ask(self._manager.job(path))
        if self._target.start_time not in (None, properties["StartTime"]):
            raise NoSuchJob("it has no job for the guest")
        return path

    async def _daemon_ends(self) -> bool:
        """A daemon that is being stopped may cancel its jobs, which nobody asked for."""
        await asyncio.sleep(ENDING_S)
        return await self._manager.owner() != self._owner

    def _guess(self) -> str:
        """How a process ended that is gone, where the daemon does not say."""
        phase = self.view.phase if self.view is not None else ""
        return Result.KILLED if phase in (Phase.KILL, Phase.REAP) else Result.EXITED

    def _hear(self, changes: dict[str, Any]) -> None:
        from qkilld.model.jobview import JobView

        before = self.view or JobView(self._path, {})
        self.view = before.updated(changes)
        self._on_change(self.view)


async def _result(job: Job) -> str:
    result, _ = await job.wait()
    return result
