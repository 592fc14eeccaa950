"""Cutting the stream of a bus into messages, and reading their headers."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from jeepney import DBusAddress, MessageFlag, MessageType, new_method_call, new_signal  # type: ignore[import-untyped]
from jeepney.low_level import HeaderFields, Message, Parser  # type: ignore[import-untyped]

from qkilld.bus.framing import (
    MAX_CALL,
    MAX_FIELDS,
    MAX_MESSAGE,
    Frames,
    IncomingMessage,
    MessageKind,
    error_reply,
)

CALL = new_method_call(
    DBusAddress("/org/qkilld1", "org.qkilld1", "org.qkilld1.Manager"), "Terminate", "ut", (17, 1)
)
CALL.header.fields[HeaderFields.sender] = ":1.7"
SIGNAL = new_signal(DBusAddress("/a", None, "b.c"), "D", "s", ("x",))


def message(kind: int, fields: int, body: int, order: str = "<") -> bytes:
    """Return a message without header fields, with padding instead."""
    mark = b"l" if order == "<" else b"B"
    fixed = mark + bytes([kind]) + b"\0\1" + struct.pack(order + "III", body, 7, fields)
    return fixed + b"\0" * (fields + (-fields & 7)) + b"b" * body


def feed(stream: bytes, size: int) -> list[IncomingMessage | None]:
    frames = Frames()
    found = [m for i in range(0, len(stream), size) for m in frames.feed(stream[i : i + size])]
    assert not frames._buffer
    return found


@pytest.mark.parametrize("size", [1, 3, 16, 17, 4096, 1 << 22])
def test_whole_messages_however_they_arrive(size: int) -> None:
    big_endian = message(MessageKind.SIGNAL, 0, 8, ">")
    long_call = message(MessageKind.CALL, 0, MAX_CALL)
    stream = b"".join([CALL.serialise(5), big_endian, long_call, SIGNAL.serialise(6)])
    call, other, too_long, signal = feed(stream, size)
    assert call == IncomingMessage(
        kind=MessageKind.CALL,
        flags=0,
        serial=5,
        order="<",
        body=struct.pack("<IxxxxQ", 17, 1),
        path="/org/qkilld1",
        interface="org.qkilld1.Manager",
        member="Terminate",
        sender=":1.7",
        signature="ut",
    )
    assert other == IncomingMessage(MessageKind.SIGNAL, 0, 7, ">", b"b" * 8)
    assert too_long == IncomingMessage(MessageKind.CALL, 0, 7, "<", None)
    assert signal is not None
    assert (signal.path, signal.member, signal.signature) == ("/a", "D", "s")


@pytest.mark.parametrize("size", [1000, 1 << 22])
def test_messages_that_are_too_long_are_skipped(size: int) -> None:
    stream = message(MessageKind.REPLY, 8, MAX_MESSAGE) + message(
        MessageKind.REPLY, MAX_FIELDS + 8, 100
    )
    frames = Frames()
    kept: list[IncomingMessage | None] = []
    for start in range(0, len(stream), size):
        kept += frames.feed(stream[start : start + size])
        assert len(frames._buffer) <= 2 * MAX_FIELDS + size
    kept += frames.feed(CALL.serialise(1))
    assert [one and one.body for one in kept] == [None, struct.pack("<IxxxxQ", 17, 1)]


def test_headers_with_bits_flipped() -> None:
    """The result is a message or None. If a length is wrong, later messages may be lost."""
    source = random.Random(1)
    good = CALL.serialise(5)
    for _ in range(20_000):
        bad = bytearray(good)
        for _ in range(source.randint(1, 3)):
            bad[source.randrange(len(bad))] ^= 1 << source.randrange(8)
        for found in Frames().feed(bytes(bad)):
            assert found is None or isinstance(found.sender, str)


def test_an_error_reply_as_another_library_reads_it() -> None:
    (call,) = feed(CALL.serialise(5), 4096)
    assert call is not None
    for text in ("", "x", "Busy \N{SNOWMAN}", "y" * 300):
        parser = Parser()
        parser.add_data(error_reply(call, 99, "org.qkilld1.Error.Busy", text))
        reply: Message = parser.get_next_message()
        fields: dict[Any, Any] = reply.header.fields
        assert reply.header.message_type is MessageType.error
        assert reply.header.flags == MessageFlag.no_reply_expected
        assert reply.header.serial == 99
        assert reply.body == (text,)
        assert fields == {
            HeaderFields.error_name: "org.qkilld1.Error.Busy",
            HeaderFields.reply_serial: 5,
            HeaderFields.destination: ":1.7",
            HeaderFields.signature: "s",
        }
