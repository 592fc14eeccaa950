"""The command line of qkillctl: commands, options and --help texts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Final

from qkilld import __version__
from qkilld.adapters import argument_types
from qkilld.model.bus_address import SESSION_BUS, SYSTEM_BUS, BusAddress
from qkilld.model.policy import JOB_SPANS, SPANS
from qkilld.model.text import MAX_TEXT, printable

_TARGETS: Final = """\
a target is one of
  4711, pid:4711            a process id
  web, name:web             the name of a guest, as given to QEMU with -name
  5f0c3c1e-…, uuid:…        the UUID of a guest
  /run/web.pid, pidfile:…   a pidfile (anything with a slash)
  web.service, unit:web     the systemd unit in which a guest runs
A target that matches more than one guest is refused. A prefix selects one kind.
"""
_EXIT_CODES: Final = """\
exit codes
  0  success; for terminate --wait: the guest exited without SIGKILL
  1  a failure, also of the bus; with --wait, the guest may still be running
  2  wrong usage
  3  the guest exited only after SIGKILL: data may be lost
  4  the guest is still there: it survived, or the job was cancelled
  5  the process is not QEMU, or is another process by now
  6  permission denied
  7  no such process, guest, unit or job, or more than one matches
  8  check-unit, check-host, adopt: not safe, or not known to be safe
  130  interrupted; the jobs continue
With several targets the worst code counts, in the order 1, 4, 6, 5, 7, 2, 3, 8, 0.
"""
_DESCRIPTION: Final = """\
Stop QEMU guests through qkilld, and show what qkilld does.

qkilld sends SIGTERM, on which QEMU writes out its data and exits. SIGKILL would lose this data, and
is sent only with --force, to a QEMU that is stuck. Data that the guest's operating system has not
written is saved only if the guest shuts down: with --powerdown, qkilld asks it to do so first.
"""
_EXAMPLES: Final = """\
examples
  qkillctl list                                list the guests and what they use
  qkillctl terminate --wait web                stop web without SIGKILL, and wait
  qkillctl terminate --wait --force web db     send SIGKILL if one of them gets stuck
  qkillctl terminate --force --grace 2min web  the same, but not within two minutes
  qkillctl terminate --powerdown --wait web    ask web's operating system to shut down first
  qkillctl terminate --all --dry-run           show what would be stopped, and how
  qkillctl status web                          show web and its job
  qkillctl watch                               show all running jobs live
  qkillctl cancel web                          send web no more signals
  qkillctl extend 5min web                     no SIGKILL for another five minutes
  qkillctl hold web                            no signal until `qkillctl release web`
  qkillctl trace web                           watch web, and stop nothing
  qkillctl history --since yesterday           list past stops and how they ended
  qkillctl replay --grace 2s job7-….jsonl      show what another policy would have done
  qkillctl timeline job7-….jsonl >stop.svg     draw a stop
  qkillctl check-unit web.service              would stopping this unit lose data?
  qkillctl adopt web.service                   make the unit safe; --undo reverts this
  qkillctl --json list                         for scripts
  qkillctl -H root@host terminate --wait web   stop a guest on another host, over ssh
"""
_TERMINATE: Final = """\
Stop guests. All jobs are started before any is waited for. A job that cannot be started does
not affect the others. Without --wait, qkillctl returns as soon as the jobs have started, and qkilld
continues them.

  qkillctl terminate --powerdown --wait web
                      Ask the guest's operating system to shut down, and watch it. SIGTERM follows
                      if it does not shut down. SIGKILL is never sent.
  qkillctl terminate --powerdown --force --wait web
                      The same, with SIGKILL for a QEMU that is stuck.
  qkillctl terminate --powerdown-only --wait web
                      No signal at all, for a guest that may ask its user "save changes?"
  qkillctl terminate --wait web
                      SIGTERM only: QEMU writes out its data. Data that the guest's operating system
                      has not written is lost, as after a power failure.
