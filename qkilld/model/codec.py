"""Convert our dataclasses to plain JSON types and back, driven by their type hints.

A Flag becomes the list of its names, a Policy an object of time spans as in systemd.time(7), with
absurdly long ones as infinity, any other Enum its value, a tuple or set a list.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Final

from qkilld.model import timespan
from qkilld.model.constants import INFINITY, Flag
from qkilld.model.policy import Policy

_ENDLESS: Final = INFINITY // 2
"""Spans from this on (µs) are written as infinity, because systemd.time(7) cannot express some of
them."""


def to_json(value: Any) -> Any:
    if isinstance(value, Policy):
        return {f.name: _span(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Flag):
        return [str(flag.name).lower() for flag in Flag if flag in value]
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(to_json(item) for item in value)
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return value.value if isinstance(value, Enum) else value


def from_json(hint: Any, value: Any, place: str, *, strict: bool = False) -> Any:
    """Convert `value` to the type `hint`. Raises ValueError, which names `place`.

    A missing field gets its default and an unknown one is ignored; with `strict` both are errors.
    """
    decode = functools.partial(from_json, strict=strict)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        (hint,) = (one for one in arguments if one is not types.NoneType)
        return None if value is None else decode(hint, value, place)
    if origin in (tuple, frozenset):
        if not isinstance(value, list):
            raise ValueError(f"{place} is not a list")
        return origin(decode(arguments[0], item, place) for item in value)
    if origin is Mapping:
        return {key: decode(arguments[1], i, place) for key, i in _object(value, place).items()}
    if hint is Policy:
        return _policy(value, place, strict)
    if hint is Flag:
        return _flags(value, place)
    if is_dataclass(hint):
        return _dataclass(hint, value, place, strict)
    if issubclass(hint, Enum):
        for member in hint:
            if type(value) is type(member.value) and value == member.value:
                return member
        raise ValueError(f"{place} is not one of {', '.join(str(m.value) for m in hint)}")
    # In Python a bool is an int; in JSON it is not.
    if type(value) is not hint:
        raise ValueError(f"{place} is not of the type {hint.__name__}")
    return value


def _span(usec: int) -> str:
    return timespan.format_usec(usec if usec < _ENDLESS else INFINITY)


def _dataclass(cls: Any, value: Any, place: str, strict: bool) -> Any:
    document, hints = _object(value, place), _hints(cls)
    if strict and not document.keys() <= hints.keys():
        raise ValueError(f"{place} has a field that is not known")
    known = {
        name: from_json(hint, document[name], f"{place}, {name},", strict=strict)
        for name, hint in hints.items()
        if name in document
    }
    for field in fields(cls):
        optional = not strict and (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if field.name not in known and not optional:
            raise ValueError(f"{place} lacks {field.name}")
    return cls(**known)


def _policy(value: Any, place: str, strict: bool) -> Policy:
    document = _object(value, place)
    spans = {}
    for field in fields(Policy):
        if field.name in document:
            try:
                spans[field.name] = timespan.parse(str(document[field.name]))
            except ValueError:
                raise ValueError(f"{place} {field.name}, is not a time span") from None
    if strict and spans.keys() != document.keys() | {field.name for field in fields(Policy)}:
        raise ValueError(f"{place} lacks a time span, or has one that is not known")
    return Policy(**spans)


def _flags(value: Any, place: str) -> Flag:
    if not isinstance(value, list):
        raise ValueError(f"{place} is not a list")
    names = {str(flag.name).lower(): flag for flag in Flag}
    flags = Flag(0)
    for name in value:
        if not isinstance(name, str) or name not in names:
            raise ValueError(f"{place} has a flag that is not one of {', '.join(names)}")
        flags |= names[name]
    return flags


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is not an object")
    return value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)
