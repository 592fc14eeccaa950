"""Sockets whose last close(2) blocks."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def lingering_sockets(seconds: int) -> Iterator[Callable[[], socket.socket]]:
    """Yield a function that makes a TCP socket whose last close(2) takes this many seconds."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def make() -> socket.socket:
            made = socket.create_connection(server.getsockname())
            stack.enter_context(server.accept()[0])
            made.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    made.send(bytes(1 << 16))
            made.setblocking(True)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
            return made

        yield make
