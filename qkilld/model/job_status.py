"""The status of a job, and how it is shown to users. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from qkilld.model.constants import (
    INFINITY,
    UNKNOWN,
    USEC_PER_SEC,
    Flag,
    GuestAsked,
    NextRung,
    Phase,
    Result,
    Verdict,
)
from qkilld.model.dataclass import dataclass
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec

BEFORE_SIGNALS: Final = (Phase.POWERDOWN, Phase.QUIT)
_ASKED: Final[dict[str, str]] = {
    GuestAsked.SHUT_DOWN: "its system has shut down",
    GuestAsked.IGNORED: "its system was asked to shut down and did not",
    GuestAsked.ASKED: "its system was asked to shut down; whether it did is unknown",
    GuestAsked.DEAF: "nothing in it listened to the power button",
    GuestAsked.UNREACHABLE: "it could not be asked to shut down",
    GuestAsked.NOT_RUNNING: "it was not running, so it could not be asked to shut down",
}
"""Phrases for the result of asking the guest. Results without a phrase are not mentioned."""
_BEFORE_SIGNALS: Final[dict[str, str]] = {
    GuestAsked.NOT_ASKED: "is about to be asked",
    GuestAsked.SHUT_DOWN: "has shut down",
    GuestAsked.IGNORED: "did not shut down",
    GuestAsked.DEAF: "cannot be asked",
    GuestAsked.UNREACHABLE: "cannot be asked",
    GuestAsked.NOT_RUNNING: "cannot be asked",
}
"""Phrases for the time before the first signal, keyed by the present result of asking the guest."""
_ASKED_BY: Final = {
    "agent": "its agent was asked to shut it down",
    "button": "its power button was pressed",
    "virsh": "libvirt was told to shut it down",
}
"""Phrases for rungs that are not signals."""
_STATES: Final[dict[str, str]] = {
    Verdict.UNKNOWN: "SIGTERM sent",
    Verdict.FLUSHING: "flushes",
    Verdict.STORAGE_WAIT: "waits for storage",
    Verdict.BLOCKED: "waits in a system call",
    Verdict.STOPPED: "is kept from running",
    Verdict.IDLE: "idle, does not exit",
    Verdict.ZOMBIE: "has exited",
    Verdict.GONE: "is gone",
}
"""Phrases for the time after SIGTERM, keyed by the verdict."""
_GIVES_UP: Final = "gives up"
_SHOWN_RISKS: Final = 3
MOVES_FOR: Final = 6 * USEC_PER_SEC
"""The maximum age (µs) of progress that counts as current. Disks write back in bursts up to 5 s
apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A job at one moment. Times are CLOCK_MONOTONIC in µs.

    `phase`, `verdict` and `result` may be words that only a newer daemon knows.
    """

    path: str = ""
    """The job's object on the bus; "" if it has none."""
    id: int
    pid: int
    start_time: int | None = None
    """The start of the process, in clock ticks since boot."""
    name: str = ""
    uuid: str = ""
    unit: str = ""
    uid: int = 0
    flags: Flag
    phase: str
    """Printable, like `verdict`."""
    verdict: str
    result: str = ""
    """Empty while the job runs."""
    started: int
    deadline: int
    """When the job takes its next step; INFINITY for never."""
    last_progress: int | None = None
    bytes_written: int | None = None
    bytes_pending: int | None = None
    held: bool = False
    not_before: int = 0
    """The time before which Extend forbids SIGKILL; 0 if the job was never extended."""
    guest_asked: str = GuestAsked.NOT_ASKED
    """The result of asking the guest, as in `guest-asked` of the receipt; `asked` until the result
    is known. Printable."""
    powerdown_only: bool = False
    """The guest is only asked: no signal follows if it does not shut down."""
    next_rung: str = ""
    """A NextRung, or a printable word of a newer daemon; "" if an older daemon does not report
    it."""
    standstill: int = 0
    """The next rung follows after this time (µs) without progress; 0 if progress does not delay
    it."""
    reasons: tuple[str, ...] = ()
    """The printable reasons for the verdict; () if the caller may not see them."""
    rate: int | None = None
    """Bytes per second."""
    reason: str = ""
    """The printable reason of the stop."""
    requested_by: int | None = None
    ended: int | None = None
    receipt: dict[str, Any] | None = None
    """The receipt that Wait returns; None while the job runs, or if it was not read."""

    def __post_init__(self) -> None:
        # Correct the deadline after an extension, because the daemon updates it only at its next
        # decision.
        if self.phase == Phase.TERMINATE and self.deadline < self.not_before:
            object.__setattr__(self, "deadline", self.not_before)

    @property
    def forced(self) -> bool:
        return Flag.FORCE in self.flags

    @property
    def doing(self) -> str:
        """What the guest or its QEMU is doing, as a phrase that follows the guest's name."""
        if self.result or self.phase == Phase.DONE:
            return "is left alone" if self.result == Result.CANCELLED else self.result or "ended"
        if self.phase == Phase.QUIT:
            down = self.guest_asked == GuestAsked.SHUT_DOWN
            return "has shut down" if down else "is flushing its disks"
        if self.phase == Phase.POWERDOWN:
            return self._doing_before_signals()
        # In the phase kill, the next rung shows whether SIGKILL was sent already.
        is_sent = self.phase == Phase.KILL and self.next_rung in ("", NextRung.GIVE_UP)
        if is_sent or self.phase == Phase.REAP:
            return "SIGKILL sent"
        return _STATES.get(self.verdict, self.verdict)

    def _doing_before_signals(self) -> str:
        if self.verdict == Verdict.GUEST_SHUTDOWN:
            return "shuts down"
        if self.verdict == Verdict.FLUSHING and self.guest_asked == GuestAsked.NOT_ASKED:
            return "waits for a backup or migration"
        # A job that is held stays in the phase powerdown even after qkilld has stopped asking the
        # guest.
        return _BEFORE_SIGNALS.get(self.guest_asked, "was asked to shut down")

    @property
    def asks_alone(self) -> bool:
        """Whether the guest is only asked, and no signal follows."""
        return self.powerdown_only or (Flag.POWERDOWN in self.flags and self.unsupervised)

    @property
    def unsupervised(self) -> bool:
        return Flag.NOWAIT in self.flags

    def elapsed(self, now: int) -> str:
        """The running time of the job in whole seconds."""
        seconds = max(0, now - self.started) // USEC_PER_SEC
        return format_usec(seconds * USEC_PER_SEC) if seconds else "0"

    def clock(self, now: int) -> str:
        """The running time in the form of a clock: `1:03`, `2:00:00`."""
        minutes, seconds = divmod(max(0, now - self.started) // USEC_PER_SEC, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def outlook(self, now: int, *, short: bool = False) -> str:
        """Describe the next step and its earliest time: `SIGKILL in 7s unless it moves`.

        Return "" if no step follows. While there is progress, no remaining time is shown, because
        progress delays the step: `SIGKILL only after 1min without progress`. With `short`, use
        fewer words.
        """
        if self.result or self.phase == Phase.DONE:
            return ""
        if self.held:
            return "held"
        step = self._next_step
        if self.deadline == INFINITY:
            return "" if self.next_rung == NextRung.ASK else "waits without limit"
        # Round up, so that the last second is not shown as 0.
        seconds = -((now - self.deadline) // USEC_PER_SEC)
        remaining = format_usec(seconds * USEC_PER_SEC)
        if seconds <= 0:
            return f"{step} now"
        if self.phase == Phase.TERMINATE and self.deadline == self.not_before:
            return f"no {step} for {remaining}" if self.forced else f"{step} in {remaining}"
        if self.standstill and now - (self.deadline - self.standstill) <= MOVES_FOR:
            span = format_usec(self.standstill)
            return (
                f"{step} if still {span}"
                if short
                else (f"{step} only after {span} without progress")
            )
        return f"{step} in {remaining}" if short else f"{step} in {remaining}{self._condition}"

    @property
    def _next_step(self) -> str:
        """Return the name of the next step. If an older daemon does not report it, infer it from
        the phase."""
        if self.next_rung and self.next_rung not in (NextRung.ASK, NextRung.GIVE_UP):
            return self.next_rung
        if self.phase in BEFORE_SIGNALS and not self.asks_alone:
            return NextRung.TERMINATE.value
        if not self.next_rung and self.phase == Phase.TERMINATE and self.forced:
            return NextRung.KILL.value
        return _GIVES_UP

    @property
    def _condition(self) -> str:
        if self.phase == Phase.POWERDOWN:
            if self.guest_asked == GuestAsked.NOT_ASKED:
                return " unless it can be asked"
            return " unless it shuts down" if self.guest_asked == GuestAsked.ASKED else ""
        if self.phase == Phase.QUIT and self.verdict == Verdict.FLUSHING:
            return " unless it moves"
        return " unless it moves" if self.standstill else ""

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object for --json. Unknown values, and times that never come, are
        null."""
        return {
            "id": self.id,
            "path": self.path,
            "pid": self.pid,
            "start_time": self.start_time,
            "name": self.name,
            "uuid": self.uuid,
            "unit": self.unit,
            "uid": self.uid,
            "flags": flag_names(self.flags),
            "phase": self.phase,
            "verdict": self.verdict,
            "result": self.result or None,
            "started_usec": self.started,
            "deadline_usec": known(self.deadline),
            "last_progress_usec": self.last_progress,
            "bytes_written": self.bytes_written,
            "bytes_pending": self.bytes_pending,
            "held": self.held,
            "guest_asked": self.guest_asked,
            "reason": self.reason or None,
            "requested_by": self.requested_by,
            "reasons": list(self.reasons),
            "bytes_per_second": self.rate,
            "next_rung": self.next_rung or None,
            "next_rung_stall_usec": self.standstill or None,
            "ended_usec": self.ended,
            "receipt": None if self.receipt is None else receipt_as_json(self.receipt),
        }


def known(value: int) -> int | None:
    """Return None for 2^64-1, which means "never" and "unknown" on the bus."""
    return None if value in (INFINITY, UNKNOWN) else value


def flag_names(flags: int) -> list[str]:
    """Return the names of flags in lower case. Unknown bits become one hexadecimal number."""
    names = [str(flag.name).lower() for flag in Flag if flags & flag]
    unknown = flags & ~sum(Flag)
    return [*names, hex(unknown)] if unknown else names


def verdict_of(word: str) -> Verdict:
    """Return the verdict; UNKNOWN for a word of a newer daemon."""
    return Verdict(word) if word in set(Verdict) else Verdict.UNKNOWN


def guest_asked_of(word: str) -> GuestAsked:
    """Return the GuestAsked for a word. A word of a newer daemon means that the guest was asked."""
    return GuestAsked(word) if word in set(GuestAsked) else GuestAsked.ASKED


def label(pid: int, name: str) -> str:
    """Return a guest's label for output lines: `web (pid 4711)`."""
    return f"{printable(name)} (pid {pid})" if name else f"pid {pid}"


def ending(result: str, receipt: dict[str, Any]) -> str:
    """Describe the end of a job, as a sentence without its subject."""
    asking = _ASKED.get(str(receipt.get("guest-asked", "")), "")
    # If a job that only asks has failed, its error says why the guest could not be asked.
    is_said = result == Result.FAILED and "SIGTERM" not in _actions(receipt)
    if not asking or is_said or result == Result.SIGNALLED:
        return _ending(result, receipt)
    return f"{_ending(result, receipt)}; {asking}"


def _actions(receipt: dict[str, Any]) -> list[str]:
    return [printable(str(action)) for _, action, _ in receipt.get("rungs", [])]


def _ending(result: str, receipt: dict[str, Any]) -> str:
    signals = _actions(receipt)
    elapsed = int(receipt.get("elapsed-usec", 0))
    after = f"after {format_usec(rounded(elapsed))}"
    match result:
        case Result.EXITED if receipt.get("data-at-risk"):
            return f"gone {after}, without SIGKILL, but data may be lost{_risks(receipt)}"
        case Result.EXITED:
            return f"gone {after}, without SIGKILL"
        case Result.KILLED if receipt.get("data-at-risk") is False:
            return f"gone {after} by SIGKILL, with nothing left to write"
        case Result.KILLED:
            return f"gone {after}, but only by SIGKILL: data may be lost"
        case Result.SURVIVED if "SIGKILL" in signals:
            return (
                f"still there {after}, despite SIGKILL: the kernel cannot end it, usually because "
                "of its storage. qkilld logs when it exits"
            )
        case Result.SURVIVED if "SIGTERM" not in signals:
            some = "but SIGCONT" if "SIGCONT" in signals else ""
            return f"still there {after}, without any signal {some}".rstrip()
        case Result.SURVIVED:
            return (
                f"still there {after}; SIGKILL was not allowed (--force). It may still exit after "
                "the SIGTERM, and qkilld logs that"
            )
        case Result.CANCELLED if not {"SIGTERM", "SIGKILL"} & set(signals):
            return f"cancelled {after}, before any signal"
        case Result.CANCELLED:
            return (
                f"cancelled {after}: no more signals will be sent. "
                "It may still exit because of earlier signals"
            )
        case Result.SIGNALLED:
            last_signal = signals[-1] if signals else "the signal"
            action = _ASKED_BY.get(last_signal, f"{last_signal} was sent")
            return f"{action}, and the process is not watched"
        case Result.FAILED:
            error = printable(str(receipt.get("error", ""))) or "no reason given"
            return f"not stopped: {error}"
        case _:
            return f'ended {after} as "{printable(result)}", which this qkillctl does not know'


def _risks(receipt: dict[str, Any]) -> str:
    """Return ": " and the first reasons why data may be lost; "" if the caller may not see them."""
    texts = [printable(str(text)) for _, text in receipt.get("at-risk", ()) if text]
    more = f" and {len(texts) - _SHOWN_RISKS} more" if len(texts) > _SHOWN_RISKS else ""
    return f": {'; '.join(texts[:_SHOWN_RISKS])}{more}" if texts else ""


def rounded(usec: int) -> int:
    """Round a time down for people: to µs below 1 ms, to ms below 1 minute, else to seconds."""
    step = USEC_PER_SEC
    if usec < 60 * USEC_PER_SEC:
        step = 1 if usec < 1000 else 1000
    return usec // step * step


def receipt_as_json(receipt: dict[str, Any]) -> dict[str, Any]:
    """Return the receipt for --json. Its reason, error and requester are null if missing."""
    document = {key.replace("-", "_"): value for key, value in receipt.items()}
    document["rungs"] = rungs_as_json(receipt.get("rungs", []))
    if "verdicts" in receipt:
        document["verdicts"] = [
            {"verdict": verdict, "at_usec": at, "reasons": reasons}
            for verdict, at, reasons in receipt["verdicts"]
        ]
    if "at-risk" in receipt:
        document["at_risk"] = [{"code": code, "text": text} for code, text in receipt["at-risk"]]
    return {"reason": None, "error": None, "requested_by": None} | document


def rungs_as_json(rungs: Iterable[Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the rungs of a receipt or a plan for --json. `at_usec` is relative to the start."""
    return [{"phase": phase, "action": action, "at_usec": at} for phase, action, at in rungs]
