"""Cut a byte stream into D-Bus messages and parse their headers.

Source: D-Bus specification, "Message Format". Bodies are not parsed here, because the header shows
whether a body is worth parsing.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Final, Literal

from qkilld.model.dataclass import dataclass

MAX_CALL: Final = 16 << 10
"""The maximum size of a method call, in bytes. The body of a longer call is dropped, and the call
is refused."""
MAX_MESSAGE: Final = 1 << 20
"""The maximum size of any other message, in bytes. The body of a longer message is dropped."""
MAX_FIELDS: Final = 8 << 10
"""The maximum size of the header fields, in bytes. A message with larger fields is skipped."""

_FIXED_HEADER: Final = 16
_FIELDS: Final = {
    1: (0, ord("o")),
    2: (1, ord("s")),
    3: (2, ord("s")),
    4: (3, ord("s")),
    5: (4, ord("u")),
    7: (5, ord("s")),
    8: (6, ord("g")),
}
"""By field code: the index in the result of `_fields`, and the type."""
_SHORT: Final = 512
"""Parsed header fields are cached if they have at most this many bytes, because clients repeat
them. The fields of replies are not cached."""
_STRINGS: Final = frozenset(b"so")
_SIGNATURE: Final = ord("g")
_NUMBER: Final = ord("u")


class MessageKind(IntEnum):
    CALL = 1
    REPLY = 2
    ERROR = 3
    SIGNAL = 4


class Flags(IntEnum):
    NO_REPLY_EXPECTED = 1
    ALLOW_INTERACTIVE_AUTHORIZATION = 4


@dataclass(slots=True)
class IncomingMessage:
    """A message whose body is not parsed yet. Missing header fields are empty."""

    kind: int
    flags: int
    serial: int
    order: Literal["<", ">"]
    """The byte order of its numbers, as in `struct`."""
    body: bytes | None = b""
    """None if it was too long to be kept."""
    path: str = ""
    interface: str = ""
    member: str = ""
    error_name: str = ""
    reply_serial: int = 0
    sender: str = ""
    signature: str = ""

    @property
    def wants_reply(self) -> bool:
        return not self.flags & Flags.NO_REPLY_EXPECTED


class Frames:
    """Reassembles messages from the chunks of a byte stream."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0

    def feed(self, chunk: bytes) -> Iterator[IncomingMessage | None]:
        """Yield the messages that `chunk` completes; None for one whose header cannot be parsed. A
        message that is too long is yielded without its body, as soon as its header is complete."""
        if self._skip:
            skipped = min(self._skip, len(chunk))
            self._skip -= skipped
            chunk = chunk[skipped:]
        buffer = self._buffer
        buffer += chunk
        start = 0
        try:
            while len(buffer) - start >= _FIXED_HEADER:
                order: Literal["<", ">"] = "<" if buffer[start] == ord("l") else ">"
                body, _, fields = struct.unpack_from(order + "III", buffer, start + 4)
                body_at = start + _FIXED_HEADER + fields + (-fields & 7)
                end = body_at + body
                most = MAX_CALL if buffer[start + 1] == MessageKind.CALL else MAX_MESSAGE
                if fields > MAX_FIELDS or end - start > most:
                    if fields <= MAX_FIELDS:
                        if len(buffer) < body_at:
                            return
                        yield _read(buffer, start, fields, order, None)
                    self._skip = max(0, end - len(buffer))
                    start = min(end, len(buffer))
                    continue
                if len(buffer) < end:
                    return
                yield _read(buffer, start, fields, order, bytes(buffer[body_at:end]))
                start = end
        finally:
            del buffer[:start]


def _read(
    buffer: bytearray,
    start: int,
    length: int,
    order: Literal["<", ">"],
    body: bytes | None,
) -> IncomingMessage | None:
    try:
        return _read_header(bytes(buffer[start : start + _FIXED_HEADER + length]), order, body)
    except (ValueError, IndexError, struct.error):
        return None


