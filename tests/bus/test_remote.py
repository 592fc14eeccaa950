"""qkillctl -H: the daemon of another host. The systemd-stdio-bridge is the real one, and a fake ssh
runs it on this machine. For -M see tests/system/test_remote.py."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import bus as lab_bus
from tests.lab import needs
from tests.lab.bus import Daemon
from tests.lab.guest import Guest
from tests.lab.process import run

Ctl = Callable[..., subprocess.CompletedProcess[str]]
SSH = """\
#!/bin/sh
echo "$*" >>{directory}/calls
[ ! -e {directory}/refused ] || {{ echo "no route" >&2; exit 255; }}
while [ "$1" != systemd-stdio-bridge ]; do shift; done
shift
exec {bridge} --bus-path={address} "$@"
"""


@pytest.fixture
def ctl(daemon: Daemon, lab_dir: Path) -> Ctl:
    """A function that runs qkillctl for this daemon, as if it were on root@far:2222."""
    bridge = needs.program("systemd-stdio-bridge", "systemd")
    ssh = lab_dir / "ssh"
    address = shlex.quote(daemon.bus.address)
    ssh.write_text(SSH.format(directory=lab_dir, bridge=bridge, address=address))
    ssh.chmod(0o755)
    environment = lab_bus.environment("unix:path=/nowhere")
    environment["PATH"] = f"{lab_dir}:{environment.get('PATH', os.defpath)}"

    def call(
        *arguments: str, code: int = 0, host: str = "root@far:2222"
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qkilld.ctl", *arguments]
        done = run(command + ["-H", host] * bool(host), env=environment)
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return call


def test_a_guest_of_another_host_is_listed_and_stopped(
    ctl: Ctl, qemu: Callable[..., Guest], lab_dir: Path
) -> None:
    guest = qemu(name="far-guest")
    (row,) = (each for each in json.loads(ctl("--json", "list").stdout) if each["pid"] == guest.pid)
    # qkillctl must not read files of this machine for a process of the other host.
    assert row["memory_bytes"] is None and row["user"] == str(os.geteuid())
    assert "system bus of root@far:2222" in ctl("status").stdout
    done = ctl("terminate", "--wait", "far-guest")
    assert "gone" in done.stdout
    guest.wait_gone()
    calls = (lab_dir / "calls").read_text().splitlines()
    assert set(calls) == {"-xT -p 2222 -- root@far systemd-stdio-bridge"}


def test_all_guests_are_those_of_the_user_there(ctl: Ctl, qemu: Callable[..., Guest]) -> None:
    qemu(name="far-guest")
    assert "far-guest" in ctl("terminate", "--all", "--dry-run").stdout


def test_a_container_of_another_host(ctl: Ctl, lab_dir: Path) -> None:
    # There is no such container. The bridge's error shows that qkillctl requested it.
    failed = ctl("list", host="far/box", code=1)
    assert "system bus of container box on far: `ssh` ended with status" in failed.stderr
    call = (lab_dir / "calls").read_text()
    assert call == "-xT -- far systemd-stdio-bridge --machine=box\n"


def test_a_host_that_cannot_be_reached(ctl: Ctl, lab_dir: Path) -> None:
    (lab_dir / "refused").touch()
    said = ctl("list", code=1).stderr
    assert "no route" in said, "ssh's own words"
    assert "`ssh` ended with status 255" in said
    assert "Check whether `busctl -H root@far:2222 list` works" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["check-unit", "-H", "far"],
            "the other machine, as in `ssh HOST qkillctl check-unit`",
        ),
        (["adopt", "web", "-M", "box"], "run it on the other machine"),
        (["list", "-H", "-oProxyCommand=touch /x"], "is not [USER@]HOST[:PORT]"),
        (["list", "--host=-oProxyCommand=x"], "is not [USER@]HOST[:PORT]"),
        (["list", "-H", "far/box;reboot"], "is not the name of a container"),
        (["list", "-M", "../../x"], "is not the name of a container"),
        (["list", "-H", "far", "-M", "box"], "not allowed with"),
        (["list", "-H", "far", "--user"], "leave out --user"),
        (["list", "-H", "far", "--bus", "unix:path=/x"], "leave out either"),
    ],
)
def test_contradictory_arguments_are_refused(
    ctl: Ctl, arguments: list[str], said: str, lab_dir: Path
) -> None:
    refused = ctl(*arguments, code=2, host="")
    assert said in " ".join(refused.stderr.split())
    assert not (lab_dir / "calls").exists()


def test_a_pidfile_is_of_this_machine(ctl: Ctl) -> None:
    assert "is a file on this machine" in ctl("terminate", "/run/web.pid", code=2).stderr
