"""Fill the socket of journald, which all services share."""

from __future__ import annotations

from typing import Final

from tests.lab.container import Container

_FILL: Final = """
import socket
sent = 1
while sent:
    # What one sender may have under way is limited, too.
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
    """Fill its socket. Its journald must be stopped: who logs has to wait then until it goes on."""
    system.python("-c", _FILL)
