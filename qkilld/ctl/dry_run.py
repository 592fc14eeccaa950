"""The option terminate --dry-run: print what would be done."""

from __future__ import annotations

from typing import Any

from qkilld.ctl.session import Session, explain
from qkilld.ctl.targets import Resolver, guest_rows, is_own, labels, parse
from qkilld.ctl.terminate import TargetOutcome, TerminateOptions
from qkilld.model.constants import INFINITY, Flag
from qkilld.model.errors import QkilldError
from qkilld.model.exits import worst
from qkilld.model.job_status import known, label, rungs_as_json
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec


async def plan(session: Session, outcomes: list[TargetOutcome], options: TerminateOptions) -> int:
    """Print the plan for each target; return the worst exit code."""
    resolver = Resolver(session.manager)
    documents: list[dict[str, Any]] = []
    codes: list[int] = []
    for outcome in outcomes:
        try:
            process = await resolver.find(parse(outcome.text))
            answer = await session.manager.plan(process.pid, options.flags, options.job_options)
        except QkilldError as error:
            outcome.error = error
            codes.append(error.exit_code)
            documents.append(outcome.as_json(session.bus))
            session.output.error(explain(error, session.bus))
            continue
        outcome.pid = process.pid
        planned = {key.replace("-", "_"): value for key, value in answer.items()}
        planned["rungs"] = rungs_as_json(answer["rungs"])
        planned["gives_up_usec"] = known(answer["gives-up-usec"])
        documents.append(outcome.as_json(session.bus) | planned)
        if not session.json:
            session.output.line(label(process.pid, answer["name"]))
            asks = any(name == "ask" for _, name, _ in answer["rungs"])
            for phase, name, after in answer["rungs"]:
                at = _when(after, asks=asks)
                session.output.line(f"  {printable(name)} {at} ({printable(phase)})")
            if Flag.NOWAIT not in options.flags:
                session.output.line(f"  gives up: {_when(answer['gives-up-usec'], asks=asks)}")
            for way in answer.get("ways", []):
                session.output.line(f"  asking: {printable(way)}")
            for warning in answer["warnings"]:
                session.output.line(f"  note: {printable(warning)}")
    if session.json:
        session.output.json(documents)
    return worst(codes)


async def plan_all(session: Session, options: TerminateOptions) -> int:
    """Print the plan for each guest of the caller. For guests of other users, print that
    stopping them needs an authorization."""
    uid = session.connection.uid
    guests = await guest_rows(session.manager)
    outcomes = [TargetOutcome.of_guest(guest) for guest in guests if is_own(guest, uid)]
    if foreign := [guest for guest in guests if not is_own(guest, uid)]:
        session.output.error(f"not yours, so you need authorization: {labels(foreign)}")
    if not outcomes and not session.json:
        session.output.line("No QEMU guests of yours to stop.")
    return await plan(session, outcomes, options)


def _when(usec: int, *, asks: bool) -> str:
    """Format the time (µs) of a step. `asks`: the guest is asked before this step. If
    the guest does not react, the step comes earlier than `usec`."""
    if usec in (0, INFINITY):
        return "never" if usec else "at once"
    return f"after {format_usec(usec)}{'' if asks else ' at the soonest'}"
