"""Strings of other people's, made fit to be passed on."""

from __future__ import annotations

from typing import Final

MAX_TEXT: Final = 256
"""Characters kept of a string that a process says of itself."""


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """`text` as it may go into a log line or onto the bus.

    Control and format characters, bidirectional overrides, line breaks, surrogates (bytes that are
    no UTF-8) and unassigned code points each become one U+FFFD; what is longer than `limit`
    characters is cut and ends in an ellipsis.
    """
    cleaned = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:limit])
    return cleaned[: limit - 1] + "…" if len(text) > limit else cleaned
