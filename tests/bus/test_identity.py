"""Only the process that was checked gets a signal, and only while it is still the same process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qkilld.adapters.procfs import read_identity, read_stat
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bus import Bus, CallError, Client, Daemon
from tests.lab.guest import FIRST_THREAD_EXITS, Guest
from tests.lab.process import TOP, run

FORCE = 1
FIXED = 8
Make = Callable[..., Guest]


@pytest.mark.parametrize("flags", [FORCE, FORCE | FIXED])
def test_a_guest_whose_first_thread_has_exited(
    client: Client, scripted_qemu: Make, flags: int
) -> None:
    """In this process, Python does not handle SIGTERM, because it runs signal handlers only in the
    first thread, which has exited."""
    guest = scripted_qemu(FIRST_THREAD_EXITS)
    until(lambda: read_stat(guest.pid), lambda stat: stat.state == "Z")
    job = client.terminate(guest.pid, flags, grace_usec=("t", 300_000))
    assert client.wait(job)[0] in ("exited", "killed")
    assert not guest.alive


EXECUTES = """
import os, signal, time
def become(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    BECOME
signal.signal(signal.SIGTERM, become)
print("ready", flush=True)
while True:
    time.sleep(600)
"""
ANOTHER = EXECUTES.replace("BECOME", 'os.execv("/bin/sleep", ["sleep", "600"])')
OF_ANOTHER_USER = EXECUTES.replace("BECOME", "os.setuid(65534)")


@pytest.mark.parametrize("script", [ANOTHER, OF_ANOTHER_USER])
def test_no_sigkill_for_what_a_guest_has_become(
    daemon: Daemon, client: Client, scripted_qemu: Make, script: str
) -> None:
    if script == OF_ANOTHER_USER:
        needs.root("to become another user")
    guest = scripted_qemu(script)
    before = read_identity(guest.pid)
    job = client.terminate(guest.pid, FORCE | FIXED, grace_usec=("t", 1_500_000))
    until(
        lambda: read_identity(guest.pid),
        lambda now: (now.executable, now.uid) != (before.executable, before.uid),
    )
    result, receipt = client.wait(job)
    assert (result, receipt["error-name"]) == ("failed", "org.qkilld1.Error.ProcessChanged")
    assert [rung[1] for rung in receipt["rungs"]] == ["SIGTERM"]
    assert guest.alive
    daemon.wait_for(r"is no longer a guest: it runs /\S+ as uid \d+ now")


def test_force_is_told_what_a_guest_has_become(client: Client, scripted_qemu: Make) -> None:
    guest = scripted_qemu(ANOTHER)
    job = client.terminate(guest.pid)
    until(lambda: read_identity(guest.pid).command, lambda command: command == "sleep")
    with pytest.raises(CallError) as caught:
        client.call("Force", path=job, interface="org.qkilld1.Job")
    assert caught.value.name == "org.qkilld1.Error.ProcessChanged"
    assert 'runs "sleep" by now' in caught.value.text
    assert client.wait(job)[0] == "failed"
    assert guest.alive


def test_no_signal_for_what_a_guest_has_become_while_the_daemon_was_away(
    private_bus: Bus, start_daemon: Callable[..., Daemon], lab_dir: Path, scripted_qemu: Make
) -> None:
    lab_dir.chmod(0o700)
    first = start_daemon(env={"RUNTIME_DIRECTORY": str(lab_dir)})
    guest = scripted_qemu(ANOTHER)
    with private_bus.client() as client:
        job = client.terminate(guest.pid, FORCE, grace_usec=("t", 600_000_000))
        until(lambda: read_identity(guest.pid).command, lambda command: command == "sleep")
        until(lambda: (lab_dir / "job-1.json").exists(), bool)
        first.process.kill()
        first.wait_gone()
        start_daemon(env={"RUNTIME_DIRECTORY": str(lab_dir)})
        result, receipt = client.wait(job)
    assert (result, receipt["error-name"]) == ("failed", "org.qkilld1.Error.ProcessChanged")
    assert guest.alive


def test_the_helper_says_that_it_is_another_process_by_now(
    start_daemon: Callable[..., Daemon], scripted_qemu: Make, lab_dir: Path
) -> None:
    socket = f"{lab_dir}/socket"
    start_daemon("--varlink", socket)
    guest = scripted_qemu(ANOTHER)
    options = ("--force", "--max=2s", f"--socket={socket}", f"--pid={guest.pid}")
    done = run(
        [sys.executable, "-m", "qkilld.stop", *options],
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    assert (done.returncode, guest.alive) == (5, True), done.stderr
    assert 'runs "sleep" by now' in done.stderr
