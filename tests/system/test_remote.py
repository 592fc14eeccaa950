"""qkillctl -M: the daemon of a container, called from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.lab import needs
from tests.lab.container import Container
from tests.lab.process import run

QEMU = "/usr/bin/qemu-system-x86_64 -name inside -M none -nodefaults -display none"
REGISTERED = "CLASS=container\nLEADER={leader}\n"
"""The file that systemd-machined writes for a container; see container_get_leader() in systemd."""


def ctl(container: Container, lab_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run qkillctl as if systemd-machined knew the container as "box"."""
    machine = lab_dir / "box"
    machine.write_text(REGISTERED.format(leader=container.leader))
    script = (
        "mkdir -p /run/systemd && mount -t tmpfs tmpfs /run/systemd && mkdir /run/systemd/machines"
        ' && cp "$1" /run/systemd/machines/ && shift && exec "$@"'
    )
    own = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(machine)]
    return run([*own, sys.executable, "-m", "qkilld.ctl", *arguments, "-M", "box"])


def test_a_guest_in_a_container(installed: Container, lab_dir: Path) -> None:
    needs.program("systemd-stdio-bridge", "systemd")
    installed.run("systemd-run", "--unit=remote-inside", "-p", "Type=exec", *QEMU.split())
    done = ctl(installed, lab_dir, "terminate", "--wait", "remote-inside.service")
    assert done.returncode == 0, done.stderr
    assert "inside (pid " in done.stdout and "without SIGKILL" in done.stdout
    assert "system bus of container box" in ctl(installed, lab_dir, "status").stdout
