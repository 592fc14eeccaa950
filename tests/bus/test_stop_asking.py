"""qkilld-stop asks the guest first, with and without the real daemon. The QEMU is real."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.bus import Client, Daemon, lab_config
from tests.lab.debian import FILES, boot_debian
from tests.lab.guest import Guest
from tests.lab.log import Log
from tests.lab.process import TOP, end, spawn

Make = Callable[..., Guest]
Start = Callable[..., Daemon]
NOBODY_THERE = ["-M", "q35", "-m", "32"]
"""Arguments of a QEMU with only its firmware. The firmware does not listen to the power button."""

_WITH_ROOT = """
import sys
from pathlib import Path
from qkilld.adapters import config
from qkilld.stop.main import main
root, load = Path(sys.argv.pop(1)), config.load
config.load = lambda: load(root)
main()
"""
"""A program that runs qkilld-stop with the configuration of the tested daemon. (qkilld-stop has no
option for this.)"""


@contextlib.contextmanager
def helper(
    root: Path, directory: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[bytes], Log]]:
    """Run qkilld-stop with these arguments; yield the process and its output. qkilld-stop calls the
    daemon that `started` has started with the same directory."""
    said = Log(directory / "said")
    arguments = (f"--socket={directory}/socket", *arguments)
    no_bus = {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent/bus"}
    environment = os.environ | no_bus | {"PYTHONPATH": str(TOP)}
    with said.path.open("wb") as output:
        process = spawn(
            [sys.executable, "-c", _WITH_ROOT, str(root), *arguments],
            stdout=output,
            stderr=output,
            env=environment,
        )
    try:
        yield process, said
    finally:
        end(process)


def started(start: Start, directory: Path, **options: Any) -> Daemon:
    """Start a daemon that qkilld-stop can call."""
    daemon = start("--varlink", f"{directory}/socket", **options)
    daemon.wait_for("serves the bus at")
    return daemon


def stop(root: Path, directory: Path, *arguments: str) -> int:
    with helper(root, directory, *arguments) as (process, _):
        return process.wait(120)


def asked(client: Client, number: int) -> str:
    """Return the outcome of asking, from the receipt of a job that has ended."""
    _, receipt = client.wait(f"/org/qkilld1/job/{number}")
    return str(receipt["guest-asked"])


def test_a_guest_is_asked_by_default_and_not_if_somebody_says_so(
    start_daemon: Start, qemu: Make, lab_dir: Path
) -> None:
    config = lab_config() + "[Guest quiet]\nPowerdown=no\n"
    daemon = started(start_daemon, lab_dir, config=config)
    with daemon.bus.client() as client:
        for number, (name, argument, outcome) in enumerate(
            (
                ("web", "--no-force", "deaf"),
                ("web", "--no-powerdown", "not-asked"),
                ("quiet", "--no-force", "not-asked"),
                ("quiet", "--powerdown", "deaf"),
            ),
            1,
        ):
            guest = qemu(name=name, arguments=NOBODY_THERE)
            assert stop(daemon.root, lab_dir, f"--pid={guest.pid}", argument) == 0
            assert asked(client, number) == outcome


def test_the_dry_run_tells_the_ways(daemon: Daemon, qemu: Make, lab_dir: Path) -> None:
    guest = qemu(arguments=NOBODY_THERE)
    with helper(daemon.root, lab_dir, "--dry-run", f"--pid={guest.pid}") as (
        process,
        said,
    ):
        assert process.wait(60) == 0
    text = said.path.read_text()
    assert "  ask       now\n  SIGTERM   after 1min" in text
    assert "  asking    the monitor at /" in text
    assert guest.alive


@pytest.mark.timeout(900)
@pytest.mark.parametrize("by_daemon", [True, False], ids=["daemon", "alone"])
def test_data_written_by_the_guest_is_kept(
    start_daemon: Start, lab_dir: Path, by_daemon: bool
) -> None:
    daemon = started(start_daemon, lab_dir)
    if not by_daemon:
        (lab_dir / "socket").rename(lab_dir / "away")
    with boot_debian() as debian:
        debian.write_files()
        assert stop(daemon.root, lab_dir, f"--pid={debian.guest.pid}", "--force") == 0
        assert debian.guest.wait_gone(60) == 0
        assert debian.kept() == (FILES, True)


@pytest.mark.timeout(900)
def test_the_daemon_is_killed_while_the_guest_shuts_down(
    start_daemon: Start, lab_dir: Path
) -> None:
    """The helper keeps waiting, and sends nothing until the guest has exited by itself."""
    daemon = started(start_daemon, lab_dir)
    with boot_debian() as debian:
        debian.write_files()
        pid = f"--pid={debian.guest.pid}"
        with helper(daemon.root, lab_dir, pid, "--force") as (process, _):
            daemon.wait_for("Asked .* to shut down")
            os.kill(daemon.pid, 9)
            assert process.wait(120) == 0
        assert debian.guest.wait_gone(60) == 0
        assert debian.kept() == (FILES, True)
