"""Following jobs to their end, and showing it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from qkilld.bus.client import Job
from qkilld.ctl.output import Output, width
from qkilld.model.errors import BusError, QkilldError
from qkilld.model.jobview import JobView, label
from qkilld.model.words import INFINITY

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

TICK_S: Final = 0.5
"""A live line is drawn at least so often, for its clock, …"""
MIN_REDRAW_S: Final = 0.1
"""… and at most so often, however many jobs report."""
MIN_NAME: Final = 20
"""Terminal columns that a guest's name and pid have at least."""


RETURN_TIMEOUT_S: Final = 5.0
"""A daemon that died or is restarted is back within a second, and goes on with its jobs."""
AWAY: Final = f"qkilld went away; waiting up to {RETURN_TIMEOUT_S:g} s for it to go on"


class Outages:
    """Tells many jobs' news of one absence of the daemon from that of the next."""

    def __init__(self) -> None:
        self._told_at = -RETURN_TIMEOUT_S

    def new(self) -> bool:
        now = time.monotonic()
        if now - self._told_at < RETURN_TIMEOUT_S:
            return False
        self._told_at = now
        return True


class Display(Protocol):
    """Shows jobs while they run."""

    @property
    def watches(self) -> bool:
        """Whether `changed` is of any use to it."""

    def changed(self, view: JobView) -> None:
        """The first look at a job, and every change after that."""

    def away(self) -> None:
        """The daemon went away, and is given some time to come back."""

    def ended(self, path: str, line: str) -> None:
        """The end of a job; `line` says how, printable."""


class Quiet:
    """For --json: nothing."""

    watches = False

    def changed(self, view: JobView) -> None: ...

    def away(self) -> None: ...

    def ended(self, path: str, line: str) -> None: ...


class _Told(NamedTuple):
    """What the last line about a job goes by."""

    phase: str
    verdict: str
    held: bool
    not_before: int
    undecided: bool


class Plain:
    """For a pipe: a line for each change of phase or verdict, where a job is held, released or
    extended, and one for the end."""

    watches = True

    def __init__(self, output: Output) -> None:
        self._output = output
        self._last: dict[str, _Told] = {}
        self._outages = Outages()

    def changed(self, view: JobView) -> None:
        before = self._last.get(view.path)
        released = before is not None and before.held and not view.held
        # What a released job does next is known only when the daemon has looked at its process.
        undecided = (released or (before is not None and before.undecided)) and (
            not view.held and view.deadline == INFINITY
        )
        told = _Told(view.phase, view.verdict, view.held, view.not_before, undecided)
        if view.result or before == told:
            return
        self._last[view.path] = told
        said = [f"{view.phase}, {view.verdict}"]
        if released:
            said.append("released")
        if before is not None and view.not_before > before.not_before:
            said.append("extended")
        if not undecided and (outlook := view.outlook(monotonic_usec())):
            said.append(outlook)
        self._output.line(f"{label(view.pid, view.name)}: {'; '.join(said)}")

    def away(self) -> None:
        if self._outages.new():
            self._output.line(AWAY)

    def ended(self, path: str, line: str) -> None:
        self._output.line(line)


class Lively:
    """For a terminal: a live line for each job, replaced by a lasting one at its end."""

    watches = True

    def __init__(self, live: Live) -> None:
        self._live = live
        self._views: dict[str, JobView] = {}
        self._dirty = asyncio.Event()
        self._outages = Outages()

    def changed(self, view: JobView) -> None:
        if not view.result:
            self._views[view.path] = view
            self._dirty.set()

    def away(self) -> None:
        if self._outages.new():
            self._live.console.print(AWAY, style="yellow")

    def ended(self, path: str, line: str) -> None:
        from rich.text import Text

        self._views.pop(path, None)
        self._live.update(self._table(), refresh=True)
        self._live.console.print(Text(line), soft_wrap=True)

    async def run(self) -> None:
        """Redraw until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._dirty.wait()
            self._dirty.clear()
            self._live.update(self._table(), refresh=True)
            await asyncio.sleep(MIN_REDRAW_S)

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        now = monotonic_usec()
        rows = [
            (view.phase, view.verdict, view.elapsed(now), view.outlook(now))
            for view in self._views.values()
        ]
        # The name gives way on a narrow terminal, and not what happens to the guest.
        others = sum(max(map(width, column)) + 2 for column in zip(*rows, strict=True))
        room = max(self._live.console.width - others, MIN_NAME)
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(5):
            table.add_column(no_wrap=True)
        for view, row in zip(self._views.values(), rows, strict=True):
            name = Text(view.name)
            name.truncate(room - width(label(view.pid, "…")) + 1, overflow="ellipsis")
            styled = map(Text, row, ("cyan", "", "dim", "bold"))
            table.add_row(Text(label(view.pid, name.plain)), *styled)
        return table


def monotonic_usec() -> int:
    """CLOCK_MONOTONIC in µs, the clock of the daemon's points in time."""
    return time.monotonic_ns() // 1000


@contextlib.asynccontextmanager
async def display_on(output: Output, *, quiet: bool) -> AsyncIterator[Display]:
    """The display that fits where the output goes."""
    if quiet:
        yield Quiet()
    elif not output.rich:
        yield Plain(output)
    else:
        from rich.live import Live

        with Live(
            console=output.console(),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as live:
            lively = Lively(live)
            drawing = asyncio.create_task(lively.run())
            try:
                yield lively
            finally:
                drawing.cancel()
                await asyncio.gather(drawing, return_exceptions=True)


async def follow(job: Job, display: Display) -> tuple[str, dict[str, Any]]:
    """(result, receipt) of the job when it has ended, shown on the way there.

    The job outlives a restart of the daemon, which is waited for. Raises what the wait for the end
    raises. That something cannot be shown is no reason to fail.
    """
    while True:
        try:
            return await _follow(job, display)
        except BusError:
            display.away()
            if not await job.returns(RETURN_TIMEOUT_S):
                raise


async def _follow(job: Job, display: Display) -> tuple[str, dict[str, Any]]:
    watching = asyncio.create_task(_watch(job, display.changed)) if display.watches else None
    try:
        return await job.wait()
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def _watch(job: Job, changed: Callable[[JobView], None]) -> None:
    view = JobView(job.path, {})

    def on_change(changes: dict[str, Any]) -> None:
        nonlocal view
        view = view.updated(changes)
        changed(view)

    with contextlib.suppress(QkilldError):
        async with job.watch(on_change):
            await asyncio.Event().wait()
