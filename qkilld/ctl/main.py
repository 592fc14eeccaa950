"""qkillctl: from the command line to what is run, and from an error to an exit code."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qkilld.ctl import commands, planning, stopping
from qkilld.ctl.agent import may_ask, password_agent
from qkilld.ctl.arguments import JOB_SPANS, SPANS, parse_arguments
from qkilld.ctl.output import Output
from qkilld.ctl.session import Bus, Session, error_as_json, explain, open_connection
from qkilld.ctl.stopping import How, Order
from qkilld.ctl.targets import parse
from qkilld.model.errors import QkilldError
from qkilld.model.exits import INTERRUPTED
from qkilld.model.words import ExitCode, Flag

if TYPE_CHECKING:
    from qkilld.judgement.replay import Terms

_MAY_NEED_A_PASSWORD: Final = (
    *("terminate", "cancel", "hold", "release", "extend", "force"),
    *("inspect", "trace", "status"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run qkillctl and return its exit code. Raises SystemExit for usage errors and --help."""
    arguments = parse_arguments(argv)
    # dbus_next and asyncio log a lost connection, which is told below in its own words.
    logging.getLogger().addHandler(logging.NullHandler())
    output = Output()
    bus = arguments.bus or Bus()
    orders = [Order(text) for text in getattr(arguments, "targets", [])]
    interactive = arguments.ask_password and may_ask()
    # On another bus than the system's polkit has no say.
    wanted = interactive and bus == Bus() and arguments.command in _MAY_NEED_A_PASSWORD
    try:
        with password_agent(wanted):
            code = asyncio.run(_run(arguments, bus, output, orders, interactive))
    except KeyboardInterrupt:
        code = INTERRUPTED
        output.error("interrupted")
    except QkilldError as error:
        code = error.exit_code
        output.error(explain(error, bus))
        if arguments.json:
            for order in orders:
                order.error = error
            failure = {"error": error_as_json(error, bus), "exit_code": int(code)}
            output.json([order.as_json(bus) for order in orders] if orders else failure)
    if output.failure is not None:
        output.error(f"cannot write to standard output: {output.failure.strerror}")
        code = code or ExitCode.FAILURE
    return int(code)


async def _run(
    arguments: argparse.Namespace,
    bus: Bus,
    output: Output,
    orders: list[Order],
    interactive: bool,
) -> int:
    if arguments.command == "replay":
        # The whole judgement, which no other command needs.
        from qkilld.ctl import replay

        return replay.run(output, arguments.file, _terms(arguments), json=arguments.json)
    target = None
    if getattr(arguments, "target", None) is not None:
        target = parse(arguments.target, jobs=arguments.command == "status")
    async with open_connection(bus) as connection:
        session = Session(bus, output, arguments.json, connection, interactive)
        match arguments.command:
            case "list":
                return await commands.list_guests(session)
            case "jobs":
                return await commands.list_jobs(session)
            case "status":
                if target is None:
                    return await commands.overview(session)
                return await commands.status(session, target)
            case "inspect":
                assert target is not None
                return await commands.inspect(session, target)
            case "trace":
                from qkilld.ctl import trace

                assert target is not None
                return await trace.trace(session, target)
            case "check-unit":
                from qkilld.ctl import units

                return await units.check_units(session, arguments.units)
            case "adopt":
                from qkilld.ctl import adopt

                return await adopt.adopt(
                    session, arguments.units, dry_run=arguments.dry_run, undo=arguments.undo
                )
            case "terminate" if arguments.all:
                from qkilld.ctl import everything

                act = everything.plan if arguments.dry_run else everything.terminate
                return await act(session, _how(arguments))
            case "terminate":
                if arguments.dry_run:
                    return await planning.plan(session, orders, _how(arguments))
                return await stopping.terminate(session, orders, _how(arguments))
            case command:
                from qkilld.ctl import control

                if command == "extend":
                    how = control.extending(arguments.span)
                else:
                    how = control.CONTROLS[command]
                return await control.control(session, orders, how, command)


def _how(arguments: argparse.Namespace) -> How:
    flags = Flag(0)
    if arguments.force:
        flags |= Flag.FORCE
    if arguments.fixed:
        flags |= Flag.FIXED
    if arguments.no_wait:
        flags |= Flag.NOWAIT
    options: dict[str, int | str] = {}
    for name, _ in JOB_SPANS:
        if (span := getattr(arguments, name.replace("-", "_"))) is not None:
            options[f"{name}-usec"] = span
    if arguments.reason is not None:
        options["reason"] = arguments.reason
    return How(flags, arguments.wait, options)


def _terms(arguments: argparse.Namespace) -> Terms:
    """What a trace is replayed with. An option that is not given leaves what was recorded."""
    from qkilld.judgement.replay import Terms

    add = remove = Flag(0)
    for flag, wanted in ((Flag.FORCE, arguments.force), (Flag.FIXED, arguments.fixed)):
        if wanted is not None:
            add, remove = (add | flag, remove) if wanted else (add, remove | flag)
    spans = {name.replace("-", "_") for name, _ in SPANS}
    given = {name: span for name in spans if (span := getattr(arguments, name)) is not None}
    return Terms(add, remove, given)


if __name__ == "__main__":
    sys.exit(main())
