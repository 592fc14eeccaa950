"""The lines about a job that is followed through a pipe."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest

from qkilld.ctl import follow
from qkilld.ctl.follow import LineDisplay
from qkilld.ctl.output import Output
from qkilld.model.constants import INFINITY, Flag, Phase
from tests.pure.test_job_status import JOB, NOW, S

OVERDUE = {"held": False, "deadline": INFINITY}
"""The state that the daemon announces after a long hold, until it has taken a sample."""


def lines(monkeypatch: pytest.MonkeyPatch, *changes: dict[str, Any]) -> list[str]:
    monkeypatch.setattr(follow, "monotonic_usec", lambda: NOW)
    out = io.StringIO()
    plain = LineDisplay(Output(out, out))
    now = replace(JOB, flags=Flag.FORCE)
    for change in ({}, *changes):
        now = replace(now, **change)
        plain.show(now)
    first, *rest = out.getvalue().splitlines()
    assert first == "web (pid 4711): SIGTERM sent; SIGKILL in 7s"
    return [line.removeprefix("web (pid 4711): ") for line in rest]


HELD = {"held": True, "deadline": INFINITY}


def test_nothing_is_promised_of_a_released_job_before_it_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed = {"phase": Phase.KILL, "deadline": NOW + 5 * S}
    assert lines(monkeypatch, HELD, OVERDUE, {"verdict": "idle"}, killed) == [
        "SIGTERM sent; held",
        "SIGTERM sent; released",
        "idle, does not exit",
        "SIGKILL sent; gives up in 5s",
    ]
    later = {"deadline": NOW + 3 * S}
    assert lines(monkeypatch, HELD, OVERDUE, later)[1:] == [
        "SIGTERM sent; released",
        "SIGTERM sent; SIGKILL in 3s",
    ]
    assert lines(monkeypatch, HELD, {"held": False} | later)[1:] == [
        "SIGTERM sent; released; SIGKILL in 3s"
    ]
    assert lines(monkeypatch, HELD, OVERDUE, HELD)[2:] == ["SIGTERM sent; held"]


def test_an_extension_has_a_line_and_evidence_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, {"deadline": NOW + 20 * S}) == []
    extended = {"not_before": NOW + 60 * S, "deadline": NOW + 60 * S}
    assert lines(monkeypatch, extended) == ["SIGTERM sent; extended; no SIGKILL for 1min"]
    assert lines(monkeypatch, HELD, {"not_before": NOW + 60 * S})[1:] == [
        "SIGTERM sent; extended; held"
    ]
