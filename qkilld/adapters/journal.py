"""Where events go: journald, or standard error where there is none.

Writing to the journal can block, and qkilld works just when disks stall. So events go through a
bounded queue to a thread of its own, and a full queue drops and counts instead of waiting.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qkilld.engine.events import Event
    from qkilld.model.guest import Guest

QUEUE_LENGTH: Final = 4096
FLUSH_TIMEOUT_S: Final = 2.0

Sink = Callable[["Event"], None]


class QueuedJournal:
    """Implements engine.ports.Journal."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._queue: queue.Queue[Event | None] = queue.Queue(QUEUE_LENGTH)
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def write(self, event: Event) -> None:
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is queued, for at most FLUSH_TIMEOUT_S."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=FLUSH_TIMEOUT_S)
            self._thread.join(FLUSH_TIMEOUT_S)

    def _work(self) -> None:
        while (event := self._queue.get()) is not None:
            # There is no one left to tell where even the journal cannot be written.
            with contextlib.suppress(Exception):
                if self._dropped:
                    print(
                        f"{self._dropped} events were dropped: the journal was too slow",
                        file=sys.stderr,
                    )
                    self._dropped = 0
                self._sink(event)


def open_journal(identifier: str = "qkilld") -> QueuedJournal:
    """journald where standard error is connected to it (JOURNAL_STREAM, systemd.exec(5)).

    `identifier` is the name of the program there.
    """
    journald = functools.partial(to_journald, identifier=identifier)
    return QueuedJournal(journald if stderr_is_journal() else to_stderr)


def to_journald(event: Event, *, identifier: str = "qkilld") -> None:
    from systemd import journal

    journal.send(
        event.message,
        MESSAGE_ID=event.id.value,
        PRIORITY=int(event.priority),
        SYSLOG_IDENTIFIER=identifier,
        **event.fields,
        **(_object_fields(event.guest) if event.guest else {}),
    )


def to_stderr(event: Event) -> None:
    from qkilld.engine.events import Priority

    mark = {Priority.ERR: "error: ", Priority.WARNING: "warning: "}.get(event.priority, "")
    details = [f"{key.removeprefix('QKILLD_').lower()}={value}" for key, value in _shown(event)]
    line = f"{mark}{event.message}" + (f" [{' '.join(details)}]" if details else "")
    if trace := event.fields.get("QKILLD_TRACEBACK"):
        line += "\n" + trace.rstrip()
    print(line, file=sys.stderr, flush=True)


def _shown(event: Event) -> list[tuple[str, str]]:
    """The fields that a reader of a terminal wants beside the message."""
    keys = ("QKILLD_JOB", "QKILLD_PHASE", "QKILLD_VERDICT", "QKILLD_SIGNAL", "QKILLD_RESULT")
    return [(key, event.fields[key]) for key in keys if key in event.fields]


def _object_fields(guest: Guest) -> dict[str, str]:
    """OBJECT_PID=, from which journald itself adds the unit (systemd.journal-fields(7)).

    It cannot where the process is gone by the time it looks, so the unit is named here as well;
    `journalctl -u UNIT` takes OBJECT_SYSTEMD_UNIT= from a sender that is root, and journald keeps
    of two alike one.
    """
    fields = {"OBJECT_PID": str(guest.identity.pid)}
    unit = guest.label.unit
    if unit.system:
        fields["OBJECT_SYSTEMD_UNIT"] = unit.system
    if unit.user:
        fields["OBJECT_SYSTEMD_USER_UNIT"] = unit.user
        fields["OBJECT_UID"] = str(guest.identity.uid)
    return fields


def stderr_is_journal() -> bool:
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(sys.stderr.fileno())
        return (status.st_dev, status.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False
