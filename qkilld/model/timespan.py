"""Parse and format time spans. Sources: systemd.time(7); systemd, src/basic/time-util.c."""

from __future__ import annotations

import re
from typing import Final

from qkilld.model.constants import INFINITY, USEC_PER_SEC
from qkilld.model.text import printable

ENDLESS: Final = 100 * 365 * 86_400 * USEC_PER_SEC
"""In a call over D-Bus or Varlink, a time span of this length (µs) or more means infinity."""

_US: Final = {
    "us": 1,
    "ms": 1_000,
    "s": 1_000_000,
    "min": 60 * 1_000_000,
    "h": 3_600 * 1_000_000,
    "d": 86_400 * 1_000_000,
    "w": 7 * 86_400 * 1_000_000,
    "month": 2_629_800 * 1_000_000,
    "y": 31_557_600 * 1_000_000,
}
"""The length of each unit in µs. A year has 365.25 days, and a month is a twelfth of a year."""

_SPELLINGS: Final = {
    "us": ("usec", "us", "µs", "μs"),
    "ms": ("msec", "ms"),
    "s": ("seconds", "second", "sec", "s"),
    "min": ("minutes", "minute", "min", "m"),
    "h": ("hours", "hour", "hr", "h"),
    "d": ("days", "day", "d"),
    "w": ("weeks", "week", "w"),
    "month": ("months", "month", "M"),
    "y": ("years", "year", "y"),
}
_BY_SPELLING: Final = {
    spelling: _US[unit] for unit, spellings in _SPELLINGS.items() for spelling in spellings
}
_UNIT: Final = "|".join(sorted(_BY_SPELLING, key=len, reverse=True))
_BLANKS: Final = " \t\r\n"
_PART: Final = re.compile(
    rf"(?P<whole>\+?[0-9]+)?(?:\.(?P<fraction>[0-9]+))?"
    rf"(?P<space>[{_BLANKS}]*)(?:(?P<unit>{_UNIT})[{_BLANKS}]*)?"
)
_LONG_MAX: Final = 2**63 - 1
"""The greatest number allowed before a unit: systemd reads it with strtoll(3)."""
_SHOWN: Final = 80
"""The maximum number of characters that a message quotes from an invalid text."""


def parse(text: str) -> int:
    """Return the span in µs of a text such as `10`, `1.5s`, `2h 30min` or `infinity`. A number
    without a unit is in seconds.

    Raises ValueError with a text for users, which says what was expected.
    """
    bare = text.strip(_BLANKS)
    if bare == "infinity":
        return INFINITY
    total = 0
    if not bare:
        raise _wrong(text)
    position = 0
    while position < len(bare):
        part = _PART.match(bare, position)
        assert part is not None  # Each part of the pattern may be empty.
        whole, fraction, unit = part["whole"], part["fraction"], part["unit"]
        position = part.end()
        if whole is None and fraction is None:
            raise _wrong(text)
        if unit is None and not part["space"] and position < len(bare):
            raise _wrong(text)  # This refuses `1.2.3` and `5x`, but not `1 2`.
        size = _BY_SPELLING[unit] if unit else _US["s"]
        digits = (whole or "").lstrip("+0") or "0"
        # Refuse very long numbers here, because int() would refuse them with another message.
        if len(digits) > len(str(_LONG_MAX)):
            raise _too_long(text)
        number = int(digits)
        if number > _LONG_MAX or number >= INFINITY // size:
            raise _too_long(text)
        total += number * size
        # Digits below 1 µs are dropped, as in systemd.
        for place, digit in enumerate((fraction or "")[:20], 1):
            total += int(digit) * (size // 10**place)
        if total >= INFINITY:
            raise _too_long(text)
    return total


def from_call(usec: int) -> int:
    """Return the span (µs) for a number in a call over D-Bus or Varlink (see ENDLESS)."""
    return INFINITY if usec >= ENDLESS else usec


def parse_seconds(text: str) -> float:
    """Return the span in seconds. Raises ValueError as `parse` does."""
    return parse(text) / USEC_PER_SEC


def format_usec(usec: int) -> str:
    """Return `1min 30s`, `1.5s`, `infinity`, `0`: the form of systemd without trailing zeros."""
    if usec == INFINITY:
        return "infinity"
    if usec == 0:
        return "0"
    words = []
    remaining = usec
    for unit in reversed(_US):
        size = _US[unit]
        whole, remainder = divmod(remaining, size)
        if not whole:
            continue
        if remaining < _US["min"] and remainder:
            digits = len(str(size)) - 1
            words.append(f"{whole}.{remainder:0{digits}d}".rstrip("0") + unit)
            break
        words.append(f"{whole}{unit}")
        remaining = remainder
    return " ".join(words)


def _wrong(text: str) -> ValueError:
    return ValueError(
        f'"{printable(text, _SHOWN)}" is not a time span; write 10, 1.5s, "2min 30s" or infinity'
    )


def _too_long(text: str) -> ValueError:
    return ValueError(
        f'"{printable(text, _SHOWN)}" is too long a time span; write infinity for no limit'
    )
