"""Follow jobs to their end and show their progress."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from qkilld.bus.client import JobProxy
from qkilld.ctl.job_table import cells_of, line_of, shape_for
from qkilld.ctl.output import Output
from qkilld.debug_log import ignore
from qkilld.model.constants import INFINITY
from qkilld.model.errors import BusError, QkilldError
from qkilld.model.job_status import JobStatus, label
from qkilld.model.named_tuple import NamedTuple

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

TICK_S: Final = 0.5
"""Live lines show times, so they are redrawn at this interval even without a report."""
MIN_REDRAW_S: Final = 0.1
"""The shortest time between two redraws of live lines, however many jobs report."""

RETURN_TIMEOUT_S: Final = 5.0
"""How long to wait for the next daemon, which continues the jobs. It normally comes within a second
of a crash or restart."""
AWAY: Final = f"qkilld went away; waiting up to {RETURN_TIMEOUT_S:g} s for it to return"


class Outages:
    """Recognizes repeated reports of an outage of the daemon: each job reports the same outage."""

    def __init__(self) -> None:
        self._announced_at = -RETURN_TIMEOUT_S

    def new(self) -> bool:
        now = time.monotonic()
        if now - self._announced_at < RETURN_TIMEOUT_S:
            return False
        self._announced_at = now
        return True


class Display(Protocol):
    """Shows running jobs."""

    @property
    def watches(self) -> bool:
        """Whether `show` prints anything."""

    def show(self, job: JobStatus) -> None:
        """Show a job when it is first seen and at each change."""

    def show_outage(self) -> None:
        """Report that the daemon is away and may return."""

    def show_end(self, path: str, line: str) -> None:
        """`line` must be printable."""


class SilentDisplay:
    """Shows nothing, for --json."""

    watches = False

    def show(self, job: JobStatus) -> None: ...

    def show_outage(self) -> None: ...

    def show_end(self, path: str, line: str) -> None: ...


class _LastLine(NamedTuple):
    phase: str
    doing: str
    held: bool
    not_before: int
    undecided: bool


class LineDisplay:
    """Prints a line when a job's phase, verdict, hold or extension changes, and when the job ends.
    For a pipe."""

    watches = True

    def __init__(self, output: Output) -> None:
        self._output = output
        self._last: dict[str, _LastLine] = {}
        self._outages = Outages()

    def show(self, job: JobStatus) -> None:
        before = self._last.get(job.path)
        released = before is not None and before.held and not job.held
        # After a release, the next step is unknown until the daemon has taken a sample.
        undecided = (released or (before is not None and before.undecided)) and (
            not job.held and job.deadline == INFINITY
        )
        line = _LastLine(job.phase, job.doing, job.held, job.not_before, undecided)
        if job.result or before == line:
            return
        self._last[job.path] = line
        parts = [job.doing]
        if released:
            parts.append("released")
        if before is not None and job.not_before > before.not_before:
            parts.append("extended")
        if not undecided and (outlook := job.outlook(monotonic_usec())):
            parts.append(outlook)
        self._output.line(f"{label(job.pid, job.name)}: {'; '.join(parts)}")

    def show_outage(self) -> None:
        if self._outages.new():
            self._output.line(AWAY)

    def show_end(self, path: str, line: str) -> None:
        self._output.line(line)


class LiveDisplay:
    """Shows a live line for each job, and a permanent line when the job ends. For a terminal."""

    watches = True

    def __init__(self, live: Live) -> None:
        self._live = live
        self._jobs: dict[str, JobStatus] = {}
        self._dirty = asyncio.Event()
        self._outages = Outages()

    def show(self, job: JobStatus) -> None:
        if not job.result:
            self._jobs[job.path] = job
            self._dirty.set()

    def show_outage(self) -> None:
        if self._outages.new():
            self._live.console.print(AWAY, style="yellow")

    def show_end(self, path: str, line: str) -> None:
        from rich.text import Text

        self._jobs.pop(path, None)
        self._live.update(self._lines(), refresh=True)
        self._live.console.print(Text(line), soft_wrap=True)

    async def run(self) -> None:
        """Redraw until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._dirty.wait()
            self._dirty.clear()
            self._live.update(self._lines(), refresh=True)
            await asyncio.sleep(MIN_REDRAW_S)

    def _lines(self) -> Group:
        from rich.console import Group

        now = monotonic_usec()
        rows = [cells_of(job, now) for job in self._jobs.values()]
        # Leave the last column free, because some terminals wrap a line that reaches the last
        # column.
        shape = shape_for(rows, self._live.console.width - 1)
        return Group(*(line_of(row, shape) for row in rows))


def monotonic_usec() -> int:
    """Return CLOCK_MONOTONIC in µs, the clock of the daemon's timestamps."""
    return time.monotonic_ns() // 1000


@contextlib.asynccontextmanager
async def display_on(output: Output, *, quiet: bool) -> AsyncIterator[Display]:
    if quiet:
        yield SilentDisplay()
    elif not output.rich:
        yield LineDisplay(output)
    else:
        from rich.live import Live

        with Live(
            console=output.console(),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as live:
            display = LiveDisplay(live)
            drawing = asyncio.create_task(display.run())
            try:
                yield display
            finally:
                drawing.cancel()
                await asyncio.gather(drawing, return_exceptions=True)


async def follow(job: JobProxy, display: Display) -> tuple[str, dict[str, Any]]:
    """Show a job until it has ended; return (result, receipt).

    If the daemon restarts, wait for the new one, which continues the jobs. Raises what
    JobProxy.wait raises. A failure to watch the job's progress is ignored.
    """
    while True:
        try:
            return await _follow(job, display)
        except BusError:
            display.show_outage()
            if not await job.returns(RETURN_TIMEOUT_S):
                raise


async def _follow(job: JobProxy, display: Display) -> tuple[str, dict[str, Any]]:
    watching = asyncio.create_task(_watch(job, display.show)) if display.watches else None
    try:
        return await job.wait()
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def _watch(job: JobProxy, changed: Callable[[JobStatus], None]) -> None:
    with ignore(f"watching {job.path}; its end is still waited for", QkilldError):
        async with job.watch(changed):
            await asyncio.Event().wait()
