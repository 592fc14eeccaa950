"""The findings of a unit check, and the lines of a unit file that fix them."""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum
from typing import Final

from qkilld.model.dataclass import dataclass


class Severity(StrEnum):
    """The severity, as displayed."""

    LOSES = "loses data"
    """Every stop that takes time loses what the guest's disks have acknowledged."""
    MAY_LOSE = "may lose data"
    """The same data is lost, but only under additional circumstances."""
    ADVICE = "advice"


UNSAFE: Final = frozenset({Severity.LOSES, Severity.MAY_LOSE})


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a unit file; without a section, a command to run."""

    section: str
    """Unit, Service, Scope or ""."""
    text: str
    by_hand: bool = False
    """It changes how the unit runs, which only the owner can judge, so adopt does not write it."""
    repeats: int | None = field(default=None, compare=False)
    """The index of the unit's ExecStop= line that it repeats."""

    def __str__(self) -> str:
        return f"[{self.section}] {self.text}" if self.section else self.text


@dataclass(frozen=True, slots=True)
class Finding:
    key: str
    """For scripts; one for each kind of finding."""
    severity: Severity
    problem: str
    """What is wrong, with the unit's value. May contain any text from the unit."""
    reason: str
    """How that loses data."""
    mends: tuple[Line, ...] = ()

    @property
    def is_unsafe(self) -> bool:
        return self.severity in UNSAFE
