"""What check-unit finds out about the surroundings of a unit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qkilld.ctl.unit_context import _missing_helpers
from qkilld.model.unit import Command, UnitFacts


def test_a_program_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "qkilld-stop"
    facts = UnitFacts("web.service", exec_stop=(Command(str(program), (str(program),)),))
    assert list(_missing_helpers(facts)) == [str(program)]
    program.touch(0o644)
    assert list(_missing_helpers(facts)) == [str(program)]  # Not executable.
    program.chmod(0o755)
    assert list(_missing_helpers(facts)) == []

    def denied(path: object, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    # A user may be unable to see the program that root executes.
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(os, "stat", denied)
    assert list(_missing_helpers(facts)) == []
