"""Parse the command line of qkilld-stop, if it has arguments."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Final

from qkilld import __version__
from qkilld.adapters import argument_types
from qkilld.model.policy import JOB_SPANS
from qkilld.model.text import is_pid
from qkilld.stop.options import Options
from qkilld.stop.process import stops_unit

_EPILOG: Final = """\
In the unit of a guest, these lines are enough:

  [Service]
  ExecStart=/usr/bin/qemu-system-x86_64 ...
  ExecStop=/usr/bin/qkilld-stop
  NotifyAccess=exec

qkilld-stop lets qkilld stop the process $MAINPID (or every QEMU in the unit's control group, if
$MAINPID is not QEMU), and exits when the guest has exited. If qkilld cannot be reached, or exits
before the guest, qkilld-stop stops the guest itself. While the guest makes progress, qkilld-stop
extends TimeoutStopSec= (needs NotifyAccess=exec). `systemctl status` shows what a stop waits for.

Unless qkilld.conf has Powerdown=no, the guest's operating system is first asked to shut down. For
this, QEMU needs a monitor on a unix socket that no other program uses:

  ExecStart=/usr/bin/qemu-system-x86_64 ... -qmp unix:/run/web.qmp,server=on,wait=off

SIGTERM follows as soon as the guest is not, or no longer, shutting down. --dry-run shows whether
the guest can be asked, and `qkillctl check-unit` shows what its unit lacks.

SIGKILL is sent only if systemd would send it too: TimeoutStopSec= is not infinity, and neither
SendSIGKILL= nor KillMode= prevents it. --force and --no-force override this.

TIME is a time span such as 90s, 1min 30s or infinity.

Exit codes: 0 exited without SIGKILL or was gone already, 1 failure, 2 wrong usage, 3 exited
only after SIGKILL, 4 still there, 5 not QEMU, 6 permission denied, 7 no such unit.
"""


def parse(argv: Sequence[str]) -> Options:
    """Exit with 2 and a message if the arguments are invalid."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.json and not arguments.dry_run:
        parser.error("--json is for --dry-run")
    if not arguments.pid and arguments.pid is not None:
        # systemd expands $MAINPID to nothing if the main process is gone.
        if not stops_unit(os.environ):
            parser.error("argument --pid: expected one argument")
        arguments.pid = None if os.environ.get("MAINPID") else 0
    spans = {
        span.field: usec
        for span in JOB_SPANS
        if (usec := getattr(arguments, span.field)) is not None
    }
    return Options(
        pid=arguments.pid,
        pidfile=arguments.pidfile,
        unit=arguments.unit,
        all_guests=arguments.all_guests,
        force=arguments.force,
        powerdown=arguments.ask,
        spans=spans,
        reason=arguments.reason,
        socket=arguments.socket,
        dry_run=arguments.dry_run,
        json=arguments.json,
        debug=arguments.debug,
    )


def _unit(name: str) -> str:
    """Complete the name of a unit as systemctl does."""
    return name if name.endswith((".service", ".scope")) else f"{name}.service"


def build_parser() -> argparse.ArgumentParser:
    parser = argument_types.SuggestingParser(
        prog="qkilld-stop",
        description="Stop the QEMU guest of a systemd unit without losing what it wrote.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--pid", type=_pid, nargs="?", const=0, metavar="PID", help="stop this process"
    )
    target.add_argument(
        "--pidfile", metavar="FILE", help="stop the process whose id is in this file"
    )
    target.add_argument(
        "--unit", type=_unit, metavar="NAME", help="stop every QEMU in this service or scope"
    )
    target.add_argument(
        "--all",
        dest="all_guests",
        action="store_true",
        help="like qkilld-guests.service at shutdown, stop every QEMU, except those that are "
        "stopped by ExecStop= of their own unit",
    )
    force = parser.add_mutually_exclusive_group()
    force.add_argument(
        "--force",
        action="store_true",
        default=None,
        help="allow SIGKILL for a guest that is stuck (default: if systemd would send it too)",
    )
    force.add_argument("--no-force", dest="force", action="store_false", help="never send SIGKILL")
    powerdown = parser.add_mutually_exclusive_group()
    powerdown.add_argument(
        "--powerdown",
        dest="ask",
        action="store_true",
        default=None,
        help="first ask the guest to shut down, whatever qkilld.conf says",
    )
    powerdown.add_argument(
        "--no-powerdown", dest="ask", action="store_false", help="start with SIGTERM"
    )
    for span in JOB_SPANS:
        parser.add_argument(
            span.argument,
            dest=span.field,
            type=argument_types.span,
            metavar="TIME",
            help=span.help,
        )
    parser.add_argument(
        "--reason",
        type=argument_types.reason,
        metavar="TEXT",
        help="why the guest is stopped, for the journal",
    )
    parser.add_argument("--socket", metavar="PATH", help="connect to qkilld at this Varlink socket")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done, and do nothing"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON")
    parser.add_argument("--debug", action="store_true", help="print failures that are ignored")
    parser.add_argument("--version", action="version", version=f"qkilld-stop {__version__}")
    return parser


def _pid(text: str) -> int:
    """Return 0 for an empty text."""
    if not text:
        return 0
    if not is_pid(text):
        raise argparse.ArgumentTypeError(f'"{text[:80]}" is not the id of a process')
    return int(text)
