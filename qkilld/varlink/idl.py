"""Parse Varlink interface descriptions, and check values against them.

Source: varlink.org, "Interface Definition". The description is the source of truth: calls are
checked against it before they are interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from qkilld.model.named_tuple import NamedTuple

_TOKEN: Final = re.compile(
    r"\s*(?:#[^\n]*\n\s*)*(\[\]|\[string\]|->|[(),:?]|[A-Za-z][\w.-]*|\Z)", re.ASCII
)
_PLAIN: Final[Mapping[str, type]] = {"bool": bool, "int": int, "string": str, "object": dict}
_INT64: Final = range(-(2**63), 2**63)


class WrongValue(ValueError):
    """A value has the wrong type. `place` names the parameter that contains the value."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place


class Type(NamedTuple):
    """A type: `kind` is a key of _PLAIN, or enum, struct, list, map, maybe or named."""

    kind: str
    name: str = ""
    """For `named`: the name of a type in the interface."""
    inner: Type | None = None
    """For list, map and maybe: the type of the elements."""
    fields: Mapping[str, Type] | None = None
    """For struct: the type of each field."""
    words: frozenset[str] = frozenset()
    """For enum: the permitted values."""


class InterfaceMethod(NamedTuple):
    takes: Type
    gives: Type


class Description(NamedTuple):
    """One interface."""

    name: str
    text: str
    """The source text, as returned by GetInterfaceDescription."""
    types: Mapping[str, Type]
    methods: Mapping[str, InterfaceMethod]
    errors: Mapping[str, Type]

    def check(self, value: Any, hint: Type, place: str = "") -> None:
        """Check a value against its type. Raises WrongValue, also for unknown fields of a
        struct."""
        match hint.kind:
            case "named":
                self.check(value, self.types[hint.name], place)
            case "maybe":
                if value is not None:
                    assert hint.inner is not None
                    self.check(value, hint.inner, place)
            case "enum":
                if not isinstance(value, str) or value not in hint.words:
                    raise WrongValue(place)
            case "list":
                self._check_list(value, hint, place)
            case "map":
                self._check_map(value, hint, place)
            case "struct":
                self._check_struct(value, hint, place)
            case _:
                # Compare the exact type, because in Python, unlike in JSON, a bool is an int.
                if type(value) is not _PLAIN[hint.kind]:
                    raise WrongValue(place)
                if hint.kind == "int" and value not in _INT64:
                    raise WrongValue(place)
                if hint.kind == "string" and not _is_text(value):
                    raise WrongValue(place)

    def _check_list(self, value: Any, hint: Type, place: str) -> None:
        if not isinstance(value, list):
            raise WrongValue(place)
        assert hint.inner is not None
        for item in value:
            self.check(item, hint.inner, place)

    def _check_map(self, value: Any, hint: Type, place: str) -> None:
        if not isinstance(value, dict):
            raise WrongValue(place)
        assert hint.inner is not None
        for item in value.values():
            self.check(item, hint.inner, place)

    def _check_struct(self, value: Any, hint: Type, place: str) -> None:
        assert hint.fields is not None
        if not isinstance(value, dict):
            raise WrongValue(place)
        for name in value:
            if name not in hint.fields:
                raise WrongValue(place or name)
        for name, field in hint.fields.items():
            self.check(value.get(name), field, place or name)


def _is_text(value: Any) -> bool:
    """Return whether a string has no lone surrogate and no NUL. JSON allows both, but a NUL would
    end a path."""
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def parse(text: str) -> Description:
    """Parse an interface description. Raises ValueError."""
    return _Parser(text).description()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._next = self._read()

    def description(self) -> Description:
        self._take("interface")
        name = self._take()
        types: dict[str, Type] = {}
        methods: dict[str, InterfaceMethod] = {}
        errors: dict[str, Type] = {}
        while self._next:
            kind, member = self._take(), self._take()
            if kind == "type":
                types[member] = self._body()
            elif kind == "error":
                errors[member] = self._body()
            elif kind == "method":
                takes = self._body()
                self._take("->")
                methods[member] = InterfaceMethod(takes, self._body())
            else:
                raise ValueError(f"{kind!r} is neither a type nor a method nor an error")
        return Description(name, self._text, types, methods, errors)

    def _read(self) -> str:
        match = _TOKEN.match(self._text, self._at)
        if match is None:
            raise ValueError(f"cannot be read from {self._text[self._at : self._at + 20]!r} on")
        self._at = match.end()
        return match[1]

    def _take(self, wanted: str = "") -> str:
        token = self._next
        if not token or (wanted and token != wanted):
            raise ValueError(f"{wanted or 'more'} expected, not {token!r}")
        self._next = self._read()
        return token

    def _type(self) -> Type:
        match self._next:
            case "?" | "[]" | "[string]":
                kind = {"?": "maybe", "[]": "list", "[string]": "map"}[self._take()]
                return Type(kind, inner=self._type())
            case "(":
                return self._body()
        name = self._take()
        return Type(name) if name in _PLAIN else Type("named", name)

    def _body(self) -> Type:
        """Parse the parentheses of a struct or an enum."""
        self._take("(")
        fields: dict[str, Type] = {}
        words: set[str] = set()
        while self._next != ")":
            name = self._take()
            if self._next == ":":
                self._take()
                fields[name] = self._type()
            else:
                words.add(name)
            if self._next != ")":
                self._take(",")
        self._take(")")
        if words and fields:
            raise ValueError("either all fields must have types (a struct) or none (an enum)")
        return Type("enum", words=frozenset(words)) if words else Type("struct", fields=fields)
