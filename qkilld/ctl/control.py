"""The commands for running jobs: cancel, hold, release, extend and force."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from qkilld.bus.client import JobProxy
from qkilld.ctl.follow import monotonic_usec
from qkilld.ctl.session import Session
from qkilld.ctl.targets import Resolver, parse
from qkilld.ctl.terminate import TargetOutcome, each, finish
from qkilld.debug_log import ignore
from qkilld.model.errors import NoSuchJob, QkilldError
from qkilld.model.job_status import JobStatus
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec


class JobCommand(NamedTuple):
    act: Callable[[JobProxy], Awaitable[None]]
    report: Callable[[JobStatus, JobStatus], str]
    """Makes the message after `job 7 ` from the job's status before and after."""


def _cancel_report(before: JobStatus, _: JobStatus) -> str:
    text = "cancelled: no more signals will be sent. It may still end from those it got"
    if unit := printable(before.unit):
        text += (
            f". Where systemd is stopping {unit}, it goes on by its own clock, to SIGKILL: it is"
            " `hold` in place of cancel that keeps a guest from that"
        )
    return text


def _release_report(before: JobStatus, _: JobStatus) -> str:
    return "released: it goes on" if before.held else "was not held: nothing has changed"


JOB_COMMANDS: Final = {
    "cancel": JobCommand(JobProxy.cancel, _cancel_report),
    "hold": JobCommand(
        JobProxy.hold,
        lambda *_: "held: no more signals until `release`. It may still end by itself",
    ),
    "release": JobCommand(JobProxy.release, _release_report),
    "force": JobCommand(JobProxy.force, lambda *_: "forced: SIGKILL was sent"),
}
"""By command name."""


def extension(usec: int) -> JobCommand:
    async def act(job: JobProxy) -> None:
        await job.extend(usec)

    def report(before: JobStatus, after: JobStatus) -> str:
        if after.not_before and after.not_before == before.not_before:
            text = "has more time already: nothing has changed"
        elif not after.forced:
            text = "extended; without --force it gets no SIGKILL anyway"
        else:
            text = f"extended: no SIGKILL for {format_usec(usec)} from now on"
        outlook = after.outlook(monotonic_usec())
        return f"{text}; next: {outlook}" if outlook else text

    return JobCommand(act, report)


async def control(
    session: Session, outcomes: list[TargetOutcome], job_command: JobCommand, name: str
) -> int:
    """Carry out the command for the running job of each target."""
    resolver = Resolver(session.manager)

    async def one(outcome: TargetOutcome) -> None:
        outcome.job = await resolver.job(parse(outcome.text, jobs=True))
        job = session.manager.job(outcome.job)
        before = await job.status()
        outcome.pid, outcome.name = before.pid, before.name
        if before.result:
            raise NoSuchJob(
                f"Job {before.id} has ended already ({before.result}): there is nothing to {name}"
            )
        await job_command.act(job)
        if session.json:
            return
        after = before
        # The command has succeeded; the status is only for the message.
        with ignore(f"reading job {before.id} again", QkilldError):
            after = await job.status()
        session.output.line(f"{outcome.title}: job {before.id} {job_command.report(before, after)}")

    await each(session, outcomes, one)
    return finish(session, outcomes)
