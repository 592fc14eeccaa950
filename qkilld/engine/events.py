"""The journal entries of the engine: text and fields of each kind of event."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from signal import SIGKILL, Signals
from typing import TYPE_CHECKING, Final

from qkilld.decision.yank import CutOff
from qkilld.model.constants import (
    INFINITY,
    USEC_PER_SEC,
    Flag,
    GuestAsked,
    Phase,
    Result,
    Verdict,
)
from qkilld.model.errors import NoSuchProcess, QkilldError
from qkilld.model.event import Event, MessageId, Priority
from qkilld.model.guest import Guest, Identity, Unidentified, Unit
from qkilld.model.job import Request, Rung, VerdictChange
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec

if TYPE_CHECKING:
    from qkilld.engine.ports import ObservedJob

_WORRYING: Final = (Verdict.STORAGE_WAIT, Verdict.BLOCKED, Verdict.STOPPED)
_RESULTS_IN_WORDS: Final = {
    Result.EXITED: "exited",
    Result.KILLED: "killed",
    Result.SURVIVED: "still there",
    Result.SIGNALLED: "only signalled",
    Result.CANCELLED: "cancelled",
    Result.FAILED: "failed",
}
MAX_NAMED: Final = 10
"""The maximum number of guests that one entry names."""
NAME_UNKNOWN: Final = (
    "Its name could not be read, so each time is the longest of all sections of the configuration."
)
VERDICTS_IN_WORDS: Final = {
    Verdict.UNKNOWN: "cannot be judged",
    Verdict.GUEST_SHUTDOWN: "is shutting down",
    Verdict.FLUSHING: "is making progress",
    Verdict.STORAGE_WAIT: "waits for storage that does not move",
    Verdict.BLOCKED: "waits in a system call",
    Verdict.STOPPED: "is kept from running",
    Verdict.IDLE: "waits for nothing and does not exit",
    Verdict.ZOMBIE: "has exited",
    Verdict.GONE: "is gone",
}


def job_started(job: ObservedJob) -> Event:
    request = job.request
    reason = f': "{request.reason}"' if request.reason else ""
    unnamed = f" {NAME_UNKNOWN}" if job.guest.label.name is None else ""
    return _of_job(
        job,
        MessageId.JOB_STARTED,
        Priority.INFO,
        f"Stopping {job.guest.title} for uid {request.uid}, {_ladder(job.flags)}{reason}.{unnamed}",
        QKILLD_FLAGS=str(int(job.flags)),
        QKILLD_REQUESTED_BY=str(request.uid),
        QKILLD_REASON=request.reason,
    )


def signal_sent(job: ObservedJob, rung: Rung) -> Event:
    return _of_job(
        job,
        MessageId.SIGNAL_SENT,
        Priority.NOTICE if rung.action == SIGKILL.name else Priority.INFO,
        f"Sent {rung.action} to {job.guest.title} after {_seconds(rung.at - job.started)}.",
        QKILLD_PHASE=rung.phase.value,
        QKILLD_SIGNAL=rung.action,
    )


def guest_asked(job: ObservedJob, rung: Rung) -> Event:
    by = {"agent": "by its agent", "button": "by its power button"}.get(rung.action, rung.action)
    return _of_job(
        job,
        MessageId.GUEST_ASKED,
        Priority.INFO,
        f"Asked {job.guest.title} to shut down, {by}, after {_seconds(rung.at - job.started)}.",
        QKILLD_METHOD=rung.action,
    )


def asking_ended(job: ObservedJob, reason: str) -> Event:
    down = job.guest_asked is GuestAsked.SHUT_DOWN
    what = "has shut down" if down else "does not shut down"
    return _of_job(
        job,
        MessageId.ASKING_ENDED,
        Priority.INFO if down else Priority.NOTICE,
        f"{_capitalised(job.guest.title)} {what}: {reason}.",
        QKILLD_GUEST_ASKED=job.guest_asked.value,
    )


def disks_flushed(job: ObservedJob) -> Event:
    report = job.flush
    what = {
        "complete": "were flushed",
        "failed": "could not all be flushed",
        "partial": "were flushed in part, without reporting the errors of disks",
    }.get(report.outcome, "were not flushed before SIGTERM")
    why = f": {report.reason}" if report.reason else ""
    return _of_job(
        job,
        MessageId.DISKS_FLUSHED,
        Priority.WARNING if job.data_at_risk else Priority.INFO,
        f"The disks of {job.guest.title} {what}{why}.",
        QKILLD_FLUSH=report.outcome,
    )


def cut_off(job: ObservedJob, chosen: Sequence[CutOff]) -> Event:
    named = "; ".join(f"{', '.join(cut.disks)}: {cut.why}" for cut in chosen[:4])
    return _of_job(
        job,
        MessageId.STORAGE_CUT_OFF,
        Priority.WARNING,
        f"Cut off dead storage of {job.guest.title}, so that its other disks can be written: "
        f"{named}.",
        QKILLD_CUT_OFF="\n".join(cut.instance.name for cut in chosen),
        QKILLD_DATA_AT_RISK="1",
    )


def signal_refused(job: ObservedJob, number: Signals) -> Event:
    return _of_job(
        job,
        MessageId.SIGNAL_REFUSED,
        Priority.ERR,
        f"The kernel does not let qkilld send {number.name} to {job.guest.title}.",
        QKILLD_SIGNAL=number.name,
    )


def job_joined(job: ObservedJob, request: Request, *, took_over: bool) -> Event:
    return _of_job(
        job,
        MessageId.JOB_JOINED,
        Priority.INFO,
        f"Uid {request.uid} {'took over' if took_over else 'joined'} the stop of "
        f"{job.guest.title}, now {_ladder(job.flags)}.",
        QKILLD_FLAGS=str(int(job.flags)),
        QKILLD_REQUESTED_BY=str(request.uid),
    )


def process_changed(job: ObservedJob, now: Identity) -> Event:
    runs = printable(now.executable, 4096)
    return _of_job(
        job,
        MessageId.PROCESS_CHANGED,
        Priority.ERR,
        f"{_capitalised(job.guest.title)} is no longer a guest: it runs {runs} as uid {now.uid} "
        "now. Its job has ended, and it gets no more signals.",
        QKILLD_EXECUTABLE=runs,
        QKILLD_UID=str(now.uid),
    )


def job_held(job: ObservedJob, uid: int) -> Event:
    bound = "" if job.control.held_until == INFINITY else ", or MaxSec has passed"
    return _of_job(
        job,
        MessageId.JOB_HELD,
        Priority.NOTICE,
        f"Uid {uid} holds the stop of {job.guest.title}: no more signals until it is released"
        f"{bound}.",
        QKILLD_REQUESTED_BY=str(uid),
    )


def job_released(job: ObservedJob, by: str, uid: int | None) -> Event:
    """`by` names the caller who released the job. If a time limit ended the hold, `by` names the
    limit, and `uid` is None."""
    return _of_job(
        job,
        MessageId.JOB_RELEASED,
        Priority.NOTICE,
        f"{by} released the stop of {job.guest.title}: it continues, {_ladder(job.flags)}.",
        more={} if uid is None else {"QKILLD_REQUESTED_BY": str(uid)},
    )


def job_extended(job: ObservedJob, usec: int, uid: int) -> Event:
    return _of_job(
        job,
        MessageId.JOB_EXTENDED,
        Priority.NOTICE,
        f"Uid {uid} gives {job.guest.title} at least {format_usec(usec)} more before SIGKILL.",
        QKILLD_REQUESTED_BY=str(uid),
        QKILLD_EXTENDED_USEC=str(usec),
    )


def job_forced(job: ObservedJob, uid: int) -> Event:
    return _of_job(
        job,
        MessageId.JOB_FORCED,
        Priority.NOTICE,
        f"Killing {job.guest.title} now, requested by uid {uid}.",
        QKILLD_REQUESTED_BY=str(uid),
    )


def job_resumed(job: ObservedJob) -> Event:
    actions = ", ".join(rung.action for rung in job.rungs) or "nothing"
    return _of_job(
        job,
        MessageId.JOB_RESUMED,
        Priority.NOTICE,
        f"Resuming the stop of {job.guest.title} for uid {job.request.uid}, "
        f"{_ladder(job.flags)}, after {_seconds(job.elapsed)}; done so far: {actions}.",
        QKILLD_FLAGS=str(int(job.flags)),
        QKILLD_REQUESTED_BY=str(job.request.uid),
        QKILLD_ELAPSED_USEC=str(job.elapsed),
    )


def verdict_turned(job: ObservedJob, turn: VerdictChange) -> Event:
    why = "; ".join(turn.reasons)
    state = VERDICTS_IN_WORDS[turn.verdict]
    if job.phase is Phase.POWERDOWN and turn.verdict is Verdict.UNKNOWN:
        state = "has not shut down yet"
    return _of_job(
        job,
        MessageId.VERDICT_TURNED,
        Priority.NOTICE if turn.verdict in _WORRYING else Priority.INFO,
        f"{_capitalised(job.guest.title)} {state}: {why}.",
        QKILLD_REASONS="\n".join(turn.reasons),
    )


def job_ended(job: ObservedJob) -> Event:
    assert job.result is not None
    after = _seconds(job.elapsed)
    evidence = job.assessment
    why = f" ({'; '.join(evidence.reasons)})" if evidence is not None else ""
    lost = (
        f"data is at risk: {job.risks[0].text}" if job.data_at_risk else "nothing was outstanding"
    )
    priority, text = {
        Result.EXITED: (
            (Priority.WARNING, f"exited after {after}: {lost}")
            if job.data_at_risk
            else (Priority.INFO, f"exited after {after}")
        ),
        Result.KILLED: (
            Priority.WARNING if job.data_at_risk else Priority.NOTICE,
            f"was killed after {after}: {lost}",
        ),
        Result.SURVIVED: (
            Priority.WARNING,
            f"is still there after {after}{why}: {job.error or 'no more signals will be sent'}",
        ),
        Result.SIGNALLED: (Priority.INFO, _unsupervised(job)),
        Result.CANCELLED: (
            Priority.NOTICE,
            f"was not stopped: the job was cancelled after {after}",
        ),
        Result.FAILED: (Priority.ERR, f"could not be stopped: {job.error}"),
    }[job.result]
    return _of_job(
        job,
        MessageId.JOB_ENDED,
        priority,
        f"{_capitalised(job.guest.title)} {text}.",
        QKILLD_RESULT=job.result.value,
        QKILLD_ELAPSED_USEC=str(job.elapsed),
        more=_measured(job),
    )


def _measured(job: ObservedJob) -> dict[str, str]:
    """Return the known facts about the outcome, as journal fields."""
    evidence = job.assessment
    numbers = {
        "QKILLD_GUEST_ASKED": job.guest_asked.value,
        "QKILLD_DATA_AT_RISK": 1 if job.data_at_risk else None,
        "QKILLD_BYTES_WRITTEN": evidence.written if evidence else None,
        "QKILLD_LAST_PROGRESS_USEC": evidence.progress_at if evidence else None,
    }
    return {name: str(number) for name, number in numbers.items() if number is not None}


def stops_ended(jobs: Sequence[ObservedJob]) -> Event:
    """One entry for concurrent stops, in addition to the `job_ended` entry of each stop."""
    results = Counter(job.result for job in jobs)
    counts = [
        f"{results[result]} {word}" for result, word in _RESULTS_IN_WORDS.items() if results[result]
    ]
    at_risk = [job.guest.title for job in jobs if job.data_at_risk]
    named = ", ".join(at_risk[:MAX_NAMED]) + (", ..." if len(at_risk) > MAX_NAMED else "")
    began = min(job.started for job in jobs)
    duration = max(job.started + job.elapsed for job in jobs) - began
    risk = f"Data of {len(at_risk)} is at risk: {named}" if at_risk else "No data is at risk"
    return Event(
        MessageId.STOPS_ENDED,
        Priority.NOTICE,
        f"Stopped {len(jobs)} guests in {_seconds(duration)}: {', '.join(counts)}. {risk}.",
        fields={
            "QKILLD_STOPS": str(len(jobs)),
            "QKILLD_STOPS_AT_RISK": str(len(at_risk)),
            "QKILLD_ELAPSED_USEC": str(duration),
        },
    )


def survivor_gone(job: ObservedJob, now: int) -> Event:
    return _of_job(
        job,
        MessageId.SURVIVOR_GONE,
        Priority.NOTICE,
        f"{_capitalised(job.guest.title)} has exited at last, {_seconds(now - job.started)} after "
        "its job started.",
        QKILLD_ELAPSED_USEC=str(now - job.started),
    )


def waiter_gone(job: ObservedJob) -> Event:
    return _of_job(
        job,
        MessageId.WAITER_GONE,
        Priority.WARNING,
        f"The client that requested the stop of {job.guest.title} no longer waits. The job "
        "continues; but if the client was ExecStop= of a unit, systemd may end the guest now.",
    )


def not_stopped(guest: Guest, uid: int, error: QkilldError) -> Event:
    """TerminateAll could not stop this guest. This does no harm if the guest has just exited."""
    is_gone = isinstance(error, NoSuchProcess)
    return Event(
        MessageId.NOT_STOPPED,
        Priority.INFO if is_gone else Priority.WARNING,
        f"Failed to stop {guest.title} for uid {uid}, who requested to stop all: {error}.",
        guest=guest,
        fields={"QKILLD_GUEST": guest.label.shown_name, "QKILLD_REQUESTED_BY": str(uid)},
    )


def not_identified(processes: Sequence[Unidentified], uid: int) -> Event:
    """TerminateAll has left out these processes, because the kernel does not show their
    executables."""
    named = ", ".join(
        f"{each.pid} (unit: {_unit_in_words(each.unit)})" for each in processes[:MAX_NAMED]
    )
    more = len(processes) - MAX_NAMED
    return Event(
        MessageId.NOT_IDENTIFIED,
        Priority.WARNING,
        f"Failed to identify process {named}{f' and {more} more' if more > 0 else ''} for uid "
        f"{uid}, who requested to stop all: the kernel does not show its executable. A guest among "
        "them is not stopped.",
        fields={"QKILLD_REQUESTED_BY": str(uid)},
    )


def _unit_in_words(unit: Unit | None) -> str:
    return "unknown" if unit is None else printable(unit.name or "none")


def daemon_started(version: str, where: str) -> Event:
    return Event(MessageId.DAEMON_STARTED, Priority.INFO, f"qkilld {version} serves {where}.")


def daemon_stopping(running: int, *, to_go_on: bool = False) -> Event:
    if not running:
        consequence = ""
    elif to_go_on:
        consequence = f"; {running} jobs continue when it is started again"
    else:
        consequence = f"; {running} jobs are cancelled, and their guests get no more signals"
    return Event(
        MessageId.DAEMON_STOPPING,
        Priority.WARNING if running and not to_go_on else Priority.INFO,
        f"qkilld is stopping{consequence}.",
    )


def daemon_idle() -> Event:
    return Event(MessageId.DAEMON_STOPPING, Priority.INFO, "qkilld is idle and exits.")


def bus_lost(running: int, why: str, *, goes_on: bool) -> Event:
    """`goes_on`: Varlink is still served, because it needs no bus."""
    if goes_on:
        consequence = "it serves only Varlink until a bus appears"
    elif running:
        consequence = f"{running} jobs continue, after which it exits unless the bus is back"
    else:
        consequence = "it exits, because no job is running"
    priority, what = (Priority.NOTICE, "no") if goes_on else (Priority.ERR, "lost the")
    return Event(MessageId.BUS_LOST, priority, f"qkilld has {what} bus ({why}): {consequence}.")


def traces_failed(text: str) -> Event:
    return Event(
        MessageId.TRACES_FAILED, Priority.WARNING, f"{text}. The jobs continue without traces."
    )


def state_set_aside(name: str, why: str) -> Event:
    return Event(
        MessageId.STATE_SET_ASIDE,
        Priority.WARNING,
        f"Cannot use the saved job state {name}: {why}. If this job was running, its guest gets no "
        "more signals; see `qkillctl list`.",
    )


def descriptor_rejected(name: str, why: str) -> Event:
    return Event(
        MessageId.STATE_SET_ASIDE,
        Priority.WARNING,
        f'Closed the descriptor "{printable(name)}" that the service manager kept: {why}.',
    )


def state_failed(why: str) -> Event:
    return Event(
        MessageId.STATE_FAILED,
        Priority.WARNING,
        f"Failed to save job state: {why}. Jobs continue, but will not survive a restart.",
    )


def not_written(job: ObservedJob) -> Event:
    return _of_job(
        job,
        MessageId.NOT_WRITTEN,
        Priority.WARNING,
        f"The state of the job of {job.guest.title} is not saved yet, because saving takes long. "
        "The job continues, but would not survive a restart now.",
    )


def memory_not_locked(why: str) -> Event:
    return Event(
        MessageId.MEMORY_NOT_LOCKED,
        Priority.NOTICE,
        f"Failed to lock memory: {why}. Jobs continue, but a disk that stalls may delay them.",
    )


def entries_dropped(count: int) -> Event:
    return Event(
        MessageId.ENTRIES_DROPPED,
        Priority.WARNING,
        f"{count} entries of qkilld were lost: the journal did not accept them in time.",
        fields={"QKILLD_DROPPED": str(count)},
    )


def internal_error(doing: str, error: BaseException) -> Event:
    """A bug in this program. No other event has a traceback."""
    trace = "".join(traceback.format_exception(error))
    return Event(
        MessageId.INTERNAL_ERROR,
        Priority.ERR,
        f"Internal error while {doing}: {type(error).__name__}.",
        fields={"QKILLD_TRACEBACK": trace},
    )


def _of_job(
    job: ObservedJob,
    id: MessageId,
    priority: Priority,
    message: str,
    *,
    more: Mapping[str, str] | None = None,
    **fields: str,
) -> Event:
    return Event(
        id,
        priority,
        message,
        guest=job.guest,
        fields={
            "QKILLD_JOB": str(job.number),
            "QKILLD_PHASE": job.phase.value,
            "QKILLD_VERDICT": job.verdict.value,
            "QKILLD_GUEST": job.guest.label.shown_name,
            **fields,
            **(more or {}),
        },
    )


def _ladder(flags: Flag) -> str:
    if Flag.POWERDOWN in flags:
        return f"asking the guest first, {_ladder(flags & ~Flag.POWERDOWN & ~Flag.NOWAIT)}"
    if Flag.NOWAIT in flags:
        return "with SIGKILL at once" if Flag.FORCE in flags else "with SIGTERM and no supervision"
    return "with SIGKILL if necessary" if Flag.FORCE in flags else "without SIGKILL"


def _unsupervised(job: ObservedJob) -> str:
    """Describe how a job with NOWAIT has ended."""
    what = "was asked to shut down" if Flag.POWERDOWN in job.flags else "got one signal"
    return f"{what}, and is not watched"


def _seconds(usec: int) -> str:
    return f"{usec / USEC_PER_SEC:.3f} s"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
