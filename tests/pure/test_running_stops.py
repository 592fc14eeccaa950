"""Finding the units in which qkilld-stop runs, by the names of processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qkilld
from qkilld.ctl.running_stops import _units_of_helpers

STOP = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from qkilld.stop import main
main._main = lambda options, notifier: print(open("/proc/self/comm").read(), end="") or 0
main.main()
"""
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


@pytest.mark.parametrize(("options", "name"), [((), "qkilld-stop"), (("--dry-run",), "python")])
def test_the_name_of_a_stop_that_an_interpreter_runs(options: tuple[str, ...], name: str) -> None:
    """Examples are ExecStop=/usr/bin/python3 -m qkilld.stop, and the wrapper of a distribution."""
    top = Path(qkilld.__file__).parents[1]
    command = [sys.executable, "-I", "-S", "-c", STOP, str(top), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(name)
