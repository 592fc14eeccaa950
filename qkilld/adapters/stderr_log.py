"""The debug log on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Final

from qkilld.adapters.background import BackgroundWriter
from qkilld.adapters.journal_stream import stderr_is_journal
from qkilld.model.text import printable

QUEUE_LENGTH: Final = 4096
MAX_LINE: Final = 2000
_DEBUG_PREFIX: Final = "<7>"
"""The priority of a line, as a prefix for journald: sd-daemon(3)."""


class StderrHandler(logging.Handler):
    """Writes in its own thread, because writing blocks while journald does not read."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._prefix = f"{_DEBUG_PREFIX if stderr_is_journal() else ''}{program}: debug: "
        self._writer: BackgroundWriter[str] = BackgroundWriter("debug", _write, QUEUE_LENGTH)

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.put(self._prefix + printable(record.getMessage(), MAX_LINE))

    def close(self) -> None:
        """Write the queued lines; logging.shutdown() calls this at the end of the program."""
        self._writer.close()
        super().close()


def _write(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
