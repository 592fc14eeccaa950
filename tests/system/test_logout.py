"""The end of a user's manager, and `systemctl --user isolate`, with guests in the user's scopes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.corpus.units import wait_for
from tests.lab.container import Container
from tests.lab.session import ENVIRONMENT, UID, session

GUESTS = "qkilld-guests.service"
SCOPE = "logout.scope"
OTHER = "lab-other.target"
IDLE = ("qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none")
DEADLINE_S = 60


@pytest.fixture(scope="module")
def system(installed: Container) -> Iterator[Container]:
    """A user with a session, qkilld-guests.service and a guest in a scope."""
    installed.write(f"/run/systemd/user/{OTHER}", "[Unit]\nAllowIsolate=yes\n")
    with session(installed):
        run(installed, "systemctl", "--user", "daemon-reload")
        run(installed, "systemctl", "--user", "start", GUESTS)
        scope = ("systemd-run", "--user", "--scope", f"--unit={SCOPE}", *IDLE)
        # Make the process a child of the manager, which reaps it.
        script = 'exec setsid --fork "$@" </dev/null >/dev/null 2>&1'
        run(installed, "sh", "-c", script, "sh", *scope)
        wait_for(lambda: "qemu-system" in run(installed, "ps", "-u", str(UID), "-o", "comm"))
        yield installed
    installed.run("rm", f"/run/systemd/user/{OTHER}")


def run(system: Container, *command: str) -> str:
    """Run a command as the user, and return its output."""
    return system.run(*command, check=False, uid=UID, env=ENVIRONMENT).stdout.strip()


def property(system: Container, unit: str, name: str) -> str:
    return run(system, "systemctl", "--user", "show", "--value", f"--property={name}", unit)


def test_isolate_leaves_the_guests_in_a_users_scopes_running(system: Container) -> None:
    run(system, "systemctl", "--user", "isolate", OTHER)
    # When isolate returns, systemd has queued every stop.
    for unit in (SCOPE, GUESTS):
        assert property(system, unit, "ActiveState") == "active", unit
        assert property(system, unit, "Job") in ("", "0"), unit
    # The stops may take longer on a busy host.
    wait_for(lambda: property(system, "basic.target", "ActiveState") == "inactive")


def test_a_logout_stops_them_through_the_daemon(system: Container) -> None:
    """The manager must neither stop the daemon before the guests are stopped, nor refuse to start
    it. This must be the last test with this user."""
    run(system, "systemctl", "--user", "stop", "qkilld.service")
    since = system.run("date", "+@%s.%N").stdout.strip()
    run(system, "systemctl", "--user", "exit")
    manager = f"user@{UID}.service"
    wait_for(lambda: system.property(manager, "ActiveState") == "inactive", DEADLINE_S)
    story = system.journal(f"--since={since}")
    said = [(entry["SYSLOG_IDENTIFIER"], str(entry["MESSAGE"])) for entry in story]
    exits = [who for who, text in said if text.startswith("QEMU process") and " exited " in text]
    assert exits == ["qkilld"], said
