"""What a job was asked for, and what it did: data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from signal import Signals
from typing import Final

from qkilld.model.words import Flag, Phase, Verdict


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asked for."""

    flags: Flag
    spans: Mapping[str, int] = field(default_factory=dict)
    """Fields of Policy in µs, in place of the configured ones."""
    reason: str = ""
    """Printable."""
    uid: int = 0
    """Whose request it is."""


@dataclass(frozen=True, slots=True)
class Control:
    """What callers have said of a running job, beyond their requests."""

    held: bool = False
    """No further rung, until it is released."""
    not_before: int = 0
    """No SIGKILL before; CLOCK_MONOTONIC, µs."""


UNCONTROLLED: Final = Control()


@dataclass(frozen=True, slots=True)
class Rung:
    """A signal that was sent."""

    phase: Phase
    signal: Signals
    at: int
    """CLOCK_MONOTONIC, µs."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A change of the verdict."""

    verdict: Verdict
    reasons: tuple[str, ...]
    at: int
    """CLOCK_MONOTONIC, µs."""
