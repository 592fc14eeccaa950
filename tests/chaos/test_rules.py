"""The rules detect violations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos import plan
from tests.chaos.plan import EXTEND_S, FORCE, GRACE_S, Fault, Guest, Incident, Kind
from tests.chaos.rules import Record, broken, outcome
from tests.chaos.run import Report


def record(kind: Kind, flags: int = FORCE, **known: Any) -> Record:
    known.setdefault("asked", {"Terminate": [10.0]})
    known.setdefault("answered", {"Terminate": [10.1]})
    known.setdefault("signals", [(10.05, 15, 0)])
    return Record(Guest(1, kind, 0.0, flags, 0), **known)


KILLED: dict[str, Any] = {"gone": 20.0, "killed": True, "status": 9, "result": "killed"}


@pytest.mark.parametrize(
    "good",
    [
        record(Kind.FORCED, **KILLED),
        record(Kind.POLITE, gone=11.0, result="exited"),
        record(Kind.SPARED, 0, result="survived"),
        record(Kind.FLUSHING, gone=40.0, writes=[39.9], result="exited"),
        record(Kind.BYSTANDER, 0, signals=[]),
        record(
            Kind.POLITE,
            gone=11.0,
            refused=[("Terminate", "org.qkilld1.Error.NoSuchProcess")],
            answered={},
        ),
    ],
)
def test_a_good_record_breaks_no_rule(good: Record) -> None:
    assert list(broken(good, [])) == []


def test_a_longer_grace_period_counts() -> None:
    longer = record(Kind.FORCED, **KILLED | {"gone": 39.0})
    longer.guest = replace(longer.guest, grace_s=30.0)
    assert "after the first call, and not 30" in "\n".join(broken(longer, []))
    longer.gone = 40.0
    assert list(broken(longer, [])) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (record(Kind.FORCED, **KILLED | {"gone": 10.0 + GRACE_S - 0.1}), "after the first call"),
        (record(Kind.FIXED, 9, **KILLED | {"gone": 19.0}), "and not 10"),
        (record(Kind.SPARED, 0, **KILLED), "without FORCE"),
        (record(Kind.FLUSHING, **KILLED, writes=[19.0]), "after it had written"),
        (
            record(Kind.CANCELLED, **KILLED, answered={"Terminate": [10.1], "Cancel": [12.0]}),
            "after the job was cancelled",
        ),
        (
            record(Kind.HELD, **KILLED, answered={"Terminate": [10.1], "Hold": [12.0]}),
            "while it was held",
        ),
        (
            record(
                Kind.EXTENDED,
                **KILLED | {"gone": 11.0 + EXTEND_S - 0.1},
                asked={"Terminate": [10.0], "Extend": [11.0]},
                answered={"Terminate": [10.1], "Extend": [11.1]},
            ),
            "after it was extended",
        ),
        (record(Kind.BYSTANDER, 0), "a bystander got"),
        (record(Kind.FORCED), "not accounted for"),
        (record(Kind.FORCED, **KILLED | {"result": "exited"}), 'the result is "exited"'),
        (record(Kind.FORCED, gone=11.0, result="killed"), "but the process was not killed"),
        (record(Kind.POLITE, gone=11.0, status=1, result="exited"), "exited with code 1"),
        (record(Kind.POLITE, signals=[(9.0, 15, 0)], result="survived"), "before it was asked for"),
        (record(Kind.POLITE, signals=[(10.2, 2, 0)], result="survived"), "it got signal 2"),
        (record(Kind.POLITE, signals=[(10.2, 15, 7)], result="survived"), "from uid 7"),
    ],
)
def test_a_bad_record_breaks_its_rule(bad: Record, words: str) -> None:
    assert words in "\n".join(broken(bad, []))


def test_a_job_may_be_lost_if_saving_failed() -> None:
    full = (Incident(0.0, Fault.FULL), 9.0, 12.0)
    lost = record(Kind.FORCED)
    assert outcome(lost, [full]) == "unfinished, because it could not be saved"
    assert outcome(lost, [(Incident(0.0, Fault.KILL), 9.0, 12.0)]) == ""
    assert outcome(lost, [(Incident(0.0, Fault.FULL), 12.0, 13.0)]) == ""
    # A full disk does not excuse a signal.
    early = record(Kind.SPARED, 0, **KILLED)
    assert "without FORCE" in "\n".join(broken(early, [full]))


def test_kills_come_while_all_jobs_run() -> None:
    made = plan.kills(7, jobs=50, count=200, qemus=8)
    assert [one.fault for one in made.incidents] == [Fault.KILL] * 200
    kills = [one.at for one in made.incidents]
    waiting = [guest for guest in made.guests if guest.grace_s]
    assert len(waiting) == 50
    assert max(guest.start for guest in waiting) < kills[0]
    # All jobs run during the first half. Their SIGKILLs are due one after another in the second
    # half.
    assert min(guest.grace_s for guest in waiting) >= made.seconds / 2
    assert sum(at < made.seconds / 2 for at in kills) > 50
    # systemd allows 100 starts in 60 s.
    assert all(b - a > 60 for a, b in zip(kills, kills[100:], strict=False))
    others = [guest.start for guest in made.guests if guest.kind is Kind.POLITE]
    assert min(others) < made.seconds / 2 < max(others)


def test_a_kill_that_finds_no_daemon_is_reported_and_so_is_another_end() -> None:
    made = plan.kills(7, jobs=5, count=3, qemus=0)

    def report(kills: int, *ends: str) -> Report:
        empty: dict[str, Any] = {"records": [], "incidents": [], "events": [], "journal": []}
        return Report(made, **empty, seconds=1.0, restarts=kills, kills=kills, ends=ends)

    killed, failed = "code=killed, status=9/KILL", "code=exited, status=1/FAILURE"
    assert report(2, killed).broken() == ["1 SIGKILLs found no daemon"]
    assert report(3, killed).broken() == []
    assert report(3, killed, failed).broken() == [failed]


def test_the_same_seed_gives_the_same_plan() -> None:
    first, second = (plan.make(7, jobs=20, seconds=20, qemus=2) for _ in range(2))
    assert first == second
    assert {guest.kind for guest in first.guests} == set(Kind)
    assert {incident.fault for incident in first.incidents} == set(Fault)
