"""Run a qkillctl command, and turn errors into exit codes."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qkilld import log_setup
from qkilld.ctl import dry_run, listing, terminate
from qkilld.ctl.arguments import parse_arguments
from qkilld.ctl.output import Output
from qkilld.ctl.password_agent import may_ask, password_agent
from qkilld.ctl.session import Session, error_as_json, explain, open_connection
from qkilld.ctl.targets import parse
from qkilld.ctl.terminate import TargetOutcome, TerminateOptions
from qkilld.ctl.varlink_client import socket_of
from qkilld.model.bus_address import BusAddress
from qkilld.model.constants import ExitCode, Flag
from qkilld.model.errors import QkilldError
from qkilld.model.exits import INTERRUPTED
from qkilld.model.policy import JOB_SPANS, SPANS

if TYPE_CHECKING:
    from qkilld.decision.replay import Overrides

_MAY_NEED_A_PASSWORD: Final = (
    *("terminate", "cancel", "hold", "release", "extend", "force"),
    *("inspect", "trace", "status", "watch"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Raises SystemExit for usage errors and --help."""
    arguments = parse_arguments(argv)
    log_setup.set_up("qkillctl", debug=arguments.debug)
    output = Output()
    bus: BusAddress = arguments.bus
    outcomes = [TargetOutcome(text) for text in getattr(arguments, "targets", [])]
    interactive = arguments.ask_password and may_ask() and not bus.is_remote
    # An agent is useful only on the system bus, because polkit serves no other bus.
    needs_agent = interactive and bus.is_system_bus and arguments.command in _MAY_NEED_A_PASSWORD
    try:
        with password_agent(needs_agent):
            code = asyncio.run(_run(arguments, bus, output, outcomes, interactive))
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = INTERRUPTED
        output.error("interrupted")
    except QkilldError as error:
        code = error.exit_code
        output.error(explain(error, bus))
        if arguments.json:
            for outcome in outcomes:
                outcome.error = error
            failure = {"error": error_as_json(error, bus), "exit_code": int(code)}
            output.json([outcome.as_json(bus) for outcome in outcomes] if outcomes else failure)
    if output.failure is not None:
        output.error(f"cannot write to standard output: {output.failure.strerror}")
        code = code or ExitCode.FAILURE
    return int(code)


async def _run(
    arguments: argparse.Namespace,
    bus: BusAddress,
    output: Output,
    outcomes: list[TargetOutcome],
    interactive: bool,
) -> int:
    if arguments.command == "replay":
        # Imported late: it imports all of `decision`, which most commands do not need.
        from qkilld.ctl import replay

        return replay.run(output, arguments.file, _overrides(arguments), json=arguments.json)
    if arguments.command == "timeline":
        from qkilld.ctl import timeline

        return timeline.timeline(output, arguments.source, arguments.output)
    target = None
    if getattr(arguments, "target", None) is not None:
        target = parse(arguments.target, jobs=arguments.command == "status")
    if arguments.command == "history":
        from qkilld.ctl.history import history

        return history(output, target, arguments.since, json=arguments.json)
    if arguments.command == "metrics":
        from qkilld.ctl.metrics import metrics

        return await metrics(bus, output, arguments.output)
    if arguments.command == "watch":
        from qkilld.ctl.watch import watch

        return await watch(bus, output, json=arguments.json, interactive=interactive)
    async with open_connection(bus) as connection:
        varlink = getattr(arguments, "socket", None) or socket_of(bus)
        session = Session(bus, output, arguments.json, connection, interactive, varlink)
        match arguments.command:
            case "list":
                return await listing.list_guests(session)
            case "jobs":
                return await listing.list_jobs(session)
            case "status":
                if target is None:
                    return await listing.overview(session)
                return await listing.status(session, target)
            case "inspect":
                assert target is not None
                return await listing.inspect(session, target)
            case "trace":
                from qkilld.ctl import trace

                assert target is not None
                return await trace.trace(session, target)
            case "check-unit":
                from qkilld.ctl import check_unit

                return await check_unit.check_units(session, arguments.units)
            case "check-host":
                from qkilld.ctl import check_host

                return await check_host.check_host(session)
            case "adopt":
                from qkilld.ctl import adopt

                return await adopt.adopt(
                    session,
                    arguments.units,
                    dry_run=arguments.dry_run,
                    undo=arguments.undo,
                    all_units=arguments.all_units,
                    now=arguments.now,
                )
            case "terminate" if arguments.all:
                act = dry_run.plan_all if arguments.dry_run else terminate.terminate_all
                return await act(session, _terminate_options(arguments))
            case "terminate":
                if arguments.dry_run:
                    return await dry_run.plan(session, outcomes, _terminate_options(arguments))
                return await terminate.terminate(session, outcomes, _terminate_options(arguments))
            case command:
                from qkilld.ctl import control

                if command == "extend":
                    job_command = control.extension(arguments.span)
                else:
                    job_command = control.JOB_COMMANDS[command]
                return await control.control(session, outcomes, job_command, command)


def _terminate_options(arguments: argparse.Namespace) -> TerminateOptions:
    flags = Flag(0)
    if arguments.force:
        flags |= Flag.FORCE
    if arguments.fixed:
        flags |= Flag.FIXED
    if arguments.no_wait:
        flags |= Flag.NOWAIT
    options: dict[str, int | str] = {}
    for span in JOB_SPANS:
        if (usec := getattr(arguments, span.field)) is not None:
            options[span.bus_option] = usec
    if arguments.reason is not None:
        options["reason"] = arguments.reason
    if arguments.ask or arguments.powerdown_only:
        flags |= Flag.POWERDOWN
    for name in ("powerdown_only", "resume", "wake", "thaw"):
        if getattr(arguments, name):
            options[name.replace("_", "-")] = True
    if arguments.qmp_socket is not None:
        options["qmp-socket"] = arguments.qmp_socket
    return TerminateOptions(flags, arguments.wait, options)


def _overrides(arguments: argparse.Namespace) -> Overrides:
    """Return the values that a replay changes. Without an option, the recorded value applies."""
    from qkilld.decision.replay import Overrides

    add = remove = Flag(0)
    for flag, choice in ((Flag.FORCE, arguments.force), (Flag.FIXED, arguments.fixed)):
        if choice is not None:
            add, remove = (add | flag, remove) if choice else (add, remove | flag)
    changes = {
        span.field: usec for span in SPANS if (usec := getattr(arguments, span.field)) is not None
    }
    return Overrides(add, remove, changes)


if __name__ == "__main__":
    sys.exit(main())
