"""The debug log: one line for each ignored failure.

--debug or SYSTEMD_LOG_LEVEL=debug turn it on (log_setup). Every package may use this module. The
module itself imports almost nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import logging

_NAME: Final = "qkilld"
_MAX_NOTED: Final = 4096
"""How many notes are remembered so that they are not repeated. When there are more, all are
forgotten."""

_is_on = False
_here: Final = threading.local()
_logged_keys: Final[set[tuple[object, ...]]] = set()


@contextlib.contextmanager
def ignore(doing: str, *errors: type[Exception]) -> Iterator[None]:
    """Suppress errors as contextlib.suppress does, and log a line; `doing` says what failed."""
    try:
        yield
    except errors as error:
        note(doing, error)


def note(doing: str, error: Exception) -> None:
    """Log an ignored failure."""
    import logging

    logging.getLogger(_NAME).debug("ignored while %s: %s: %s", doing, type(error).__name__, error)


def about(pid: int) -> None:
    """Set the process for later calls of `note_once` and `note_unknown` in this thread."""
    _here.pid = pid


def note_once(doing: str, why: Exception | str) -> None:
    """Log an ignored failure once for each combination of process, `doing` and kind of error.

    Use this for reads that are repeated every second. It takes almost no time if the log is off.
    """
    if not _is_on:
        return
    pid = getattr(_here, "pid", None)
    subject = doing if pid is None else f"{doing} of process {pid}"
    if isinstance(why, Exception):
        kind = (subject, type(why), getattr(why, "errno", None))
        _write_once(kind, f"ignored while {subject}: {type(why).__name__}: {why}")
    else:
        _write_once((subject, why), f"ignored while {subject}: {why}")


def note_unknown(fields: Iterable[str]) -> None:
    """Log each unknown field once for each process. Other lines of the log say why a field is
    unknown."""
    for field in fields:
        line = f"not known of process {getattr(_here, 'pid', None)}: {field}"
        _write_once((line,), line)


def is_on() -> bool:
    return _is_on


def _write_once(key: tuple[object, ...], line: str) -> None:
    if len(_logged_keys) >= _MAX_NOTED:
        _logged_keys.clear()
    if key not in _logged_keys:
        _logged_keys.add(key)
        import logging

        logging.getLogger(_NAME).debug("%s", line)


def turn_on(handler: logging.Handler) -> None:
    """Send the lines to `handler` from now on."""
    import logging

    global _is_on
    _is_on = True
    logger = logging.getLogger(_NAME)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
