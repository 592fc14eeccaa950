"""Connect to a message bus: its address, the socket, and authentication.

Source: D-Bus specification, "Server Addresses" and "Authentication Protocol".
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Final
from urllib.parse import quote

from qkilld.bus.bridge import open_bridge
from qkilld.bus.library import (
    AuthExternal,
    BusType,
    InvalidAddressError,
    get_bus_address,
    parse_address,
)
from qkilld.foreign_descriptors import take_over
from qkilld.model.bus_address import BusAddress

MAX_LINE: Final = 4096
"""The maximum length of a line during authentication, in bytes; a bus sends at most 40."""
RETRY_S: Final = 0.01
"""Delay before connecting again to a bus whose backlog is full."""


async def open_socket(bus: BusAddress, *, descriptors: bool = False) -> socket.socket:
    """Connect and authenticate; after an OSError, try the next address. Blocks only to end a bridge
    process that has failed.

    `descriptors`: messages can carry descriptors in both directions. Any user of the bus can then
    send some; ForeignSocket closes them. Raises OSError, EOFError, ValueError,
    AuthError or InvalidAddressError.
    """
    if bus.is_remote:
        return await _open_remote(bus)
    failure: Exception = InvalidAddressError("there is no address")
    for transport, options in parse_address(_address(bus)):
        family, target = _target(transport, options)
        sock = take_over(socket.socket(family, socket.SOCK_STREAM))
        try:
            await _connect(sock, target)
            await _authenticate(sock, descriptors=descriptors)
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            failure = error
        else:
            return sock
    raise failure


async def _open_remote(bus: BusAddress) -> socket.socket:
    sock = open_bridge(bus)
    try:
        await _authenticate(sock)
    except BaseException as error:
        failure = sock.failure() if isinstance(error, (OSError, EOFError)) else ""
        sock.close()
        if failure:
            raise EOFError(failure) from None
        raise
    return sock


def _address(bus: BusAddress) -> str:
    """Return the D-Bus address of a bus. Raises InvalidAddressError."""
    if bus.address:
        return bus.address
    if not bus.user or "DBUS_SESSION_BUS_ADDRESS" in os.environ:
        return str(get_bus_address(BusType.SESSION if bus.user else BusType.SYSTEM))
    # Find the user bus as sd_bus_default_user(3) does, because the library does not handle a user
    # without a session.
    directory = os.environ.get("XDG_RUNTIME_DIR", "")
    if not directory:
        raise InvalidAddressError(
            "neither $DBUS_SESSION_BUS_ADDRESS nor $XDG_RUNTIME_DIR is set, as they are in a "
            "session of the user"
        )
    return f"unix:path={quote(f'{directory}/bus', safe='/').replace('~', '%7E')}"


def _target(
    transport: str, options: dict[str, str]
) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """Return the family and address of a socket. Raises InvalidAddressError, ValueError."""
    match transport:
        case "unix" if "path" in options:
            return socket.AF_UNIX, options["path"]
        case "unix" if "abstract" in options:
            return socket.AF_UNIX, f"\0{options['abstract']}"
        case "tcp":
            return socket.AF_INET, (options.get("host", ""), int(options.get("port", 0)))
    raise InvalidAddressError(f"addresses of the kind {transport}: are not supported")


async def _connect(sock: socket.socket, target: str | tuple[str, int]) -> None:
    loop = asyncio.get_running_loop()
    if sock.family != socket.AF_UNIX:
        await loop.sock_connect(sock, target)
        return
    # Call connect() directly: EAGAIN means that the backlog is full, but sock_connect() would take
    # it for a connection in progress.
    while True:
        try:
            sock.connect(target)
        except (BlockingIOError, InterruptedError):
            await asyncio.sleep(RETRY_S)
        else:
            return


async def _authenticate(sock: socket.socket, *, descriptors: bool = False) -> None:
    loop = asyncio.get_running_loop()
    auth = AuthExternal()
    start = auth._authentication_start(negotiate_unix_fd=descriptors)
    await loop.sock_sendall(sock, b"\0" + f"{start}\r\n".encode())
    response = None
    while response != "BEGIN":
        response = auth._receive_line(await _read_line(sock))
        await loop.sock_sendall(sock, f"{response}\r\n".encode())


async def _read_line(sock: socket.socket) -> str:
    """Read up to CR LF. Raises EOFError if the line is too long or the connection ends. (If the
    connection ends, dbus-next would wait forever.)"""
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\r\n"):
        # Byte by byte, because the bytes after the line belong to the message stream.
        byte = await loop.sock_recv(sock, 1)
        if not byte:
            raise EOFError("the bus closed the connection during authentication")
        line += byte
        if len(line) > MAX_LINE:
            raise EOFError("the peer does not authenticate as a bus does")
    return line[:-2].decode()
