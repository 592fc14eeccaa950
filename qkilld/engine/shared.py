"""One run of a piece of work for all who ask for it at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Who asks while it runs shares the next run with all who do: what runs may have begun before
    the thing came about that they ask for."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self._work = work
        self._running: asyncio.Task[T] | None = None
        self._next: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """What the work gives, or raises. It is everybody's: not to be changed."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._run(self._running))
        # Somebody who leaves does not take it from the others.
        return await asyncio.shield(self._next)

    async def _run(self, before: asyncio.Task[T] | None) -> T:
        if before is not None:
            await asyncio.wait((before,))
        running = self._running = self._next
        self._next = None
        try:
            return await self._work()
        finally:
            if self._running is running:
                self._running = None
