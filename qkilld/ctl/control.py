"""The commands for running jobs: cancel, hold, release, extend and force."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from qkilld.bus.client import JobProxy
from qkilld.ctl.follow import monotonic_usec
from qkilld.ctl.session import Session
from qkilld.ctl.targets import Resolver, parse
from qkilld.ctl.terminate import TargetOutcome, each, finish
from qkilld.debug_log import ignore
from qkilld.model.constants import GuestAsked
from qkilld.model.errors import NoSuchJob, QkilldError
from qkilld.model.job_status import BEFORE_SIGNALS, JobStatus
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec


class JobCommand(NamedTuple):
    act: Callable[[JobProxy], Awaitable[None]]
    report: Callable[[JobStatus, JobStatus], str]
    """Takes the job's status before and after the command; returns the text that follows `job 7 `
    in the message."""


def _cancel_report(before: JobStatus, _: JobStatus) -> str:
    text = "cancelled: no more signals will be sent. The guest may still exit from an earlier one"
    if before.phase in BEFORE_SIGNALS:
        text = "cancelled: no signal will be sent"
        if before.guest_asked == GuestAsked.ASKED:
            text += ". The guest was asked, and may still shut down"
    if unit := printable(before.unit):
        text += (
            f". If systemd is stopping {unit}, systemd continues, up to SIGKILL at its timeout: to"
            " prevent that, use `hold` instead of `cancel`"
        )
    return text


def _release_report(before: JobStatus, _: JobStatus) -> str:
    return "released: the stop continues" if before.held else "was not held: nothing has changed"


JOB_COMMANDS: Final = {
    "cancel": JobCommand(JobProxy.cancel, _cancel_report),
    "hold": JobCommand(
        JobProxy.hold,
        lambda *_: "held: no more signals until `release`. The guest may still exit by itself",
    ),
    "release": JobCommand(JobProxy.release, _release_report),
    "force": JobCommand(JobProxy.force, lambda *_: "forced: SIGKILL was sent"),
}


def extension(usec: int) -> JobCommand:
    async def act(job: JobProxy) -> None:
        await job.extend(usec)

    def report(before: JobStatus, after: JobStatus) -> str:
        if after.not_before and after.not_before == before.not_before:
            text = "has more time already: nothing has changed"
        elif not after.forced:
            text = "extended; without --force, no SIGKILL is sent anyway"
        else:
            text = f"extended: no SIGKILL for {format_usec(usec)} from now on"
        outlook = after.outlook(monotonic_usec())
        return f"{text}; next: {outlook}" if outlook else text

    return JobCommand(act, report)


async def control(
    session: Session, outcomes: list[TargetOutcome], job_command: JobCommand, name: str
) -> int:
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
        # Ignore a failure: the command has succeeded, and this status is only for the message.
        with ignore(f"reading job {before.id} again", QkilldError):
            after = await job.status()
        session.output.line(f"{outcome.title}: job {before.id} {job_command.report(before, after)}")

    await each(session, outcomes, one)
    return finish(session, outcomes)
