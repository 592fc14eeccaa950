"""The options of qkilld. Reading a plain command line takes no argparse, which with all that it
imports is a twentieth of the daemon's start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from qkilld.model import timespan
from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonOptions:
    user: bool = False
    bus: str = ""
    varlink: Path | None = None
    root: Path = Path("/")
    trace_dir: Path | None = None
    exit_idle_s: float | None = None
    debug: bool = False
    check_config: bool = False


def seconds(text: str) -> float:
    """Parse a time span as in systemd.time(7). Raises ValueError."""
    return timespan.parse(text) / USEC_PER_SEC


FLAGS: Final = {"--user": "user", "--debug": "debug", "--check-config": "check_config"}
VALUES: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "--bus": ("bus", str),
    "--varlink": ("varlink", Path),
    "--root": ("root", Path),
    "--trace-dir": ("trace_dir", Path),
    "--exit-idle": ("exit_idle_s", seconds),
}


def read_plainly(argv: Sequence[str]) -> DaemonOptions | None:
    """Return the options if each is written in full, once, with its value as the next argument.

    None for everything else, errors and --help among them: that is for argparse.
    """
    found: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        if word in FLAGS:
            name, value = FLAGS[word], True
        elif word in VALUES:
            name, convert = VALUES[word]
            text = next(words, "-")
            if text.startswith("-"):
                return None
            try:
                value = convert(text)
            except ValueError:
                return None
        else:
            return None
        if name in found:
            return None
        found[name] = value
    if "user" in found and "bus" in found:
        return None
    return DaemonOptions(**found)
