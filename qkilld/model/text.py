"""Make untrusted strings safe to show."""

from __future__ import annotations

from typing import Final

MAX_TEXT: Final = 256
"""Strings from untrusted processes are cut to this number of characters."""


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """Return `text` in a form that is safe in a log line and on the bus.

    Each control or format character, bidirectional override, line break, surrogate (a byte that is
    not UTF-8) and unassigned code point becomes U+FFFD. Text that is longer than `limit` characters
    is cut, and ends in an ellipsis.
    """
    if len(text) <= limit and text.isprintable():
        return text
    cleaned = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:limit])
    return cleaned[: limit - 1] + "…" if len(text) > limit else cleaned


def check_reason(text: str) -> None:
    """Raise ValueError if the reason for a stop is too long, or is not valid UTF-8, as the bus
    requires."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not valid UTF-8") from None
    if len(text) > MAX_TEXT:
        raise ValueError(f"it has {len(text)} characters, at most {MAX_TEXT} are allowed")


def is_pid(text: str) -> bool:
    """Return whether the text may be the id of a process, as a decimal number."""
    return text.isascii() and text.isdecimal() and len(text) < 11 and 0 < int(text) < 2**31


def format_bytes(count: int) -> str:
    """Return `312 bytes`, `4.1 kB`, `12.3 MB`. 1 MB is 10^6 bytes."""
    if count < 1000:
        return f"{count} bytes"
    size = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        # The limit is not 1000, because a size just below it would be rounded to "1000.0 kB".
        if size < 999.95 or unit == "TB":
            break
    return f"{size:.1f} {unit}"
