"""The receiving end of sd_notify(3)."""

from __future__ import annotations

import select
import socket
import time
from pathlib import Path


class NotifySocket:
    """A NOTIFY_SOCKET in `directory`. It keeps the newest value of each assignment."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self.state: dict[str, str] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self.path.chmod(0o666)

    def wait_for(self, key: str, timeout: float, *, pidfd: int) -> str:
        """Wait for the value of `key`.

        Raises AssertionError if the sender (`pidfd`) ends first, or after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while key not in self.state:
            poll = select.poll()  # select(2) accepts only descriptors below 1024.
            poll.register(self._socket, select.POLLIN)
            poll.register(pidfd, select.POLLIN)
            remaining = max(0.0, deadline - time.monotonic())
            ready = [fd for fd, _ in poll.poll(remaining * 1000)]
            if self._socket.fileno() in ready:
                self._take(self._socket.recv(65536))
            elif pidfd in ready:
                raise AssertionError(f"it ended without sending {key}=")
            else:
                raise AssertionError(f"it did not send {key}= within {timeout} s")
        return self.state[key]

    def _take(self, datagram: bytes) -> None:
        for line in datagram.decode(errors="replace").splitlines():
            key, _, value = line.partition("=")
            self.state[key] = value

    def close(self) -> None:
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> NotifySocket:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
