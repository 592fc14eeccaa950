"""Set up logging for a program: --debug and SYSTEMD_LOG_LEVEL, as in systemd's own programs."""

from __future__ import annotations

import os
from typing import Final

from qkilld import debug_log

_DEBUG_LEVELS: Final = ("debug", "7")


def set_up(program: str, *, debug: bool) -> None:
    """Start the debug log of `program` if requested. Call it once."""
    silence()
    if debug or os.environ.get("SYSTEMD_LOG_LEVEL") in _DEBUG_LEVELS:
        from qkilld.adapters.stderr_log import StderrHandler

        debug_log.turn_on(StderrHandler(program))


def silence() -> None:
    """Add a handler. Without a handler, Python prints warnings and tracebacks of dbus_next and
    asyncio. May be called again."""
    import logging

    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())
