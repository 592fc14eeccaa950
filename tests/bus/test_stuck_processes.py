"""Processes that block the reading of their identity. Other users do not wait for them, and they
get no signal."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from qkilld.ctl.process_stats import ProcessStats, executable, process_stats
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bus import Bus, CallError, Client, Daemon
from tests.lab.guest import Guest, own_qemus
from tests.lab.process import OTHER_UID, TOP, communicate, end, spawn, wait_gone
from tests.lab.stuck import StuckGuests, stuck_guests

FORCE, FIXED = 1, 8
JOB = "org.qkilld1.Job"
ANSWER_S = 1.0
LIST_S = ANSWER_S + 2
"""The limit for a list. The first search for guests also waits for the stuck processes of other
tests."""
Make = Callable[..., Guest]
Start = Callable[..., Daemon]


@pytest.fixture
def stuck() -> Iterator[StuckGuests]:
    with stuck_guests() as guests:
        yield guests


class TimedManager:
    """Calls methods of the manager, and records the longest time of a call."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.longest_s = 0.0

    def __call__(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        began = time.monotonic()
        try:
            return self._client.call(method, *arguments)
        finally:
            self.longest_s = max(self.longest_s, time.monotonic() - began)


def test_calls_are_answered(stuck: StuckGuests, start_daemon: Start, fake_qemu: Make) -> None:
    theirs = [stuck.make_stuck(OTHER_UID) for _ in range(3)]
    daemon, web = start_daemon(), fake_qemu(name="web")
    with daemon.bus.client() as client:
        call = TimedManager(client)
        calls = [("Terminate", "ut", (0,)), ("Inspect", "u", ())]
        for guest, (method, signature, more) in zip(theirs, calls, strict=False):
            with pytest.raises(CallError, match="Cannot identify process") as caught:
                client.call(method, signature, guest.pid, *more)
            assert caught.value.name == "org.qkilld1.Error.Failed"
        rows = call("ListGuests")[0]
        assert web.pid in [row[0] for row in rows]
        assert not {guest.pid for guest in theirs} & {row[0] for row in rows}
        (jobs,) = call("TerminateAll", "ta{sv}", 0, {})
        ((pid, job),) = jobs
        assert pid == web.pid
        assert client.wait(job)[0] == "exited"
        warning = daemon.wait_for("Failed to identify process.*")[0]
        assert all(str(guest.pid) in warning for guest in theirs)
        assert call.longest_s < LIST_S
    assert all(guest.alive for guest in theirs)


def test_a_process_that_is_stuck_for_a_moment_is_stopped(
    stuck: StuckGuests, start_daemon: Start
) -> None:
    guest, daemon = stuck.make_stuck(OTHER_UID), start_daemon()
    with daemon.bus.client() as client, daemon.bus.client() as other:
        threading.Timer(0.5, stuck.free).start()
        answers: list[str] = []

        def terminate() -> None:
            grace = ("t", 100_000)
            answers.append(client.terminate(guest.pid, FORCE | FIXED, grace_usec=grace))

        waiting = threading.Thread(target=terminate)
        waiting.start()
        call = TimedManager(other)
        call("ListJobs")
        assert call.longest_s < ANSWER_S
        waiting.join()
        assert client.wait(answers[0])[0] == "killed"


def test_a_job_sends_no_signal_while_its_process_is_stuck(
    stuck: StuckGuests, start_daemon: Start, fake_qemu: Make
) -> None:
    guest, daemon = stuck.make(OTHER_UID), start_daemon()
    with daemon.bus.client() as client:
        job = client.terminate(guest.pid, FORCE | FIXED, grace_usec=("t", 1_000_000))
        daemon.wait_for("Sent SIGTERM")
        stuck.stick(guest)
        # The grace has passed, and the daemon tries to read the identity once a second.
        time.sleep(3.5)
        assert client.properties(job, JOB)["Result"] == ""
        assert "SIGKILL" not in _pending_signals(guest.pid)
        call = TimedManager(client)
        call("ListGuests")
        other = fake_qemu()
        assert client.wait(client.terminate(other.pid))[0] == "exited"
        assert call.longest_s < LIST_S
        stuck.free()
        result, receipt = client.wait(job)
    assert result == "killed"
    assert [rung[1] for rung in receipt["rungs"]] == ["SIGTERM", "SIGKILL"]
    assert wait_gone(guest.pidfd, 10)


def test_a_daemon_that_is_restarted_meanwhile_is_ready(
    stuck: StuckGuests, private_bus: Bus, start_daemon: Start, lab_dir: Path
) -> None:
    lab_dir.chmod(0o700)
    env = {"RUNTIME_DIRECTORY": str(lab_dir)}
    first, guest = start_daemon(env=env), stuck.make(OTHER_UID)
    with private_bus.client() as client:
        job = client.terminate(guest.pid, FORCE | FIXED, grace_usec=("t", 4_000_000))
        first.wait_for("Sent SIGTERM")
        time.sleep(0.2)
        stuck.stick(guest)
        first.process.kill()
        first.wait_gone()
        began = time.monotonic()
        start_daemon(env=env).wait_for("Resuming the stop")
        print("ready after", time.monotonic() - began)
        call = TimedManager(client)
        call("ListGuests")
        assert call.longest_s < LIST_S
        time.sleep(max(0.0, began + 6 - time.monotonic()))
        assert client.properties(job, JOB)["Result"] == ""
        stuck.free()
        result, receipt = client.wait(job)
    assert result == "killed"
    assert [rung[1] for rung in receipt["rungs"]] == ["SIGTERM", "SIGKILL"]


def _pending_signals(pid: int) -> str:
    """Return "SIGKILL" if SIGKILL is pending, otherwise ""."""
    lines = until(Path(f"/proc/{pid}/status").read_text, lambda text: "ShdPnd" in text).split("\n")
    masks = [int(line.split()[1], 16) for line in lines if line[3:5] == "Pn"]
    return "SIGKILL" if any(mask & 1 << SIGKILL - 1 for mask in masks) else ""


_WITHOUT_THREADS = """
import _thread
def refuse(*arguments):
    raise RuntimeError("can't start new thread")
_thread.start_new_thread = refuse
from qkilld.stop.main import main
main()
"""


def test_qkilld_stop_needs_no_thread_to_reach_the_daemon(
    start_daemon: Start, fake_qemu: Make, lab_dir: Path
) -> None:
    """TasksMax= of the helper's unit may allow no more threads."""
    daemon = start_daemon("--varlink", f"{lab_dir}/socket")
    daemon.wait_for("serves the bus at")
    guest = fake_qemu()
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_THREADS, f"--socket={lab_dir}/socket"],
        env=os.environ | {"MAINPID": str(guest.pid), "PYTHONPATH": str(TOP)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert wait_gone(guest.pidfd, 10)
    daemon.wait_for("Sent SIGTERM")


def test_qkillctl_shows_no_usage_of_a_stuck_process(stuck: StuckGuests) -> None:
    """qkillctl does not wait for the process, either."""
    guest = stuck.make_stuck(OTHER_UID)
    read: list[object] = []

    def read_all() -> None:
        read.extend((process_stats(guest.pid, OTHER_UID), executable(guest.pid)))

    reader = threading.Thread(target=read_all, daemon=True)
    reader.start()
    reader.join(60)
    assert read == [ProcessStats(), ""]


_FOR_STAND_INS = """
import sys
from qkilld.model.policy import Config
from qkilld.stop import configuration, fallback
config = Config(executables=(sys.argv.pop(1),))
fallback.configuration = configuration.configuration = lambda: config
from qkilld.stop.main import main
main()
"""


def _allow_no_threads() -> None:
    """Forbid new threads of this user. Call this as OTHER_UID."""
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))


@pytest.mark.parametrize(("stubborn", "code"), [(False, 0), (True, 3)])
def test_qkilld_stop_needs_no_thread_without_the_daemon(
    fake_qemu: Make, lab_dir: Path, stubborn: bool, code: int
) -> None:
    """qkilld-stop needs no thread to sample the guest, either. Without samples, a guest that hangs
    would never get SIGKILL."""
    needs.readable_by_others(TOP)
    guest = fake_qemu(uid=OTHER_UID, stubborn=stubborn)
    spans = ("--grace=1s", "--stall=1s", "--storage-stall=4s")
    options = ("--force", *spans, f"--socket={lab_dir}/none")
    helper = spawn(
        [sys.executable, "-c", _FOR_STAND_INS, own_qemus(), *options],
        env=os.environ
        | {
            "MAINPID": str(guest.pid),
            "PYTHONPATH": str(TOP),
            "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent/bus",
        },
        uid=OTHER_UID,
        before=_allow_no_threads,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        done = communicate(helper, input=None, timeout=60, check=False)
    finally:
        end(helper)
    assert done.returncode == code, done.stderr
    assert wait_gone(guest.pidfd, 10)
