"""Phrases for a job while it runs and at its end."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from qkilld.model.constants import INFINITY, ExitCode, Flag, Phase, Result, Verdict
from qkilld.model.exits import WORST_FIRST, exit_code_of, worst
from qkilld.model.job_status import (
    JobStatus,
    ending,
    flag_names,
    label,
    receipt_as_json,
    rounded,
)

S = 1_000_000
NOW = 1000 * S
JOB = JobStatus(
    path="/org/qkilld1/job/3",
    id=3,
    pid=4711,
    start_time=12345,
    name="web",
    flags=Flag(0),
    phase=Phase.TERMINATE,
    verdict=Verdict.UNKNOWN,
    started=NOW - 3 * S,
    deadline=NOW + 7 * S,
)


ONLY_AFTER = "SIGKILL only after 1min without progress"
UNLESS_DOWN = "SIGTERM in 7s unless it shuts down"


GIVES_UP = "gives up in 7s unless it can be asked"


@pytest.mark.parametrize(
    ("changes", "outlook"),
    [
        ({}, "gives up in 7s"),
        ({"flags": Flag.FORCE}, "SIGKILL in 7s"),
        ({"flags": Flag.FORCE, "next_rung": "yank"}, "yank in 7s"),
        ({"next_rung": "give-up"}, "gives up in 7s"),
        # While there is progress, no time is shown.
        ({"flags": Flag.FORCE, "standstill": 60 * S, "deadline": NOW + 55 * S}, ONLY_AFTER),
        ({"flags": Flag.FORCE, "standstill": 60 * S, "deadline": NOW + 60 * S}, ONLY_AFTER),
        ({"flags": Flag.FORCE, "standstill": 60 * S}, "SIGKILL in 7s unless it moves"),
        ({"flags": Flag.FORCE | Flag.FIXED}, "SIGKILL in 7s"),
        ({"flags": Flag.FIXED}, "gives up in 7s"),
        ({"flags": Flag.FORCE, "phase": Phase.KILL}, "gives up in 7s"),
        ({"flags": Flag.FORCE, "phase": Phase.REAP}, "gives up in 7s"),
        ({"phase": Phase.POWERDOWN}, "SIGTERM in 7s unless it can be asked"),
        ({"phase": Phase.POWERDOWN, "next_rung": "ask"}, "SIGTERM in 7s unless it can be asked"),
        ({"phase": Phase.POWERDOWN, "guest_asked": "asked"}, UNLESS_DOWN),
        ({"phase": Phase.POWERDOWN, "guest_asked": "deaf"}, "SIGTERM in 7s"),
        ({"flags": Flag.POWERDOWN | Flag.NOWAIT, "phase": Phase.POWERDOWN}, GIVES_UP),
        ({"flags": Flag.FORCE, "phase": Phase.KILL, "next_rung": "SIGKILL"}, "SIGKILL in 7s"),
        ({"phase": Phase.POWERDOWN, "next_rung": "ask", "deadline": INFINITY}, ""),
        ({"phase": Phase.QUIT}, "SIGTERM in 7s"),
        ({"phase": Phase.QUIT, "verdict": "flushing"}, "SIGTERM in 7s unless it moves"),
        (
            {"phase": Phase.POWERDOWN, "powerdown_only": True, "guest_asked": "asked"},
            "gives up in 7s unless it shuts down",
        ),
        ({"deadline": NOW + 7 * S + 1}, "gives up in 8s"),  # Rounded up.
        ({"deadline": NOW + 1}, "gives up in 1s"),
        ({"deadline": NOW}, "gives up now"),
        ({"deadline": NOW - 5 * S}, "gives up now"),
        ({"deadline": NOW + 90 * S}, "gives up in 1min 30s"),
        ({"deadline": INFINITY}, "waits without limit"),
        ({"held": True}, "held"),
        # The job was extended after the daemon's last decision.
        ({"flags": Flag.FORCE, "not_before": NOW + 60 * S}, "no SIGKILL for 1min"),
        ({"not_before": NOW + 60 * S}, "gives up in 1min"),
        ({"flags": Flag.FORCE, "not_before": NOW + 2 * S}, "SIGKILL in 7s"),
        ({"phase": Phase.REAP, "not_before": NOW + 60 * S}, "gives up in 7s"),
        ({"phase": Phase.DONE, "result": Result.EXITED}, ""),
        ({"result": Result.SURVIVED}, ""),
    ],
)
def test_outlook(changes: dict[str, Any], outlook: str) -> None:
    assert replace(JOB, **changes).outlook(NOW) == outlook


def test_a_shorter_outlook() -> None:
    job = replace(JOB, flags=Flag.FORCE, standstill=60 * S)
    assert job.outlook(NOW, short=True) == "SIGKILL in 7s"
    moving = replace(job, deadline=NOW + 59 * S)
    assert moving.outlook(NOW, short=True) == "SIGKILL if still 1min"


@pytest.mark.parametrize(
    ("changes", "doing"),
    [
        ({}, "SIGTERM sent"),
        ({"verdict": "flushing"}, "flushes"),
        ({"verdict": "of-a-newer-daemon"}, "of-a-newer-daemon"),
        ({"phase": Phase.REAP, "verdict": "storage-wait"}, "SIGKILL sent"),
        ({"phase": Phase.KILL, "next_rung": "give-up"}, "SIGKILL sent"),
        ({"phase": Phase.KILL, "next_rung": "SIGKILL", "verdict": "idle"}, "idle, does not exit"),
        ({"phase": Phase.POWERDOWN}, "is about to be asked"),
        ({"phase": Phase.POWERDOWN, "verdict": "flushing"}, "waits for a backup or migration"),
        ({"phase": Phase.POWERDOWN, "guest_asked": "asked"}, "was asked to shut down"),
        ({"phase": Phase.POWERDOWN, "guest_asked": "ignored", "held": True}, "did not shut down"),
        ({"phase": Phase.POWERDOWN, "guest_asked": "deaf", "held": True}, "cannot be asked"),
        ({"phase": Phase.POWERDOWN, "guest_asked": "of-a-newer-daemon"}, "was asked to shut down"),
        ({"phase": Phase.POWERDOWN, "verdict": "guest-shutdown"}, "shuts down"),
        ({"phase": Phase.QUIT, "guest_asked": "shut-down"}, "has shut down"),
        ({"phase": Phase.QUIT}, "is flushing its disks"),
        ({"phase": Phase.DONE, "verdict": "zombie", "result": "exited"}, "exited"),
        ({"phase": Phase.DONE, "result": "cancelled"}, "is left alone"),
    ],
)
def test_doing(changes: dict[str, Any], doing: str) -> None:
    assert replace(JOB, **changes).doing == doing


def test_every_verdict_has_words() -> None:
    said = {replace(JOB, verdict=verdict).doing for verdict in Verdict}
    assert len(said) == len(Verdict) and "guest-shutdown" in said


@pytest.mark.parametrize(
    ("started", "elapsed"),
    [(NOW, "0"), (NOW - S + 1, "0"), (NOW - 61 * S, "1min 1s"), (NOW + S, "0")],
)
def test_elapsed(started: int, elapsed: str) -> None:
    assert replace(JOB, started=started).elapsed(NOW) == elapsed


@pytest.mark.parametrize(
    ("seconds", "clock"), [(-1, "0:00"), (9, "0:09"), (61, "1:01"), (3661, "1:01:01")]
)
def test_clock(seconds: int, clock: str) -> None:
    assert replace(JOB, started=NOW - seconds * S).clock(NOW) == clock


def test_a_job_that_only_asks_says_once_why_it_failed() -> None:
    receipt = {"error": "it is stopped", "guest-asked": "not-running", "rungs": []}
    assert ending("failed", receipt) == "not stopped: it is stopped"
    assert "did not" in ending("failed", receipt | {"rungs": [TERM], "guest-asked": "ignored"})


def test_json_has_null_for_what_is_not_known() -> None:
    job = replace(JOB, flags=Flag(9 | 1 << 40), deadline=INFINITY)
    document = json.loads(json.dumps(job.as_json()))
    assert document["flags"] == ["force", "fixed", "0x10000000000"]
    for key in ("deadline_usec", "bytes_written", "bytes_pending", "last_progress_usec", "result"):
        assert document[key] is None, key
    assert replace(JOB, bytes_written=0).as_json()["bytes_written"] == 0


@pytest.mark.parametrize(
    ("flags", "names"),
    [(0, []), (1, ["force"]), (2, ["nowait"]), (15, ["force", "nowait", "powerdown", "fixed"])],
)
def test_flag_names(flags: int, names: list[str]) -> None:
    assert flag_names(flags) == names


@pytest.mark.parametrize(
    ("name", "text"),
    [("", "pid 7"), ("web", "web (pid 7)"), ("a\x1b[2J\n[red]", "a\ufffd[2J\ufffd[red] (pid 7)")],
)
def test_label(name: str, text: str) -> None:
    assert label(7, name) == text


TERM = ["terminate", "SIGTERM", 0]
ASKED = ["powerdown", "button", 0]
CONT = ["powerdown", "SIGCONT", 0]
KILL = ["kill", "SIGKILL", 10 * S]


@pytest.mark.parametrize(
    ("result", "receipt", "parts", "code"),
    [
        (
            "exited",
            {"elapsed-usec": 4321, "rungs": [TERM]},
            ["gone after 4ms", "without SIGKILL"],
            0,
        ),
        (
            "exited",
            {
                "elapsed-usec": 4321,
                "rungs": [TERM],
                "data-at-risk": True,
                "at-risk": [["flush-failed", "d: Input/output error\n"], ["unknown", "u"]],
                "guest-asked": "ignored",
            },
            [
                "gone after 4ms, without SIGKILL, but data may be lost: ",
                ": d: Input/output error\ufffd; u; its system was asked",
            ],
            0,
        ),
        (
            "exited",
            {
                "rungs": [TERM],
                "data-at-risk": True,
                "at-risk": [["unknown", str(n)] for n in range(9)],
            },
            ["data may be lost: 0; 1; 2 and 6 more"],
            0,
        ),
        (
            "exited",
            {"rungs": [TERM], "data-at-risk": True, "at-risk": [["unknown", ""]]},
            ["without SIGKILL, but data may be lost"],
            0,
        ),
        (
            "killed",
            {"elapsed-usec": 10_100_000, "rungs": [TERM, KILL]},
            ["gone after 10.1s", "data may be lost"],
            3,
        ),
        (
            "killed",
            {"elapsed-usec": 10_100_000, "rungs": [TERM, KILL], "data-at-risk": False},
            ["gone after 10.1s by SIGKILL, with nothing left to write"],
            3,
        ),
        ("survived", {"elapsed-usec": 15 * S, "rungs": [TERM]}, ["after 15s", "--force"], 4),
        ("survived", {"rungs": [CONT, ASKED]}, ["without any signal but SIGCONT"], 4),
        ("cancelled", {"rungs": [ASKED], "guest-asked": "asked"}, ["before any signal; its"], 4),
        ("cancelled", {"rungs": [ASKED, TERM]}, ["may still exit because of earlier signals"], 4),
        ("survived", {"elapsed-usec": 15 * S, "rungs": [TERM, KILL]}, ["the kernel"], 4),
        (
            "signalled",
            {"elapsed-usec": 9, "rungs": [["kill", "SIGKILL", 0]]},
            ["SIGKILL was sent"],
            0,
        ),
        ("signalled", {"elapsed-usec": 9, "rungs": []}, ["the signal was sent"], 0),
        (
            "exited",
            {"elapsed-usec": 9 * S, "rungs": [ASKED], "guest-asked": "shut-down"},
            ["gone after 9s, without SIGKILL; its system has shut down"],
            0,
        ),
        (
            "exited",
            {"elapsed-usec": 62 * S, "rungs": [ASKED, TERM], "guest-asked": "ignored"},
            ["was asked to shut down and did not"],
            0,
        ),
        (
            "survived",
            {"elapsed-usec": 60 * S, "rungs": [ASKED], "guest-asked": "ignored"},
            ["still there after 1min, without any signal; its system was asked"],
            4,
        ),
        (
            "signalled",
            {"elapsed-usec": 9, "rungs": [ASKED], "guest-asked": "ignored"},
            ["its power button was pressed, and the process is not watched"],
            0,
        ),
        ("cancelled", {"elapsed-usec": S, "rungs": [TERM]}, ["cancelled after 1s"], 4),
        (
            "failed",
            {"elapsed-usec": 0, "error": "EPERM\x1b\n"},
            ["not stopped: EPERM\ufffd\ufffd"],
            1,
        ),
        ("failed", {}, ["no reason given"], 1),
        ("evaporated\n", {}, ["evaporated\ufffd"], 1),
    ],
)
def test_ending(result: str, receipt: dict[str, Any], parts: list[str], code: int) -> None:
    text = ending(result, receipt)
    assert text.isprintable()
    for part in parts:
        assert part in text
    assert exit_code_of(result) == code
    changed = exit_code_of(result, "org.qkilld1.Error.ProcessChanged")
    assert changed == (ExitCode.NOT_QEMU if result == "failed" else code)
    assert exit_code_of(result, "org.example.Error") == code


def test_every_result_has_words_of_its_own() -> None:
    assert len({ending(result, {}) for result in Result}) == len(Result)
    assert not any("does not know" in ending(result, {}) for result in Result)


@pytest.mark.parametrize(
    ("usec", "result"),
    [(0, 0), (999, 999), (4321, 4000), (59_999_999, 59_999_000), (61_500_000, 61 * S)],
)
def test_rounded(usec: int, result: int) -> None:
    assert rounded(usec) == result


def test_structures_of_a_receipt_have_keys() -> None:
    receipt = {
        "verdicts": [["idle", 7, ["nothing moves"]]],
        "at-risk": [["killed-io", "a request was outstanding"]],
    }
    document = receipt_as_json(receipt)
    assert document["verdicts"] == [{"verdict": "idle", "at_usec": 7, "reasons": ["nothing moves"]}]
    assert document["at_risk"] == [{"code": "killed-io", "text": "a request was outstanding"}]


def test_receipt_has_the_same_keys_in_every_job() -> None:
    short = receipt_as_json({"elapsed-usec": 5, "rungs": [TERM], "verdict": "gone"})
    assert short == {
        "elapsed_usec": 5,
        "rungs": [{"phase": "terminate", "action": "SIGTERM", "at_usec": 0}],
        "verdict": "gone",
        "reason": None,
        "error": None,
        "requested_by": None,
    }
    full = receipt_as_json({"elapsed-usec": 5, "rungs": [], "verdict": "gone", "requested-by": 0})
    assert full.keys() == short.keys()
    assert full["requested_by"] == 0


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 3], 3),
        ([3, 7, 0], 7),
        ([4, 3], 4),
        ([6, 5, 7], 6),
        ([4, 1, 6], 1),
        ([1, 130], 130),
    ],
)
def test_worst(codes: list[int], code: int) -> None:
    assert worst(codes) == code


def test_worst_knows_every_exit_code() -> None:
    assert set(ExitCode) <= set(WORST_FIRST)
