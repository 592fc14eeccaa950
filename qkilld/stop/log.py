"""What the helper has to say: to the journal as the daemon does, and on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qkilld.adapters.journal import QueuedJournal, open_journal, stderr_is_journal

if TYPE_CHECKING:
    from qkilld.engine.events import Event


class Log:
    """Implements engine.ports.Journal. Opens the journal with the first event: most calls of the
    helper have none."""

    def __init__(self) -> None:
        self._journal: QueuedJournal | None = None

    def write(self, event: Event) -> None:
        if self._journal is None:
            self._journal = open_journal("qkilld-stop")
        self._journal.write(event)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()


def say(text: str) -> None:
    """A line on stderr, which is the unit's journal under systemd."""
    print(f"qkilld-stop: {text}", file=sys.stderr, flush=True)


def say_ending(text: str) -> None:
    """The same for how a stop ended, which the journal knows by an event."""
    if not stderr_is_journal():
        say(text)
