"""Convert our data classes to plain JSON types and back, as their type hints require.

A Flag becomes a list of names. Any other Enum becomes its value, and a tuple or set becomes a list.
A Policy becomes an object of time spans as in systemd.time(7).

Each type gets a function that converts its values. The functions are cached, because examining a
type takes longer than converting a value, and a job has 300 values.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from operator import attrgetter
from typing import Any, Final

from qkilld.model import timespan
from qkilld.model.constants import INFINITY, Flag
from qkilld.model.policy import Policy

_ENDLESS: Final = INFINITY // 2
"""Time spans of this length (µs) or more are written as infinity, because systemd.time(7) cannot
express some of them."""

_Convert = Callable[[Any], Any]


def to_json(value: Any) -> Any:
    return _ENCODERS[type(value)](value)


def from_json(hint: Any, value: Any, place: str, *, strict: bool = False) -> Any:
    """Convert `value` to the type `hint`. Raises ValueError, whose text names `place`.

    A missing field gets its default, and an unknown field is ignored. With `strict`, both are
    errors.
    """
    try:
        return _decoder(hint, strict)(value)
    except _Mismatch as error:
        path = "".join(f" {name}," for name in reversed(error.fields))
        raise ValueError(f"{place}{',' if path else ''}{path} {error.problem}") from None


class _Mismatch(Exception):
    """A value is not of the required type."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fields: list[str] = []
        """The names of the fields around the value, the innermost first."""


class _Encoders(dict[type, _Convert]):
    """The functions that convert values of a class to JSON."""

    def __missing__(self, kind: type) -> _Convert:
        encode = self[kind] = _encoder(kind)
        return encode


_ENCODERS: Final = _Encoders()


def _encoder(kind: Any) -> _Convert:
    if issubclass(kind, Policy):
        names = [field.name for field in fields(Policy)]
        return lambda value: {name: _span(getattr(value, name)) for name in names}
    if issubclass(kind, Flag):
        return lambda value: list(_names_of(value))
    if is_dataclass(kind):
        return _object_encoder(kind)
    if issubclass(kind, tuple):
        return lambda value: [_ENCODERS[type(item)](item) for item in value]
    if issubclass(kind, frozenset):
        return lambda value: sorted(to_json(item) for item in value)
    if issubclass(kind, Mapping):
        return lambda value: {key: to_json(item) for key, item in value.items()}
    if issubclass(kind, Enum):
        return attrgetter("value")
    return lambda value: value


def _object_encoder(kind: Any) -> _Convert:
    names = [field.name for field in fields(kind)]

    def encode(value: Any) -> dict[str, Any]:
        values = [(name, getattr(value, name)) for name in names]
        return {name: _ENCODERS[type(item)](item) for name, item in values}

    return encode


@functools.cache
def _decoder(hint: Any, strict: bool) -> _Convert:
    """Return the function that converts JSON to this type. The function raises _Mismatch."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        (hint,) = (one for one in arguments if one is not types.NoneType)
        decode = _decoder(hint, strict)
        return lambda value: None if value is None else decode(value)
    if origin in (tuple, frozenset):
        return _sequence_decoder(origin, _decoder(arguments[0], strict))
    if origin is Mapping:
        decode = _decoder(arguments[1], strict)
        return lambda value: {key: decode(item) for key, item in _object(value).items()}
    if hint is Policy:
        return functools.partial(_policy, strict=strict)
    if hint is Flag:
        return _flags
    if is_dataclass(hint):
        return _object_decoder(hint, strict)
    if issubclass(hint, Enum):
        return _enum_decoder(hint)
    return _plain_decoder(hint)


def _sequence_decoder(origin: Any, decode: _Convert) -> _Convert:
    def decode_all(value: Any) -> Any:
        if not isinstance(value, list):
            raise _Mismatch("is not a list")
        return origin([decode(item) for item in value])

    return decode_all


def _object_decoder(cls: Any, strict: bool) -> _Convert:
    def decode(value: Any) -> Any:
        document = _object(value)
        decoders = _field_decoders(cls, strict)
        if strict and not document.keys() <= decoders.keys():
            raise _Mismatch("has an unknown field")
        values = {}
        for name, (decode_field, optional) in decoders.items():
            if name in document:
                try:
                    values[name] = decode_field(document[name])
                except _Mismatch as error:
                    error.fields.append(name)
                    raise
            elif not optional:
                raise _Mismatch(f"lacks {name}")
        return cls(**values)

    return decode


@functools.cache
def _field_decoders(cls: Any, strict: bool) -> dict[str, tuple[_Convert, bool]]:
    """Return the function that converts each field's value, and whether the field may be missing.

    Call this when a value is converted, not when its decoder is made: for a class that has fields
    of its own type, the recursion would not end.
    """
    hints = typing.get_type_hints(cls)
    return {
        field.name: (
            _decoder(hints[field.name], strict),
            not strict
            and (
                field.default is not dataclasses.MISSING
                or field.default_factory is not dataclasses.MISSING
            ),
        )
        for field in fields(cls)
    }


def _enum_decoder(hint: type[Enum]) -> _Convert:
    members = {(type(member.value), member.value): member for member in hint}
    kinds = {kind for kind, _ in members}

    def decode(value: Any) -> Enum:
        # Compare the types, too, because True equals 1 in Python, but not in JSON.
        member = members.get((type(value), value)) if type(value) in kinds else None
        if member is None:
            raise _Mismatch(f"is not one of {', '.join(str(one.value) for one in hint)}")
        return member

    return decode


def _plain_decoder(hint: type) -> _Convert:
    def decode(value: Any) -> Any:
        # Compare the exact type, because a bool is an int in Python, but not in JSON.
        if type(value) is not hint:
            raise _Mismatch(f"is not of the type {hint.__name__}")
        return value

    return decode


def _span(usec: int) -> str:
    return timespan.format_usec(usec if usec < _ENDLESS else INFINITY)


def _policy(value: Any, strict: bool) -> Policy:
    document = _object(value)
    spans = {}
    for field in fields(Policy):
        if field.name in document:
            try:
                spans[field.name] = timespan.parse(str(document[field.name]))
            except ValueError:
                error = _Mismatch("is not a time span")
                error.fields.append(field.name)
                raise error from None
    if strict and spans.keys() != document.keys() | {field.name for field in fields(Policy)}:
        raise _Mismatch("lacks a time span, or has an unknown one")
    return Policy(**spans)


@functools.cache
def _names_of(flags: Flag) -> tuple[str, ...]:
    return tuple(str(flag.name).lower() for flag in Flag if flag in flags)


@functools.cache
def _flags_by_name() -> dict[str, Flag]:
    return {str(flag.name).lower(): flag for flag in Flag}


def _flags(value: Any) -> Flag:
    if not isinstance(value, list):
        raise _Mismatch("is not a list")
    names = _flags_by_name()
    flags = Flag(0)
    for name in value:
        if not isinstance(name, str) or name not in names:
            raise _Mismatch(f"has a flag that is not one of {', '.join(names)}")
        flags |= names[name]
    return flags


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Mismatch("is not an object")
    return value
