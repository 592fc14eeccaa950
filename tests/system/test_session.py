"""The installed qkilld of a user's session. The session bus starts it, for the user's own
guests."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.lab.container import CHECKOUT, Container
from tests.lab.image import busybox
from tests.lab.process import TOP
from tests.lab.session import ENVIRONMENT, UID, session

STAND_IN = "/usr/local/bin/qemu-system-x86_64"


@pytest.fixture(scope="module")
def system(installed: Container) -> Iterator[Container]:
    """A user with a session. The user's unit stubborn@ runs a guest that ignores SIGTERM."""
    installed.run("cp", f"{CHECKOUT}/{busybox().relative_to(TOP)}", STAND_IN)
    installed.write("/etc/qkilld/qkilld.conf", "[Policy]\nGraceSec=4s\nStallSec=1s\n")
    script = "trap '' TERM; while :; do sleep 1000; done"
    installed.write(
        "/run/systemd/user/stubborn@.service",
        f'[Service]\nExecStart=@{STAND_IN} sh -c "{script}"\nTimeoutStopSec=1s\n',
    )
    installed.write(
        "/run/systemd/user/qkilld.service.d/idle.conf",
        "[Service]\nExecStart=\nExecStart=/usr/bin/qkilld --user --exit-idle 3s\n",
    )
    with session(installed):
        yield installed
    installed.run("rm", "-r", STAND_IN, "/run/systemd/user", "/etc/qkilld/qkilld.conf")


def run(system: Container, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command as the user."""
    done = system.run(*command, check=False, uid=UID, env=ENVIRONMENT)
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def property(system: Container, unit: str, name: str) -> str:
    show = ("systemctl", "--user", "show", "--value", f"--property={name}", unit)
    return run(system, *show).stdout.strip()


def test_the_session_bus_starts_it_and_it_ends_when_idle(system: Container) -> None:
    for _ in range(2):
        assert property(system, "qkilld.service", "ActiveState") == "inactive"
        said = json.loads(run(system, "qkillctl", "--user", "--json", "status").stdout)
        assert said["jobs"] == []
        assert property(system, "qkilld.service", "ActiveState") == "active"
        deadline = time.monotonic() + 30
        while property(system, "qkilld.service", "ActiveState") != "inactive":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert property(system, "qkilld.service", "Result") == "success"


def test_a_stop_outlives_it(system: Container) -> None:
    run(system, "systemctl", "--user", "start", "stubborn@one.service")
    pid = property(system, "stubborn@one.service", "MainPID")
    words = ("qkillctl", "--user", "terminate", "--force", "--wait", pid)
    with system.spawn(*words, uid=UID, env=ENVIRONMENT) as stopping:
        system.wait_journal("OBJECT_PID=" + pid, "QKILLD_SIGNAL=SIGTERM")
        run(system, "systemctl", "--user", "kill", "--signal=KILL", "qkilld.service")
        assert stopping.wait(30) == 3
    (receipt,) = system.journal("OBJECT_PID=" + pid, "QKILLD_RESULT=killed")
    assert 4 <= int(receipt["QKILLD_ELAPSED_USEC"]) / 1e6 < 20


def test_guests_of_other_users_are_not_stopped(system: Container) -> None:
    sleep = ("bash", "-c", f"echo $$; exec -a sleep {STAND_IN} 1000")
    with system.spawn(*sleep) as others:
        assert others.stdout is not None
        pid = others.stdout.readline().decode().strip()
        done = run(system, "qkillctl", "--user", "terminate", pid, code=5)
        assert "not show" in done.stderr
        assert others.poll() is None
