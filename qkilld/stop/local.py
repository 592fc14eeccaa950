"""Stop guests without the daemon: run the daemon's engine in a thread, or in the main thread if the
system allows no more threads (TasksMax=). Implements stopper.Stopper."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Final

from qkilld.adapters import open_files
from qkilld.debug_log import note
from qkilld.engine.events import internal_error
from qkilld.model.errors import QkilldError
from qkilld.model.varlink_state import flags_of
from qkilld.stop.fallback import Fallback, LocalStop, ask_at_most_of
from qkilld.stop.log import Log
from qkilld.stop.mailbox import Mailbox

if TYPE_CHECKING:
    from qkilld.stop.guest_stop import GuestStop
    from qkilld.stop.options import Options
    from qkilld.stop.stopper import StopListener

CLOSE_TIMEOUT_S: Final = 3.0
STACK_BYTES: Final = 8 << 20
TURN_S: Final = 0.05
"""If the engine has no thread of its own, its event loop runs at least this often."""


class LocalStopper:
    def __init__(self, options: Options, listener: StopListener, log: Log, *, reason: str) -> None:
        self._options = options
        self._listener = listener
        self._log = log
        self._reason = reason
        self._mailbox = Mailbox()
        self._stops: dict[GuestStop, LocalStop] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fallback: Fallback | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._is_here = False
        """Whether the engine runs in the main thread, because the system allows no more threads."""
        self.why: dict[GuestStop, str] = {}
        """The reason why the daemon does not stop the guest."""

    def start(self, stops: Sequence[GuestStop]) -> None:
        if not self._ready.is_set():
            self._start_engine()
        for stop in stops:
            local = self._stops[stop] = LocalStop.of(stop, self._options.spans, self._reason)
            if self._loop is None:
                self._mailbox.put(functools.partial(self._listener.ended, stop, "failed"))
            self._do(functools.partial(self._begin, stop, local))

    def _start_engine(self) -> None:
        """Start the engine in a thread or, if no thread can be started, in the main thread. If the
        engine fails to start, `_loop` stays None."""
        open_files.raise_limit()  # Each sampled guest needs about a dozen descriptors.
        try:
            self._thread.start()
        except RuntimeError as error:  # The system allows no more threads.
            note("starting a thread for the engine", error)
            self._is_here = True
            self._run()
        self._ready.wait()

    def descriptors(self) -> Collection[int]:
        return (self._mailbox.fileno(),)

    def deadline(self) -> float:
        return time.monotonic() + TURN_S if self._is_here else float("inf")

    def work(self) -> None:
        if self._is_here and self._loop is not None:
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()
        self._mailbox.work()

    def note_exit(self, stop: GuestStop) -> None:
        """Do nothing, because the engine notices the exit itself."""

    def amend(self, stop: GuestStop) -> None:
        local, flags, ask_at_most = self._stops[stop], flags_of(stop.flags), ask_at_most_of(stop)
        self._do(lambda fallback: fallback.amend(local, flags, ask_at_most))

    def release(self, stop: GuestStop) -> None:
        local = self._stops[stop]
        self._do(lambda fallback: fallback.release(local))

    def close(self) -> None:
        if self._is_here and self._loop is not None and self._fallback is not None:
            self._loop.run_until_complete(self._fallback.close())
        elif self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_TIMEOUT_S)

    # ---- in the engine's thread ----

    def _run(self) -> None:
        try:
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            loop.run_until_complete(self._open())
            self._loop = loop
            self._ready.set()
            if not self._is_here:
                loop.run_forever()
        except Exception as error:
            self._log.write(internal_error("stopping guests", error))
        finally:
            self._ready.set()
            if self._fallback is not None and not self._is_here:
                loop.run_until_complete(self._fallback.close())

    async def _open(self) -> None:
        self._fallback = Fallback(self._log)

    def _do(self, what: Callable[[Fallback], Any]) -> None:
        if self._loop is not None and self._fallback is not None:
            self._loop.call_soon_threadsafe(what, self._fallback)

    def _begin(self, stop: GuestStop, local: LocalStop, fallback: Fallback) -> None:
        task = asyncio.get_running_loop().create_task(self._follow(fallback, stop, local))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, fallback: Fallback, stop: GuestStop, local: LocalStop) -> None:
        listener = self._listener

        def heard(state: dict[str, Any]) -> None:
            def tell() -> None:
                stop.state = state
                listener.heard(stop, state)

            self._mailbox.put(tell)

        local.on_state = heard
        try:
            result = await fallback.stop(local, self.why.get(stop, "qkilld is not running"))
        except QkilldError as error:
            name, text = error.bus_name.rpartition(".")[2], str(error)
            self._mailbox.put(lambda: listener.refused(stop, name, text))
        except Exception as error:
            note("stopping a guest", error)
            self._log.write(internal_error("stopping a guest", error))
            self._mailbox.put(lambda: listener.ended(stop, "failed"))
        else:
            self._mailbox.put(lambda: listener.ended(stop, result))
