"""Lines made from replies of Inspect."""

from __future__ import annotations

from typing import Any

import pytest

from qkilld.ctl.trace import Observation

SEEN = {
    "verdict": "flushing",
    "reasons": ["it wrote 5 bytes"],
    "io": {"write_bytes": 1_000},
    "bytes-pending": 70,
}


@pytest.mark.parametrize(
    ("more", "written"),
    [
        ({}, 1_000),
        ({"cgroup": {"written": 7}, "cgroup-own": False}, 1_000),
        ({"cgroup": {"written": 7}, "cgroup-own": True}, 7),
        ({"cgroup": {"dirty": 7}, "cgroup-own": True}, 1_000),
        ({"io": {}}, None),
    ],
)
def test_the_best_counter_of_what_was_written(more: dict[str, Any], written: int | None) -> None:
    assert Observation.of({**SEEN, **more}).written == written


def test_a_look_in_words() -> None:
    first = Observation.of(SEEN)
    assert first.line(first) == "flushing: it wrote 5 bytes; 70 bytes pending"
    later = Observation.of({**SEEN, "io": {"write_bytes": 1_500}, "reasons": []})
    assert later.line(first) == "flushing: 500 bytes written; 70 bytes pending"
    assert later.as_json(first, 3) == {
        "at_usec": 3,
        "verdict": "flushing",
        "reasons": [],
        "bytes_written": 500,
        "bytes_pending": 70,
    }


def test_a_daemon_that_tells_no_more_than_the_verdict() -> None:
    look = Observation.of({"verdict": "unknown"})
    assert look.line(look) == "unknown"
    assert look.as_json(look, 0)["bytes_pending"] is None


def test_2_to_the_64_is_not_a_size() -> None:
    assert Observation.of({"verdict": "idle", "bytes-pending": 2**64 - 1}).pending is None


def test_it_is_made_printable() -> None:
    look = Observation.of({"verdict": "\x1b[2J", "reasons": ["a\nb", "\u202e"]})
    assert look.line(look) == "\ufffd[2J: a\ufffdb; \ufffd"
