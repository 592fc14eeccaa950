"""Arguments of a command line that more than one program takes: types for argparse."""

from __future__ import annotations

from argparse import ArgumentTypeError

from qkilld.model import timespan
from qkilld.model.text import MAX_TEXT


def span(text: str) -> int:
    """A time span as systemd.time(7) has them, in µs. Raises ArgumentTypeError."""
    try:
        return timespan.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def reason(text: str) -> str:
    """Why a guest is stopped, fit for the bus. Raises ArgumentTypeError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError("it is not valid UTF-8") from None
    if len(text) > MAX_TEXT:
        raise ArgumentTypeError(f"it has {len(text)} characters, at most {MAX_TEXT} are allowed")
    return text
