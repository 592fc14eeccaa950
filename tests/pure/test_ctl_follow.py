"""The lines about a job that is followed through a pipe."""

from __future__ import annotations

import io
from typing import Any

import pytest

from qkilld.ctl import follow
from qkilld.ctl.follow import Plain
from qkilld.ctl.output import Output
from qkilld.model.words import INFINITY, Flag, Phase
from tests.pure.test_jobview import NOW, S, view

OVERDUE = {"Held": False, "DeadlineUSec": INFINITY}
"""What is announced of a hold that was too long, until the daemon has looked at the process."""


def lines(monkeypatch: pytest.MonkeyPatch, *changes: dict[str, Any]) -> list[str]:
    monkeypatch.setattr(follow, "monotonic_usec", lambda: NOW)
    out = io.StringIO()
    plain = Plain(Output(out, out))
    now = view(Flags=Flag.FORCE)
    for change in ({}, *changes):
        now = now.updated(change)
        plain.changed(now)
    first, *rest = out.getvalue().splitlines()
    assert first == "web (pid 4711): terminate, unknown; SIGKILL in 7s"
    return [line.removeprefix("web (pid 4711): ") for line in rest]


HELD = {"Held": True, "DeadlineUSec": INFINITY}


def test_nothing_is_promised_of_a_released_job_before_it_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed = {"Phase": Phase.KILL, "DeadlineUSec": NOW + 5 * S}
    assert lines(monkeypatch, HELD, OVERDUE, {"Verdict": "idle"}, killed) == [
        "terminate, unknown; held",
        "terminate, unknown; released",
        "terminate, idle",
        "kill, idle; gives up in 5s",
    ]
    later = {"DeadlineUSec": NOW + 3 * S}
    assert lines(monkeypatch, HELD, OVERDUE, later)[1:] == [
        "terminate, unknown; released",
        "terminate, unknown; SIGKILL in 3s",
    ]
    assert lines(monkeypatch, HELD, {"Held": False} | later)[1:] == [
        "terminate, unknown; released; SIGKILL in 3s"
    ]
    assert lines(monkeypatch, HELD, OVERDUE, HELD)[2:] == ["terminate, unknown; held"]


def test_an_extension_has_a_line_and_evidence_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, {"DeadlineUSec": NOW + 20 * S}) == []
    extended = {"NotBeforeUSec": NOW + 60 * S, "DeadlineUSec": NOW + 60 * S}
    assert lines(monkeypatch, extended) == ["terminate, unknown; extended; SIGKILL in 1min"]
    assert lines(monkeypatch, HELD, {"NotBeforeUSec": NOW + 60 * S})[1:] == [
        "terminate, unknown; extended; held"
    ]


def test_a_daemon_that_does_not_tell_of_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    old = view()
    del old.properties["NotBeforeUSec"]
    Plain(Output(out, out)).changed(old)
    assert "terminate, unknown; " in out.getvalue()
