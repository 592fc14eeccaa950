"""A job as its properties tell it, and what can be said of it at a moment. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from qkilld.model.text import printable
from qkilld.model.timespan import format_usec
from qkilld.model.words import (
    INFINITY,
    UNKNOWN,
    USEC_PER_SEC,
    Flag,
    Phase,
    Result,
    Verdict,
)

_BEFORE_SIGNALS: Final = (Phase.POWERDOWN, Phase.QUIT)


@dataclass(frozen=True, slots=True)
class JobView:
    """The properties of org.qkilld1.Job. Times are CLOCK_MONOTONIC in µs."""

    path: str
    properties: dict[str, Any]

    def updated(self, changes: dict[str, Any]) -> JobView:
        return JobView(self.path, self.properties | changes)

    @property
    def id(self) -> int:
        return int(self.properties["Id"])

    @property
    def pid(self) -> int:
        return int(self.properties["PID"])

    @property
    def name(self) -> str:
        return str(self.properties["Name"])

    @property
    def uid(self) -> int:
        return int(self.properties["UID"])

    @property
    def phase(self) -> str:
        return printable(str(self.properties["Phase"]))

    @property
    def verdict(self) -> str:
        return printable(str(self.properties["Verdict"]))

    @property
    def result(self) -> str:
        """ "" while it runs."""
        return str(self.properties["Result"])

    @property
    def forced(self) -> bool:
        return bool(self.properties["Flags"] & Flag.FORCE)

    @property
    def held(self) -> bool:
        return bool(self.properties["Held"])

    @property
    def not_before(self) -> int:
        """By Extend; 0 for none, as of a daemon that does not tell yet."""
        return int(self.properties.get("NotBeforeUSec", 0))

    @property
    def deadline(self) -> int:
        """INFINITY for none. Not before what an extension promises, which the daemon's own deadline
        follows only at its next decision."""
        deadline = int(self.properties["DeadlineUSec"])
        return max(deadline, self.not_before) if self.phase == Phase.TERMINATE else deadline

    @property
    def unsupervised(self) -> bool:
        return bool(self.properties["Flags"] & Flag.NOWAIT)

    def elapsed(self, now: int) -> str:
        """How long it has been running, in whole seconds."""
        seconds = max(0, now - self.properties["StartedUSec"]) // USEC_PER_SEC
        return format_usec(seconds * USEC_PER_SEC) if seconds else "0"

    def outlook(self, now: int) -> str:
        """What will happen next and when, such as `SIGKILL in 7s`; "" where nothing will."""
        if self.result or self.phase == Phase.DONE:
            return ""
        if self.held:
            return "held"
        if self.phase in _BEFORE_SIGNALS:
            step = "SIGTERM"
        elif self.phase == Phase.TERMINATE and self.forced:
            step = "SIGKILL"
        else:
            step = "gives up"
        if self.deadline == INFINITY:
            return "waits without limit"
        # Rounded up, so that the last second is not shown as none.
        seconds = -((now - self.deadline) // USEC_PER_SEC)
        return f"{step} in {format_usec(seconds * USEC_PER_SEC)}" if seconds > 0 else f"{step} now"

    def as_json(self) -> dict[str, Any]:
        """For --json: null for what is unknown, never comes or is not yet."""
        values = self.properties
        return {
            "id": self.id,
            "path": self.path,
            "pid": self.pid,
            "start_time": values["StartTime"],
            "name": self.name,
            "uuid": values["UUID"],
            "unit": values["Unit"],
            "uid": self.uid,
            "flags": flag_names(values["Flags"]),
            "phase": self.phase,
            "verdict": self.verdict,
            "result": self.result or None,
            "started_usec": values["StartedUSec"],
            "deadline_usec": known(self.deadline),
            "last_progress_usec": values["LastProgressUSec"] or None,
            "bytes_written": known(values["BytesWritten"]),
            "bytes_pending": known(values["BytesPending"]),
            "held": self.held,
        }


def known(value: int) -> int | None:
    """None for 2^64-1, the bus's word for never and for unknown."""
    return None if value in (INFINITY, UNKNOWN) else value


def flag_names(flags: int) -> list[str]:
    """In lower case; bits without a name as hexadecimal numbers."""
    named = [str(flag.name).lower() for flag in Flag if flags & flag]
    rest = flags & ~sum(Flag)
    return [*named, hex(rest)] if rest else named


def verdict_of(word: str) -> Verdict:
    """One that only a newer daemon knows says nothing."""
    return Verdict(word) if word in set(Verdict) else Verdict.UNKNOWN


def label(pid: int, name: str) -> str:
    """What a guest is called in a line: `web (pid 4711)`."""
    return f"{printable(name)} (pid {pid})" if name else f"pid {pid}"


def ending(result: str, receipt: dict[str, Any]) -> str:
    """How a job ended, in a sentence without its subject."""
    signals = [printable(str(signal)) for _, signal, _ in receipt.get("rungs", [])]
    elapsed = int(receipt.get("elapsed-usec", 0))
    after = f"after {format_usec(rounded(elapsed))}"
    match result:
        case Result.EXITED:
            return f"gone {after}, without SIGKILL"
        case Result.KILLED:
            return f"gone {after}, but only by SIGKILL: data may be lost"
        case Result.SURVIVED if "SIGKILL" in signals:
            return (
                f"still there {after}, for all SIGKILL: the kernel cannot end it, mostly because "
                "of its storage. qkilld logs its end"
            )
        case Result.SURVIVED:
            return (
                f"still there {after}; SIGKILL was not allowed (--force). It may still end from "
                "the SIGTERM it got, and qkilld logs that"
            )
        case Result.CANCELLED:
            return (
                f"cancelled {after}: no more signals will be sent. "
                "It may still end from those it got"
            )
        case Result.SIGNALLED:
            sent = signals[-1] if signals else "the signal"
            return f"{sent} was sent, and nobody watches what comes of it"
        case Result.FAILED:
            error = printable(str(receipt.get("error", ""))) or "no reason given"
            return f"not stopped: {error}"
        case _:
            return f'ended {after} as "{printable(result)}", which this qkillctl does not know'


def rounded(usec: int) -> int:
    """To what a reader can use: µs below 1 ms, ms below 1 minute, else seconds."""
    step = 1 if usec < 1000 else 1000 if usec < 60 * USEC_PER_SEC else USEC_PER_SEC
    return usec // step * step


def receipt_as_json(receipt: dict[str, Any]) -> dict[str, Any]:
    """The receipt with one kind of key; those that only some jobs have are null in the others."""
    document = {key.replace("-", "_"): value for key, value in receipt.items()}
    document["rungs"] = [
        {"phase": phase, "signal": signal, "at_usec": at}
        for phase, signal, at in receipt.get("rungs", [])
    ]
    return {"reason": None, "error": None, "requested_by": None} | document
