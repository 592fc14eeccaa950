"""Hostile calls on Varlink from a seed. Source: varlink.org, "Method Call"."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from qkilld.varlink.idl import Type, parse
from tests.fuzz.messages import Aims
from tests.lab.process import TOP

DESCRIPTION: Final = parse((TOP / "dbus/org.qkilld1.varlink").read_text())
MAX_CALL: Final = 64 << 10
_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, 0, -1, 1, 2**31, 2**63 - 1, 2**64, 1e308, "", "force", "a\ud800", "\0"),
    *([], {}, [[]], ["force"] * 500, {"pid": 1}, [{"pid": 1}], "x" * 3000),
)


@dataclass(frozen=True)
class Call:
    kind: str
    data: bytes
    """The bytes to send, which end with NUL unless the call is partial."""
    descriptors: int = 0
    replies: bool = True
    ends: bool = False
    """Whether the client disconnects after the call."""


class CallSource:
    """A sequence of calls that depends only on the seed."""

    def __init__(self, seed: str, aims: Aims) -> None:
        self._rng = random.Random(seed)
        self._aims = aims

    def next(self) -> Call:
        rng = self._rng
        makers = [make for _, make in _KINDS]
        make = rng.choices(makers, [weight for weight, _ in _KINDS])[0]
        return make(rng, self._aims)


def _whole(kind: str, call: object, **more: Any) -> Call:
    return Call(kind, json.dumps(call).encode() + b"\0", **more)


def _order(rng: random.Random, aims: Aims) -> dict[str, Any]:
    """Return a call that conforms to the interface description. Its values may have any size."""
    name = rng.choice(sorted(DESCRIPTION.methods))
    call: dict[str, Any] = {
        "method": f"org.qkilld1.{name}",
        "parameters": _value(rng, aims, DESCRIPTION.methods[name].takes, ""),
    }
    if rng.random() < 0.5:
        call[rng.choice(("more", "oneway"))] = True
    return call


def _value(rng: random.Random, aims: Aims, hint: Type, name: str) -> Any:
    if name == "pid":
        return rng.choice((*aims.own, *aims.others, 1, 0, 2**22))
    if name == "job":
        return rng.randrange(-1, 40)
    match hint.kind:
        case "named":
            return _value(rng, aims, DESCRIPTION.types[hint.name], name)
        case "maybe":
            assert hint.inner is not None
            return None if rng.random() < 0.5 else _value(rng, aims, hint.inner, name)
        case "struct":
            fields = (hint.fields or {}).items()
            return {key: _value(rng, aims, field, key) for key, field in fields}
        case "list":
            inner = hint.inner
            assert inner is not None
            return [_value(rng, aims, inner, name) for _ in range(rng.randrange(4))]
        case "enum":
            return rng.choice(sorted(hint.words))
        case "bool":
            return rng.random() < 0.5
        case "int":
            return rng.choice((-1, 0, 1, 1000, 2**31, 2**62, 2**63 - 1))
    return rng.choice(("", "a.service", "../x", "\u202e", "x" * rng.randrange(300)))


def _described(rng: random.Random, aims: Aims) -> Call:
    call = _order(rng, aims)
    return _whole("varlink, as described", call, replies=not call.get("oneway"))


def _wrong_types(rng: random.Random, aims: Aims) -> Call:
    call = _order(rng, aims)
    for key in rng.sample(sorted(call["parameters"]) or ["x"], 1):
        call["parameters"][key] = rng.choice(_VALUES)
    call[rng.choice(("more", "upgrade", "parameters", "method", "x"))] = rng.choice(_VALUES)
    return _whole("varlink, of wrong types", call)


def _no_json(rng: random.Random, aims: Aims) -> Call:
    data = bytearray(json.dumps(_order(rng, aims)).encode())
    if rng.random() < 0.5:
        data[rng.randrange(len(data))] = rng.randrange(1, 256)
    else:
        data = bytearray(rng.randbytes(rng.randrange(2000)).replace(b"\0", b""))
    return Call("varlink, no JSON", bytes(data) + b"\0")


def _deep(rng: random.Random, aims: Aims) -> Call:
    opening = rng.choice((b"[", b'{"a":', b'[{"a":'))
    return Call("varlink, nested", opening * (rng.randrange(1, 16_000) // len(opening)) + b"\0")


def _huge(rng: random.Random, aims: Aims) -> Call:
    return Call("varlink, too long", b" " * rng.randrange(MAX_CALL // 4, MAX_CALL * 2) + b"\0")


def _partial(rng: random.Random, aims: Aims) -> Call:
    data = _described(rng, aims).data
    return Call("varlink, partial", data[: rng.randrange(len(data))], ends=True)


def _with_descriptors(rng: random.Random, aims: Aims) -> Call:
    call = {
        "method": "org.qkilld1.Terminate",
        "parameters": {
            "pid": _value(rng, aims, Type("int"), "pid"),
            "monitorIndex": rng.randrange(-1, 6),
        },
    }
    if rng.random() < 0.5:
        call = _order(rng, aims)
    return _whole("varlink, with descriptors", call, descriptors=rng.randrange(1, 9))


def _wait(rng: random.Random, aims: Aims) -> Call:
    parameters = {"job": rng.randrange(40)}
    return _whole(
        "varlink, Wait", {"method": "org.qkilld1.Wait", "parameters": parameters, "more": True}
    )


_KINDS: Final[tuple[tuple[int, Callable[[random.Random, Aims], Call]], ...]] = (
    (30, _described),
    (20, _wrong_types),
    (15, _no_json),
    (3, _deep),
    (2, _huge),
    (5, _partial),
    (10, _with_descriptors),
    (15, _wait),
)
CALL_KINDS: Final = (
    *("varlink, as described", "varlink, of wrong types", "varlink, no JSON", "varlink, nested"),
    *("varlink, too long", "varlink, partial", "varlink, with descriptors", "varlink, Wait"),
)
