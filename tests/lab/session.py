"""A user of a throwaway system, with their own service manager and session bus."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.container import Container

UID: Final = 4242
HOME: Final = "/home/labuser"
ENVIRONMENT: Final = {
    "HOME": HOME,
    "XDG_RUNTIME_DIR": f"/run/user/{UID}",
    "DBUS_SESSION_BUS_ADDRESS": f"unix:path=/run/user/{UID}/bus",
}
UNITS: Final = f"{HOME}/.config/systemd/user"
"""The directory of the user's own units."""


@contextlib.contextmanager
def session(system: Container) -> Iterator[None]:
    """Within the context, run the user's service manager and session bus. Raises needs.Missing."""
    for file, package in (
        ("/usr/lib/systemd/user/dbus.socket", "dbus-user-session"),
        ("/usr/share/pam-configs/systemd", "libpam-systemd"),
    ):
        if not Path(file).exists():
            raise needs.Missing(f"a user's manager needs {package}: apt-get install {package}")
    if system.run("id", "labuser", check=False).returncode != 0:
        system.run("useradd", "--create-home", f"--uid={UID}", "labuser")
    system.run("systemctl", "start", f"user@{UID}.service")
    try:
        system.run("mkdir", "-p", UNITS, uid=UID, env=ENVIRONMENT)
        system.run("systemctl", "--user", "start", "dbus.service", uid=UID, env=ENVIRONMENT)
        yield
    finally:
        system.run("systemctl", "stop", f"user@{UID}.service")
