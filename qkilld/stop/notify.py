"""Telling systemd of the stop, sd_notify(3): how long it may yet take, and what is waited for.

The protocol is written out here, as that page allows: its library takes 10 ms to load, and blocks
where systemd does not read.
"""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """The notification socket; silent where there is none, and never in the way.

    systemd gives a control process $NOTIFY_SOCKET only where it listens to it, which is with
    NotifyAccess=exec and =all (systemd, src/core/service.c, service_exec_needs_notify_socket).
    """

    def __init__(self, address: str) -> None:
        """`address` is $NOTIFY_SOCKET, or ""."""
        self._address = address
        self._status = ""

    @property
    def heard(self) -> bool:
        return bool(self._address)

    def extend(self, usec: int) -> None:
        """Let the timeout that runs end no sooner than in so many µs. Never shortens it."""
        self._send(f"EXTEND_TIMEOUT_USEC={usec}")

    def status(self, text: str) -> None:
        """What `systemctl status` shows; one line."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        # What cannot be told now is told again in a second.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender,
        ):
            sender.setblocking(False)
            sender.sendto(text.encode(), os.fsencode(address))
