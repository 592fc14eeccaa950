"""Isolate faults, so that an exception in one reader does not discard the results of others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
OnFault = Callable[[str, Exception], None]
"""Called with a description of the failed activity, and with the error."""


def raise_fault(doing: str, error: Exception) -> None:
    raise error


class FaultGuard:
    """Calls readers and reports their faults. Thread-safe."""

    def __init__(self, on_fault: OnFault = raise_fault) -> None:
        """`on_fault` is called in the reader's thread, once for each place that raises."""
        self._on_fault = on_fault
        self._lock = threading.Lock()
        self._reported_causes: set[tuple[str, type[Exception], str, int]] = set()

    def call(self, doing: str, read: Callable[..., T], *arguments: object) -> T | None:
        """Return what `read` returns; None if it raises."""
        try:
            return read(*arguments)
        except Exception as error:
            self.report(doing, error)
            return None

    def report(self, doing: str, error: Exception) -> None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        file = trace.tb_frame.f_code.co_filename if trace is not None else ""
        cause = (doing, type(error), file, trace.tb_lineno if trace is not None else 0)
        with self._lock:
            is_new = cause not in self._reported_causes
            self._reported_causes.add(cause)
        if is_new:
            self._on_fault(doing, error)

    def watch_callbacks(self, loop: asyncio.AbstractEventLoop) -> None:
        """Report exceptions of the loop's callbacks. By default, asyncio only logs them."""

        def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            error = context.get("exception")
            if "handle" in context and isinstance(error, Exception):
                self.report("running a callback", error)
            else:
                loop.default_exception_handler(context)

        loop.set_exception_handler(handle)
