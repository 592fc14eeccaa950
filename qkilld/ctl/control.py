"""The commands for a job that runs: cancel, hold, release, extend and force."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from qkilld.bus.client import Job
from qkilld.ctl.follow import monotonic_usec
from qkilld.ctl.session import Session
from qkilld.ctl.stopping import Order, each, finish
from qkilld.ctl.targets import Resolver, parse
from qkilld.model.errors import NoSuchJob, QkilldError
from qkilld.model.jobview import JobView
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec


class Control(NamedTuple):
    act: Callable[[Job], Awaitable[None]]
    told: Callable[[JobView, JobView], str]
    """What has come of it, to go after `job 7 `, by the job before and after."""


def _cancelled(before: JobView, _: JobView) -> str:
    text = "cancelled: no more signals will be sent. It may still end from those it got"
    if unit := printable(str(before.properties["Unit"])):
        text += (
            f". Where systemd is stopping {unit}, it goes on by its own clock, to SIGKILL: it is"
            " `hold` in place of cancel that keeps a guest from that"
        )
    return text


def _released(before: JobView, _: JobView) -> str:
    return "released: it goes on" if before.held else "was not held: nothing has changed"


CONTROLS: Final = {
    "cancel": Control(Job.cancel, _cancelled),
    "hold": Control(
        Job.hold, lambda *_: "held: no more signals until `release`. It may still end by itself"
    ),
    "release": Control(Job.release, _released),
    "force": Control(Job.force, lambda *_: "forced: SIGKILL was sent"),
}
"""By their command."""


def extending(usec: int) -> Control:
    async def act(job: Job) -> None:
        await job.extend(usec)

    def told(before: JobView, after: JobView) -> str:
        if after.not_before and after.not_before == before.not_before:
            text = "has more time already: nothing has changed"
        elif not after.forced:
            text = "extended; without --force it gets no SIGKILL anyway"
        else:
            text = f"extended: no SIGKILL for {format_usec(usec)} from now on"
        outlook = after.outlook(monotonic_usec())
        return f"{text}; next: {outlook}" if outlook else text

    return Control(act, told)


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
        if session.json:
            return
        after = view
        with contextlib.suppress(QkilldError):  # it is done, and this is for the line about it
            after = JobView(order.job, await job.properties())
        session.output.line(f"{order.title}: job {view.id} {how.told(view, after)}")

    await each(session, orders, one)
    return finish(session, orders)
