"""The full command line of the daemon, with help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from qkilld import __version__
from qkilld.adapters.argument_types import SuggestingParser
from qkilld.model import timespan

_EPILOG: Final = """\
examples:
  qkilld                              serve the system bus, as root
  qkilld --user                       serve the session bus, for your own guests
  qkilld --check-config               print what is wrong with the configuration, and exit
  busctl call org.qkilld1 /org/qkilld1 org.qkilld1.Manager Terminate ut PID 1
                                      stop a guest, and allow SIGKILL

Configuration: /etc/qkilld/qkilld.conf, see qkilld.conf(5). Clients: qkillctl(1), qkilld-stop(8).
Exit codes: 0 stopped or idle, 1 the bus failed or another qkilld owns its name, 2 wrong usage or
configuration.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="qkilld",
        description="Stop QEMU guests for callers on D-Bus and Varlink without losing what they "
        "wrote.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    buses = parser.add_mutually_exclusive_group()
    buses.add_argument("--user", action="store_true", help="serve the session bus")
    buses.add_argument(
        "--bus", default="", metavar="ADDRESS", help="serve the bus at this D-Bus address"
    )
    parser.add_argument(
        "--varlink",
        type=Path,
        metavar="PATH",
        help="create a socket at this path and serve Varlink on it, too",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help="read the configuration below this directory instead of /",
    )
    parser.add_argument(
        "--trace-dir",
        type=Path,
        metavar="DIR",
        help="record each job in a file in this directory, for qkillctl replay",
    )
    parser.add_argument(
        "--exit-idle",
        type=_seconds,
        metavar="SPAN",
        help="exit when idle for this long, such as 60s; use it only if the bus can activate "
        "qkilld again",
    )
    parser.add_argument("--debug", action="store_true", help="print each failure that is ignored")
    parser.add_argument(
        "--check-config", action="store_true", help="check the configuration and exit"
    )
    parser.add_argument("--version", action="version", version=f"qkilld {__version__}")
    return parser


def _seconds(text: str) -> float:
    """Parse a time span as in systemd.time(7); return seconds."""
    try:
        return timespan.parse_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
