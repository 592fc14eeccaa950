"""The command line of qkillctl: commands, options, and what --help teaches."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from qkilld import __version__
from qkilld.adapters import cmdline
from qkilld.ctl.session import Bus
from qkilld.model.text import MAX_TEXT

_TARGETS: Final = """\
a target is one of
  4711, pid:4711            a process id
  web, name:web             a guest's name, as given to QEMU with -name
  5f0c3c1e-…, uuid:…        a guest's UUID
  /run/web.pid, pidfile:…   a pidfile (anything with a slash)
  web.service, unit:web     the systemd unit that a guest runs in
What fits more than one guest is refused. A prefix says which kind is meant.
"""
_EXIT_CODES: Final = """\
exit codes
  0  done; for terminate --wait: gone without SIGKILL
  1  a failure, also of the bus; where it came during --wait, the guest may still run
  2  wrong usage
  3  gone only after SIGKILL: data may be lost
  4  still there: it survived, or the job was cancelled
  5  not a QEMU, or another process by now
  6  not permitted
  7  no such process, guest, unit or job, or more than one
  8  check-unit, adopt: a unit loses data, or may
  130  interrupted; the jobs go on
Of several targets the worst counts: 1, 4, 6, 5, 7, 2, 3, 8, 0 in this order.
"""
_DESCRIPTION: Final = """\
Stop QEMU guests through qkilld, and see what it is doing.

qkilld sends SIGTERM, on which QEMU writes out what it holds and exits. SIGKILL, which
loses that, is sent only with --force, and then only after a grace period.
"""
_EXAMPLES: Final = """\
examples
  qkillctl list                                who is there
  qkillctl terminate --wait web                stop it, without SIGKILL, and wait
  qkillctl terminate --wait --force web db     SIGKILL those that do not go in time
  qkillctl terminate --force --grace 2min web  but give it two minutes before that
  qkillctl terminate --all --dry-run           what would be stopped, and how
  qkillctl status web                          what is being done to it
  qkillctl cancel web                          send it no more signals
  qkillctl extend 5min web                     give it five minutes more before SIGKILL
  qkillctl hold web                            send no signal until `qkillctl release web`
  qkillctl trace web                           look at it, and stop nothing
  qkillctl replay --grace 2s job7-….jsonl      what another policy would have done
  qkillctl check-unit web.service              would a stop of this unit lose data?
  qkillctl adopt web.service                   make it safe; --undo takes it back
  qkillctl --json list                         for scripts
"""
_TERMINATE: Final = """\
Stop guests. All jobs are started first; one that cannot be started stops no other.
Without --wait the program returns as soon as they run; qkilld goes on by itself.
"""
_CHECK_UNIT: Final = """\
Ask systemd how it stops a unit, and tell what in that loses a guest's data and which lines mend
it. Without UNIT: every unit that a QEMU runs in. qkilld need not run, and nothing is changed.
The exit code is 8 where a unit loses data, or may. With --user: units of your own manager.
"""
_ADOPT: Final = """\
Write the drop-in UNIT.d/50-qkilld.conf that makes a unit safe, have systemd read it, and check the
unit again. It has only the lines that the unit needs; the unit itself is not touched and a guest
in it runs on. A scope, which has no ExecStop=, gets qkilld-scope@.service for a guard instead.
With --user: units of your own manager.
"""
_JOBS: Final = "A job is job:N or /org/qkilld1/job/N; see `qkillctl jobs`.\n"
_CONTROLS: Final = (
    (
        "cancel",
        "cancel jobs: no more signals are sent",
        "Cancel jobs. No more signals are sent; one that was sent already stays sent. Where\n"
        "systemd is stopping the guest's unit, it goes on by its own clock, to SIGKILL: there it\n"
        "is `qkillctl hold` that keeps the guest.",
    ),
    (
        "hold",
        "hold jobs: no more signals until they are released",
        "Hold jobs: no more signals are sent, and none gives up, until `qkillctl release`.\n"
        "qkilld goes on looking at the guest, and what it sees counts afterwards. A job stays\n"
        "held when you log out, and when qkilld is restarted.",
    ),
    (
        "release",
        "let held jobs go on",
        "Let jobs go on that were held. What is due by then is due.",
    ),
    (
        "extend",
        "give jobs more time before SIGKILL",
        "Give jobs more time: no SIGKILL for so long from now on, whatever the policy says. A job\n"
        "that has more time already keeps it, and one without FORCE gets no SIGKILL anyway.",
    ),
    (
        "force",
        "send SIGKILL now",
        "Send SIGKILL now to guests that are being stopped, held or not. What they have not\n"
        "written is lost.",
    ),
)
"""Name, summary, description."""
_UNITS: Final = """\
a unit is a service or a scope: web.service, web (the same), guest@db.service, guest@.service (the
template, and so all its instances), run-1234.scope
"""
_REPLAY: Final = """\
Put a trace that `qkilld --trace-dir` has recorded through the judgement once more: what would
have been done when. Options stand in place of what the job was recorded with. Nothing is asked
of the daemon, and nothing is stopped.
"""
SPANS: Final = (
    ("grace", "least time between SIGTERM and SIGKILL"),
    ("stall", "no progress and nothing outstanding for so long before SIGKILL"),
    ("storage-stall", "storage not moving for so long before SIGKILL"),
    ("max", "SIGKILL after so long in any case"),
    ("reap", "time to go after SIGKILL"),
)
JOB_SPANS: Final = SPANS[:-1]
"""Those that a job can have of its own."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises SystemExit for usage errors and --help."""
    parser = _build()
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    return arguments


