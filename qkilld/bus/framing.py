"""Cutting a byte stream into D-Bus messages. Source: D-Bus specification, "Message Format"."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

MAX_MESSAGE: Final = 1 << 20
"""Bytes. Nothing that qkilld says or hears comes near; a longer message is passed over unread."""
_FIXED_HEADER: Final = 16


class Frames:
    """Feed it what was read; it hands out whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The messages that `chunk` completes, those over MAX_MESSAGE left out."""
        if self._skip:
            passed = min(self._skip, len(chunk))
            self._skip -= passed
            chunk = chunk[passed:]
        self._buffer += chunk
        while len(self._buffer) >= _FIXED_HEADER:
            length = _length(self._buffer)
            if length > MAX_MESSAGE:
                self._skip = max(0, length - len(self._buffer))
                del self._buffer[:length]
                continue
            if len(self._buffer) < length:
                return
            raw = bytes(self._buffer[:length])
            del self._buffer[:length]
            yield raw


def _length(header: bytearray) -> int:
    """Of the whole message: fixed header, header fields padded to 8, body."""
    order = "<" if header[:1] == b"l" else ">"
    body, _serial, fields = struct.unpack_from(order + "4xIII", header)
    return _FIXED_HEADER + int(fields) + (-int(fields) & 7) + int(body)