def _read_header(data: bytes, order: Literal["<", ">"], body: bytes | None) -> IncomingMessage:
    """Raises ValueError, IndexError or struct.error if the header is invalid or has a field of
    unknown type."""
    kind = data[1]
    (serial,) = struct.unpack_from(order + "I", data, 8)
    encoded = data[_FIXED_HEADER:]
    if len(encoded) > _SHORT or kind in (MessageKind.REPLY, MessageKind.ERROR):
        fields = _fields(encoded, order)
    else:
        fields = _known_fields(encoded, order)
    return IncomingMessage(kind, data[2], serial, order, body, *fields)


def _fields(data: bytes, order: Literal["<", ">"]) -> tuple[Any, ...]:
    """Return the fields of IncomingMessage that come from header fields."""
    number = struct.Struct(order + "I").unpack_from
    values: list[Any] = ["", "", "", "", 0, "", ""]
    at = 0
    while at < len(data):
        at += -at & 7
        code, one, kind = data[at], data[at + 1], data[at + 2]
        if one != 1:
            raise ValueError("a header field of a type that is not simple")
        at += 4
        value: Any
        if kind in _STRINGS:
            end = at + 4 + number(data, at)[0]
            value = data[at + 4 : end].decode()
            at = end + 1
        elif kind == _SIGNATURE:
            end = at + 1 + data[at]
            value = data[at + 1 : end].decode()
            at = end + 1
        elif kind == _NUMBER:
            value = number(data, at)[0]
            at += 4
        else:
            raise ValueError("a header field of an unknown type")
        if (field := _FIELDS.get(code)) is not None:
            if field[1] != kind:
                raise ValueError("a header field of the wrong type")
            values[field[0]] = value
    if at > len(data):
        raise ValueError("a header field that is longer than the header")
    return tuple(values)


_known_fields = functools.lru_cache(maxsize=256)(_fields)


def error_reply(call: IncomingMessage, serial: int, name: str, text: str) -> bytes:
    """Encode an error reply to `call`. Refusals must be cheap, and dbus-next takes 100 µs for
    one."""
    encoded = text.encode()
    body = struct.pack("<I", len(encoded)) + encoded + b"\0"
    fields = (
        _string_field(4, b"s", name)
        + struct.pack("<B3sI", 5, b"\1u\0", call.serial)
        + _string_field(6, b"s", call.sender)
        + b"\x08\1g\0\1s\0"
    )
    return _header(MessageKind.ERROR, serial, fields, len(body)) + body


def reply_header(call: IncomingMessage, serial: int, signature: str, length: int) -> bytes:
    """Encode the header of a reply to `call`. `length`: the size of its body, which must be
    little-endian."""
    fields = (
        struct.pack("<B3sI", 5, b"\1u\0", call.serial)
        + _string_field(6, b"s", call.sender)
        + _signature_field(signature)
    )
    return _header(MessageKind.REPLY, serial, fields, length)


def signal_header(
    path: str, interface: str, member: str, serial: int, signature: str, length: int
) -> bytes:
    """Encode the header of a signal. `length`: as for `reply_header`."""
    fields = (
        _string_field(1, b"o", path)
        + _string_field(2, b"s", interface)
        + _string_field(3, b"s", member)
        + _signature_field(signature)
    )
    return _header(MessageKind.SIGNAL, serial, fields, length)


def _header(kind: MessageKind, serial: int, fields: bytes, length: int) -> bytes:
    """Encode a header, padded for a body of this length."""
    fixed = struct.pack("<cBBBIII", b"l", kind, 1, 1, length, serial, len(fields))
    return fixed + fields + b"\0" * (-len(fields) & 7)


def _signature_field(signature: str) -> bytes:
    """Encode the last header field."""
    return struct.pack("<B3sB", 8, b"\1g\0", len(signature)) + signature.encode() + b"\0"


def _string_field(code: int, kind: bytes, text: str) -> bytes:
    """Encode one header field, padded for the next."""
    encoded = text.encode()
    field = struct.pack("<B3sI", code, b"\1" + kind + b"\0", len(encoded)) + encoded + b"\0"
    return field + b"\0" * (-len(field) & 7)
