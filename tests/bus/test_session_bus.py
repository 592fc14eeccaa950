"""The bus that --user selects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.bus import Bus, Daemon, environment
from tests.lab.process import run


def without_a_session(bus: Bus, runtime: str | None) -> dict[str, str]:
    """Return the environment of a user's program outside of any session, such as one started by
    cron or `su`."""
    result = environment(bus.address)
    for name in ("DBUS_SESSION_BUS_ADDRESS", "DBUS_STARTER_ADDRESS", "XDG_RUNTIME_DIR", "DISPLAY"):
        result.pop(name, None)
    return result | ({} if runtime is None else {"XDG_RUNTIME_DIR": runtime})


@pytest.mark.parametrize("name", ["1000", "a user~'s; directory, 50%"])
def test_the_bus_in_the_runtime_directory(daemon: Daemon, tmp_path: Path, name: str) -> None:
    runtime = tmp_path / name
    runtime.mkdir()
    (runtime / "bus").symlink_to(daemon.bus.address.removeprefix("unix:path=").partition(",")[0])
    done = qkillctl(without_a_session(daemon.bus, str(runtime)))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["jobs"] == []


def test_a_user_without_either(private_bus: Bus) -> None:
    done = qkillctl(without_a_session(private_bus, None))
    assert done.returncode == 1
    assert "session bus" in done.stderr and "XDG_RUNTIME_DIR" in done.stderr
    assert "Traceback" not in done.stderr


def qkillctl(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "qkilld.ctl", "--user", "--json", "status"], env=env)
