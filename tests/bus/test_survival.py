"""Jobs outlive the daemon if there is a runtime directory, even without a service manager."""

from __future__ import annotations

import json
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bus import Bus, CallError, Daemon
from tests.lab.groups import temporary_group
from tests.lab.guest import Guest
from tests.lab.process import OTHER_UID, run, wait_gone

from .test_ends import recycled

FORCE, FIXED = 1, 8
JOB = "org.qkilld1.Job"
Make = Callable[..., Guest]
Start = Callable[..., Daemon]


@pytest.fixture
def start(start_daemon: Start, lab_dir: Path) -> Iterator[Start]:
    """A function like start_daemon, with one runtime directory for all daemons of a test."""
    lab_dir.chmod(0o700)

    def start(**options: str) -> Daemon:
        return start_daemon(env={"RUNTIME_DIRECTORY": str(lab_dir)} | options)

    yield start


def kill(daemon: Daemon) -> None:
    daemon.process.kill()
    daemon.wait_gone()


def test_a_job_goes_on_with_no_descriptor_kept(
    private_bus: Bus, start: Start, fake_qemu: Make
) -> None:
    first = start()
    guest = fake_qemu(stubborn=True)
    with private_bus.client() as client:
        job = client.terminate(guest.pid, FORCE | FIXED, grace_usec=("t", 8_000_000))
        deadline = client.properties(job, JOB)["DeadlineUSec"]
        serial = client.send("Wait", path=job, interface=JOB)
        first.wait_for("Sent SIGTERM")
        time.sleep(0.2)
        kill(first)
        with pytest.raises(CallError) as caught:
            client.reply(serial)
        assert caught.value.name == "org.freedesktop.DBus.Error.NoReply"
        second = start()
        second.wait_for('Resuming the stop of guest "lab"')
        # The job was saved right before SIGTERM was sent.
        assert abs(client.properties(job, JOB)["DeadlineUSec"] - deadline) < 50_000
        result, receipt = client.wait(job)
    assert result == "killed"
    assert [rung[1] for rung in receipt["rungs"]] == ["SIGTERM", "SIGKILL"]
    assert receipt["elapsed-usec"] >= 8_000_000


def test_a_job_goes_on_that_had_not_sent_sigterm(
    private_bus: Bus, start: Start, fake_qemu: Make, lab_dir: Path
) -> None:
    """The phase `terminate` is saved before SIGTERM is sent. A crash in between leaves this
    state."""
    first, guest, saved = start(), fake_qemu(stubborn=True), lab_dir / "job-1.json"
    with private_bus.client() as client:
        job = client.terminate(guest.pid, FORCE | FIXED, grace_usec=("t", 1_000_000))
        kill(first)
        document = json.loads(saved.read_text())
        document["job"] |= {"phase": "terminate", "rungs": []}
        saved.write_text(json.dumps(document))
        second = start()
        second.wait_for("Sent SIGTERM")
        result, receipt = client.wait(job)
    assert result == "killed"
    assert [rung[1] for rung in receipt["rungs"]] == ["SIGTERM", "SIGKILL"]


def test_a_job_outlives_a_crash_right_after_its_reply(
    private_bus: Bus, start: Start, fake_qemu: Make
) -> None:
    """The daemon replies only after the job is saved. An earlier daemon replied first, and lost
    every third job."""
    daemon = start()
    with private_bus.client() as client:
        for _ in range(12):
            guest = fake_qemu(stubborn=True)
            job = client.terminate(guest.pid, FORCE)
            kill(daemon)
            daemon = start()
            assert client.call("GetJobByPID", "u", guest.pid) == (job,)
            client.call("Hold", path=job, interface=JOB)
            kill(daemon)
            daemon = start()
            assert client.properties(job, JOB)["Held"] is True
            client.call("Force", path=job, interface=JOB)
            assert client.wait(job)[0] == "killed"


