"""terminate --dry-run: what would be done, and nothing is."""

from __future__ import annotations

from typing import Any

from qkilld.ctl.session import Session, explain
from qkilld.ctl.stopping import How, Order
from qkilld.ctl.targets import Resolver, parse
from qkilld.model.errors import QkilldError
from qkilld.model.exits import worst
from qkilld.model.jobview import label
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec
from qkilld.model.words import INFINITY, Flag


async def plan(session: Session, orders: list[Order], how: How) -> int:
    """For each target; the exit code is that of the worst."""
    resolver = Resolver(session.manager)
    documents: list[dict[str, Any]] = []
    codes: list[int] = []
    for order in orders:
        try:
            found = await resolver.find(parse(order.text))
            seen = await session.manager.plan(found.pid, how.flags, how.options)
        except QkilldError as error:
            order.error = error
            codes.append(error.exit_code)
            documents.append(order.as_json(session.bus))
            session.output.error(explain(error, session.bus))
            continue
        order.pid = found.pid
        planned = {key.replace("-", "_"): value for key, value in seen.items()}
        documents.append(order.as_json(session.bus) | planned)
        if not session.json:
            session.output.line(label(found.pid, seen["name"]))
            for phase, name, after in seen["rungs"]:
                at = f"after {format_usec(after)} at the soonest" if after else "at once"
                session.output.line(f"  {name} {at} ({phase})")
            if Flag.NOWAIT not in how.flags:
                session.output.line(f"  gives up: {_after(seen['gives-up-usec'])}")
            for warning in seen["warnings"]:
                session.output.line(f"  note: {printable(warning)}")
    if session.json:
        session.output.json(documents)
    return worst(codes)


def _after(usec: int) -> str:
    return "never" if usec == INFINITY else f"after {format_usec(usec)} at the soonest"
