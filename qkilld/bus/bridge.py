"""Connect to the bus of another host or of a container through systemd-stdio-bridge(1), as
systemd's own tools do."""

from __future__ import annotations

import os
import socket
import subprocess
from typing import Final

from qkilld.model.bus_address import BusAddress

BRIDGE: Final = "systemd-stdio-bridge"
END_TIMEOUT_S: Final = 2.0
"""How long to wait for the process to exit after its input has ended. It normally exits at once."""


class BridgeSocket(socket.socket):
    """Our end of a socket pair. Closing it ends the process at the other end."""

    program: str
    process: subprocess.Popen[bytes]

    def close(self) -> None:
        """Block until the process has ended; after END_TIMEOUT_S, terminate it."""
        super().close()
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()

    def failure(self) -> str:
        """Explain why the process has closed the connection. (The process prints its own reason on
        standard error.)"""
        try:
            status = self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "it closed the connection"
        return f"`{self.program}` ended with status {status}"


def open_bridge(bus: BusAddress) -> BridgeSocket:
    """Start the bridge process; return our end of the connection. Raises OSError."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with other:
        sock = BridgeSocket(fileno=own.detach())
        try:
            sock.program, *rest = bridge_command(bus)
            end = other.fileno()
            sock.process = subprocess.Popen([sock.program, *rest], stdin=end, stdout=end)
        except BaseException:
            socket.socket.close(sock)
            raise
    sock.setblocking(False)
    return sock


def bridge_command(bus: BusAddress) -> list[str]:
    """Return the command of a process that forwards its standard input and output to `bus`."""
    words = [BRIDGE]
    if bus.user:
        words.append("--user")
    if bus.machine:
        words.append(f"--machine={bus.machine}")
    if not bus.host:
        return words
    host, colon, port = bus.host.partition(":")
    options = ["-p", port] if colon else []
    return [os.environ.get("SYSTEMD_SSH", "ssh"), "-xT", *options, "--", host, *words]
