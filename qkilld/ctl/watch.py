"""The command watch: all running stops, live, with keys to control them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Final

from qkilld.ctl import control
from qkilld.ctl.follow import MIN_REDRAW_S, TICK_S, LineDisplay, monotonic_usec
from qkilld.ctl.job_feed import JobFeed, JobListener
from qkilld.ctl.output import Output
from qkilld.ctl.session import explain
from qkilld.ctl.terminal import FullScreen
from qkilld.ctl.watch_screen import WatchState, screen
from qkilld.debug_log import ignore
from qkilld.model import timespan
from qkilld.model.bus_address import BusAddress
from qkilld.model.constants import ExitCode
from qkilld.model.errors import QkilldError
from qkilld.model.job_status import JobStatus, ending, label
from qkilld.model.text import printable

DEFAULT_EXTENSION: Final = "5min"
PAGE: Final = 10
MAX_TYPED: Final = 40
_ENDING_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def watch(bus: BusAddress, output: Output, *, json: bool, interactive: bool) -> int:
    """Show the jobs until the user quits or the output is closed. Raises BusError."""
    if json or not output.rich:
        return await _watch_lines(bus, output, json=json)
    watcher = _Watcher(bus, output, interactive)
    return await watcher.run()


class LineListener:
    """Prints a line for each change, for output to a pipe. Implements JobListener."""

    def __init__(self, output: Output, *, json: bool) -> None:
        self._output = output
        self._lines = LineDisplay(output)
        self._json = json
        self._reported_paths: set[str] = set()
        self._outage: str | None = None

    def show(self, job: JobStatus) -> None:
        if self._json:
            self._print({"job": job.as_json()})
        elif not job.result:
            self._lines.show(job)
        elif job.receipt is not None and job.path not in self._reported_paths:
            self._reported_paths.add(job.path)
            result_text = ending(job.result, job.receipt)
            self._lines.show_end(job.path, f"{label(job.pid, job.name)}: {result_text}")

    def show_away(self, why: str) -> None:
        if self._outage == why or (self._outage is None and not why):
            self._outage = why
            return
        self._outage = why
        if self._json:
            self._print({"away": printable(why) or None})
        else:
            self._output.line(f"{printable(why)}; waiting for it" if why else "qkilld is there")

    def _print(self, document: object) -> None:
        self._output.line(json.dumps(document, ensure_ascii=True))


async def _watch_lines(bus: BusAddress, output: Output, *, json: bool) -> int:
    feed = asyncio.ensure_future(_feed(bus, LineListener(output, json=json)))
    try:
        while not output.abandoned and not feed.done():
            await asyncio.wait((feed,), timeout=TICK_S)
        if feed.done():
            feed.result()  # If the task has failed, raise its exception.
    finally:
        feed.cancel()
        await asyncio.gather(feed, return_exceptions=True)
    return ExitCode.OK


async def _feed(bus: BusAddress, listener: JobListener) -> None:
    await JobFeed(bus, listener, interactive=False).run()


class _Watcher:
    """Implements JobListener."""

    def __init__(self, bus: BusAddress, output: Output, interactive: bool) -> None:
        self._bus = bus
        self._feed = JobFeed(bus, self, interactive=interactive)
        # If polkit may ask for a password, the screen must be suspended, because the prompt needs
        # the terminal.
        self._asks = interactive and bus.is_system_bus and os.geteuid() != 0
        self._state = WatchState(bus_title="" if bus.is_system_bus else printable(bus.title))
        self._screen = FullScreen(output.console(), self._key)
        self._screen.on_resume = self._redraw
        self._dirty = asyncio.Event()
        self._quit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._answer: Callable[[str], None] | None = None
        """Called with the text typed at a prompt."""
        self._question = ""
        self._input = ""
        self._acts: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Run until the user quits; return the exit code. Raises BusError if the first connection
        fails."""
        loop = asyncio.get_running_loop()
        for number in _ENDING_SIGNALS:
            loop.add_signal_handler(number, self._end, 128 + number)
        feeding = asyncio.ensure_future(self._feed.run())
        drawing: asyncio.Future[None] | None = None
        try:
            with self._screen:
                self._state.steers = self._screen.has_keys
                drawing = asyncio.ensure_future(self._draw_for_ever())
                futures = (self._quit, feeding, drawing)
                done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                with contextlib.suppress(OSError):  # The terminal is gone.
                    one.result()
            return self._quit.result() if self._quit.done() else ExitCode.FAILURE
        finally:
            for number in _ENDING_SIGNALS:
                loop.remove_signal_handler(number)
            tasks = [feeding, *self._acts, *([drawing] if drawing is not None else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # JobListener

    def show(self, job: JobStatus) -> None:
        self._state.show(job)
        self._redraw()

    def show_away(self, why: str) -> None:
        self._state.outage = printable(why)
        self._redraw()

    # Drawing

    def _redraw(self) -> None:
        self._dirty.set()

    async def _draw_for_ever(self) -> None:
        while True:
            self._dirty.clear()
            now = monotonic_usec()
            self._state.forget(now)
            self._screen.draw(screen(self._state, now, *self._screen.size))
            await asyncio.sleep(MIN_REDRAW_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._dirty.wait()

    # Keys

    def _end(self, code: int) -> None:
        if not self._quit.done():
            self._quit.set_result(code)

    def _key(self, key: str) -> None:
        self._redraw()
        if self._state.help:
            self._state.help = False
        elif self._answer is not None:
            self._type(key)
        else:
            self._command(key)

    def _command(self, key: str) -> None:
        self._state.message = ""
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -PAGE, "page down": PAGE}
        if key in steps:
            self._state.choose(steps[key])
        elif key == "q":
            self._end(ExitCode.OK)
        elif key == "?":
            self._state.help = True
        elif key in ("h", "r", "e", "f", "c"):
            job = self._state.jobs.get(self._state.selection)
            if job is None or job.result:
                self._state.message = "No running stop is selected."
            else:
                self._steer(key, job)
        elif len(key) == 1:
            self._state.message = f'"{key}" does nothing here; press ? for help.'

    def _steer(self, key: str, job: JobStatus) -> None:
        guest_label = label(job.pid, job.name)
        match key:
            case "h":
                self._act("hold", job)
            case "r":
                self._act("release", job)
            case "e":
                question = f"Send {guest_label} no SIGKILL for (Enter: {DEFAULT_EXTENSION}): "
                self._ask(question, lambda text: self._extend(job, text))
            case "f":
                question = f"Send {guest_label} SIGKILL now, and lose unwritten data? Type yes: "
                self._ask(question, lambda text: self._if_yes(text, "force", job))
            case "c":
                question = f"Send {guest_label} no more signals? Type yes: "
                self._ask(question, lambda text: self._if_yes(text, "cancel", job))

    def _ask(self, question: str, answer: Callable[[str], None]) -> None:
        self._question, self._input, self._answer = question, "", answer
        self._state.prompt = question + "_"

    def _type(self, key: str) -> None:
        answer = self._answer
        if key == "enter":
            self._stop_asking()
            assert answer is not None
            answer(self._input)
            return
        if key == "escape":
            self._stop_asking()
            return
        if key == "backspace":
            self._input = self._input[:-1]
        elif len(key) == 1 and len(self._input) < MAX_TYPED:
            self._input += key
        self._state.prompt = f"{self._question}{self._input}_"

    def _stop_asking(self) -> None:
        self._answer = None
        self._state.prompt = ""

    def _if_yes(self, text: str, name: str, job: JobStatus) -> None:
        if text.strip().lower() == "yes":
            self._act(name, job)
        else:
            self._state.message = "Nothing was done."

    def _extend(self, job: JobStatus, text: str) -> None:
        try:
            usec = timespan.parse(text.strip() or DEFAULT_EXTENSION)
        except ValueError as error:
            self._state.message = f"{error}."
            return
        self._act("extend", job, control.extension(usec))

    # Acting

    def _act(self, name: str, job: JobStatus, command: control.JobCommand | None = None) -> None:
        task = asyncio.ensure_future(self._carry_out(job, command or control.JOB_COMMANDS[name]))
        self._acts.add(task)
        task.add_done_callback(self._acts.discard)

    async def _carry_out(self, job: JobStatus, command: control.JobCommand) -> None:
        guest_label = label(job.pid, job.name)
        try:
            proxy = self._feed.job(job.path)
            before = after = job
            # Read the current status, because the daemon reports changes at most five times a
            # second, and keys can be pressed more often.
            with ignore(f"reading job {job.id}", QkilldError):
                before = await proxy.status()
            await self._with_terminal(job, lambda: command.act(proxy))
            # Ignore a failure: the command has succeeded, and this status is only for the message.
            with ignore(f"reading job {job.id} again", QkilldError):
                after = await proxy.status()
            self._state.message = f"{guest_label} {command.report(before, after)}."
        except QkilldError as error:
            self._state.message = f"{guest_label}: {printable(explain(error, self._bus), 400)}"
        self._redraw()

    async def _with_terminal(self, job: JobStatus, call: Callable[[], Awaitable[None]]) -> None:
        """Make a call during which polkit may ask for a password on this terminal."""
        if self._asks and job.requested_by != os.geteuid():
            with self._screen.suspended():
                await call()
        else:
            await call()
