"""How a stop can end: EPERM, ESRCH, zombies, upgrades, reused pids."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import needs
from tests.lab.bus import CallError, Client, Daemon
from tests.lab.guest import QEMU, Guest
from tests.lab.process import OTHER_UID, end, spawn, wait_gone

FORCE = 1
Make = Callable[..., Guest]
Start = Callable[..., Daemon]

_libc = ctypes.CDLL(None, use_errno=True)


def without_cap_kill() -> None:
    """Drop CAP_KILL, so that root may not signal other users' processes. Call this before exec."""
    _libc.prctl(24, 5, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_KILL


def test_eperm_at_the_first_signal(start_daemon: Start, fake_qemu: Make) -> None:
    needs.root("to run a guest as another user")
    daemon = start_daemon(before=without_cap_kill)
    guest = fake_qemu(uid=OTHER_UID)
    with daemon.bus.client() as client:
        with pytest.raises(CallError, match=f"does not let qkilld signal process {guest.pid}") as e:
            client.terminate(guest.pid)
        assert e.value.name == "org.qkilld1.Error.Failed"
        assert client.call("ListJobs") == ([],)
    daemon.wait_for(r"^error: The kernel does not let qkilld send SIGTERM")
    assert guest.alive


def test_eperm_at_sigkill(start_daemon: Start, lab_dir: Path) -> None:
    """The process changes its user between the rungs."""
    needs.root("to change the user")
    executable = lab_dir / QEMU
    shutil.copy("/usr/bin/python3", executable)
    script = (
        "import os, signal\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (os.setuid({OTHER_UID}), print('changed')))\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()\n"
    )
    read, write = os.pipe()
    process = spawn(["/usr/bin/python3", "-Suc", script], executable=executable, stdout=write)
    try:
        with os.fdopen(read) as output:
            os.close(write)
            assert output.readline() == "ready\n"
            daemon = start_daemon(before=without_cap_kill)
            with daemon.bus.client() as client:
                job = client.terminate(process.pid, FORCE, grace_usec=("t", 500_000))
                assert output.readline() == "changed\n"
                result, receipt = client.wait(job)
            assert result == "failed"
            # The daemon checks the user before it sends a signal, so the kernel reports no error.
            assert receipt["error"] == (
                f"Process {process.pid} belongs to uid {OTHER_UID} by now, not 0: it gets no signal"
            )
            assert process.poll() is None
    finally:
        end(process)


def test_no_such_process(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu()
    guest.signal(signal.SIGKILL)
    guest.wait_gone()
    with pytest.raises(CallError, match=f"No process has the id {guest.pid}") as caught:
        client.terminate(guest.pid)
    assert caught.value.name == "org.qkilld1.Error.NoSuchProcess"


def test_a_zombie_is_no_process_any_more(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu()
    guest.signal(signal.SIGKILL)
    assert wait_gone(guest.pidfd, 30)  # a zombie: this process has not reaped it
    for call in ("Terminate", "Inspect"):
        with pytest.raises(CallError, match=f"Process {guest.pid} has exited already") as caught:
            client.call(call, *(("ut", guest.pid, 0) if call == "Terminate" else ("u", guest.pid)))
        assert caught.value.name == "org.qkilld1.Error.NoSuchProcess"
    assert guest.pid not in [row[0] for row in client.call("ListGuests")[0]]


def test_a_parent_that_does_not_reap_does_not_hold_the_job(client: Client, qemu: Make) -> None:
    guest = qemu()
    result, receipt = client.wait(client.terminate(guest.pid))
    assert (result, receipt["verdict"]) == ("exited", "zombie")
    # The guest's parent, this process, reaps it only now.
    assert guest.wait_gone() == 0


def test_a_qemu_whose_executable_an_upgrade_replaced(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu()
    new = guest.directory / "new"
    new.write_bytes(b"another version")
    new.rename(guest.executable)
    (found,) = client.call("Inspect", "u", guest.pid)
    assert found["executable-deleted"] == ("b", True)
    assert found["executable"] == ("s", str(guest.executable))
    assert client.wait(client.terminate(guest.pid))[0] == "exited"


def test_a_stale_start_time(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu()
    with pytest.raises(CallError, match=f"Process {guest.pid} is another process by now") as caught:
        client.terminate(guest.pid, FORCE, start_time=("t", guest.start_time - 1))
    assert caught.value.name == "org.qkilld1.Error.ProcessChanged"
    assert guest.alive
    assert client.wait(client.terminate(guest.pid, start_time=("t", guest.start_time)))


ONE_AT_A_TIME = pytest.mark.xdist_group("ids")
"""Tests that set the kernel's last process id must not run at the same time."""


def recycled(first: Guest, make: Callable[[], Guest]) -> Guest:
    """End the guest, and make the kernel give its pid to a new process."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    pid, started = first.pid, first.start_time
    first.close()
    # Wait a clock tick, so that the start times differ.
    tick = os.sysconf("SC_CLK_TCK")
    while int(time.clock_gettime(time.CLOCK_BOOTTIME) * tick) <= started:
        time.sleep(1 / tick)
    # Repeat this, because another program may start a process in between.
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        last.write_text(str(pid - 1))
        guest = make()
        if guest.pid == pid:
            return guest
        guest.close()
    raise AssertionError(f"the id {pid} was not given out again")


@ONE_AT_A_TIME
def test_a_recycled_id_is_not_the_process_that_was_meant(
    daemon: Daemon, client: Client, fake_qemu: Make
) -> None:
    needs.root("to have the kernel give out a certain process id")
    first = fake_qemu()
    pid, start_time = first.pid, first.start_time
    second = recycled(first, fake_qemu)
    with pytest.raises(CallError) as caught:
        client.terminate(pid, FORCE, start_time=("t", start_time))
    assert caught.value.name == "org.qkilld1.Error.ProcessChanged"
    assert second.alive


@ONE_AT_A_TIME
def test_no_signal_reaches_a_recycled_id(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    """The daemon is stopped by SIGSTOP until its deadline is over. Meanwhile, the process exits,
    and its pid is reused."""
    needs.root("to have the kernel give out a certain process id")
    first = fake_qemu(stubborn=True)
    job = client.terminate(first.pid, FORCE, grace_usec=("t", 1_500_000))
    deadline = client.properties(job, "org.qkilld1.Job")["DeadlineUSec"]
    signal.pidfd_send_signal(daemon.pidfd, signal.SIGSTOP)
    pid = first.pid
    second = recycled(first, lambda: fake_qemu(stubborn=True))
    while (left := deadline - time.monotonic_ns() // 1000) > 0:
        assert not wait_gone(second.pidfd, left / 1e6)
    signal.pidfd_send_signal(daemon.pidfd, signal.SIGCONT)
    result, receipt = client.wait(job)
    assert (result, len(receipt["rungs"])) == ("exited", 1)
    assert second.alive
    # The new process can be stopped, too, by its own job.
    assert client.terminate(pid) != job
