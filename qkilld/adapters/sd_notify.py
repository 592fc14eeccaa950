"""The protocol of sd_notify(3).

The protocol is implemented here, as the man page allows. Importing systemd-python's notify() takes
10 ms. notify() also waits for room in the socket while it holds Python's lock, and so stops all
other threads.
"""

from __future__ import annotations

import os
import socket


def send(address: str, state: str, fd: int | None = None, *, wait: bool) -> None:
    """Send assignments, one on each line, and optionally a descriptor.

    `address` is $NOTIFY_SOCKET. While the socket is full, block if `wait` is true, otherwise raise
    BlockingIOError. Raises OSError.
    """
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(wait)
        sender.connect(os.fsencode(address))
        if fd is None:
            sender.send(state.encode())
        else:
            socket.send_fds(sender, [state.encode()], [fd])
