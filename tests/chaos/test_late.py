"""The figures of a run in which journald does not read."""

from __future__ import annotations

from typing import Any

import pytest

from qkilld.model.event import MessageId
from tests.chaos import plan
from tests.chaos.late import Figures, figures
from tests.chaos.plan import FORCE, Fault, Guest, Incident, Kind
from tests.chaos.rules import Record

STOPPED = (Incident(0.0, Fault.JOURNALD, 60.0, fills=True), 100.0, 160.0)


def killed(pid: int, due: float, sent_after: float) -> Record:
    """Return the record of a job that starts at 90 s."""
    return Record(
        Guest(pid, Kind.FORCED, 0.0, FORCE, 0),
        pid=pid,
        asked={"Terminate": [89.9]},
        signals=[(90.0, 15, 0)],
        started=90.0,
        sent={"SIGTERM": 0.0, "SIGKILL": sent_after},
        due=due,
        gone=90.0 + sent_after + 0.01,
        killed=True,
        looks=[(91.0, 0.2), (110.0, 0.3)],
    )


def polite(pid: int, asked: float, took: float) -> Record:
    guest = Guest(pid, Kind.POLITE, 0.0, 0, 0)
    return Record(
        guest,
        pid=pid,
        asked={"Terminate": [asked]},
        signals=[(asked + 0.02 + took, 15, 0)],
        sent={"SIGTERM": took},
    )


def entries(*records: Record) -> list[dict[str, Any]]:
    found = []
    for record in records:
        sent = [MessageId.SIGNAL_SENT.value] * (len(record.signals) + record.killed)
        found += [
            {"MESSAGE_ID": one, "OBJECT_PID": str(record.pid)}
            for one in (*sent, MessageId.JOB_ENDED.value)
        ]
    return found


RECORDS = (killed(1, 120.0, 30.04), killed(2, 170.0, 85.0), polite(3, 130.0, 0.03))


def measure(records: tuple[Record, ...], journal: list[dict[str, Any]]) -> Figures:
    return figures(records, STOPPED, journal)


def test_delays_while_journald_does_not_read_are_separate_from_later_ones() -> None:
    measured = measure(RECORDS, entries(*RECORDS))
    assert measured.broken() == []
    assert measured.stopped.sigkill == [pytest.approx(0.04)]
    assert measured.stopped.sigterm == [pytest.approx(0.03)]
    assert measured.stopped.noted == [pytest.approx(0.05)]
    assert measured.stopped.looks == [0.3, 0.3]
    # This SIGKILL was late, but journald was reading then, so it counts as after the incident.
    assert measured.after.sigkill == [pytest.approx(5.0)]
    assert "60.0 s" in measured.table()


@pytest.mark.parametrize("late", [killed(4, 120.0, 30.06), polite(4, 130.0, 0.06)])
def test_a_late_signal(late: Record) -> None:
    records = (*RECORDS, late)
    assert measure(records, entries(*records)).broken() == ["a signal was 60 ms late (limit 50 ms)"]


@pytest.mark.parametrize("lacks", range(len(entries(*RECORDS))))
def test_an_entry_is_missing(lacks: int) -> None:
    journal = entries(*RECORDS)
    del journal[lacks]
    assert measure(RECORDS, journal).broken() == ["1 entries are missing, 0 counted as dropped"]
    counted = {"MESSAGE_ID": MessageId.ENTRIES_DROPPED.value, "QKILLD_DROPPED": "1"}
    assert measure(RECORDS, [*journal, counted]).broken() == []


def test_a_run_without_signals_measures_nothing() -> None:
    assert measure((), []).broken() == ["nothing was measured"]


def test_a_plan_for_it() -> None:
    made = plan.journald(7, jobs=20, lasts=60)
    (incident,) = made.incidents
    end = incident.at + incident.lasts
    due = [guest.start + guest.grace_s for guest in made.guests if guest.kind is not Kind.POLITE]
    assert sum(incident.at < one < end for one in due) == 20
    assert sum(one > end for one in due) == 10
    assert all(guest.start < incident.at for guest in made.guests if guest.kind is not Kind.POLITE)
