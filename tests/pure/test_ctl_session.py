"""Messages to callers who are denied."""

from __future__ import annotations

import pytest

from qkilld.ctl.session import NeedsRoot, explain
from qkilld.engine.checks import check_answer
from qkilld.model.access import Answer
from qkilld.model.bus_address import SYSTEM_BUS
from qkilld.model.errors import AccessDenied


def test_advice_is_given_once_and_only_where_it_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    try:
        check_answer(Answer.CHALLENGE, "Process 7 is")
    except AccessDenied as error:
        text = explain(error, SYSTEM_BUS)
    assert text.count("administrator") == 1
    assert "as root" in text and "polkit" in text
    assert explain(NeedsRoot("run this as root"), SYSTEM_BUS) == "run this as root"


def test_root_is_not_told_to_be_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert explain(AccessDenied("not allowed"), SYSTEM_BUS) == "not allowed"
