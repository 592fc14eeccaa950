"""Write events to journald if standard error is connected to it, otherwise to standard error.

qkilld is needed when disks stall, and journald may then stop reading. journald's socket, which all
services share, then fills up, and writes to it block. So events go through a bounded queue to a
separate thread. If the queue is full, events are dropped and counted. The native protocol
(https://systemd.io/JOURNAL_NATIVE_PROTOCOL/) is implemented here, because `systemd.journal.send`
waits for room in the socket while it holds Python's lock, and so stops all threads of the process.
"""

from __future__ import annotations

import array  # noqa: F401  # socket.send_fds would import it with the first large entry
import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qkilld.adapters.background import BackgroundWriter
from qkilld.adapters.journal_stream import stderr_is_journal
from qkilld.debug_log import note

if TYPE_CHECKING:
    from qkilld.model.event import Event
    from qkilld.model.guest import Guest

JOURNALD_SOCKET: Final = Path("/run/systemd/journal/socket")
QUEUE_LENGTH: Final = 4096
PROCESSING_TIMEOUT_S: Final = 1.0
_PROCESSING_INTERVAL_S: Final = 0.002

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
"""journald accepts an entry in a memfd only with all of these seals."""

Sink = Callable[["Event"], None]


class QueuedJournal:
    """Implements engine.ports.Journal."""

    def __init__(self, sink: Sink, wait: Callable[[], None] | None = None) -> None:
        """`sink` writes one event. It may block. If it raises, the event counts as dropped. `wait`
        waits, for a limited time, until the reader has processed everything that `sink` wrote."""
        self._sink = sink
        self._wait = wait
        self._lock = threading.Lock()
        self._dropped = 0
        """The number of dropped events. Reset to 0 when this number is queued to be logged."""
        self._writer: BackgroundWriter[Event | int] = BackgroundWriter(
            "journal", self._write, QUEUE_LENGTH
        )
        """Items are events and, in the place of dropped events, their number."""

    def write(self, event: Event) -> None:
        """Queue an event. If the queue is full, drop the event and count it. Never blocks."""
        with self._lock:
            self._queue_count()
            if not self._writer.put(event):
                self._dropped += 1

    def close(self) -> None:
        """Write all queued items (limit: background.FLUSH_TIMEOUT_S), and wait for the reader."""
        if self._writer.close() and self._wait is not None:
            self._wait()

    def _queue_count(self) -> None:
        if self._dropped and self._writer.put(self._dropped):
            self._dropped = 0

    def _write(self, item: Event | int) -> None:
        try:
            self._sink(_event(item))
        except Exception as error:
            # Count the event as dropped. If the item is itself a number of dropped events, add this
            # number.
            note("writing to the journal", error)
            with self._lock:
                self._dropped += item if isinstance(item, int) else 1
            return
        with self._lock:
            self._queue_count()


class Journald:
    """A sink that writes to journald by its native protocol.

    While journald does not read, a write blocks, but other threads can run. Raises OSError, for
    example if there is no journald.
    """

    def __init__(self, identifier: str, path: Path = JOURNALD_SOCKET) -> None:
        """`identifier` is the name of the program in the journal."""
        self._identifier = identifier
        self._path = path
        self._socket: socket.socket | None = None

    def __call__(self, event: Event) -> None:
        entry = _entry(event, self._identifier)
        try:
            self._send(entry)
        except OSError:
            # Connect again, because journald may have restarted with a new socket.
            self.close()
            self._send(entry)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def wait_until_processed(self) -> None:
        """Wait up to PROCESSING_TIMEOUT_S until journald has processed all entries.

        When journald processes an entry, it reads the sender's unit from /proc/PID. If the sender
        has exited by then, the entry belongs to no unit. Then `journalctl --unit` does not show the
        entry, and `qkillctl history` trusts it only if it was written by root or by the user who
        runs `qkillctl history`.
        """
        if self._socket is None:
            return
        # Send an empty datagram. journald ignores it, but reads it only after it has processed all
        # earlier ones.
        with contextlib.suppress(OSError):
            self._socket.send(b"")
        deadline = time.monotonic() + PROCESSING_TIMEOUT_S
        while _unread(self._socket) and time.monotonic() < deadline:
            time.sleep(_PROCESSING_INTERVAL_S)

    def _send(self, entry: bytes) -> None:
        if self._socket is None:
            self._socket = _connect(self._path)
        connected = self._socket
        try:
            _when_writable(connected, lambda: connected.send(entry))
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            with _sealed_memfd(entry) as fd:
                _when_writable(connected, lambda: socket.send_fds(connected, [b""], [fd]))


