"""Stops of real guests over a real bus."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable

import pytest

from qkilld.model.constants import JOB_INTERFACE
from tests.lab.bus import CallError, Client, Daemon, lab_config
from tests.lab.guest import Guest

FORCE, NOWAIT, POWERDOWN, FIXED = 1, 2, 4, 8
PRIVATE = {"BytesWritten", "BytesPending", "Rate", "Reasons", "Receipt"}
Make = Callable[..., Guest]
Start = Callable[..., Daemon]


def seconds(receipt: dict[str, object]) -> float:
    elapsed = receipt["elapsed-usec"]
    assert isinstance(elapsed, int)
    return elapsed / 1e6


def signals(receipt: dict[str, object]) -> list[str]:
    rungs = receipt["rungs"]
    assert isinstance(rungs, list)
    return [name for _, name, _ in rungs]


def test_a_real_guest_that_runs_linux(client: Client, linux_guest: Make) -> None:
    guest = linux_guest(name="web")
    client.subscribe()
    job = client.terminate(guest.pid)
    result, receipt = client.wait(job)
    assert (result, signals(receipt)) == ("exited", ["SIGTERM"])
    assert receipt["verdict"] == "zombie"  # its parent, this process, has not reaped it yet
    assert not guest.alive
    assert guest.wait_gone() == 0
    assert client.signal("JobNew")[1] == (1, job, guest.pid)
    assert client.signal("JobRemoved")[1] == (1, job, guest.pid, "exited")


@pytest.mark.parametrize("flags", [0, FORCE, FIXED, FORCE | FIXED])
def test_an_idle_qemu_goes_by_sigterm(client: Client, qemu: Make, flags: int) -> None:
    guest = qemu()
    result, receipt = client.wait(client.terminate(guest.pid, flags))
    assert (result, signals(receipt)) == ("exited", ["SIGTERM"])
    assert guest.wait_gone() == 0
    assert "terminating on signal 15" in guest.stderr


def test_a_stopped_qemu_is_killed_at_ten_seconds(client: Client, qemu: Make) -> None:
    """libvirt's fixed timeouts in real time, with a real QEMU that cannot handle SIGTERM."""
    guest = qemu()
    guest.signal(signal.SIGSTOP)
    result, receipt = client.wait(client.terminate(guest.pid, FORCE | FIXED))
    assert (result, signals(receipt)) == ("killed", ["SIGTERM", "SIGKILL"])
    assert 10 <= seconds(receipt) < 15
    assert guest.wait_gone() == -signal.SIGKILL


def test_without_force_it_survives_fifteen_seconds(
    daemon: Daemon, client: Client, qemu: Make
) -> None:
    guest = qemu()
    guest.signal(signal.SIGSTOP)
    result, receipt = client.wait(client.terminate(guest.pid, FIXED))
    assert (result, signals(receipt)) == ("survived", ["SIGTERM"])
    assert 15 <= seconds(receipt) < 30
    assert guest.alive
    # The survivor is still watched, and its exit is logged.
    guest.signal(signal.SIGCONT)
    assert guest.wait_gone() == 0
    daemon.wait_for(
        rf"process {guest.pid}\) has exited at last, [1-9]\d\.\d+ s after its job started"
    )


def test_nowait_sends_one_sigterm(client: Client, fake_qemu: Make) -> None:
    stubborn, polite = fake_qemu(stubborn=True), fake_qemu()
    for guest in (stubborn, polite):
        result, receipt = client.wait(client.terminate(guest.pid, NOWAIT))
        assert (result, signals(receipt)) == ("signalled", ["SIGTERM"])
    assert polite.wait_gone() == -signal.SIGTERM
    assert stubborn.alive


