"""Callers that wait for the end of a job."""

from __future__ import annotations

from collections.abc import Callable

Callback = Callable[[], None]


class Waiters:
    """The callers that wait for one job. Any user may wait, any number of times, so `add` and
    `remove` are O(1)."""

    __slots__ = ("_requesters", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[Callback, bool] = {}
        """For each callback, whether it belongs to the job's requester."""
        self._requesters = 0

    def add(self, callback: Callback, *, requester: bool) -> None:
        """Add a callback, which is called once, when the job ends."""
        self._waiting[callback] = requester
        self._requesters += requester

    def remove(self, callback: Callback) -> bool:
        """Remove a callback. Return whether it was the last callback of the job's requester."""
        requester = self._waiting.pop(callback, False)
        self._requesters -= requester
        return requester and not self._requesters

    def call(self) -> None:
        waiting, self._waiting, self._requesters = self._waiting, {}, 0
        for callback in waiting:
            callback()
