"""The receiving end of sd_notify(3)."""

from __future__ import annotations

import select
import socket
import time
from pathlib import Path


class NotifySocket:
    """A NOTIFY_SOCKET in `directory`. Collects every assignment that arrives; the newest wins."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self.state: dict[str, str] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self.path.chmod(0o666)

    def wait_for(self, key: str, timeout: float, *, pidfd: int) -> str:
        """The value of `key`, as soon as it was sent.

        AssertionError if the sender (`pidfd`) ends first or the time (seconds) runs out.
        """
        deadline = time.monotonic() + timeout
        while key not in self.state:
            sources: list[socket.socket | int] = [self._socket, pidfd]
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select(sources, [], [], left)
            if self._socket in ready:
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
