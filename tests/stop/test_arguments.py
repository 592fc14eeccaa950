"""The command line of qkilld-stop."""

from __future__ import annotations

import os

import pytest

from qkilld.stop.arguments import parse
from qkilld.stop.finder import ProcessFinder


@pytest.mark.parametrize(
    ("given", "unit"),
    [("web", "web.service"), ("web.service", "web.service"), ("run-1.scope", "run-1.scope")],
)
def test_the_suffix_of_a_unit_may_be_omitted(given: str, unit: str) -> None:
    assert parse(["--unit", given]).unit == unit


@pytest.mark.parametrize("given", [["--pid", "--force"], ["--pid", "", "--force"]])
def test_a_main_process_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    """If the main process is gone, systemd expands $MAINPID to nothing."""
    monkeypatch.delenv("SYSTEMD_EXEC_PID", raising=False)
    with pytest.raises(SystemExit):
        parse(given)
    assert "expected one argument" in capsys.readouterr().err
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    with pytest.raises(SystemExit):
        parse(given)  # A program of ExecStart= may have run qkilld-stop.
    monkeypatch.setenv("SERVICE_RESULT", "success")
    monkeypatch.delenv("MAINPID", raising=False)
    options = parse(given)
    assert (options.pid, options.force, options.names_one) == (0, True, True)
    assert ProcessFinder(options, os.environ).in_own_unit
    assert ProcessFinder(options, os.environ).named() is None
    # Another variable was empty.
    monkeypatch.setenv("MAINPID", "5")
    assert parse(given).pid is None
