"""The units of processes, without asking systemd."""

from __future__ import annotations

import os

import pytest

from qkilld.adapters import procfs
from qkilld.ctl.unit_processes import others_are_hidden, processes_of
from qkilld.model.guest import Unit

UNITS = {
    1: Unit("init.scope"),
    20: Unit("web.service"),
    21: Unit(f"user@{os.getuid()}.service", "web.service"),
    22: Unit("user@4242.service", "web.service"),
    23: None,
    24: Unit("web.service"),
    25: Unit(""),
}


def test_the_processes_of_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit of a user may have the name of another one."""
    monkeypatch.setattr(procfs, "pids", lambda: list(UNITS))
    monkeypatch.setattr(procfs, "read_unit", UNITS.__getitem__)
    assert processes_of("web.service", user=False) == [20, 24]
    assert processes_of("web.service", user=True) == [21]
    assert processes_of("user@4242.service", user=False) == [22]
    assert not others_are_hidden()
    monkeypatch.setattr(procfs, "pids", lambda: [20, 24])
    assert others_are_hidden()