def test_a_job_goes_on_where_the_runtime_directory_is_full(
    private_bus: Bus, start_daemon: Start, lab_dir: Path, fake_qemu: Make
) -> None:
    needs.root("to mount a small tmpfs")
    run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", lab_dir], check=True)
    try:
        env = {"RUNTIME_DIRECTORY": str(lab_dir)}
        first = start_daemon(env=env)
        guest = fake_qemu(stubborn=True)
        with private_bus.client() as client:
            job = client.terminate(guest.pid, FORCE | FIXED, grace_usec=("t", 3_000_000))
            deadline = time.monotonic() + 10
            while not (lab_dir / "job-1.json").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            kill(first)
            with pytest.raises(OSError, match="No space left"):
                (lab_dir / "fill").write_bytes(bytes(1 << 17))
            second = start_daemon(env=env)
            second.wait_for('Resuming the stop of guest "lab"')
            second.wait_for("No space left on device")
            assert client.wait(job)[0] == "killed"
            second.stop()
    finally:
        run(["umount", "--lazy", lab_dir], check=True)


def test_a_cancel_outlives_a_crash_where_the_runtime_directory_is_full(
    private_bus: Bus, start_daemon: Start, lab_dir: Path, fake_qemu: Make
) -> None:
    needs.root("to mount a small tmpfs")
    run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", lab_dir], check=True)
    try:
        env = {"RUNTIME_DIRECTORY": str(lab_dir)}
        first = start_daemon(env=env)
        cancelled, held = fake_qemu(stubborn=True), fake_qemu(stubborn=True)
        with private_bus.client() as client:
            grace = ("t", 5_000_000)
            job = client.terminate(cancelled.pid, FORCE | FIXED, grace_usec=grace)
            other = client.terminate(held.pid, FORCE | FIXED, grace_usec=grace)
            until((lab_dir / "job-2.json").exists, bool)
            with pytest.raises(OSError, match="No space left"):
                (lab_dir / "fill").write_bytes(bytes(1 << 17))
            client.cancel(job)
            client.call("Hold", path=other, interface=JOB)
            until((lab_dir / "job-1.json").read_text, lambda text: '"result":"cancelled"' in text)
            until((lab_dir / "job-2.json").read_text, lambda text: '"held":true' in text)
            kill(first)
            second = start_daemon(env=env)
            assert client.wait(job)[0] == "cancelled"
            assert client.properties(other, JOB)["Held"] is True
            assert not wait_gone(cancelled.pidfd, 6)
            assert held.alive
            second.stop()
    finally:
        run(["umount", "--lazy", lab_dir], check=True)


def test_killed_after_its_sigkill_and_before_the_process_went(
    private_bus: Bus, start: Start, fake_qemu: Make
) -> None:
    """A frozen process of cgroup v1 gets its SIGKILL when it is thawed."""
    freezer = Path("/sys/fs/cgroup/freezer")
    if not os.access(freezer, os.W_OK):
        raise needs.Missing("the freezer of cgroup v1, as root: what it holds outlives SIGKILL")
    guest = fake_qemu(stubborn=True)
    first = start()
    with temporary_group(freezer) as group, private_bus.client() as client:
        (group / "cgroup.procs").write_text(str(guest.pid))
        (group / "freezer.state").write_text("FROZEN")
        job = client.terminate(guest.pid, FORCE | FIXED, grace_usec=("t", 300_000))
        first.wait_for("Sent SIGKILL")
        time.sleep(0.2)
        kill(first)
        start().wait_for('Resuming the stop of guest "lab"')
        assert client.properties(job, JOB)["Phase"] == "reap"
        assert guest.alive
        (group / "freezer.state").write_text("THAWED")
        result, receipt = client.wait(job)
    assert result == "killed"
    assert [rung[1] for rung in receipt["rungs"]] == ["SIGTERM", "SIGKILL"]


