"""The modules that qkilld-stop imports, and those that it does not need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import qkilld.stop
from qkilld.stop.limits import NO_STATE
from tests.lab.notify import NotifySocket

MODULES = sorted(
    f"qkilld.stop.{path.stem}"
    for path in Path(qkilld.stop.__file__).parent.glob("*.py")
    if not path.stem.startswith("__")
)
PROGRAM = """
import importlib, sys
class MissingModules:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dbus_next", "dbus_fast"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, MissingModules())
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not [name for name in sys.modules if name.startswith("qkilld.bus")]
"""


def test_it_starts_without_the_library_for_the_bus() -> None:
    """qkilld-stop uses the D-Bus library only if it is installed and works."""
    assert "qkilld.stop.fallback" in MODULES
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *MODULES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


FAST = """
import sys
sys.path.insert(0, sys.argv[1])
import qkilld.stop.main, qkilld.stop.run
print(*sorted(sys.modules))
"""
ALLOWED = {
    "qkilld",
    "qkilld.adapters",
    "qkilld.adapters.blockable",
    "qkilld.adapters.journal_stream",
    "qkilld.adapters.sd_notify",
    "qkilld.engine",
    "qkilld.engine.fair_shares",
}


def imported_by(program: str) -> set[str]:
    top = str(Path(qkilld.stop.__file__).parents[2])
    command = [sys.executable, "-I", "-S", "-c", program, top]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_looking_for_other_guests_of_the_unit_does_not_import_the_engine() -> None:
    loaded = imported_by(FAST.replace("qkilld.stop.run", "qkilld.stop.run, qkilld.stop.targets"))
    assert "qkilld.stop.targets" in loaded
    assert not {"qkilld.engine.service", "qkilld.stop.fallback", "asyncio"} & loaded


def test_the_way_of_an_idle_guest_imports_next_to_nothing() -> None:
    """When a host shuts down, the time for these imports is spent for each guest."""
    loaded = imported_by(FAST)
    ours = {name for name in loaded if name.startswith("qkilld") and "qkilld.stop" not in name}
    assert ours == ALLOWED
    of_stop = {
        "daemon",
        "guest_stop",
        "limits",
        "log",
        "main",
        "notifier",
        "options",
        "process",
        "run",
    }
    assert {name for name in loaded if "qkilld.stop." in name} == {
        f"qkilld.stop.{name}" for name in of_stop
    }
    costly = {"asyncio", "dataclasses", "typing", "pathlib", "logging", "argparse", "threading"}
    assert not loaded & (costly | {"subprocess", "inspect", "dbus_next", "contextlib"})


WAITING = """
import sys
sys.path.insert(0, sys.argv[1])
import qkilld.stop.main
from qkilld.stop.log import Log
from qkilld.stop.notifier import Notifier
from qkilld.stop.options import Options
from qkilld.stop.run import StopRun
times = iter([0.0])
run = StopRun(Options(), Notifier(sys.argv[2]), Log(), lambda: next(times, 1.0))
before = set(sys.modules)
run.turn()
print(*sorted(set(sys.modules) - before))
"""


def test_waiting_for_the_daemon_imports_nothing(lab_dir: Path) -> None:
    """The daemon may be starting, and the host may have no free processor."""
    top = str(Path(qkilld.stop.__file__).parents[2])
    with NotifySocket(lab_dir) as notify:
        command = [sys.executable, "-I", "-S", "-c", WAITING, top, str(notify.path)]
        pidfd = os.pidfd_open(os.getpid())
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert notify.wait_for("STATUS", 10, pidfd=pidfd) == NO_STATE
        os.close(pidfd)
    assert done.stdout.split() == []
