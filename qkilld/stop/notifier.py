"""Tell systemd how much longer a stop can take, and what the stop waits for.

Imports little, to start fast: see stop.main.
"""

from __future__ import annotations

import errno

from qkilld.adapters import sd_notify

_HIDDEN = frozenset({errno.EAFNOSUPPORT, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR})
"""Errors that occur if a sandbox hides the socket. Other errors, such as EAGAIN, are transient."""


class Notifier:
    """The notification socket. Without a socket, calls do nothing. Calls never block.

    A control process gets $NOTIFY_SOCKET only with NotifyAccess=exec or =all (systemd,
    src/core/service.c, service_exec_needs_notify_socket).
    """

    def __init__(self, address: str) -> None:
        """`address` is $NOTIFY_SOCKET, or ""."""
        self._address = address
        self._status = ""
        self._is_error_reported = False

    def extend(self, usec: int) -> None:
        """Extend the current timeout to at least `usec` µs from now. Never shortens it."""
        self._send(f"EXTEND_TIMEOUT_USEC={usec}")

    def status(self, text: str) -> None:
        """Set the status line that `systemctl status` shows."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            sd_notify.send(self._address, text, wait=False)
        except OSError as error:
            from qkilld.debug_log import note

            if error.errno in _HIDDEN and not self._is_error_reported:
                from qkilld.stop.log import say

                self._is_error_reported = True
                say(
                    "The sandbox of this unit hides systemd's notification socket from qkilld-stop"
                    f" ({error.strerror}), which therefore cannot extend TimeoutStopSec=. Write"
                    " ExecStop=+/usr/bin/qkilld-stop to run it outside of the sandbox"
                )

            # Ignore the failure, because the next extension follows in a second.
            note("sending a notification to systemd", error)