"""
_CHECK_UNIT: Final = """\
Ask systemd how it stops a unit, and print the settings that lose a guest's data and the lines that
fix them. Also compare the data that a stop, a restart and a shutdown of the host keep now, and
would keep after `qkillctl adopt`. Without UNIT, check every unit in which QEMU runs. qkilld need
not run, and nothing is changed. The exit code is 8 if a unit is not safe. With --user: your own
units.
"""
_CHECK_HOST: Final = """\
Show what qkilld-guests.service would change on this host, before you enable it: the other services
that shut guests down (keepers), what stops each guest, and the order at shutdown. Nothing is
changed. The exit code is 8 if systemd's own signals stop a guest.
"""
_ADOPT: Final = """\
Write the drop-in UNIT.d/50-qkilld.conf that makes a unit safe, reload systemd, and check the unit
again. The drop-in has only the lines that the unit needs. The unit file is not changed, and a guest
in the unit keeps running. A drop-in that could keep less data than now is refused. A scope,
which cannot have an ExecStop=, gets a guard instead: qkilld-scope@.service, which stops the guest
first. With --user: your own units.
"""
_JOBS: Final = "A job is job:N or /org/qkilld1/job/N; see `qkillctl jobs`.\n"
_WATCH: Final = """\
Show all running jobs live, one line each: what the guest does, how much was written and what comes
next. On a terminal, keys hold, release, extend, force and cancel the selected job; ? explains them.
Otherwise, print a line for each change, with --json an object. qkillctl watch continues when qkilld
is restarted, and never starts qkilld.
"""
_CONTROLS: Final = (
    (
        "cancel",
        "cancel jobs: no more signals are sent",
        "Cancel jobs: no more signals are sent. A signal that was sent cannot be taken back. If\n"
        "systemd is stopping the guest's unit, systemd continues with its own signals, up to\n"
        "SIGKILL; use `qkillctl hold` to keep such a guest.",
    ),
    (
        "hold",
        "hold jobs: no more signals until they are released",
        "Hold jobs: no signal is sent and no job gives up until `qkillctl release`. qkilld\n"
        "continues to watch the guest, and time without progress counts. A hold persists when you\n"
        "log out and when qkilld is restarted.",
    ),
    (
        "release",
        "let held jobs continue",
        "Let held jobs continue. A step that has become due is taken at once.",
    ),
    (
        "extend",
        "give jobs more time before SIGKILL",
        "Give jobs more time: no SIGKILL is sent within SPAN from now, whatever the policy. A job\n"
        "that already has more time keeps it. A job without FORCE never sends SIGKILL.",
    ),
    (
        "force",
        "send SIGKILL now",
        "Send SIGKILL now to guests that are being stopped, even if their jobs are held. What\n"
        "QEMU has not written is lost.",
    ),
)
"""Name, summary, description."""
_UNITS: Final = """\
a unit is a service or a scope: web.service, web (the same), guest@db.service, guest@.service (a
template: all its instances), run-1234.scope
"""
_HISTORY: Final = """\
List past stops, one line each: when and how the stop ended, how long it took, and whether data is
at risk. Stops are read from the journal, so qkilld need not run. Select a guest by its name, its
unit or the process id that it had. TIME is a date such as 2026-11-25 or "2026-11-25 18:00", today,
yesterday, or a span before now such as 2h.
"""
_REPLAY: Final = """\
Judge a job again from the trace that `qkilld --trace-dir` recorded, and print the steps and their
times. Options override the recorded flags and policy. qkilld need not run, and nothing is stopped.
"""

_METRICS: Final = """\
Print OpenMetrics text: the numbers of running and ended stops, their results and durations, and
how many left data at risk. For the textfile collector of node_exporter:
qkillctl metrics --output /var/lib/prometheus/node-exporter/qkilld.prom
"""
_TIMELINE: Final = """\
Draw one stop as SVG: steps, verdicts, throughput and deadlines over time. FILE is a trace recorded
by `qkilld --trace-dir`. JOB is job:N or /org/qkilld1/job/N: the newest job with this number in the
journal, which records no throughput and no deadlines.
"""


_LOCAL: Final = frozenset(
    ("adopt", "check-host", "check-unit", "history", "metrics", "replay", "timeline")
)
"""Commands that use files of this host."""
_HOST: Final = re.compile(r"(?!-)[\w.@\[\]-]+(?::[0-9]{1,5})?", re.ASCII)
_MACHINE: Final = re.compile(r"(?![-.])(?:[\w.-]+@)?[\w.-]{1,64}", re.ASCII)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises SystemExit for usage errors and --help."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    # Report errors through the command's parser, which prints the usage of the command.
    command = parser.command_parser(arguments)
    _check(command, arguments)
    arguments.bus = _bus(command, arguments)
    return arguments


def build_parser() -> argument_types.SuggestingParser:
    parser = argument_types.SuggestingParser(
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

    add("list", "list the QEMU guests of this host and the resources they use")
    status = add(
        "status",
        "show the daemon and its policy, or a guest or a job",
        epilog=f"{_TARGETS}{_JOBS}",
    )
    status.add_argument("target", nargs="?", metavar="TARGET|JOB")
    inspect = add("inspect", "show a guest's process and the evidence about it", epilog=_TARGETS)
    inspect.add_argument("target", metavar="TARGET")
    add("jobs", "list running jobs and those that ended within the last minute")
    add("watch", "show all running jobs live, and control them with keys", _WATCH)
    _add_terminate(add("terminate", "stop guests", _TERMINATE, f"{_TARGETS}\n{_EXIT_CODES}"))
    for name, summary, description in _CONTROLS:
        command = add(name, summary, description, f"{_TARGETS}{_JOBS}")
        if name == "extend":
            command.add_argument(
                "span",
                type=argument_types.span,
                metavar="SPAN",
                help="such as 90s, 5min or infinity",
            )
        command.add_argument("targets", nargs="+", metavar="TARGET|JOB")
    trace = add(
        "trace",
        "watch a guest without stopping it",
        "Sample a guest once a second until it has exited, and print a line for each change. With\n"
        "--json, each line is an object. Nothing is stopped.",
        _TARGETS,
    )
    trace.add_argument("target", metavar="TARGET")
    past = add("history", "list past stops", _HISTORY)
    past.add_argument("target", nargs="?", metavar="GUEST|UNIT")
    past.add_argument("--since", metavar="TIME", help="show only stops that ended after this time")
    _add_replay(add("replay", "judge a recorded job again, with another policy", _REPLAY))
    measured = add("metrics", "print numbers about stops for a monitoring system", _METRICS)
    measured.add_argument("--output", metavar="FILE", help="replace this file as a whole")
    drawn = add("timeline", "draw one stop as a picture", _TIMELINE)
    drawn.add_argument("source", metavar="FILE|JOB")
    drawn.add_argument(
        "--output", metavar="SVG", help="write to this file instead of standard output"
    )
    check = add(
        "check-unit",
        "show which settings of a unit lose data when it is stopped",
        _CHECK_UNIT,
        _UNITS,
    )
    check.add_argument("units", nargs="*", metavar="UNIT")
    add("check-host", "show what stops each guest when the host shuts down", _CHECK_HOST)
    _add_adopt(add("adopt", "make a unit safe with a drop-in, or remove it", _ADOPT, _UNITS))
    return parser


def _add_adopt(command: argparse.ArgumentParser) -> None:
    command.add_argument("units", nargs="*", metavar="UNIT")
    command.add_argument(
        "--dry-run", action="store_true", help="print what would be written, and write nothing"
    )
    command.add_argument("--undo", action="store_true", help="remove what adopt wrote")
    command.add_argument(
        "--all",
        dest="all_units",
        action="store_true",
        help="with --undo: remove every drop-in that adopt ever wrote, and every guard of a scope",
    )
    command.add_argument(
        "--now",
        action="store_true",
        help="do not wait for running stops, whose timeout extensions systemd then forgets",
    )


def _add_replay(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE")
    for name, text in (
        ("force", "allow SIGKILL"),
        ("fixed", "use fixed times instead of evidence"),
    ):
        command.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text
        )
    for span in SPANS:
        command.add_argument(
            span.argument,
            dest=span.field,
            type=argument_types.span,
            metavar="SPAN",
            help=span.help,
        )


def _add_terminate(command: argparse.ArgumentParser) -> None:
    command.add_argument("targets", nargs="*", metavar="TARGET")
    command.add_argument(
        "--all",
        action="store_true",
        help="stop every guest that you may stop: your own (root: all), and, if polkit allows it, "
        "those of others",
    )
    command.add_argument(
        "--force",
        action="store_true",
        help="allow SIGKILL if QEMU makes no progress, or its storage does not move",
    )
    command.add_argument(
        "--fixed",
        action="store_true",
        help="use fixed times instead of evidence: with --force, send SIGKILL 10 s after SIGTERM; "
        "without it, give up after 15 s",
    )
    _add_powerdown(command)
    waiting = command.add_mutually_exclusive_group()
    waiting.add_argument(
        "--wait",
        action="store_true",
        help="wait until all jobs have ended; the exit code shows whether SIGKILL was needed. "
        "Whether data is at risk is printed; with --json, see data_at_risk of the receipt",
    )
    waiting.add_argument(
        "--no-wait",
        action="store_true",
        help="send one signal, SIGTERM or with --force SIGKILL, and do not watch the process",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print what would be done, and send nothing"
    )
    for span in JOB_SPANS:
        command.add_argument(
            span.argument,
            dest=span.field,
            type=argument_types.span,
            metavar="SPAN",
            help=span.help,
        )
    command.add_argument(
        "--reason",
        type=argument_types.reason,
        metavar="TEXT",
        help=f"why the guests are stopped, for the journal; at most {MAX_TEXT} characters",
    )


def _add_powerdown(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--powerdown",
        dest="ask",
        action="store_true",
        help="first ask the guest's own operating system to shut down, and watch it",
    )
    command.add_argument(
        "--powerdown-only",
        action="store_true",
        help="ask the guest, and send no signal if it does not shut down",
    )
    for name, text in (
        ("resume", "resume a paused or stopped (SIGSTOP) guest, so that it can be asked"),
        ("wake", "wake up a suspended guest, so that it can be asked"),
        ("thaw", "thaw the guest's file systems before its agent is asked"),
    ):
        command.add_argument(f"--{name}", action="store_true", help=text)
    command.add_argument(
        "--qmp-socket",
        metavar="PATH",
        help="the guest's QMP monitor; a socket of another process is refused",
    )
    command.add_argument(
        "--socket",
        metavar="PATH",
        help="the daemon's Varlink socket, if not the default one",
    )


def _add_common(parser: argparse.ArgumentParser, *, top: bool) -> None:
    """Add the options that are allowed before and after the command."""
    # The defaults of options after the command must not override options before the command.
    unset = None if top else argparse.SUPPRESS
    buses = parser.add_mutually_exclusive_group()
    for name, bus, text in (
        ("--system", SYSTEM_BUS, "use the daemon of the system (the default)"),
        ("--user", SESSION_BUS, "use your own daemon on the session bus"),
    ):
        buses.add_argument(
            name, dest="bus", action="store_const", const=bus, default=unset, help=text
        )
    buses.add_argument(
        "--bus",
        type=_address,
        metavar="ADDRESS",
        default=unset,
        help="use the daemon on the bus at this D-Bus address",
    )
    hosts = parser.add_mutually_exclusive_group()
    hosts.add_argument(
        *("-H", "--host"),
        type=_host,
        metavar="HOST",
        default=unset,
        help="use the daemon of another host, over ssh: [USER@]HOST[:PORT][/CONTAINER]",
    )
    hosts.add_argument(
        *("-M", "--machine"),
        type=_machine,
        metavar="CONTAINER",
        default=unset,
        help="use the daemon of a container on this host",
    )
    parser.add_argument(
        "--no-ask-password",
        dest="ask_password",
        action="store_false",
        default=True if top else argparse.SUPPRESS,
        help="do not ask for a password on this terminal",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        default=False if top else argparse.SUPPRESS,
        help="print failures that are ignored",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        default=False if top else argparse.SUPPRESS,
        help="print one JSON document and nothing else",
    )


def _address(text: str) -> BusAddress:
    if not text:
        raise argparse.ArgumentTypeError("a D-Bus address is needed, such as unix:path=/run/bus")
    return BusAddress(address=text)


def _host(text: str) -> tuple[str, str]:
    """Return the host and the container on that host; "" for no container."""
    host, slash, machine = text.partition("/")
    if not _HOST.fullmatch(host):
        raise argparse.ArgumentTypeError(f'"{printable(text)}" is not [USER@]HOST[:PORT]')
    return host, _machine(machine) if slash else ""


def _machine(text: str) -> str:
    # Allow only plain characters, because the name may be passed to a shell on another host.
    if not _MACHINE.fullmatch(text):
        raise argparse.ArgumentTypeError(f'"{printable(text)}" is not the name of a container')
    return text


def _bus(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> BusAddress:
    """Return the bus that the options select. Exits with 2 if the options contradict each other."""
    bus: BusAddress = arguments.bus or SYSTEM_BUS
    host, machine = arguments.host or ("", arguments.machine or "")
    if not host and not machine:
        return bus
    if bus.address:
        parser.error("--bus is a bus of this machine: leave out either --bus or -H and -M")
    if bus.user and host:
        parser.error("-H reaches the system bus of another host: leave out --user")
    if arguments.command in _LOCAL:
        parser.error(
            f"{arguments.command} uses local files, so -H and -M do not work: run it on the other "
            f"machine, as in `ssh HOST qkillctl {arguments.command}`"
        )
    return BusAddress(user=bus.user, host=host, machine=machine)


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Check what argparse cannot check. Exits with 2 if something is wrong."""
    if arguments.command == "terminate" and arguments.all and arguments.targets:
        targets = " ".join(map(printable, arguments.targets))
        parser.error(f"--all selects every guest: leave out either --all or {targets}")
    if arguments.command == "terminate" and not arguments.all and not arguments.targets:
        parser.error("name each TARGET to stop, or give --all")
    if arguments.command == "terminate" and arguments.no_wait and arguments.grace is not None:
        parser.error("--grace has no meaning with --no-wait: there is only one signal")
    if arguments.command == "terminate":
        _check_powerdown(parser, arguments)
    if arguments.command == "adopt":
        _check_adopt(parser, arguments)
    if arguments.command in ("metrics", "timeline") and arguments.json:
        form = "OpenMetrics text" if arguments.command == "metrics" else "SVG"
        parser.error(f"{arguments.command} prints {form}: leave out --json")


def _check_adopt(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.all_units and not arguments.undo:
        parser.error("--all is only for --undo: name the units to adopt")
    if arguments.all_units and arguments.units:
        parser.error("--all selects all adopted units: leave out either --all or UNIT")
    if not arguments.all_units and not arguments.units:
        parser.error("name each UNIT, or give --undo --all")


def _check_powerdown(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.ask or arguments.powerdown_only:
        if arguments.fixed:
            parser.error("--fixed uses no evidence: leave out either --fixed or --powerdown")
        if arguments.force and (arguments.no_wait or arguments.powerdown_only):
            parser.error("--force has no meaning here: a guest that is asked gets no signal")
        if arguments.all and arguments.qmp_socket is not None:
            parser.error("--qmp-socket belongs to one guest: name that guest instead of --all")
        return
    for name in ("resume", "wake", "thaw", "qmp_socket", "powerdown"):
        if getattr(arguments, name):
            option = "powerdown-sec" if name == "powerdown" else name.replace("_", "-")
            parser.error(f"--{option} has no meaning without --powerdown")
