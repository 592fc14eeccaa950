"""Cutting the stream of a bus into messages."""

from __future__ import annotations

import struct

import pytest

from qkilld.bus.framing import MAX_MESSAGE, Frames


def message(fields: int, body: int, order: str = "<") -> bytes:
    mark = b"l" if order == "<" else b"B"
    fixed = mark + b"\1\0\1" + struct.pack(order + "III", body, 7, fields)
    return fixed + b"f" * fields + b"\0" * (-fields & 7) + b"b" * body


SMALL = message(13, 5)
BIG_ENDIAN = message(8, 0, ">")
TOO_LONG = message(16, MAX_MESSAGE)


@pytest.mark.parametrize("size", [1, 3, 16, 17, 4096, 1 << 22])
def test_whole_messages_however_they_arrive(size: int) -> None:
    stream = SMALL + BIG_ENDIAN + TOO_LONG + SMALL + TOO_LONG + TOO_LONG + BIG_ENDIAN
    if size < 16:
        stream = stream.replace(TOO_LONG, b"")
    frames = Frames()
    found = [m for i in range(0, len(stream), size) for m in frames.feed(stream[i : i + size])]
    assert found == [SMALL, BIG_ENDIAN, SMALL, BIG_ENDIAN]


def test_what_is_too_long_is_not_kept() -> None:
    frames = Frames()
    assert list(frames.feed(TOO_LONG[:100])) == []
    assert not frames._buffer
