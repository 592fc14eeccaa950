"""Follow all jobs of the daemon live, across restarts of the daemon and of the bus."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final, Protocol

from qkilld.bus.client import JobProxy, ManagerProxy
from qkilld.bus.connection import Connection
from qkilld.ctl.session import open_connection
from qkilld.debug_log import ignore
from qkilld.model.bus_address import BusAddress
from qkilld.model.errors import BusError, QkilldError
from qkilld.model.job_status import JobStatus

RETRY_S: Final = 1.0
MAX_READS: Final = 16


class JobListener(Protocol):
    def show(self, job: JobStatus) -> None:
        """Called for each new job, and for each change of a job. The last status of a job has a
        result."""

    def show_away(self, why: str) -> None:
        """Called, perhaps repeatedly, with the reason why the daemon cannot be reached, and with ""
        once it can be reached."""


class JobFeed:
    """Reports every job to a listener, and returns proxies for jobs."""

    def __init__(self, bus: BusAddress, listener: JobListener, *, interactive: bool) -> None:
        """`interactive`: whether polkit may ask for a password."""
        self._bus = bus
        self._listener = listener
        self._interactive = interactive
        self._connection: Connection | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(MAX_READS)

    async def run(self) -> None:
        """Follow jobs until cancelled. Raises BusError if the first connection to the bus fails."""
        reached = False
        while True:
            try:
                async with open_connection(self._bus) as connection:
                    reached = True
                    await self._follow(connection)
            except BusError as error:
                if not reached:
                    raise
                self._listener.show_away(str(error))
            await asyncio.sleep(RETRY_S)

    def job(self, path: str) -> JobProxy:
        """Raises BusError while there is no connection."""
        if self._connection is None:
            raise BusError("the connection to the bus is lost")
        return JobProxy(self._connection, path, interactive=self._interactive)

    async def _follow(self, connection: Connection) -> None:
        """Follow jobs until the connection is lost."""
        manager = ManagerProxy(connection)
        changed = asyncio.Event()

        def owner_changed(owner: str) -> None:
            changed.set()

        def job_new(path: str) -> None:
            self._begin(manager, path)

        closed = asyncio.ensure_future(connection.wait_closed())
        self._connection = connection
        try:
            async with manager.watch(job_new, lambda path: None, owner_changed) as owner:
                while not closed.done():
                    changed.clear()
                    if owner:
                        with ignore("listing jobs, of a daemon that may have gone", QkilldError):
                            await self._list(manager)
                    else:
                        self._listener.show_away("qkilld is not running")
                    waiting = asyncio.ensure_future(changed.wait())
                    await asyncio.wait((waiting, closed), return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
                    await self._end_all()
                    if not closed.done():
                        owner = await manager.owner()
            self._listener.show_away("the connection to the bus is lost")
        finally:
            self._connection = None
            closed.cancel()
            await self._end_all()

    async def _list(self, manager: ManagerProxy) -> None:
        jobs = await manager.list_jobs()
        self._listener.show_away("")
        for _, path, *_ in jobs:
            self._begin(manager, path)

    def _begin(self, manager: ManagerProxy, path: str) -> None:
        if path not in self._tasks:
            task = asyncio.ensure_future(self._follow_job(manager.job(path)))
            self._tasks[path] = task
            task.add_done_callback(lambda _: self._tasks.pop(path, None))

    async def _follow_job(self, job: JobProxy) -> None:
        ended = asyncio.Event()

        def changed(status: JobStatus) -> None:
            self._listener.show(status)
            # Wait for the receipt, which arrives after the signal that announces the end.
            if status.result and status.receipt is not None:
                ended.set()

        with ignore(f"following {job.path}, which may be forgotten by now", QkilldError):
            async with contextlib.AsyncExitStack() as stack:
                async with self._slots:
                    await stack.enter_async_context(job.watch(changed, matched=True))
                await ended.wait()

    async def _end_all(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
