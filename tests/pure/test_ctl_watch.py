"""The output of watch: a table and a screen that fit any terminal. Its keys."""

from __future__ import annotations

import asyncio
import gc
import itertools
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest

from qkilld.ctl.job_table import TITLES, cells_of, line_of, shape_for
from qkilld.ctl.output import width
from qkilld.ctl.terminal import keys_of
from qkilld.ctl.watch import _Watcher
from qkilld.ctl.watch_screen import KEEP_ENDED, WatchState, screen
from qkilld.model.constants import Flag, Phase
from qkilld.model.job_status import JobStatus
from tests.pure.test_job_status import JOB, NOW, S

LONG = replace(
    JOB,
    path="/org/qkilld1/job/4",
    id=4,
    pid=4194304,
    name="a-rather-long-name\x1b[2J\n[bold]\u202e漢字漢字漢字漢字",
    flags=Flag.FORCE,
    phase=Phase.TERMINATE,
    verdict="storage-wait",
    standstill=60 * S,
    deadline=NOW + 41 * S,
    started=NOW - 3723 * S,
    bytes_written=12_345_678,
    bytes_pending=7_000,
    rate=2_100_000,
    reasons=("nbd node d0 has 5632 bytes or segments on the way to nbdkit (process 5825)",) * 3,
    last_progress=NOW - 19 * S,
    requested_by=0,
    reason="migration",
)
MOVING = replace(
    LONG, path="/org/qkilld1/job/5", id=5, name="web", verdict="flushing", deadline=NOW + 60 * S
)
ENDED = replace(
    LONG,
    path="/org/qkilld1/job/6",
    id=6,
    result="killed",
    phase=Phase.DONE,
    ended=NOW - S,
    receipt={"elapsed-usec": 61 * S, "rungs": [["kill", "SIGKILL", 60 * S]]},
)
ASKED = replace(JOB, phase=Phase.POWERDOWN, guest_asked="ignored", standstill=60 * S)


@pytest.mark.parametrize("columns", range(20, 161, 7))
def test_a_table_fits(columns: int) -> None:
    rows = [cells_of(job, NOW) for job in (JOB, LONG, MOVING, ASKED)]
    shape = shape_for([TITLES, *rows], columns)
    for row in (TITLES, *rows):
        line = line_of(row, shape)
        assert width(line.plain) <= columns
        assert line.plain.isprintable()


@pytest.mark.parametrize("columns", [57, 77, 117])
def test_the_time_and_what_comes_next_are_there(columns: int) -> None:
    rows = [cells_of(job, NOW) for job in (LONG, MOVING)]
    shape = shape_for([TITLES, *rows], columns)
    still, moving = (line_of(row, shape).plain for row in rows)
    assert "1:02:03" in still and "SIGKILL in 41s" in still
    assert "1:02:03" in moving
    after = "SIGKILL only after 1min without progress" if columns > 100 else "SIGKILL if still 1min"
    assert after in moving
    assert "web" in moving and "flushes" in moving
    # A less important cell is shown only if the more important ones are.
    assert ("2.1 MB/s" in still) <= ("12.3 MB" in still)


CHANGES: list[dict[str, Any]] = [
    {},
    {"outage": ""},
    {"help": True},
    {"message": "word " * 60, "bus_title": "bus at unix:path=/" + "x" * 200},
    {"prompt": "SIGKILL now to " + "x" * 100 + " Type yes: _", "steers": False},
]


def states() -> list[WatchState]:
    found = []
    hundred = [numbered(number) for number in range(1, 101)]
    some: tuple[list[JobStatus], ...] = ([], [JOB], [ENDED], [JOB, LONG, MOVING, ENDED], hundred)
    for jobs, changes in itertools.product(some, CHANGES):
        state = WatchState(**changes)
        for job in jobs:
            state.show(job)
        found.append(state)
    return found


def numbered(number: int, **changes: Any) -> JobStatus:
    return replace(LONG, id=number, path=f"/org/qkilld1/job/{number}", **changes)


@pytest.mark.parametrize(("columns", "rows"), [(20, 5), (40, 8), (60, 12), (80, 24), (200, 60)])
def test_a_screen_fits(columns: int, rows: int) -> None:
    for state in states():
        lines = screen(state, NOW, columns, rows)
        assert len(lines) <= rows
        for line in lines:
            assert width(line.plain) <= columns, line.plain
            assert line.plain.isprintable()


def test_the_chosen_job_is_always_to_be_seen() -> None:
    state = WatchState(outage="")
    for number in range(1, 101):
        state.show(numbered(number, name=f"guest{number}"))
    for step in (1, 1, 30, 30, 1000, -1, -50, -1000):
        state.choose(step)
        chosen = state.jobs[state.selection].name
        for rows in (6, 12, 24):
            marked = [line.plain for line in screen(state, NOW, 80, rows) if "▸" in line.plain]
            assert len(marked) == 1 and chosen in marked[0], (rows, chosen)


def test_one_that_has_ended_is_shown_for_a_while() -> None:
    state = WatchState(outage="")
    state.show(JOB)
    state.show(ENDED)
    assert state.running == 1
    assert any("but only by SIGKILL" in line.plain for line in screen(state, NOW, 100, 24))
    state.choose(1)
    assert state.selection == ENDED.path
    state.forget(NOW + KEEP_ENDED)
    assert state.jobs.keys() == {JOB.path} and state.selection == JOB.path


def test_a_question_is_seen_to_its_end() -> None:
    state = WatchState(prompt="SIGKILL now to a-rather-long-name, which loses data? Type yes: ye_")
    lines = [line.plain for line in screen(state, NOW, 30, 24)]
    assert lines[-1].endswith("ye_")


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("h", ["h"]),
        ("\x1b[A\x1b[B\x1bOA", ["up", "down", "up"]),
        ("\x1b", ["escape"]),
        ("2h\r", ["2", "h", "enter"]),
        ("a\x7f\b", ["a", "backspace", "backspace"]),
        ("\x1b[15~q", ["q"]),
        ("\x1b[", []),
        ("\x1b[200~f\x1b[201~", ["f"]),
        ("\x00\x01\u202eé", ["é"]),
    ],
)
def test_keys(text: str, keys: list[str]) -> None:
    assert keys_of(text) == keys


def test_nothing_is_called_if_the_terminal_cannot_be_given_away() -> None:
    """If the call was made, nobody would await it."""

    class LostScreen:
        def suspended(self) -> NoReturn:
            raise OSError("the terminal is gone")

    async def call() -> None: ...

    async def act() -> None:
        watcher = SimpleNamespace(_asks=True, _screen=LostScreen())
        await _Watcher._with_terminal(cast(_Watcher, watcher), JOB, call)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError):
            asyncio.run(act())
        gc.collect()
