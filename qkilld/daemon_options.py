"""The options of the daemon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from qkilld.debug_log import ignore
from qkilld.model import timespan
from qkilld.model.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """See daemon_arguments for their meaning."""

    user: bool = False
    bus: str = ""
    varlink: Path | None = None
    root: Path = Path("/")
    trace_dir: Path | None = None
    exit_idle: float | None = None
    """Exit after this time without work, in seconds; None for never."""
    debug: bool = False
    check_config: bool = False


def parse(arguments: Sequence[str]) -> DaemonOptions:
    """Parse the command line; exit if it is wrong or asks for help.

    A simple command line, such as those in our units, is parsed without argparse, which would take
    a tenth of the daemon's start time.
    """
    with ignore("parsing the command line without argparse", *_NOT_SIMPLE):
        return DaemonOptions(**_parse_simple(arguments))
    from qkilld.daemon_arguments import build_parser

    return DaemonOptions(**vars(build_parser().parse_args(arguments)))


_NOT_SIMPLE: Final = (LookupError, ValueError, StopIteration)
_FLAGS: Final = ("--user", "--debug")
_VALUES: Final[dict[str, Callable[[str], Any]]] = {
    "--bus": str,
    "--varlink": Path,
    "--root": Path,
    "--trace-dir": Path,
    "--exit-idle": timespan.parse_seconds,
}


def _parse_simple(words: Sequence[str]) -> dict[str, Any]:
    """Parse options whose names are not abbreviated and whose values are separate words (`--bus
    ADDRESS`). Raises StopIteration, LookupError, ValueError."""
    found: dict[str, Any] = {}
    rest = iter(words)
    for option in rest:
        value: Any = True
        if option not in _FLAGS:
            value = _VALUES[option](text := next(rest))
            if text.startswith("-"):
                raise ValueError(text)
        found[option.removeprefix("--").replace("-", "_")] = value
    if {"user", "bus"} <= found.keys():
        raise ValueError("--user and --bus")
    return found