def open_journal(identifier: str = "qkilld") -> QueuedJournal:
    """Return a queue that writes events to journald if standard error is connected to it, otherwise
    to standard error."""
    if not stderr_is_journal():
        return QueuedJournal(to_stderr)
    journald = Journald(identifier)
    return QueuedJournal(journald, journald.wait_until_processed)


def to_stderr(event: Event) -> None:
    from qkilld.model.event import Priority

    mark = {Priority.ERR: "error: ", Priority.WARNING: "warning: "}.get(event.priority, "")
    details = [f"{key.removeprefix('QKILLD_').lower()}={value}" for key, value in _shown(event)]
    line = f"{mark}{event.message}" + (f" [{' '.join(details)}]" if details else "")
    if trace := event.fields.get("QKILLD_TRACEBACK"):
        line += "\n" + trace.rstrip()
    print(line, file=sys.stderr, flush=True)


def _event(item: Event | int) -> Event:
    from qkilld.engine.events import entries_dropped

    return entries_dropped(item) if isinstance(item, int) else item


def _connect(path: Path) -> socket.socket:
    connected = socket.socket(
        socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    )
    try:
        connected.connect(os.fsencode(path))
    except OSError:
        connected.close()
        raise
    return connected


def _unread(connected: socket.socket) -> bool:
    """Return whether the other end still has datagrams to read."""
    size = fcntl.ioctl(connected, termios.TIOCOUTQ, bytes(4))
    return any(size)


def _when_writable(connected: socket.socket, send: Callable[[], object]) -> None:
    """Call `send` when the other end has room."""
    room = select.poll()
    room.register(connected, select.POLLOUT)
    while True:
        try:
            send()
            return
        except BlockingIOError:
            room.poll()


@contextlib.contextmanager
def _sealed_memfd(entry: bytes) -> Iterator[int]:
    """Put an entry that is too long for a datagram into a memfd."""
    fd = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(entry)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        yield fd
    finally:
        os.close(fd)


def _entry(event: Event, identifier: str) -> bytes:
    fields = {
        "MESSAGE": event.message,
        "MESSAGE_ID": event.id.value,
        "PRIORITY": str(int(event.priority)),
        "SYSLOG_IDENTIFIER": identifier,
        **event.fields,
        **(_object_fields(event.guest) if event.guest else {}),
    }
    return b"".join(_field(name.encode(), text) for name, text in fields.items())


def _field(name: bytes, text: str) -> bytes:
    """Encode a field: as a line or, if the value has line breaks, as its length and the value."""
    value = text.encode(errors="backslashreplace")
    if b"\n" in value:
        return name + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
    return name + b"=" + value + b"\n"


def _shown(event: Event) -> list[tuple[str, str]]:
    """Return the fields that are shown beside the message on a terminal."""
    keys = ("QKILLD_JOB", "QKILLD_PHASE", "QKILLD_VERDICT", "QKILLD_SIGNAL", "QKILLD_RESULT")
    return [(key, event.fields[key]) for key in keys if key in event.fields]


def _object_fields(guest: Guest) -> dict[str, str]:
    """Return OBJECT_PID= and the guest's unit.

    For OBJECT_PID=, journald adds the unit of the process (systemd.journal-fields(7)), but cannot
    find this unit after the process has exited. So these fields name the unit. `journalctl -u UNIT`
    matches OBJECT_SYSTEMD_UNIT= in entries written by root. If journald adds the same field, it
    drops the duplicate.
    """
    fields = {"OBJECT_PID": str(guest.identity.pid)}
    unit = guest.label.unit
    if unit is None:
        return fields
    if unit.system:
        fields["OBJECT_SYSTEMD_UNIT"] = unit.system
    if unit.user:
        fields["OBJECT_SYSTEMD_USER_UNIT"] = unit.user
        fields["OBJECT_UID"] = str(guest.identity.uid)
    return fields
