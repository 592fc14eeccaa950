"""What is said of a job while it runs and at its end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qkilld.model.exits import WORST_FIRST, exit_code_of, worst
from qkilld.model.jobview import (
    JobView,
    ending,
    flag_names,
    label,
    receipt_as_json,
    rounded,
)
from qkilld.model.words import INFINITY, UNKNOWN, ExitCode, Flag, Phase, Result, Verdict

S = 1_000_000
NOW = 1000 * S
PROPERTIES: dict[str, Any] = {
    "Id": 3,
    "PID": 4711,
    "StartTime": 12345,
    "Name": "web",
    "UUID": "",
    "Unit": "",
    "UID": 0,
    "Flags": 0,
    "Phase": Phase.TERMINATE,
    "Verdict": Verdict.UNKNOWN,
    "Result": "",
    "StartedUSec": NOW - 3 * S,
    "DeadlineUSec": NOW + 7 * S,
    "LastProgressUSec": 0,
    "BytesWritten": UNKNOWN,
    "BytesPending": UNKNOWN,
    "Held": False,
    "NotBeforeUSec": 0,
}


def view(**properties: Any) -> JobView:
    return JobView("/org/qkilld1/job/3", PROPERTIES | properties)


@pytest.mark.parametrize(
    ("properties", "outlook"),
    [
        ({}, "gives up in 7s"),
        ({"Flags": Flag.FORCE}, "SIGKILL in 7s"),
        ({"Flags": Flag.FORCE | Flag.FIXED}, "SIGKILL in 7s"),
        ({"Flags": Flag.FIXED}, "gives up in 7s"),
        ({"Flags": Flag.FORCE, "Phase": Phase.KILL}, "gives up in 7s"),
        ({"Flags": Flag.FORCE, "Phase": Phase.REAP}, "gives up in 7s"),
        ({"Phase": Phase.POWERDOWN}, "SIGTERM in 7s"),
        ({"Phase": Phase.QUIT}, "SIGTERM in 7s"),
        ({"DeadlineUSec": NOW + 7 * S + 1}, "gives up in 8s"),  # never says less than is left
        ({"DeadlineUSec": NOW + 1}, "gives up in 1s"),
        ({"DeadlineUSec": NOW}, "gives up now"),
        ({"DeadlineUSec": NOW - 5 * S}, "gives up now"),
        ({"DeadlineUSec": NOW + 90 * S}, "gives up in 1min 30s"),
        ({"DeadlineUSec": INFINITY}, "waits without limit"),
        ({"Held": True}, "held"),
        # Extended, and the daemon has not decided anew yet.
        ({"Flags": Flag.FORCE, "NotBeforeUSec": NOW + 60 * S}, "SIGKILL in 1min"),
        ({"Flags": Flag.FORCE, "NotBeforeUSec": NOW + 2 * S}, "SIGKILL in 7s"),
        ({"Phase": Phase.REAP, "NotBeforeUSec": NOW + 60 * S}, "gives up in 7s"),
        ({"Phase": Phase.DONE, "Result": Result.EXITED}, ""),
        ({"Result": Result.SURVIVED}, ""),
    ],
)
def test_outlook(properties: dict[str, Any], outlook: str) -> None:
    assert view(**properties).outlook(NOW) == outlook


@pytest.mark.parametrize(
    ("started", "elapsed"),
    [(NOW, "0"), (NOW - S + 1, "0"), (NOW - 61 * S, "1min 1s"), (NOW + S, "0")],
)
def test_elapsed(started: int, elapsed: str) -> None:
    assert view(StartedUSec=started).elapsed(NOW) == elapsed


def test_updated() -> None:
    changed = view().updated({"Phase": Phase.KILL, "Result": Result.KILLED, "Novelty": 1})
    assert (changed.phase, changed.result, changed.pid) == ("kill", "killed", 4711)


def test_json_has_null_for_what_is_not_known() -> None:
    document = json.loads(json.dumps(view(Flags=9 | 1 << 40, DeadlineUSec=INFINITY).as_json()))
    assert document["flags"] == ["force", "fixed", "0x10000000000"]
    for key in ("deadline_usec", "bytes_written", "bytes_pending", "last_progress_usec", "result"):
        assert document[key] is None, key
    assert view(BytesWritten=0).as_json()["bytes_written"] == 0


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
            "killed",
            {"elapsed-usec": 10_100_000, "rungs": [TERM, KILL]},
            ["gone after 10.1s", "data may be lost"],
            3,
        ),
        ("survived", {"elapsed-usec": 15 * S, "rungs": [TERM]}, ["after 15s", "--force"], 4),
        ("survived", {"elapsed-usec": 15 * S, "rungs": [TERM, KILL]}, ["the kernel"], 4),
        (
            "signalled",
            {"elapsed-usec": 9, "rungs": [["kill", "SIGKILL", 0]]},
            ["SIGKILL was sent"],
            0,
        ),
        ("signalled", {"elapsed-usec": 9, "rungs": []}, ["the signal was sent"], 0),
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


def test_every_result_has_words_of_its_own() -> None:
    assert len({ending(result, {}) for result in Result}) == len(Result)
    assert not any("does not know" in ending(result, {}) for result in Result)


@pytest.mark.parametrize(
    ("usec", "result"),
    [(0, 0), (999, 999), (4321, 4000), (59_999_999, 59_999_000), (61_500_000, 61 * S)],
)
def test_rounded(usec: int, result: int) -> None:
    assert rounded(usec) == result


def test_receipt_has_the_same_keys_in_every_job() -> None:
    short = receipt_as_json({"elapsed-usec": 5, "rungs": [TERM], "verdict": "gone"})
    assert short == {
        "elapsed_usec": 5,
        "rungs": [{"phase": "terminate", "signal": "SIGTERM", "at_usec": 0}],
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
