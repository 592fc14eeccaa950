"""Limit how many journal entries callers and guests can make qkilld write."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.event import Event, MessageId

if TYPE_CHECKING:
    from qkilld.engine.ports import Clock, Journal

WINDOW: Final = USEC_PER_SEC
"""At most one entry of each LIMITED kind is written for each job in this time (µs)."""
LIMITED: Final = frozenset(
    (
        MessageId.JOB_JOINED,
        MessageId.JOB_HELD,
        MessageId.JOB_RELEASED,
        MessageId.JOB_EXTENDED,
        MessageId.WAITER_GONE,
        MessageId.NOT_STOPPED,
        MessageId.NOT_IDENTIFIED,
        MessageId.NOT_WRITTEN,
        MessageId.INTERNAL_ERROR,
    )
)
"""The kinds of entries that a caller can cause without limit. All other kinds are limited by the
number of jobs."""

_Key = tuple[MessageId, str]


@dataclass(slots=True)
class _Window:
    """The events with one key (`_key`) since one of them was last written."""

    latest: Event | None = None
    """The newest event that was held back."""
    count: int = 0
    """The number of events that were held back."""


class RateLimitedJournal:
    """Implements engine.ports.Journal. Use it only in the loop.

    The first event of each kind is written at once. More events of this kind within a second are
    only counted. At the end of this second, the last of them is written, with the count.
    """

    def __init__(self, journal: Journal, clock: Clock) -> None:
        self._journal = journal
        self._clock = clock
        self._windows: dict[_Key, _Window] = {}

    def write(self, event: Event) -> None:
        if event.id not in LIMITED:
            self._journal.write(event)
            return
        key = _key(event)
        if (window := self._windows.get(key)) is None:
            self._journal.write(event)
            self._open(key)
        else:
            window.latest = event
            window.count += 1

    def flush(self) -> None:
        """Write the events that were held back."""
        windows, self._windows = self._windows, {}
        for window in windows.values():
            self._write(window)

    def _open(self, key: _Key) -> None:
        self._windows[key] = window = _Window()
        self._clock.call_at(self._clock.now() + WINDOW, lambda: self._close(key, window))

    def _close(self, key: _Key, window: _Window) -> None:
        if self._windows.get(key) is window:
            del self._windows[key]
            if self._write(window):
                self._open(key)

    def _write(self, window: _Window) -> bool:
        """Write the newest held-back event of a window; return whether there was one."""
        if window.latest is None:
            return False
        event, count = window.latest, window.count
        if count > 1:
            event = replace(
                event,
                message=f"{event.message} ({count} of these in a second.)",
                fields={**event.fields, "QKILLD_COUNT": str(count)},
            )
        self._journal.write(event)
        return True


def _key(event: Event) -> _Key:
    """Return a key. Events of the same kind about the same job or process have the same key."""
    if job := event.fields.get("QKILLD_JOB"):
        return event.id, job
    return event.id, event.message if event.guest is None else str(event.guest.identity.key)