def test_no_guest_that_was_killed_is_said_to_have_exited(
    private_bus: Bus, start: Start, fake_qemu: Make
) -> None:
    """The daemon is killed right after it has sent SIGKILL, before it can save this. But it has
    already saved that it is about to send SIGKILL, unless saving took more than 50 ms on a busy
    machine."""
    daemon = start()
    rounds: list[set[str]] = []
    with private_bus.client() as client:
        while rounds.count({"killed"}) < 4:
            assert len(rounds) < 8, rounds
            guests = [fake_qemu(stubborn=True) for _ in range(6)]
            jobs = [
                client.terminate(guest.pid, FORCE | FIXED, grace_usec=("t", 1_000_000))
                for guest in guests
            ]
            pidfds = [os.pidfd_open(guest.pid) for guest in guests]
            select.select(pidfds, [], [], 30)
            kill(daemon)
            for pidfd in pidfds:
                os.close(pidfd)
            daemon = start()
            rounds.append({client.wait(job)[0] for job in jobs})


def test_sigterm_without_a_manager_to_ask_leaves_the_jobs(
    private_bus: Bus, start: Start, fake_qemu: Make
) -> None:
    guest = fake_qemu(stubborn=True)
    first = start()
    with private_bus.client() as client:
        job = client.terminate(guest.pid, FORCE | FIXED)
        # The exit code is an error, so that a service manager starts the daemon again.
        assert first.stop() == 1
        first.wait_for("1 jobs continue when it is started again")
        start()
        client.cancel(job)
        assert client.wait(job)[0] == "cancelled"
    assert guest.alive


def test_no_signal_reaches_another_process_after_a_crash(
    private_bus: Bus, start: Start, fake_qemu: Make
) -> None:
    needs.root("to have the kernel give out a certain process id")
    guest = fake_qemu(stubborn=True)
    first = start()
    with private_bus.client() as client:
        job = client.terminate(guest.pid, FORCE | FIXED, grace_usec=("t", 100_000_000))
        first.wait_for("Sent SIGTERM")
        time.sleep(0.2)
        kill(first)
        second = recycled(guest, lambda: fake_qemu(stubborn=True))
        start()
        assert client.wait(job)[0] == "exited"
        assert second.alive


def test_nothing_is_imported_and_no_page_may_go_while_a_job_runs(
    private_bus: Bus, start: Start, fake_qemu: Make, request: pytest.FixtureRequest
) -> None:
    """Locked memory is not read from a disk, so a stalled disk cannot stop the daemon."""
    needs.root("to lock memory without a limit")
    daemon = start(PYTHONPROFILEIMPORTTIME="1")
    idle, stubborn = fake_qemu(), fake_qemu(stubborn=True)
    status = Path(f"/proc/{daemon.pid}/status")

    def memory(name: str) -> int:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])

    before = daemon.stderr.text()
    unused = "_ssl|inspect|locale|ipaddress"
    # Since Python 3.14, dataclasses and traceback need these two. dbus-fast 5.2 needs them, too.
    is_fast = request.config.getoption("--dbus-library") == "dbus-fast"
    if sys.version_info < (3, 14) and not is_fast:
        unused += "|ast|dis"
    assert not re.search(rf"\| +({unused})$", before, re.MULTILINE)
    with private_bus.client() as client:
        assert client.call("ListGuests")
        assert client.wait(client.terminate(idle.pid))[0] == "exited"
        job = client.terminate(stubborn.pid, FORCE, grace_usec=("t", 2_000_000))
        deadline = time.monotonic() + 10
        while not memory("VmLck:") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert memory("VmLck:")
        print(f"resident, locked: {memory('VmRSS:')} kB")
        assert client.wait(job)[0] == "killed"
    # The reply may come before the log entry.
    daemon.wait_for("was killed")
    said = daemon.stderr.text()[len(before) :]
    assert [line for line in said.splitlines() if line.startswith("import time:")] == []


def test_a_runtime_directory_of_others_is_not_used(
    private_bus: Bus, start: Start, lab_dir: Path, fake_qemu: Make
) -> None:
    needs.root("to give a directory away")
    os.chown(lab_dir, OTHER_UID, OTHER_UID)
    daemon = start()
    daemon.wait_for("Failed to save job state")
    with private_bus.client() as client:
        guest = fake_qemu()
        assert client.wait(client.terminate(guest.pid))[0] == "exited"
    assert daemon.stop() == 0
    assert list(lab_dir.iterdir()) == []
