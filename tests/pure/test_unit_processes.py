"""The units of processes, without asking systemd."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qkilld.adapters import procfs
from qkilld.ctl.unit_processes import others_are_hidden, processes_of
from qkilld.model.guest import Unit

OWN = f"/user.slice/user-1.slice/user@{os.getuid()}.service"


def test_the_processes_of_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    units = {1: Unit("init.scope"), 20: Unit("web.service"), 21: None, 22: Unit("")}
    units |= {23: Unit("web.service"), 24: Unit("user@7.service", "web.service")}
    monkeypatch.setattr(procfs, "pids", lambda: list(units))
    monkeypatch.setattr(procfs, "read_unit", units.__getitem__)
    assert processes_of("web.service", user=False) == [20, 23]
    assert processes_of("user@7.service", user=False) == [24]
    assert not others_are_hidden()


def test_the_processes_of_a_users_unit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A unit of the system or of another user may have the same name. Process 1 is hidden."""
    for pid, group in {
        20: "0::/system.slice/web.service",
        21: f"0::{OWN}/app.slice/web.service",
        22: f"1:name=systemd:{OWN}/app.slice/app-vm.slice/web.service/own\n0::/",
        23: "0::/user.slice/user-4242.slice/user@4242.service/app.slice/web.service",
        24: f"0::{OWN}/app.slice/other.service/web.service",
        25: f"0::{OWN}/app.slice",
        26: f"0::{OWN}/_web.service",
    }.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(f"{group}\n")
    (tmp_path / "27").mkdir()  # It has exited.
    monkeypatch.setattr(procfs, "PROC", tmp_path)
    monkeypatch.setattr(procfs, "pids", lambda: list(range(20, 28)))
    assert processes_of("web.service", user=True) == [21, 22, 26]
    assert others_are_hidden()