def test_nowait_with_force_sends_one_sigkill(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    result, receipt = client.wait(client.terminate(guest.pid, NOWAIT | FORCE))
    assert (result, signals(receipt)) == ("signalled", ["SIGKILL"])
    assert guest.wait_gone() == -signal.SIGKILL


def test_grace_option_and_reason(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True, name="db")
    job = client.terminate(guest.pid, FORCE, grace_usec=("t", 700_000), reason=("s", "move"))
    result, receipt = client.wait(job)
    assert result == "killed"
    assert 0.7 <= seconds(receipt) < 8
    assert receipt["reason"] == "move"
    assert receipt["requested-by"] == os.getuid()
    daemon.wait_for(r'^Stopping guest "db" .* with SIGKILL if necessary: "move"')
    daemon.wait_for(r'^Guest "db" .* was killed after \d\.\d+ s: nothing')


def test_a_second_terminate_joins_and_adds_force(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid, 0, grace_usec=("t", 3_000_000))
    assert client.terminate(guest.pid) == job
    assert client.properties(job, "org.qkilld1.Job")["Flags"] == 0
    assert client.terminate(guest.pid, FORCE) == job
    assert client.terminate(guest.pid) == job
    assert client.properties(job, "org.qkilld1.Job")["Flags"] == FORCE
    assert client.wait(job)[0] == "killed"


def test_cancel(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid, FORCE, grace_usec=("t", 3_000_000))
    client.cancel(job)
    result, receipt = client.wait(job)
    assert (result, signals(receipt)) == ("cancelled", ["SIGTERM"])
    # Wait for the SIGKILL of a later job with the same grace. If the first job were not cancelled,
    # it would have sent SIGKILL earlier.
    other = fake_qemu(stubborn=True)
    result, _ = client.wait(client.terminate(other.pid, FORCE, grace_usec=("t", 3_000_000)))
    assert result == "killed"
    assert guest.alive
    client.cancel(job)


def test_jobs_do_not_delay_one_another(client: Client, fake_qemu: Make, qemu: Make) -> None:
    stuck = [fake_qemu(stubborn=True) for _ in range(20)]
    for guest in stuck:
        client.terminate(guest.pid)
    idle = qemu()
    result, receipt = client.wait(client.terminate(idle.pid))
    assert result == "exited"
    assert seconds(receipt) < 10
    assert all(guest.alive for guest in stuck)


def test_terminate_has_sent_its_signal_when_it_replies(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu()
    client.terminate(guest.pid)
    assert guest.wait_gone() == -signal.SIGTERM


@pytest.mark.each_library
def test_progress_is_announced(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    client.subscribe()
    job = client.terminate(guest.pid, FORCE, grace_usec=("t", 1_000_000))
    result, _ = client.wait(job)
    phases: list[str] = []
    while not phases or phases[-1] != "done":
        _, (interface, changed, invalidated) = client.signal("PropertiesChanged", path=job)
        assert interface == "org.qkilld1.Job"
        # Everyone gets the signals, but not everyone may see how much a guest writes.
        assert set(invalidated) <= PRIVATE
        assert not PRIVATE & changed.keys()
        # Simultaneous changes are announced in one signal.
        if "LastProgressUSec" in changed and "Phase" not in changed:
            assert "DeadlineUSec" in changed
        phases += [changed["Phase"][1]] if "Phase" in changed else []
    # The last change is announced at once, even within 200 ms of another signal.
    assert phases in (["done"], ["kill", "done"], ["reap", "done"])
    assert changed["Result"] == ("s", result)


def test_properties_of_a_job_for_desktop_tools(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    spans = {"grace_usec": ("t", 2_000_000), "stall_usec": ("t", 2_000_000)}
    job = client.terminate(guest.pid, FORCE, reason=("s", "move"), **spans)
    values = client.properties(job, JOB_INTERFACE)
    assert (values["Reason"], values["RequestedBy"]) == ("move", os.getuid())
    assert (values["NextRung"], values["EndedUSec"], values["Receipt"]) == ("SIGKILL", 0, {})
    client.subscribe()
    while values["Verdict"] != "idle":
        client.signal("PropertiesChanged", path=job)
        values = client.properties(job, JOB_INTERFACE)
    assert values["Reasons"] == ["nothing moves and nothing is outstanding"]
    assert values["NextRungStallUSec"] == 2_000_000
    result, receipt = client.wait(job)
    values = client.properties(job, JOB_INTERFACE)
    assert (values["Result"], values["NextRung"], values["NextRungStallUSec"]) == (result, "", 0)
    assert values["Receipt"] == receipt
    assert values["EndedUSec"] - values["StartedUSec"] == receipt["elapsed-usec"]


def test_a_guest_known_by_name_uuid_and_uid(client: Client, qemu: Make) -> None:
    guest = qemu(name="a,b c")
    rows = client.call("ListGuests")[0]
    assert (guest.pid, "a,b c", guest.uuid, os.getuid()) in [tuple(row[:4]) for row in rows]
    (found,) = client.call("Inspect", "u", guest.pid)
    assert found["start-time"] == ("t", guest.start_time)
    assert found["executable"] == ("s", str(guest.executable))
    assert found["executable-deleted"] == ("b", False)
    assert found["name"] == ("s", "a,b c")
    assert "job" not in found


def test_finding_jobs(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    job = client.terminate(guest.pid, FIXED)
    assert [tuple(row) for row in client.call("ListJobs")[0]] == [
        (1, job, guest.pid, "terminate", "unknown")
    ]
    assert client.call("GetJobByPID", "u", guest.pid) == (job,)
    assert client.call("Inspect", "u", guest.pid)[0]["job"] == ("o", job)
    assert client.properties()["NJobs"] == 1
    values = client.properties(job, "org.qkilld1.Job")
    assert values["PID"] == guest.pid
    assert values["StartTime"] == guest.start_time
    assert values["Name"] == guest.name
    assert values["UUID"] == guest.uuid
    assert values["DeadlineUSec"] == pytest.approx(values["StartedUSec"] + 15e6, abs=1e6)
    guest.signal(signal.SIGKILL)
    assert client.wait(job)[0] == "exited"
    # The object exists longer than its job runs, so that a late Wait still gets its answer.
    assert client.wait(job)[0] == "exited"
    assert client.properties(job, "org.qkilld1.Job")["Result"] == "exited"
    assert client.properties()["NJobs"] == 0


def test_busctl_and_gdbus(daemon: Daemon, qemu: Make) -> None:
    bus = daemon.bus
    first, second = qemu(), qemu()
    target = ["org.qkilld1", "/org/qkilld1", "org.qkilld1.Manager"]
    out = bus.busctl("call", *target, "Terminate", "ut", str(first.pid), "0").stdout
    assert out == 'o "/org/qkilld1/job/1"\n'
    out = bus.busctl("call", "org.qkilld1", "/org/qkilld1/job/1", "org.qkilld1.Job", "Wait").stdout
    assert out.startswith('sa{sv} "exited" ')
    out = bus.gdbus(
        *("call", "-d", "org.qkilld1", "-o", "/org/qkilld1", "-m", "org.qkilld1.Manager.Terminate"),
        *(str(second.pid), "1"),
    ).stdout
    assert out == "(objectpath '/org/qkilld1/job/2',)\n"
    out = bus.gdbus(
        *("call", "-d", "org.qkilld1", "-o", "/org/qkilld1/job/2", "-m", "org.qkilld1.Job.Wait"),
    ).stdout
    assert out.startswith("('exited', {")
    assert re.search(r"'rungs': <\[\('terminate', 'SIGTERM', uint64 \d+\)\]>", out)


@pytest.mark.each_library
def test_many_clients_at_once(daemon: Daemon, qemu: Make) -> None:
    guests = [qemu() for _ in range(4)]
    results: list[str] = []

    def stop(guest: Guest) -> None:
        with daemon.bus.client() as client:
            results.append(client.wait(client.terminate(guest.pid))[0])

    threads = [threading.Thread(target=stop, args=(guest,)) for guest in guests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["exited"] * 4


def test_a_guests_own_section_of_the_configuration(start_daemon: Start, fake_qemu: Make) -> None:
    daemon = start_daemon(config=lab_config("GraceSec=60s") + "[Guest short one]\nGraceSec=300ms\n")
    guest = fake_qemu(stubborn=True, name="short one")
    with daemon.bus.client() as client:
        assert client.properties()["GraceUSec"] == 60_000_000
        result, receipt = client.wait(client.terminate(guest.pid, FORCE))
    assert result == "killed"
    assert 0.3 <= seconds(receipt) < 30


def test_powerdown_is_refused_and_says_so(client: Client, fake_qemu: Make) -> None:
    guest = fake_qemu()
    with pytest.raises(CallError, match="POWERDOWN") as caught:
        client.terminate(guest.pid, POWERDOWN | FIXED)
    assert caught.value.name == "org.qkilld1.Error.InvalidArgs"
    assert guest.alive
