"""Jobs that outlive the daemon where there is a runtime directory and no service manager."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import needs
from tests.lab.bus import Bus, CallError, Daemon
from tests.lab.groups import temporary_group
from tests.lab.guest import Guest
from tests.lab.process import OTHER_UID, run

from .test_ends import recycled

FORCE, FIXED = 1, 8
JOB = "org.qkilld1.Job"
Make = Callable[..., Guest]
Start = Callable[..., Daemon]


@pytest.fixture
def start(start_daemon: Start, lab_dir: Path) -> Iterator[Start]:
    """start_daemon with a runtime directory of this test's."""
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
        job = client.terminate(guest.pid, FORCE | FIXED, grace_usec=("t", 3_000_000))
        deadline = client.properties(job, JOB)["DeadlineUSec"]
        serial = client.send("Wait", path=job, interface=JOB)
        first.wait_for("Sent SIGTERM")
        time.sleep(0.2)
        kill(first)
        with pytest.raises(CallError) as caught:
            client.reply(serial)
        assert caught.value.name == "org.freedesktop.DBus.Error.NoReply"
        second = start()
        second.wait_for('Going on with the stop of guest "lab"')
        assert client.properties(job, JOB)["DeadlineUSec"] == deadline
        result, receipt = client.wait(job)
    assert result == "killed"
    assert [rung[1] for rung in receipt["rungs"]] == ["SIGTERM", "SIGKILL"]
    assert receipt["elapsed-usec"] >= 3_000_000


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
            second.wait_for('Going on with the stop of guest "lab"')
            second.wait_for("No space left on device")
            assert client.wait(job)[0] == "killed"
            second.stop()
    finally:
        run(["umount", "--lazy", lab_dir], check=True)


def test_killed_after_its_sigkill_and_before_the_process_went(
    private_bus: Bus, start: Start, fake_qemu: Make
) -> None:
    """A frozen process of cgroup v1 takes its SIGKILL when it is thawed."""
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
        start().wait_for('Going on with the stop of guest "lab"')
        assert client.properties(job, JOB)["Phase"] == "reap"
        assert guest.alive
        (group / "freezer.state").write_text("THAWED")
        result, receipt = client.wait(job)
    assert result == "killed"
    assert [rung[1] for rung in receipt["rungs"]] == ["SIGTERM", "SIGKILL"]


def test_sigterm_without_a_manager_to_ask_leaves_the_jobs(
    private_bus: Bus, start: Start, fake_qemu: Make
) -> None:
    guest = fake_qemu(stubborn=True)
    first = start()
    with private_bus.client() as client:
        job = client.terminate(guest.pid, FORCE | FIXED)
        # An error, so that a manager starts it again.
        assert first.stop() == 1
        first.wait_for("1 jobs go on when it is started again")
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
    private_bus: Bus, start: Start, fake_qemu: Make
) -> None:
    """A disk that stalls cannot stall what need not be read from it."""
    needs.root("to lock memory without a limit")
    daemon = start(PYTHONPROFILEIMPORTTIME="1")
    idle, stubborn = fake_qemu(), fake_qemu(stubborn=True)
    status = Path(f"/proc/{daemon.pid}/status")

    def memory(name: str) -> int:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])

    before = daemon.stderr.text()
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
    # The answer does not wait for what is said.
    daemon.wait_for("was killed")
    said = daemon.stderr.text()[len(before) :]
    assert [line for line in said.splitlines() if line.startswith("import time:")] == []


def test_a_runtime_directory_of_others_is_not_used(
    private_bus: Bus, start: Start, lab_dir: Path, fake_qemu: Make
) -> None:
    needs.root("to give a directory away")
    os.chown(lab_dir, OTHER_UID, OTHER_UID)
    daemon = start()
    daemon.wait_for("Stops cannot be written to the runtime directory")
    with private_bus.client() as client:
        guest = fake_qemu()
        assert client.wait(client.terminate(guest.pid))[0] == "exited"
    assert daemon.stop() == 0
    assert list(lab_dir.iterdir()) == []
