"""Run each function in its own thread, so that the event loop can await a function that blocks."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def run_in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run `function` in a new thread; the future gets its result or exception.

    asyncio's own executor is unsuitable: blocked calls would use up its few threads, and the
    program would wait for these threads when it exits.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            settle = functools.partial(_set_result, future, function())
        except Exception as error:
            settle = functools.partial(_set_exception, future, error)
        # A blocked call may return so late that the loop is closed. Then nobody waits for the
        # result.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle)

    threading.Thread(target=work, name="background", daemon=True).start()
    return future


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
