"""Show the current step on stderr if that is a terminal."""

from __future__ import annotations

import sys
from typing import Final

_CLEAR_LINE: Final = "\r\x1b[K"


def show(text: str) -> None:
    """Replace the displayed line. "" removes it."""
    if sys.stderr.isatty():
        print(f"{_CLEAR_LINE}{text}", end="", file=sys.stderr, flush=True)
