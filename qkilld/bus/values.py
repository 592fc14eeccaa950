"""Parse the values in the body of a message. Source: D-Bus specification, "Marshaling".

D-Bus libraries keep every signature that they have ever parsed, so variants sent by a stranger
would fill the memory (183 MB for one message of 1 MiB, measured with dbus-next). The cache of this
parser is bounded.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, Final, Literal

from qkilld.model.dataclass import dataclass

MAX_DEPTH: Final = 12
"""The maximum nesting depth of arrays, structures and variants. systemd's deepest value has 5."""

_NUMBERS: Final = {
    "y": ("B", 1),
    "n": ("h", 2),
    "q": ("H", 2),
    "i": ("i", 4),
    "u": ("I", 4),
    "h": ("I", 4),
    "x": ("q", 8),
    "t": ("Q", 8),
    "d": ("d", 8),
}
_ALIGNED: Final = {
    **{kind: size for kind, (_, size) in _NUMBERS.items()},
    "b": 4,
    "s": 4,
    "o": 4,
    "g": 1,
    "a": 4,
    "v": 1,
    "(": 8,
    "{": 8,
}
_CLOSED: Final = {"(": ")", "{": "}"}


@dataclass(frozen=True, slots=True)
class VariantValue:
    signature: str
    value: Any


def parse(
    signature: str, body: bytes, order: Literal["<", ">"] = "<", *, max_depth: int = MAX_DEPTH
) -> list[Any]:
    """Parse a body. An `ay` is returned as bytes, a dictionary as a dict, a variant as a
    VariantValue, and a structure or any other array as a list.

    Takes time in proportion to the length of the body. Raises ValueError if the body does not match
    the signature.
    """
    reader = _BodyReader(body, order, max_depth)
    try:
        values = [reader.value(one, 0) for one in split(signature)]
    except (IndexError, struct.error, TypeError) as error:
        raise ValueError(f"the body does not match its signature: {error}") from None
    if reader.at != len(body):
        raise ValueError("the body is longer than its signature")
    return values


@functools.lru_cache(maxsize=512)
def split(signature: str) -> tuple[str, ...]:
    """Split a signature into its complete types. Raises ValueError."""
    types, at = [], 0
    while at < len(signature):
        end = _end(signature, at)
        types.append(signature[at:end])
        at = end
    return tuple(types)


def _end(signature: str, at: int) -> int:
    """Return the end of the complete type that begins at `at`."""
    while signature[at : at + 1] == "a":
        at += 1
    kind = signature[at : at + 1]
    if kind not in _CLOSED:
        if kind not in _ALIGNED:
            raise ValueError(f"no type begins with {kind!r}")
        return at + 1
    depth = 0
    for index in range(at, len(signature)):
        if signature[index] in "({":
            depth += 1
        elif signature[index] in ")}":
            depth -= 1
            if not depth:
                return index + 1
    raise ValueError("a structure that does not end")


class _BodyReader:
    def __init__(self, body: bytes, order: str, max_depth: int) -> None:
        self._body = body
        self._order = order
        self._max_depth = max_depth
        self.at = 0

    def value(self, kind: str, depth: int) -> Any:
        first = kind[0]
        self.at += -self.at & (_ALIGNED[first] - 1)
        if first in _NUMBERS:
            return self._number(*_NUMBERS[first])
        match first:
            case "s" | "o":
                return self._text(self._number("I", 4))
            case "b":
                return bool(self._number("I", 4))
            case "g":
                return self._text(self._number("B", 1))
        if depth >= self._max_depth:
            raise ValueError("values that are nested too deeply")
        match first:
            case "v":
                signature = self._text(self._number("B", 1))
                (inner,) = split(signature)
                return VariantValue(signature, self.value(inner, depth + 1))
            case "a":
                return self._array(kind[1:], depth + 1)
        return [self.value(one, depth + 1) for one in split(kind[1:-1])]

    def _array(self, kind: str, depth: int) -> Any:
        length = self._number("I", 4)
        self.at += -self.at & (_ALIGNED[kind[0]] - 1)
        end = self.at + length
        if end > len(self._body):
            raise ValueError("an array that is longer than the body")
        if kind == "y":
            data = self._body[self.at : end]
            self.at = end
            return data
        if kind[0] == "{":
            key, value = split(kind[1:-1])
            entries = {}
            while self.at < end:
                self.at += -self.at & 7
                name = self.value(key, depth)
                entries[name] = self.value(value, depth)
            items: Any = entries
        else:
            items = []
            while self.at < end:
                before = self.at
                items.append(self.value(kind, depth))
                if self.at == before:
                    raise ValueError("an array of nothing")
        if self.at != end:
            raise ValueError("an array that ends within a value")
        return items

    def _number(self, code: str, size: int) -> Any:
        (number,) = struct.unpack_from(self._order + code, self._body, self.at)
        self.at += size
        return number

    def _text(self, length: int) -> str:
        end = self.at + length
        if end >= len(self._body):
            raise ValueError("a text that is longer than the body")
        text = self._body[self.at : end].decode()
        self.at = end + 1
        return text
