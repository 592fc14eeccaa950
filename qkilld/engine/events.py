"""Everything that is worth a journal entry, each with a MESSAGE_ID of its own.

The catalogue that explains them to `journalctl -x` is packaging/qkilld.catalog.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from signal import SIGKILL, Signals
from typing import TYPE_CHECKING, Final

from qkilld.model.errors import QkilldError
from qkilld.model.guest import Guest
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec
from qkilld.model.words import USEC_PER_SEC, Flag, Result, Verdict

if TYPE_CHECKING:
    from qkilld.engine.job import Job
    from qkilld.model.job import Request, Rung, Turn


class Priority(IntEnum):
    """syslog(3)."""

    ERR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


class MessageId(Enum):
    """sd_journal_print(3), sd-id128(3): 128 bits, the same for ever."""

    JOB_STARTED = "93375c572f1241ecb4db7298ec382174"
    SIGNAL_SENT = "ccad3eab18e747ca8bd4d129b46e422b"
    SIGNAL_REFUSED = "62abee31bee64db4a88fd9002b90364c"
    JOB_JOINED = "c8c755af4e2845c19090e03b3e3a13f9"
    JOB_HELD = "a851f57cd0b7424ebf499d2dd53e0f98"
    JOB_RELEASED = "22673d96e4b847b79f61214935d7ade4"
    JOB_EXTENDED = "751f26c2bdeb494fabe9468dfb1d6f67"
    JOB_FORCED = "fe4506d5abf84ff1bd46b11e479f4a20"
    JOB_RESUMED = "575356985b7542e3a54687417a1c5574"
    VERDICT_TURNED = "b5f7ec2ec2a74611bdca05783a342ee5"
    JOB_ENDED = "133dbb3477ca47cead6af608bc47d331"
    WAITER_GONE = "1f5ff25c6abd4224b9ae4c60a4145f06"
    STOP_ALONE = "c1f0507f40cf4584baa4ffa57f19fca8"
    STOP_LIMITED = "93527dfc2b7c4c21b6169eafece6a83b"
    STOP_LEFT = "ef381959bfb844e5834fb0c03d6fe765"
    STOP_OVERRUN = "125b2a8d9523474a8fd4b435ae168ab9"
    SURVIVOR_GONE = "510528c7fbaf4685a07faadc86df8447"
    DAEMON_STARTED = "880a8eefeebd4e2aaa3c6396bda9897d"
    DAEMON_STOPPING = "032598709f0d4d6cae7cfd4082fc0502"
    BUS_LOST = "60d83e4c547c45cfacf4e19d579c9823"
    TRACES_FAILED = "c6c3ace9256b422fb10fff9c5c2c71b3"
    STATE_SET_ASIDE = "d92afc3557914f139c26cb181452269e"
    STATE_FAILED = "3c8417b2ed8447dcbd17c90d388a29a8"
    MEMORY_NOT_LOCKED = "69983a44334c4f53b5ca8811a33f4297"
    NOT_STOPPED = "f27725a9e32549bc841e54b783885a6e"
    INTERNAL_ERROR = "d633f10750c743be8ac731e94b8805a9"


@dataclass(frozen=True, slots=True)
class Event:
    id: MessageId
    priority: Priority
    message: str
    """One line, printable."""
    guest: Guest | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """Further journal fields."""


_WORRYING: Final = (Verdict.STORAGE_WAIT, Verdict.BLOCKED, Verdict.STOPPED)
VERDICTS_IN_WORDS: Final = {
    Verdict.UNKNOWN: "cannot be judged",
    Verdict.GUEST_SHUTDOWN: "is shutting down",
    Verdict.FLUSHING: "is making progress",
    Verdict.STORAGE_WAIT: "waits for storage that does not move",
    Verdict.BLOCKED: "cannot be interrupted",
    Verdict.STOPPED: "is held still",
    Verdict.IDLE: "has nothing to do and does not exit",
    Verdict.ZOMBIE: "has exited",
    Verdict.GONE: "is gone",
}


def job_started(job: Job) -> Event:
    request = job.request
    reason = f': "{request.reason}"' if request.reason else ""
    return _of_job(
        job,
        MessageId.JOB_STARTED,
        Priority.INFO,
        f"Stopping {job.guest.title} for uid {request.uid}, {_ladder(job.flags)}{reason}.",
        QKILLD_FLAGS=str(int(job.flags)),
        QKILLD_REQUESTED_BY=str(request.uid),
        QKILLD_REASON=request.reason,
    )


def signal_sent(job: Job, rung: Rung) -> Event:
    return _of_job(
        job,
        MessageId.SIGNAL_SENT,
        Priority.NOTICE if rung.signal is SIGKILL else Priority.INFO,
        f"Sent {rung.signal.name} to {job.guest.title} after {_seconds(rung.at - job.started)}.",
        QKILLD_PHASE=rung.phase.value,
        QKILLD_SIGNAL=rung.signal.name,
    )


def signal_refused(job: Job, number: Signals) -> Event:
    return _of_job(
        job,
        MessageId.SIGNAL_REFUSED,
        Priority.ERR,
        f"The kernel does not let qkilld send {number.name} to {job.guest.title}.",
        QKILLD_SIGNAL=number.name,
    )


def job_joined(job: Job, request: Request) -> Event:
    return _of_job(
        job,
        MessageId.JOB_JOINED,
        Priority.INFO,
        f"Uid {request.uid} joined the stop of {job.guest.title}, now {_ladder(job.flags)}.",
        QKILLD_FLAGS=str(int(job.flags)),
        QKILLD_REQUESTED_BY=str(request.uid),
    )


def job_held(job: Job, uid: int) -> Event:
    """And released."""
    held = job.control.held
    return _of_job(
        job,
        MessageId.JOB_HELD if held else MessageId.JOB_RELEASED,
        Priority.NOTICE,
        f"Uid {uid} holds the stop of {job.guest.title}: no more signals until it is released."
        if held
        else f"Uid {uid} released the stop of {job.guest.title}: it goes on, {_ladder(job.flags)}.",
        QKILLD_REQUESTED_BY=str(uid),
    )


def job_extended(job: Job, usec: int, uid: int) -> Event:
    return _of_job(
        job,
        MessageId.JOB_EXTENDED,
        Priority.NOTICE,
        f"Uid {uid} gives {job.guest.title} at least {format_usec(usec)} more before SIGKILL.",
        QKILLD_REQUESTED_BY=str(uid),
        QKILLD_EXTENDED_USEC=str(usec),
    )


def job_forced(job: Job, uid: int) -> Event:
    return _of_job(
        job,
        MessageId.JOB_FORCED,
        Priority.NOTICE,
        f"Uid {uid} has {job.guest.title} killed now.",
        QKILLD_REQUESTED_BY=str(uid),
    )


def job_resumed(job: Job) -> Event:
    sent = ", ".join(rung.signal.name for rung in job.rungs)
    return _of_job(
        job,
        MessageId.JOB_RESUMED,
        Priority.NOTICE,
        f"Going on with the stop of {job.guest.title} for uid {job.request.uid}, "
        f"{_ladder(job.flags)}, after {_seconds(job.elapsed)}; sent so far: {sent}.",
        QKILLD_FLAGS=str(int(job.flags)),
        QKILLD_REQUESTED_BY=str(job.request.uid),
        QKILLD_ELAPSED_USEC=str(job.elapsed),
    )


def verdict_turned(job: Job, turn: Turn) -> Event:
    why = "; ".join(turn.reasons)
    return _of_job(
        job,
        MessageId.VERDICT_TURNED,
        Priority.NOTICE if turn.verdict in _WORRYING else Priority.INFO,
        f"{_capitalised(job.guest.title)} {VERDICTS_IN_WORDS[turn.verdict]}: {why}.",
        QKILLD_REASONS="\n".join(turn.reasons),
    )


def job_ended(job: Job) -> Event:
    """The receipt."""
    assert job.result is not None
    after = _seconds(job.elapsed)
    evidence = job.assessment
    why = f" ({'; '.join(evidence.reasons)})" if evidence is not None else ""
    lost = (
        "it still wrote or waited for storage, so data is at risk"
        if job.data_at_risk
        else "nothing of it was outstanding"
        if evidence is not None
        else "data may be lost"
    )
    priority, text = {
        Result.EXITED: (Priority.INFO, f"exited after {after}"),
        Result.KILLED: (Priority.WARNING, f"was killed, gone after {after}: {lost}"),
        Result.SURVIVED: (
            Priority.WARNING,
            f"is still there after {after}{why}: no more signals will be sent",
        ),
        Result.SIGNALLED: (Priority.INFO, "got its one signal, unsupervised"),
        Result.CANCELLED: (Priority.NOTICE, f"is left alone after {after}: the stop was cancelled"),
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


def _measured(job: Job) -> dict[str, str]:
    """What the evidence says in numbers, where it says something."""
    evidence = job.assessment
    numbers = {
        "QKILLD_DATA_AT_RISK": 1 if job.data_at_risk else None,
        "QKILLD_BYTES_WRITTEN": evidence.written if evidence else None,
        "QKILLD_LAST_PROGRESS_USEC": evidence.progress_at if evidence else None,
    }
    return {name: str(number) for name, number in numbers.items() if number is not None}


def survivor_gone(job: Job, now: int) -> Event:
    return _of_job(
        job,
        MessageId.SURVIVOR_GONE,
        Priority.NOTICE,
        f"{_capitalised(job.guest.title)} is gone at last, {_seconds(now - job.started)} after its "
        "stop began.",
        QKILLD_ELAPSED_USEC=str(now - job.started),
    )


def waiter_gone(job: Job) -> Event:
    return _of_job(
        job,
        MessageId.WAITER_GONE,
        Priority.WARNING,
        f"Nobody waits for the stop of {job.guest.title} any more. It goes on; but where systemd "
        "asked for it, systemd's own time limits may end the guest now.",
    )


def not_stopped(guest: Guest, uid: int, error: QkilldError) -> Event:
    """One of many that were to be stopped with one call."""
    return Event(
        MessageId.NOT_STOPPED,
        Priority.WARNING,
        f"Could not stop {guest.title}, one of all for uid {uid}: {error}.",
        guest=guest,
        fields={"QKILLD_GUEST": guest.label.name, "QKILLD_REQUESTED_BY": str(uid)},
    )


def daemon_started(version: str, where: str) -> Event:
    return Event(MessageId.DAEMON_STARTED, Priority.INFO, f"qkilld {version} serves the {where}.")


def daemon_stopping(running: int, *, to_go_on: bool = False) -> Event:
    if not running:
        left = ""
    elif to_go_on:
        left = f"; {running} jobs go on when it is started again"
    else:
        left = f"; {running} jobs are cancelled, their guests left alone"
    return Event(
        MessageId.DAEMON_STOPPING,
        Priority.WARNING if running and not to_go_on else Priority.INFO,
        f"qkilld is stopping{left}.",
    )


def daemon_idle() -> Event:
    return Event(MessageId.DAEMON_STOPPING, Priority.INFO, "qkilld has nothing to do and ends.")


def bus_lost(running: int, why: str) -> Event:
    then = (
        f"{running} jobs go on, and it ends after them unless the bus comes back"
        if running
        else "it ends, for no job is running"
    )
    return Event(MessageId.BUS_LOST, Priority.ERR, f"qkilld has lost the bus ({why}): {then}.")


def traces_failed(text: str) -> Event:
    return Event(MessageId.TRACES_FAILED, Priority.WARNING, f"{text}. The jobs themselves go on.")


def state_set_aside(name: str, why: str) -> Event:
    return Event(
        MessageId.STATE_SET_ASIDE,
        Priority.WARNING,
        f"{name} in the runtime directory is set aside: {why}. If a stop was running there, it "
        "does not go on.",
    )


def descriptor_rejected(name: str, why: str) -> Event:
    return Event(
        MessageId.STATE_SET_ASIDE,
        Priority.WARNING,
        f'The descriptor "{printable(name)}" that the service manager kept is let go of: {why}.',
    )


def state_failed(why: str) -> Event:
    return Event(
        MessageId.STATE_FAILED,
        Priority.WARNING,
        f"Stops cannot be written to the runtime directory: {why}. They go on, but would not "
        "outlive qkilld.",
    )


def memory_not_locked(why: str) -> Event:
    return Event(
        MessageId.MEMORY_NOT_LOCKED,
        Priority.NOTICE,
        f"Memory cannot be locked: {why}. Stops go on, but a disk that stalls may hold them up.",
    )


def internal_error(doing: str, error: BaseException) -> Event:
    """A fault of the program itself: the only place where a traceback goes."""
    trace = "".join(traceback.format_exception(error))
    return Event(
        MessageId.INTERNAL_ERROR,
        Priority.ERR,
        f"Internal error while {doing}: {type(error).__name__}.",
        fields={"QKILLD_TRACEBACK": trace},
    )


def _of_job(
    job: Job,
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
            "QKILLD_GUEST": job.guest.label.name,
            **fields,
            **(more or {}),
        },
    )


def _ladder(flags: Flag) -> str:
    """The flags in words."""
    if Flag.NOWAIT in flags:
        return "with SIGKILL at once" if Flag.FORCE in flags else "with SIGTERM and no supervision"
    return "by force if need be" if Flag.FORCE in flags else "without force"


def _seconds(usec: int) -> str:
    return f"{usec / USEC_PER_SEC:.3f} s"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
