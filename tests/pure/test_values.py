"""Parsing the bodies of messages."""

from __future__ import annotations

import contextlib
import random
import struct
import time
import tracemalloc
from typing import Any

import pytest

from qkilld.bus.framing import Frames
from qkilld.bus.library import Message, Variant, encode
from qkilld.bus.values import VariantValue, parse, split

pytestmark = pytest.mark.each_library

EVERY_NUMBER = [1, True, -2, 3, -4, 5, -6, 7, 0.5]


def body(signature: str, *values: Any) -> bytes:
    message = Message(path="/", member="M", signature=signature, body=list(values), serial=1)
    (read,) = Frames().feed(bytes(encode(message)))
    assert read is not None and read.body is not None
    return read.body


@pytest.mark.parametrize(
    ("signature", "values", "expected"),
    [
        ("", [], []),
        ("ybnqiuxtd", EVERY_NUMBER, EVERY_NUMBER),
        ("sog", ["", "/a/b", "a{sv}"], ["", "/a/b", "a{sv}"]),
        ("ayas", [b"xyz", ["a", "b"]], [b"xyz", ["a", "b"]]),
        ("(yt)y", [[1, 2], 3], [[1, 2], 3]),
        ("a(yt)at", [[[1, 2], [3, 4]], []], [[[1, 2], [3, 4]], []]),
        ("a{sas}y", [{"k": ["v"], "e": []}, 9], [{"k": ["v"], "e": []}, 9]),
        ("a{sv}", [{"k": Variant("(us)", [1, "x"])}], [{"k": VariantValue("(us)", [1, "x"])}]),
        ("v", [Variant("v", Variant("u", 1))], [VariantValue("v", VariantValue("u", 1))]),
        ("a(sasasttttuii)", [[["p", ["a"], [], 1, 2, 3, 4, 5, -6, -7]]], None),
    ],
)
def test_values(signature: str, values: list[Any], expected: list[Any] | None) -> None:
    assert parse(signature, body(signature, *values)) == (values if expected is None else expected)


def test_big_endian() -> None:
    assert parse("su", struct.pack(">I2sxxI", 1, b"x", 7)[:6] + b"\0\0" + b"\0\0\0\7", ">") == [
        "x",
        7,
    ]


@pytest.mark.parametrize("signature", ["(", ")", "a", "(y", "{sv", "z", "a{", "aa", "y)"])
def test_malformed_signatures_are_refused(signature: str) -> None:
    with pytest.raises(ValueError):
        parse(signature, bytes(64))


def test_the_types_of_a_signature() -> None:
    assert split("ya{sv}a(ya(t))aayv") == ("y", "a{sv}", "a(ya(t))", "aay", "v")


@pytest.mark.parametrize("signature", ["s", "as", "a{sv}", "v", "(sa{sv})", "t", "aay", "b"])
def test_bodies_that_are_cut_or_changed(signature: str) -> None:
    """The parser returns a list or raises ValueError, and is fast."""
    values = {
        "s": "text",
        "as": ["one", "two"],
        "a{sv}": {"a": Variant("as", ["x"]), "b": Variant("t", 1)},
        "v": Variant("a{sv}", {"a": Variant("u", 1)}),
        "(sa{sv})": ["x", {"k": Variant("b", True)}],
        "t": 7,
        "aay": [b"x", b"yy"],
        "b": True,
    }
    good = body(signature, values[signature])
    source = random.Random(1)
    for length in range(len(good)):
        with pytest.raises(ValueError):
            parse(signature, good[:length])
    with pytest.raises(ValueError):
        parse(signature, good + b"\0")
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(source.randint(1, 4)):
            bad[source.randrange(len(bad))] = source.randrange(256)
        with contextlib.suppress(ValueError):
            assert isinstance(parse(signature, bytes(bad)), list)


def test_values_that_are_nested_too_deeply() -> None:
    nested: Any = Variant("y", 1)
    for _ in range(20):
        nested = Variant("v", nested)
    data = body("v", nested)
    with pytest.raises(ValueError, match="nested"):
        parse("v", data)
    with pytest.raises(ValueError, match="nested"):
        parse("v", body("v", Variant("as", [])), max_depth=1)


def test_hostile_signatures_are_not_cached() -> None:
    """The libraries keep each signature forever. With dbus-next, one message of 1 MiB took 183
    MB."""
    source = random.Random(1)

    def hostile() -> bytes:
        found = bytearray()
        for _ in range(60):
            signature = "(" + "".join(source.choice("ynqiux") for _ in range(200)) + ")"
            found += bytes([len(signature)]) + signature.encode() + b"\0"
            found += bytes(-len(found) & 7)
        return struct.pack("<I", len(found)) + bytes(found)

    messages = [hostile() for _ in range(50)]
    tracemalloc.start()
    began = time.process_time()
    for message in messages * 4:
        with pytest.raises(ValueError):
            parse("av", message, max_depth=3)
    spent = time.process_time() - began
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1 << 20
    assert spent / 200 < 0.1
