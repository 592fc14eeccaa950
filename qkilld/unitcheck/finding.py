"""The findings of a unit check, and the lines of a unit file that fix them."""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum
from typing import Final

from qkilld.model.dataclass import dataclass


class Severity(StrEnum):
    """A finding's severity, as displayed."""

    LOSES = "loses data"
    """Every stop that takes long loses data that the guest's disks have acknowledged."""
    MAY_LOSE = "may lose data"
    """Acknowledged data is lost only if something else fails or the host is slow."""
    ADVICE = "advice"


UNSAFE: Final = frozenset({Severity.LOSES, Severity.MAY_LOSE})


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a unit file or, if it has no section, a command for the administrator to run."""

    section: str
    """The section: Unit, Service, Scope or ""."""
    text: str
    by_hand: bool = False
    """adopt does not write the line, because it changes how the unit runs, and only the owner can
    judge that."""
    repeats: int | None = field(default=None, compare=False)
    """The index of the unit's ExecStop= command that this line repeats. If the command is
    qkilld-stop, the line may have other prefixes."""
    is_resolved: bool = field(default=False, compare=False)
    """The line contains text in which systemd has replaced the specifiers, so it is right for only
    one instance of a template."""

    def __str__(self) -> str:
        return f"[{self.section}] {self.text}" if self.section else self.text


@dataclass(frozen=True, slots=True)
class Finding:
    key: str
    """The kind of finding, for scripts."""
    severity: Severity
    problem: str
    """What is wrong. May contain any text from the unit."""
    reason: str
    """How the problem loses data."""
    fixes: tuple[Line, ...] = ()

    @property
    def is_unsafe(self) -> bool:
        return self.severity in UNSAFE
