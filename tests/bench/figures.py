"""Measurements as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

_LABEL_WIDTH: Final = 54
_COLUMNS: Final = ("n", "min", "median", "p99", "max")


@dataclass(frozen=True, slots=True)
class Row:
    """One line: the spread of many samples, or a single value."""

    label: str
    unit: str
    """ "" for a plain number."""
    samples: Sequence[float]

    @property
    def n(self) -> int:
        return len(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p99(self) -> float:
        """Return the 99th percentile by nearest rank; the maximum if there are fewer than 100
        samples."""
        return sorted(self.samples)[math.ceil(0.99 * self.n) - 1]

    def as_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "unit": self.unit,
            "n": self.n,
            "min": min(self.samples),
            "median": self.median,
            "p99": self.p99,
            "max": max(self.samples),
        }


@dataclass(frozen=True, slots=True)
class Goal:
    """The limit for a value, and the value that was measured."""

    what: str
    wanted: str
    value: str
    met: bool


@dataclass(slots=True)
class Figure:
    """One measurement, or the reason why it is missing."""

    title: str
    rows: list[Row] = field(default_factory=list)
    targets: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_measured: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": [row.as_json() for row in self.rows],
            "targets": [dataclasses.asdict(target) for target in self.targets],
            "notes": self.notes,
            "not_measured": self.not_measured,
        }


def at_most(what: str, value: float, limit: float, unit: str) -> Goal:
    return Goal(
        what,
        f"at most {limit:g} {unit}".rstrip(),
        f"{shown(value)} {unit}".rstrip(),
        value <= limit,
    )


def at_least(what: str, value: float, limit: float, unit: str) -> Goal:
    return Goal(what, f"at least {limit:g} {unit}", f"{shown(value)} {unit}", value >= limit)


def none_of(what: str, count: int) -> Goal:
    return Goal(what, "none", str(count) if count else "none", count == 0)


def shown(value: float) -> str:
    """Format a number with about three significant digits."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(figures: Sequence[Figure]) -> str:
    """Return plain text of at most 100 columns."""
    return "\n\n".join("\n".join(_lines(figure)) for figure in figures)


def _lines(figure: Figure) -> list[str]:
    lines = [figure.title]
    many = any(row.n > 1 for row in figure.rows)
    if many:
        lines.append(" " * (_LABEL_WIDTH + 2) + "".join(f"{name:>8}" for name in _COLUMNS))
    for row in figure.rows:
        label = f"  {row.label}{row.unit and f', {row.unit}'}".ljust(_LABEL_WIDTH + 2)
        if row.n > 1:
            values = (min(row.samples), row.median, row.p99, max(row.samples))
            lines.append(f"{label}{row.n:>8}" + "".join(f"{shown(v):>8}" for v in values))
        else:
            lines.append(f"{label}{shown(row.samples[0]):>{24 if many else 8}}")
    for target in figure.targets:
        verdict = "met" if target.met else "MISSED"
        lines.append(f"  {verdict:<7} {target.what}: {target.value} (target: {target.wanted})")
    lines += [f"  {note}" for note in figure.notes]
    if figure.not_measured:
        lines.append(f"  not measured: {figure.not_measured}")
    return lines
