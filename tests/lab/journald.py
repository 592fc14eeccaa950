"""Fill the socket of journald, which all services share."""

from __future__ import annotations

from typing import Final

from tests.lab.container import Container

_FILL: Final = """
import socket
sent = 1
while sent:
    # Use many senders, because the unread messages of each sender are limited, too.
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.setblocking(False)
    sender.connect("/run/systemd/journal/socket")
    sent = 0
    try:
        while True:
            sender.send(b"MESSAGE=one of many\\n")
            sent += 1
    except BlockingIOError:
        pass
"""


def fill_journald(system: Container) -> None:
    """Fill the socket of the container's journald, which must be stopped. A program that writes to
    the log then blocks until journald continues."""
    system.python("-c", _FILL)
