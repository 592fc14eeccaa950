"""The service manager: status messages, its watchdog and its file descriptor store.

The manager's socket may be full while the manager is busy, so a separate thread sends. Without a
manager (NOTIFY_SOCKET), nothing is sent.
"""

from __future__ import annotations

import array  # noqa: F401  # socket.send_fds would import it with the first job
import asyncio
import os
from typing import Final

from qkilld.adapters import sd_notify
from qkilld.adapters.background import BackgroundWriter
from qkilld.debug_log import ignore, note
from qkilld.foreign_descriptors import close_later, is_socket

QUEUE_LENGTH: Final = 1 << 14
"""While this many messages wait to be sent, further messages about stored descriptors are dropped.
This is harmless: if a pidfd is missing, the next daemon finds the process by its id and start time.
If a stored descriptor is not needed by any job, the next daemon rejects it."""
SOCK_DIAG: Final = "sock-diag"
"""The name of the descriptor from units/qkilld-diag.socket."""
VARLINK: Final = "varlink"
"""The name of the descriptor from units/qkilld.socket."""


class ServiceManager:
    def __init__(self) -> None:
        self._pinging = False
        self._writer: BackgroundWriter[tuple[str, int | None]] | None = None
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        if self._address:
            self._writer = BackgroundWriter("notify", self._write, QUEUE_LENGTH)

    @property
    def watchdog_s(self) -> float | None:
        """The watchdog's interval; None for no watchdog (sd_watchdog_enabled(3))."""
        if self._writer is None or os.environ.get("WATCHDOG_PID") not in (None, str(os.getpid())):
            return None
        usec = os.environ.get("WATCHDOG_USEC", "")
        return int(usec) / 1e6 if usec.isdecimal() and int(usec) else None

    def tell(self, state: str) -> None:
        """Send assignments, one on each line."""
        self._put(state, None, always=True)

    def ping(self) -> None:
        """Tell systemd's watchdog that this program still works. Does nothing while an earlier such
        message waits to be sent."""
        if not self._pinging:
            self._pinging = True
            self._put("WATCHDOG=1", None, always=True)

    def store_fd(self, name: str, fd: int) -> None:
        """Store a descriptor in the service manager, where it survives this process. Failures are
        ignored, because the next daemon can work without the descriptor."""
        # Send a duplicate: before the message is sent, the original may be closed and its number
        # reused.
        with ignore(f"storing the descriptor of {name}", OSError):
            self._put(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", os.dup(fd))

    def drop_fd(self, name: str) -> None:
        self._put(f"FDSTOREREMOVE=1\nFDNAME={name}", None)

    async def barrier(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` until the manager has processed everything sent so far
        (sd_notify_barrier(3))."""
        if self._writer is None:
            return
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        loop = asyncio.get_running_loop()
        received = asyncio.Event()
        loop.add_reader(read, received.set)  # `read` becomes readable when systemd closes `write`.
        self._put("BARRIER=1", write, always=True)
        try:
            async with asyncio.timeout(timeout_s):
                await received.wait()
        except TimeoutError as error:
            note("waiting until systemd has processed all messages", error)
        finally:
            loop.remove_reader(read)
            os.close(read)

    def close(self) -> None:
        """Send all queued messages (time limit: background.FLUSH_TIMEOUT_S)."""
        if self._writer is not None:
            self._writer.close()

    def _put(self, state: str, fd: int | None, *, always: bool = False) -> None:
        queued = self._writer is not None and self._writer.put((state, fd), always=always)
        if not queued and fd is not None:
            os.close(fd)

    def _write(self, item: tuple[str, int | None]) -> None:
        state, fd = item
        if state == "WATCHDOG=1":
            self._pinging = False
        with ignore("sending a message to systemd", OSError):
            sd_notify.send(self._address, state, fd, wait=True)
        if fd is None:
            return
        if is_socket(fd):  # Closing a socket that came from a caller may block.
            close_later(fd)
        else:
            os.close(fd)


def stored_descriptors() -> dict[str, int]:
    """Return the descriptors in our file descriptor store and the sockets of our socket units, by
    name. Call this once, at the start.

    listen_fds_with_names() cannot block: it only reads the environment and sets flags.
    """
    if "LISTEN_FDS" not in os.environ:
        return {}
    from systemd import daemon

    descriptors: dict[str, int] = {}
    for fd, name in daemon.listen_fds_with_names().items():
        if name in descriptors:
            os.close(fd)
        else:
            descriptors[name] = fd
    return descriptors
