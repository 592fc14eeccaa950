"""What a check of a unit finds, and the lines of a unit file that mend it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Severity(StrEnum):
    """How bad it is, as it is shown."""

    LOSES = "loses data"
    """Every stop that takes its time loses what the guest's disks have acknowledged."""
    MAY_LOSE = "may lose data"
    """So does a stop under some circumstance more."""
    ADVICE = "advice"


UNSAFE: Final = frozenset({Severity.LOSES, Severity.MAY_LOSE})


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a unit file, or where it has no section a command to be run."""

    section: str
    """Unit, Service, Scope or ""."""
    text: str
    by_hand: bool = False
    """It changes how the unit runs, which only its owner can judge: adopt does not write it."""

    def __str__(self) -> str:
        return f"[{self.section}] {self.text}" if self.section else self.text


@dataclass(frozen=True, slots=True)
class Finding:
    key: str
    """For scripts; one for each kind."""
    severity: Severity
    what: str
    """What is wrong, with the unit's own value. May hold any text of the unit's."""
    why: str
    """How that loses data."""
    mends: tuple[Line, ...] = ()

    @property
    def is_unsafe(self) -> bool:
        return self.severity in UNSAFE
