"""Drawing a stop, from every recorded trace and from journal entries."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from qkilld.adapters.journal_reader import entries_of
from qkilld.ctl.replay import read
from qkilld.ctl.timeline import of_journal, of_trace
from qkilld.ctl.timeline_svg import WIDTH, Milestone, Stretch, Timeline, draw
from qkilld.model.event import MessageId
from qkilld.model.trace import VerdictRecord

TRACES = Path(__file__).parents[1] / "traces"
FILES = [*sorted(TRACES.glob("*.jsonl")), *sorted(TRACES.glob("matrix/*.jsonl"))]
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</svg><script>\x1b[2J\n\u202e&amp;\"'"


def texts(drawn: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(drawn).iter(f"{SVG}text")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.stem))
def test_every_trace_is_drawn(path: Path) -> None:
    trace = read(str(path))
    drawn = draw(of_trace(trace))
    root = ET.fromstring(drawn)
    words = texts(drawn)
    assert any(word.startswith("SIGTERM ") for word in words)
    verdicts = {turn.verdict.value for turn in trace.of(VerdictRecord)}
    assert verdicts <= set(words)
    for number in re.findall(r'\b(?:x|x1|x2|width)="([-\d.]+)"', drawn):
        assert 0 <= float(number) <= WIDTH
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "g", "title", "style", "rect", "line", "text", "polygon", "polyline", "path"),
    }


def test_the_timeline_of_a_trace() -> None:
    timeline = of_trace(read(str(TRACES / "ignores-sigterm.jsonl")))
    assert [mark.text for mark in timeline.marks] == ["SIGTERM", "SIGKILL", "killed"]
    assert [mark.drastic for mark in timeline.marks] == [False, True, True]
    first, *_, last = [left for _, left in timeline.time_left]
    assert first is not None and 9 < first <= 10 and last == 0
    assert timeline.next_rung == "SIGKILL"


def test_hostile_words_are_escaped() -> None:
    mark = Milestone(1, HOSTILE)
    span = Stretch(0, 2, "flushing", HOSTILE)
    drawn = draw(Timeline(HOSTILE, HOSTILE, 2, (mark,), (span,), next_rung=HOSTILE))
    root = ET.fromstring(drawn)
    assert not [element for element in root.iter() if "script" in element.tag]
    assert all(text.isprintable() for text in texts(drawn))


@pytest.mark.parametrize("length", [0, 0.001, 0.109, 3, 31.7, 600, 86_400, 10**7])
def test_every_length(length: float) -> None:
    drawn = draw(
        Timeline("web", "", length, (Milestone(0, "SIGTERM"), Milestone(length, "exited")))
    )
    lines = [e for e in ET.fromstring(drawn).iter(f"{SVG}line") if e.get("class") == "g"]
    assert 1 <= len(lines) <= 20


def test_labels_do_not_lie_on_each_other() -> None:
    marks = tuple(Milestone(number / 10, f"mark {number}") for number in range(10))
    drawn = draw(Timeline("web", "", 100, marks))
    places = [
        (element.get("x"), element.get("y"))
        for element in ET.fromstring(drawn).iter(f"{SVG}text")
        if (element.text or "").startswith("mark")
    ]
    assert len({y for _, y in places}) == 10


def entry(message: MessageId, at: float, pid: int = 7, **fields: Any) -> dict[str, Any]:
    return {
        "MESSAGE_ID": message.value,
        "__MONOTONIC_TIMESTAMP": timedelta(seconds=at),
        "_UID": os.geteuid(),
        "_BOOT_ID": "b",
        "OBJECT_PID": pid,
        "QKILLD_JOB": 1,
        "QKILLD_GUEST": "web",
        **fields,
    }


STORY = [
    entry(MessageId.JOB_STARTED, 100, QKILLD_FLAGS="5"),
    entry(MessageId.GUEST_ASKED, 100.5, QKILLD_METHOD="button"),
    entry(MessageId.VERDICT_TURNED, 101, QKILLD_VERDICT="guest-shutdown", QKILLD_REASONS="a\nb"),
    entry(MessageId.JOB_HELD, 102),
    entry(MessageId.JOB_RELEASED, 104),
    entry(MessageId.SIGNAL_SENT, 106, QKILLD_SIGNAL="SIGTERM"),
    entry(MessageId.JOB_ENDED, 108, QKILLD_RESULT="exited", QKILLD_ELAPSED_USEC="8000000"),
]


def test_the_timeline_of_journal_entries() -> None:
    older = [entry(MessageId.JOB_STARTED, 10, pid=6), entry(MessageId.JOB_ENDED, 11, pid=6)]
    stranger = entry(MessageId.SIGNAL_SENT, 107, QKILLD_SIGNAL="SIGKILL", _UID=4711)
    other = entry(MessageId.SIGNAL_SENT, 107, pid=8, QKILLD_SIGNAL="SIGKILL")
    timeline = of_journal(entries_of([*older, *STORY[:5], stranger, other, *STORY[5:]]))
    assert timeline.title == "web (pid 7), job 1: exited after 8s"
    assert [(mark.at, mark.text) for mark in timeline.marks] == [
        (0.5, "button"),
        *((2, "held"), (4, "released"), (6, "SIGTERM"), (8, "exited")),
    ]
    (span,) = timeline.verdicts
    assert (span.start, span.end, span.word) == (1, 8, "guest-shutdown")
    assert [(held.start, held.end) for held in timeline.held] == [(2, 4)]
    assert len(ET.fromstring(draw(timeline)))


def test_a_job_that_goes_on_and_one_that_was_resumed() -> None:
    running = of_journal(entries_of(STORY[:-1]))
    assert "not ended" in running.title
    resumed = [
        entry(MessageId.JOB_RESUMED, 103, QKILLD_ELAPSED_USEC="3000000", QKILLD_FLAGS="1"),
        *STORY[5:],
    ]
    assert of_journal(entries_of(resumed)).length == 8
    assert of_journal(entries_of([*STORY[:3], *resumed])).marks[0].text == "button"
    assert entries_of([replace_boot(one) for one in STORY[5:]]) == []


def replace_boot(one: dict[str, Any]) -> dict[str, Any]:
    return one | {"_BOOT_ID": "another"}


def test_a_mark_at_the_end_has_its_label_inside() -> None:
    drawn = draw(replace(Timeline("web", "", 10), marks=(Milestone(10, "a long label indeed"),)))
    (place,) = [
        float(e.get("x", "0"))
        for e in ET.fromstring(drawn).iter(f"{SVG}text")
        if (e.text or "").startswith("a long")
    ]
    assert place + 100 < WIDTH
