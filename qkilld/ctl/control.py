"""The commands for a job that runs: cancel, hold, release, extend and force."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from qkilld.bus.client import Job
from qkilld.ctl.session import Session
from qkilld.ctl.stopping import Order, each, finish
from qkilld.ctl.targets import Resolver, parse
from qkilld.model.errors import NoSuchJob
from qkilld.model.jobview import JobView
from qkilld.model.timespan import format_usec


class Control(NamedTuple):
    act: Callable[[Job], Awaitable[None]]
    told: str
    """What has come of it, to go after `job 7 `."""


CONTROLS: Final = {
    "cancel": Control(
        Job.cancel,
        "cancelled: no more signals will be sent. It may still end from those it got",
    ),
    "hold": Control(Job.hold, "held: no more signals until `release`. It may still end by itself"),
    "release": Control(Job.release, "released: it goes on"),
    "force": Control(Job.force, "forced: SIGKILL was sent"),
}
"""By their command."""


def extending(usec: int) -> Control:
    async def act(job: Job) -> None:
        await job.extend(usec)

    return Control(act, f"extended: no SIGKILL for {format_usec(usec)} from now on")


async def control(session: Session, orders: list[Order], how: Control, command: str) -> int:
    """Do that to the running job of every target."""
    resolver = Resolver(session.manager)

    async def one(order: Order) -> None:
        order.job = await resolver.job(parse(order.text, jobs=True))
        job = session.manager.job(order.job)
        view = JobView(order.job, await job.properties())
        order.pid, order.name = view.pid, view.name
        if view.result:
            raise NoSuchJob(
                f"Job {view.id} has ended already ({view.result}): there is nothing to {command}"
            )
        await how.act(job)
        if not session.json:
            session.output.line(f"{order.title}: job {view.id} {how.told}")

    await each(session, orders, one)
    return finish(session, orders)
