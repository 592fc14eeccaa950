"""In which units qkilld-stop runs, by the names of processes."""

from __future__ import annotations

from pathlib import Path

from qkilld.ctl.running_stops import _units_of_helpers

MANAGER = "/user.slice/user-1000.slice/user@1000.service/app.slice/vm.service"


def test_the_units_of_qkilld_stop(tmp_path: Path) -> None:
    for pid, comm, group in (
        (1, "systemd", "/init.scope"),
        (20, "qkilld-stop", "/system.slice/web.service"),
        (21, "qkilld-stopper", "/system.slice/db.service"),
        (22, "qkilld-stop", MANAGER),
        (23, "cp", "/system.slice/copy.service"),
    ):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(f"{comm}\n")
        (tmp_path / str(pid) / "cgroup").write_text(f"0::{group}\n")
    (tmp_path / "24").mkdir()  # It has exited.
    assert _units_of_helpers(tmp_path) == {"web.service", "vm.service"}
