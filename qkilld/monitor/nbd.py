"""The part of an NBD client that asks a server for one flush.

Source: the NBD protocol's doc/proto.md, fixed newstyle with NBD_OPT_GO. The server runs in QEMU, so
its replies are not trusted.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Final

from qkilld.model.errors import MonitorClosed, MonitorProtocolError

_GREETING: Final = b"NBDMAGICIHAVEOPT"
_FLAGS: Final = struct.Struct(">H")
_OPTION: Final = struct.Struct(">8sII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_REQUEST: Final = struct.Struct(">IHHQQI")
_REPLY: Final = struct.Struct(">IIQ")
_OPTION_MAGIC: Final = 0x3E889045565A9
_REQUEST_MAGIC: Final = 0x25609513
_REPLY_MAGIC: Final = 0x67446698
_FIXED_NEWSTYLE: Final = 1
_NO_ZEROES: Final = 2
_OPT_GO: Final = 7
_REP_ACK: Final = 1
_REP_ERROR: Final = 1 << 31
_CMD_FLUSH: Final = 3
_HANDLE: Final = 0x716B696C6C64
_MAX_OPTION: Final = 4096
_MAX_REPLIES: Final = 16


class NbdConnection:
    """One connection to a server, over a socket that the caller owns. No call has a deadline."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()

    async def greet(self) -> None:
        """Wait until the server has accepted the connection. Raises MonitorError."""
        if await self._read(len(_GREETING)) != _GREETING:
            raise _protocol_error()
        (flags,) = _FLAGS.unpack(await self._read(_FLAGS.size))
        if not flags & _FIXED_NEWSTYLE:
            raise _protocol_error()
        await self._send(struct.pack(">I", flags & (_FIXED_NEWSTYLE | _NO_ZEROES)))

    async def open_export(self, name: str) -> None:
        """Select the export to flush. Raises MonitorError."""
        text = name.encode()
        data = struct.pack(">I", len(text)) + text + struct.pack(">H", 0)
        await self._send(_OPTION.pack(b"IHAVEOPT", _OPT_GO, len(data)) + data)
        for _ in range(_MAX_REPLIES):
            magic, option, kind, size = _OPTION_REPLY.unpack(await self._read(_OPTION_REPLY.size))
            if magic != _OPTION_MAGIC or option != _OPT_GO or size > _MAX_OPTION:
                raise _protocol_error()
            await self._read(size)
            if kind == _REP_ACK:
                return
            if kind & _REP_ERROR:
                raise MonitorProtocolError("QEMU's NBD server does not have the export")
        raise _protocol_error()

    async def flush(self) -> str:
        """Flush the export. Return "", or the error message of a failed flush. Raises
        MonitorError."""
        await self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_FLUSH, _HANDLE, 0, 0))
        magic, error, handle = _REPLY.unpack(await self._read(_REPLY.size))
        if magic != _REPLY_MAGIC or handle != _HANDLE:
            raise _protocol_error()
        # The protocol's error numbers are those of Linux.
        return os.strerror(error) if error else ""

    async def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = await self._loop.sock_recv(self._socket, size - len(data))
            except OSError:
                more = b""
            if not more:
                raise MonitorClosed("QEMU's NBD server closed the connection")
            data += more
        return data

    async def _send(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._socket, data)
        except OSError:
            raise MonitorClosed("QEMU's NBD server closed the connection") from None


def _protocol_error() -> MonitorProtocolError:
    return MonitorProtocolError("QEMU does not speak NBD on the socket that was passed to it")
