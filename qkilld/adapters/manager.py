"""The service manager: sd_notify(3), its watchdog and its file descriptor store.

Its socket may be full while it is busy, so a thread of its own sends. Nothing happens where no
manager listens (NOTIFY_SOCKET).
"""

from __future__ import annotations

import array  # noqa: F401  # socket.send_fds would import it with the first job
import asyncio
import contextlib
import os
import queue
import socket
import threading
from typing import Final

CLOSE_TIMEOUT_S: Final = 2.0


class ServiceManager:
    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[str, int | None] | None] = queue.SimpleQueue()
        self._pinging = False
        self._thread: threading.Thread | None = None
        if "NOTIFY_SOCKET" in os.environ:
            self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
            self._thread.start()

    @property
    def watchdog_s(self) -> float | None:
        """How often it wants to hear of us; None for never (sd_watchdog_enabled(3))."""
        if self._thread is None or os.environ.get("WATCHDOG_PID") not in (None, str(os.getpid())):
            return None
        usec = os.environ.get("WATCHDOG_USEC", "")
        return int(usec) / 1e6 if usec.isdecimal() and int(usec) else None

    def tell(self, state: str) -> None:
        """Send assignments, one a line."""
        self._put(state, None)

    def ping(self) -> None:
        """Feed the watchdog. While one of these waits to be sent, no further one is."""
        if not self._pinging:
            self._pinging = True
            self._put("WATCHDOG=1", None)

    def keep(self, name: str, fd: int) -> None:
        """Have a descriptor kept over our end. One that cannot be kept is none that is missed."""
        # It may be closed, and its number be another's, before it is sent.
        with contextlib.suppress(OSError):
            self._put(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", os.dup(fd))

    def drop(self, name: str) -> None:
        """Have it kept no longer."""
        self._put(f"FDSTOREREMOVE=1\nFDNAME={name}", None)

    async def barrier(self, timeout_s: float) -> None:
        """Return when it has taken in everything that was sent before (sd_notify_barrier(3)), or
        the time is over."""
        if self._thread is None:
            return
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        loop = asyncio.get_running_loop()
        taken = asyncio.Event()
        loop.add_reader(read, taken.set)  # at its end, when the manager closes the other one
        self._put("BARRIER=1", write)
        try:
            async with asyncio.timeout(timeout_s):
                await taken.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(read)
            os.close(read)

    def close(self) -> None:
        """Send what is queued, for at most CLOSE_TIMEOUT_S."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_TIMEOUT_S)

    def _put(self, state: str, fd: int | None) -> None:
        if self._thread is not None:
            self._queue.put((state, fd))
        elif fd is not None:
            os.close(fd)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            state, fd = item
            if state == "WATCHDOG=1":
                self._pinging = False
            with contextlib.suppress(OSError):
                _send(state, fd)
            if fd is not None:
                os.close(fd)


def _send(state: str, fd: int | None) -> None:
    """Written out, as sd_notify(3) allows: systemd-python's notify() keeps Python's lock while it
    waits for room in the socket, and with it every other thread. Raises OSError."""
    address = os.environ["NOTIFY_SOCKET"]
    address = "\0" + address[1:] if address[0] == "@" else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect(os.fsencode(address))
        socket.send_fds(sender, [state.encode()], [] if fd is None else [fd])


def stored_descriptors() -> dict[str, int]:
    """What the manager has kept for us, by name. To be called once, at the start."""
    if "LISTEN_FDS" not in os.environ:
        return {}
    from systemd import daemon

    found: dict[str, int] = {}
    for fd, name in daemon.listen_fds_with_names().items():
        if name in found:
            os.close(fd)
        else:
            found[name] = fd
    return found
