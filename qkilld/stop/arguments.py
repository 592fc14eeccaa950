"""The command line of qkilld-stop."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from qkilld import __version__
from qkilld.adapters import cmdline
from qkilld.stop.options import Options

SPANS: Final = {
    "grace": ("grace-usec", "least time between SIGTERM and SIGKILL"),
    "stall": ("stall-usec", "no progress and nothing outstanding for so long before SIGKILL"),
    "storage_stall": ("storage-stall-usec", "storage not moving for so long before SIGKILL"),
    "max": ("max-usec", "SIGKILL after so long whatever the evidence"),
}

_EPILOG: Final = """\
In the unit of a guest this is all that is needed:

  [Service]
  ExecStart=/usr/bin/qemu-system-x86_64 ...
  ExecStop=/usr/bin/qkilld-stop
  NotifyAccess=exec

It takes the guest from $MAINPID, or where the main process is no QEMU from the unit's own control
group, has qkilld stop it and returns when it is gone. Where qkilld cannot be asked, or goes away
half-way, it does the same itself. While the guest makes progress it extends TimeoutStopSec=, which
NotifyAccess=exec allows it to; `systemctl status` shows what it waits for.

SIGKILL is sent only where systemd would send it too: TimeoutStopSec= is not infinity, SendSIGKILL=
and KillMode= are not changed to keep it from that. --force and --no-force say otherwise.

Exit codes: 0 gone without SIGKILL (or was gone already), 1 failure, 2 wrong usage, 3 gone only
after SIGKILL, 4 still there, 5 not a QEMU, 6 not permitted, 7 no such unit.
"""


def parse(argv: Sequence[str]) -> Options:
    """Exits with 2 and says why where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="qkilld-stop",
        description="Stops the QEMU guest of a systemd unit without losing what it wrote.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--pid", type=_pid, metavar="PID", help="stop this process")
    target.add_argument("--pidfile", metavar="FILE", help="stop the process that it names")
    target.add_argument("--unit", metavar="NAME", help="stop every QEMU of this service or scope")
    target.add_argument(
        "--all",
        dest="everyone",
        action="store_true",
        help="stop every QEMU that no ExecStop= of its own unit takes care of, as "
        "qkilld-guests.service does at shutdown",
    )
    force = parser.add_mutually_exclusive_group()
    force.add_argument(
        "--force",
        action="store_true",
        default=None,
        help="allow SIGKILL for a guest that is stuck (default: where systemd would send it too)",
    )
    force.add_argument("--no-force", dest="force", action="store_false", help="never send SIGKILL")
    for name, (_, text) in SPANS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=cmdline.span, metavar="TIME", help=f"{text}, as 1min 30s")
    parser.add_argument(
        "--reason", type=cmdline.reason, metavar="TEXT", help="why, for the journal"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and do nothing"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    parser.add_argument("--version", action="version", version=f"qkilld-stop {__version__}")
    given = parser.parse_args(argv)
    if given.json and not given.dry_run:
        parser.error("--json is for --dry-run")
    spans = {
        option: usec
        for name, (option, _) in SPANS.items()
        if (usec := getattr(given, name)) is not None
    }
    return Options(
        given.pid,
        given.pidfile,
        given.unit,
        given.everyone,
        given.force,
        spans,
        given.reason,
        given.dry_run,
        given.json,
    )


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 11 and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f'"{text[:80]}" is not the id of a process')
    return int(text)
