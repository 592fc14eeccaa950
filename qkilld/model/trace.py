"""The record of one job, for people to read and for the judgement to replay.

A trace is a file of JSON lines in ASCII. The first is the header: the format and its version, whose
job it is, its flags and its policy. Every other is one record: its `at`, its `kind`, and the fields
of the class of that kind, by name. A sample has every field, null for what could not be read.

`at` counts in the file from the job's start, which is easier to read; here it is CLOCK_MONOTONIC in
µs like every other time. Time spans of the policy are as in systemd.time(7).

A field or kind that this version does not know is passed over, and a field that is missing has its
default: what cannot be understood that way comes with a higher version, and only that is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, Final, TypeVar

from qkilld.model import timespan
from qkilld.model.evidence import Sample
from qkilld.model.policy import Policy
from qkilld.model.words import Flag, Phase, Result, Verdict

FORMAT: Final = "qkilld-trace"
VERSION: Final = 1
MAX_BYTES: Final = 64 * 1024 * 1024
"""Of one trace."""


@dataclass(frozen=True, slots=True)
class Header:
    """Whose job it is. Nothing of the guest's command line but its name."""

    job: int
    started: int
    """CLOCK_MONOTONIC, µs."""
    pid: int
    start_time: int
    """Of the process, in clock ticks since boot."""
    command: str
    name: str
    """The guest's, printable; "" for none."""
    flags: Flag
    policy: Policy


@dataclass(frozen=True, slots=True)
class Sent:
    """A rung."""

    at: int
    phase: Phase
    signal: str
    """SIGTERM, SIGCONT or SIGKILL."""


@dataclass(frozen=True, slots=True)
class Turned:
    """A change of the verdict."""

    at: int
    verdict: Verdict
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """Another request has joined the job."""

    at: int
    flags: Flag
    policy: Policy


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of the job."""

    at: int
    result: Result


@dataclass(frozen=True, slots=True)
class Gone:
    """The end of a process that had survived its job."""

    at: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Nothing was recorded from here on."""

    at: int
    why: str


_R = TypeVar("_R", bound="Record")

Record = Sample | Sent | Turned | Changed | Ended | Gone | Cut

_KINDS: Final[dict[str, type[Any]]] = {
    "sample": Sample,
    "sent": Sent,
    "turned": Turned,
    "changed": Changed,
    "ended": Ended,
    "gone": Gone,
    "cut": Cut,
}
_KIND_OF: Final = {cls: kind for kind, cls in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class Trace:
    header: Header
    records: tuple[Record, ...]
    """In the order in which they were recorded. A sample may come late."""

    def of(self, cls: type[_R]) -> list[_R]:
        """The records of one class."""
        return [record for record in self.records if isinstance(record, cls)]


def header_line(header: Header) -> str:
    """The first line of a trace, with its line break."""
    return _line({"format": FORMAT, "version": VERSION, **_to_json(header)})


def record_line(header: Header, record: Record) -> str:
    """Any other line, with its line break."""
    document = _to_json(record)
    at = document.pop("at") - header.started
    return _line({"at": at, "kind": _KIND_OF[type(record)], **document})


def decode(text: str) -> Trace:
    """The trace that the lines of a file hold.

    A last line without a line break was being written and does not count. Raises ValueError, whose
    text names the line and says what is wrong with it; it holds nothing of the file's own words.
    """
    lines = text.split("\n")[:-1]
    if not lines:
        raise ValueError("it is empty")
    header = _header(lines[0])
    return Trace(header, tuple(_records(header, lines[1:])))


def _header(line: str) -> Header:
    try:
        document = _parsed(line)
        if document.get("format") != FORMAT:
            raise ValueError("it is not the header of a trace of qkilld's")
        version = document.get("version")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(
                f"the version of its format is not one that this program knows (1 to {VERSION})"
            )
        return typing.cast(Header, _from_json(Header, document, "the header"))
    except ValueError as error:
        raise ValueError(f"line 1: {error}") from None


def _records(header: Header, lines: list[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 2):
        try:
            document = _parsed(line)
            kind = document.get("kind")
            cls = _KINDS.get(kind) if isinstance(kind, str) else None
            if cls is None:
                continue
            record = _from_json(cls, document, f"a record of the kind {kind}")
            yield dataclasses.replace(record, at=record.at + header.started)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None


def _line(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=True, separators=(",", ":")) + "\n"


def _parsed(line: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")
    return document


def _to_json(value: Any) -> Any:
    if isinstance(value, Policy):
        return {f.name: timespan.format_usec(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Flag):
        return [str(flag.name).lower() for flag in Flag if flag in value]
    if is_dataclass(value):
        return {field.name: _to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _from_json(hint: Any, value: Any, where: str) -> Any:
    """The value of that type. Raises ValueError, which tells the place by `where`."""
    if typing.get_origin(hint) is types.UnionType:
        (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
        return None if value is None else _from_json(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is not a list")
        return tuple(_from_json(typing.get_args(hint)[0], item, where) for item in value)
    if hint is Policy:
        return _policy(value, where)
    if hint is Flag:
        return _flags(value, where)
    if is_dataclass(hint):
        return _dataclass(hint, value, where)
    if issubclass(hint, Enum):
        for member in hint:
            if value == member.value:
                return member
        raise ValueError(f"{where} is not one of {', '.join(member.value for member in hint)}")
    # A bool is an int to Python and not to anybody else.
    if type(value) is not hint:
        raise ValueError(f"{where} is not of the type {hint.__name__}")
    return value


def _dataclass(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    hints = _hints(cls)
    known = {
        field.name: _from_json(hints[field.name], value[field.name], f"{where}, {field.name},")
        for field in fields(cls)
        if field.name in value
    }
    for field in fields(cls):
        if field.name not in known and field.default is dataclasses.MISSING:
            raise ValueError(f"{where} lacks {field.name}")
    return cls(**known)


def _policy(value: Any, where: str) -> Policy:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    spans = {}
    for field in fields(Policy):
        if field.name in value:
            try:
                spans[field.name] = timespan.parse(str(value[field.name]))
            except ValueError:
                raise ValueError(f"{where} {field.name}, is not a time span") from None
    return Policy(**spans)


def _flags(value: Any, where: str) -> Flag:
    if not isinstance(value, list):
        raise ValueError(f"{where} is not a list")
    names = {str(flag.name).lower(): flag for flag in Flag}
    flags = Flag(0)
    for name in value:
        if not isinstance(name, str) or name not in names:
            raise ValueError(f"{where} has a flag that is not one of {', '.join(names)}")
        flags |= names[name]
    return flags


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)
