"""Calls that may block for ever, kept away from the loop and from the end of the program."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def detached(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run `function` in a thread of its own; the future has what it returns or raises.

    asyncio's own executor will not do: it has few threads, which blocked calls would use up, and it
    is waited for at exit.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            settle = functools.partial(_set_result, future, function())
        except Exception as error:
            settle = functools.partial(_set_exception, future, error)
        # The loop may be gone by the time that a blocked call returns.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle)

    threading.Thread(target=work, name="detached", daemon=True).start()
    return future


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
