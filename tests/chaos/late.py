"""Figures of a run in which journald does not read: how late signals, replies and journal entries
are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from qkilld.model.event import MessageId
from tests.chaos.rules import Lasted, Record

SIGNAL_S: Final = 0.05
"""The limit for the delay of a signal."""


@dataclass
class Times:
    """Measured times in seconds."""

    sigterm: list[float] = field(default_factory=list)
    """From the start of a job until the daemon sent SIGTERM."""
    sigkill: list[float] = field(default_factory=list)
    """From the announced time of SIGKILL until the daemon sent it."""
    noted: list[float] = field(default_factory=list)
    """From a call until the process recorded SIGTERM."""
    ended: list[float] = field(default_factory=list)
    """From the announced time of SIGKILL until the client noticed the end of the process."""
    looks: list[float] = field(default_factory=list)
    """From a call for the properties of a job to the reply."""

    def rows(self) -> list[str]:
        titles = {
            "SIGTERM after the start of the job": self.sigterm,
            "SIGKILL after the announced time": self.sigkill,
            "from a call to SIGTERM in the process": self.noted,
            "the end of the process after that time": self.ended,
            "a call for the properties of a job": self.looks,
        }
        return [f"  {title:<40}{_row(times)}" for title, times in titles.items()]


@dataclass(frozen=True)
class Figures:
    lasted: float
    """How long journald did not read, in seconds."""
    stopped: Times
    """Times while journald did not read."""
    after: Times
    """Times when journald read again."""
    missing: int
    """The number of entries about signals and ends of jobs that are missing in the journal."""
    dropped: int
    """The number of entries that the daemon has counted as dropped."""
    entries: int
    """The number of all entries of the daemon in the journal."""

    def broken(self) -> list[str]:
        """Return a message for each value over its limit. (On a busy host, a value may exceed its
        limit.)"""
        faults = []
        for times in (self.stopped.sigterm, self.stopped.sigkill):
            late = max(times, default=0.0)
            if late > SIGNAL_S:
                faults.append(
                    f"a signal was {late * 1000:.0f} ms late (limit {SIGNAL_S * 1000:g} ms)"
                )
        if self.missing > self.dropped:
            faults.append(f"{self.missing} entries are missing, {self.dropped} counted as dropped")
        if not (self.stopped.sigterm and self.stopped.sigkill and self.stopped.looks):
            faults.append("nothing was measured")
        return faults

    def table(self) -> str:
        header = f"{'n':>5}{'median':>11}{'longest':>11}"
        return "\n".join(
            [
                f"{f'journald did not read for {self.lasted:.1f} s':<42}{header}",
                *self.stopped.rows(),
                "when it read again, for comparison",
                *self.after.rows(),
                f"entries of the daemon: {self.entries} in the journal, {self.dropped} counted as "
                f"dropped; {self.missing} about signals and ends are missing",
            ]
        )


def _row(times: Sequence[float]) -> str:
    if not times:
        return f"{0:>5}"
    ordered = sorted(times)
    shown = (ordered[len(ordered) // 2], ordered[-1])
    return f"{len(ordered):>5}" + "".join(f"{time * 1000:>8.1f} ms" for time in shown)


def figures(
    records: Sequence[Record], incident: Lasted, journal: Sequence[Mapping[str, Any]]
) -> Figures:
    """Return the figures of a run in which only journald failed."""
    _, begin, end = incident
    stopped, after = Times(), Times()
    entries = Counter((entry.get("MESSAGE_ID"), entry.get("OBJECT_PID")) for entry in journal)
    missing = 0

    def at(time: float) -> Times:
        """Return the Times for events at `time`."""
        return stopped if begin < time < end else after if time >= end else Times()

    for record in records:
        asked = record.first("Terminate")
        if record.signals:
            at(asked).noted.append(record.signals[0][0] - asked)
        if "SIGTERM" in record.sent:
            at(asked).sigterm.append(record.sent["SIGTERM"])
        if record.due and "SIGKILL" in record.sent:
            at(record.due).sigkill.append(record.started + record.sent["SIGKILL"] - record.due)
            if record.gone is not None:
                at(record.due).ended.append(record.gone - record.due)
        for began, took in record.looks:
            at(began).looks.append(took)
        pid = str(record.pid)
        signals = len(record.signals) + record.killed
        missing += max(0, signals - entries[MessageId.SIGNAL_SENT.value, pid])
        missing += not entries[MessageId.JOB_ENDED.value, pid]
    return Figures(
        lasted=end - begin,
        stopped=stopped,
        after=after,
        missing=missing,
        dropped=sum(int(entry.get("QKILLD_DROPPED", 0)) for entry in journal),
        entries=len(journal),
    )
