"""The options of the daemon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qkilld.debug_log import ignore
from qkilld.model import timespan
from qkilld.model.constants import USEC_PER_SEC
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

    The command line in qkilld.service is parsed without argparse, which takes a tenth of the start.
    """
    match arguments:
        case ["--exit-idle", span]:
            with ignore("parsing --exit-idle without argparse", ValueError):
                return DaemonOptions(exit_idle=timespan.parse(span) / USEC_PER_SEC)
    from qkilld.daemon_arguments import build_parser

    return DaemonOptions(**vars(build_parser().parse_args(arguments)))
