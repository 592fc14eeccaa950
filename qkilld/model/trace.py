"""The record of one job, for people and for a replay.

A trace is a file of JSON lines in ASCII. The first line is the header: the format and its version,
the job, its flags and its policy. Every other line is one record: `at`, `kind`, and the
fields of the record's class. A sample has every field; null means unreadable.

In the file, `at` is relative to the job's start, which is easier to read. In objects, `at` is
CLOCK_MONOTONIC in µs, like every other time. Time spans of the policy have the form of
systemd.time(7).

Unknown fields and kinds are ignored, and a missing field gets its default. Any other change of the
format gets a new version number, which older programs refuse.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any, Final, TypeVar

from qkilld.model.codec import from_json, to_json
from qkilld.model.constants import Flag, Phase, Result, Verdict
from qkilld.model.dataclass import dataclass
from qkilld.model.job import UNCONTROLLED, Control
from qkilld.model.policy import Policy
from qkilld.model.sample import Sample

FORMAT: Final = "qkilld-trace"
VERSION: Final = 2
"""The only version that can be read. Version 1 lacks facts that the verdict needs: which sockets
are for storage according to the command line, and which descriptors threads wait for."""
MAX_BYTES: Final = 64 * 1024 * 1024
"""The maximum size of a trace in bytes."""


@dataclass(frozen=True, slots=True)
class Header:
    """The job of a trace. It contains no part of the command line except the guest's name."""

    job: int
    started: int
    """CLOCK_MONOTONIC, µs."""
    pid: int
    start_time: int
    """The start of the process, in clock ticks since boot."""
    command: str
    name: str
    """The guest's printable name; "" for none."""
    flags: Flag
    policy: Policy


@dataclass(frozen=True, slots=True)
class RungRecord:
    """A rung that was executed."""

    at: int
    phase: Phase
    signal: str
    """The name of a signal, or another action of Rung."""


@dataclass(frozen=True, slots=True)
class VerdictRecord:
    at: int
    verdict: Verdict
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChangeRecord:
    """The flags, policy and control of the job after one of them has changed."""

    at: int
    flags: Flag
    policy: Policy
    control: Control = UNCONTROLLED


@dataclass(frozen=True, slots=True)
class EndRecord:
    at: int
    result: Result


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """The end of a process that had survived its job."""

    at: int


@dataclass(frozen=True, slots=True)
class CutRecord:
    """The recording ended before the job did."""

    at: int
    why: str


Record = Sample | RungRecord | VerdictRecord | ChangeRecord | EndRecord | ExitRecord | CutRecord
_R = TypeVar("_R", bound=Record)

_KINDS: Final[dict[str, type[Any]]] = {
    "sample": Sample,
    "sent": RungRecord,
    "turned": VerdictRecord,
    "changed": ChangeRecord,
    "ended": EndRecord,
    "gone": ExitRecord,
    "cut": CutRecord,
}
_KIND_OF: Final = {cls: kind for kind, cls in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class Trace:
    header: Header
    records: tuple[Record, ...]
    """The records in the order of recording. Their times may be in another order, because a sample
    is recorded some time after it was taken."""

    def of(self, cls: type[_R]) -> list[_R]:
        """Return the records of one class."""
        return [record for record in self.records if isinstance(record, cls)]


def header_line(header: Header) -> str:
    """Return the first line of a trace, with its line break."""
    return _line({"format": FORMAT, "version": VERSION, **to_json(header)})


def record_line(header: Header, record: Record) -> str:
    """Return the line of one record, with its line break."""
    document = to_json(record)
    at = document.pop("at") - header.started
    return _line({"at": at, "kind": _KIND_OF[type(record)], **document})


def decode(text: str) -> Trace:
    """Decode the text of a trace file.

    A last line without a line break is incomplete, and is ignored. Raises a ValueError whose text
    names the line and says what is wrong, without quoting the file.
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
            raise ValueError("it is not the header of a trace of qkilld")
        version = document.get("version")
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"the version of its format is not the one that this program knows ({VERSION})"
            )
        return typing.cast(Header, from_json(Header, document, "the header"))
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
            record = from_json(cls, document, f"a record of the kind {kind}")
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