def _build() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qkillctl",
        description=_DESCRIPTION,
        epilog=f"{_EXAMPLES}\n{_TARGETS}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _add_common(parser, top=True)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, summary: str, description: str = "", epilog: str = ""
    ) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            name,
            help=summary,
            description=description or f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _add_common(command, top=False)
        return command

    add("list", "list the QEMU guests of this host")
    status = add(
        "status",
        "show the daemon and its policy, or a guest or job",
        epilog=f"{_TARGETS}{_JOBS}",
    )
    status.add_argument("target", nargs="?", metavar="TARGET|JOB")
    inspect = add("inspect", "show who the process of a guest is", epilog=_TARGETS)
    inspect.add_argument("target", metavar="TARGET")
    add("jobs", "list the running and just finished jobs")
    _add_terminate(add("terminate", "stop guests", _TERMINATE, f"{_TARGETS}\n{_EXIT_CODES}"))
    for name, summary, description in _CONTROLS:
        command = add(name, summary, description, f"{_TARGETS}{_JOBS}")
        if name == "extend":
            command.add_argument(
                "span", type=cmdline.span, metavar="SPAN", help="such as 90s, 5min or infinity"
            )
        command.add_argument("targets", nargs="+", metavar="TARGET|JOB")
    look = add(
        "trace",
        "look at a guest once a second, and stop nothing",
        "Look at a guest once a second and print a line for each change, until it is gone.\n"
        "With --json each line is an object. Nothing is stopped.",
        _TARGETS,
    )
    look.add_argument("target", metavar="TARGET")
    _add_replay(add("replay", "judge a recorded job again, under another policy", _REPLAY))
    check = add(
        "check-unit",
        "tell what in a unit loses data when it is stopped",
        _CHECK_UNIT,
        _UNITS,
    )
    check.add_argument("units", nargs="*", metavar="UNIT")
    _add_adopt(add("adopt", "make a unit safe by a drop-in, or take that back", _ADOPT, _UNITS))
    return parser


def _add_adopt(command: argparse.ArgumentParser) -> None:
    command.add_argument("units", nargs="+", metavar="UNIT")
    command.add_argument(
        "--dry-run", action="store_true", help="show what would be written, and write nothing"
    )
    command.add_argument("--undo", action="store_true", help="take back what adopt has written")


def _add_replay(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE")
    for name, text in (("force", "SIGKILL is allowed"), ("fixed", "go by the clock alone")):
        command.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text
        )
    for name, text in SPANS:
        command.add_argument(f"--{name}", type=cmdline.span, metavar="SPAN", help=text)


def _add_terminate(command: argparse.ArgumentParser) -> None:
    command.add_argument("targets", nargs="*", metavar="TARGET")
    command.add_argument(
        "--all",
        action="store_true",
        help="every guest of this host that you may stop: root all of them, others their own, and "
        "all where polkit allows it",
    )
    command.add_argument(
        "--force", action="store_true", help="allow SIGKILL, once it has had its grace period"
    )
    command.add_argument(
        "--fixed",
        action="store_true",
        help="go by the clock alone: SIGKILL 10 s after SIGTERM with --force, "
        "else give up after 15 s",
    )
    waiting = command.add_mutually_exclusive_group()
    waiting.add_argument(
        "--wait", action="store_true", help="wait for the end, which the exit code then tells"
    )
    waiting.add_argument(
        "--no-wait",
        action="store_true",
        help="send one signal and watch nothing: SIGTERM, or with --force SIGKILL at once",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="tell what would be done, and send nothing"
    )
    for name, text in JOB_SPANS:
        command.add_argument(f"--{name}", type=cmdline.span, metavar="SPAN", help=text)
    command.add_argument(
        "--reason",
        type=cmdline.reason,
        metavar="TEXT",
        help=f"why, for the journal; at most {MAX_TEXT} characters",
    )


def _add_common(parser: argparse.ArgumentParser, *, top: bool) -> None:
    """The options that may stand before and after the command."""
    # Those after the command must not undo, by their default, what stands before it.
    unset = None if top else argparse.SUPPRESS
    buses = parser.add_mutually_exclusive_group()
    for name, bus, text in (
        ("--system", Bus(), "the daemon of the system (the default)"),
        ("--user", Bus(user=True), "your own daemon, on the session bus"),
    ):
        buses.add_argument(
            name, dest="bus", action="store_const", const=bus, default=unset, help=text
        )
    buses.add_argument(
        "--bus",
        type=_address,
        metavar="ADDRESS",
        default=unset,
        help="the daemon on the bus at this D-Bus address",
    )
    parser.add_argument(
        "--no-ask-password",
        dest="ask_password",
        action="store_false",
        default=True if top else argparse.SUPPRESS,
        help="do not ask for a password on the terminal for what is not yours",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        default=False if top else argparse.SUPPRESS,
        help="print one JSON document and nothing else",
    )


def _address(text: str) -> Bus:
    if not text:
        raise argparse.ArgumentTypeError("a D-Bus address is needed, such as unix:path=/run/bus")
    return Bus(address=text)


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What argparse cannot say of the options by itself. Exits with 2."""
    if arguments.command == "terminate" and arguments.all == bool(arguments.targets):
        parser.error("either TARGETs or --all are needed, to say what is to be stopped")
    if arguments.command == "terminate" and arguments.no_wait and arguments.grace is not None:
        parser.error("--grace has no meaning with --no-wait: there is only one signal")
