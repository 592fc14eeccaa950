"""Jobs outlive the daemon: the installed service on a real systemd."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qkilld.model.event import MessageId
from tests.evidence.until import until
from tests.lab.container import CHECKOUT, Container
from tests.lab.groups import temporary_group
from tests.lab.image import busybox
from tests.lab.journald import fill_journald
from tests.lab.process import TOP
from tests.lab.scratch import scratch
from tests.safety.contained import ContainerPolicy

TARGET = ("org.qkilld1", "/org/qkilld1", "org.qkilld1.Manager")
JOB = "org.qkilld1.Job"
FORCE, FIXED = 1, 8
STAND_IN = "/usr/local/bin/qemu-system-x86_64"
STUBBORN = "trap '' TERM; while :; do sleep 1000; done"
WRITING = (
    "trap '' TERM; x=$$(printf %%01000d 7); while :; do echo $$x$$x >/run/written; sleep 0.1; done"
)
"""A script that writes 2 kB every 100 ms, forever."""

_numbers = itertools.count(1)
StartGuest = Callable[..., tuple[str, int]]


@pytest.fixture(scope="module")
def system(installed: Container) -> Iterator[Container]:
    installed.run("cp", f"{CHECKOUT}/{busybox().relative_to(TOP)}", STAND_IN)
    installed.write("/etc/qkilld/qkilld.conf", "[Policy]\nGraceSec=2s\nStallSec=2s\n")
    installed.run("systemctl", "restart", "qkilld.service")
    ContainerPolicy(installed).show_storage()
    with scratch("w") as directory:
        # The file is on a disk, because writes to a file in memory do not count as progress.
        installed.run("ln", "-s", f"{directory}/written", "/run/written")
        yield installed
    installed.run("systemctl", "stop", "qkilld.service")
    installed.run("rm", STAND_IN, "/run/written")


@pytest.fixture
def start_guest(system: Container) -> Iterator[StartGuest]:
    """A function that starts a fake QEMU in a unit. Its script ignores SIGTERM. The function
    returns the unit's name and the pid."""
    started = []
    # These tests kill the daemon many times a minute, but systemd starts it at most 100 times a
    # minute. systemd 257 counts two starts if a call starts the daemon before RestartSec= is over.
    system.run("systemctl", "reset-failed", "qkilld.service")

    def start(script: str = STUBBORN, lines: str = "") -> tuple[str, int]:
        unit = f"outlives{next(_numbers)}.service"
        text = f'[Service]\nType=exec\nExecStart=@{STAND_IN} sh -c "{script}"\n{lines}\n'
        system.write(f"/run/systemd/system/{unit}", text)
        system.run("systemctl", "start", unit)
        started.append(unit)
        return unit, int(system.property(unit, "MainPID"))

    yield start
    for unit in started:
        system.run("systemctl", "kill", "--signal=KILL", unit, check=False)


@pytest.fixture
def drop_in(system: Container) -> Iterator[Callable[[str], None]]:
    """A function that adds these lines to the daemon's [Service]."""
    path = "/run/systemd/system/qkilld.service.d/survival.conf"

    def apply(lines: str) -> None:
        system.write(path, f"[Service]\n{lines}\n")
        system.run("systemctl", "daemon-reload")
        system.run("systemctl", "restart", "qkilld.service")

    yield apply
    system.run("rm", "-f", path)
    system.run("systemctl", "daemon-reload")
    system.run("systemctl", "restart", "qkilld.service")


def call(system: Container, member: str, *arguments: str) -> Any:
    done = system.run("busctl", "--json=short", "call", *TARGET, member, *arguments)
    return json.loads(done.stdout)["data"]


def terminate(system: Container, pid: int, flags: int, **spans_s: float) -> str:
    options = [
        word
        for name, span in spans_s.items()
        for word in (f"{name.replace('_', '-')}-usec", "t", str(int(span * 1e6)))
    ]
    (path,) = call(
        system, "TerminateWithOptions", "uta{sv}", str(pid), str(flags), str(len(spans_s)), *options
    )
    return str(path)


def steer(system: Container, pid: int, member: str, *arguments: str) -> None:
    """Call a method of the process's job. The SIGKILL of the job must be due so late that the call
    comes before it, even on a busy host."""
    (path,) = call(system, "GetJobByPID", "u", str(pid))
    system.run("busctl", "call", "org.qkilld1", path, JOB, member, *arguments)


def properties(system: Container, job: str) -> dict[str, Any]:
    done = system.run(
        *("busctl", "--json=short", "call", "org.qkilld1", job),
        *("org.freedesktop.DBus.Properties", "GetAll", "s", JOB),
    )
    return {name: value["data"] for name, value in json.loads(done.stdout)["data"][0].items()}


def wait(system: Container, job: str) -> tuple[str, dict[str, Any]]:
    done = system.run(
        "busctl", "--json=short", "--timeout=60", "call", "org.qkilld1", job, JOB, "Wait"
    )
    result, receipt = json.loads(done.stdout)["data"]
    return result, {name: value["data"] for name, value in receipt.items()}


def wait_verdict(system: Container, job: str, verdict: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while (seen := properties(system, job))["Verdict"] != verdict:
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)
    return seen


def main_pid(system: Container) -> int:
    return int(system.property("qkilld.service", "MainPID"))


def memory_kb(system: Container, name: str) -> int:
    """Return a value (kB) in the daemon's /proc/PID/status, proc(5)."""
    status = system.run("cat", f"/proc/{main_pid(system)}/status").stdout
    return int(re.findall(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)[0])


def test_memory_is_locked_while_jobs_run(
    system: Container, start_guest: StartGuest, drop_in: Callable[[str], None]
) -> None:
    """The daemon runs in the sandbox of the installed unit."""
    limits = system.run("cat", f"/proc/{main_pid(system)}/limits").stdout
    if not re.search(r"^Max locked memory +unlimited", limits, re.MULTILINE):
        # On this machine, LimitMEMLOCK= cannot set the limit. With CAP_IPC_LOCK, the limit does not
        # matter.
        drop_in("CapabilityBoundingSet=CAP_IPC_LOCK")
    assert memory_kb(system, "VmLck") == 0
    _, pid = start_guest()
    job = terminate(system, pid, FORCE, grace=3)
    deadline = time.monotonic() + 10
    while not memory_kb(system, "VmLck") and time.monotonic() < deadline:
        time.sleep(0.05)
    # All memory is locked. VmLck also includes reserved memory that is not resident.
    resident = memory_kb(system, "VmRSS")
    assert memory_kb(system, "VmLck") >= resident
    assert resident < 64_000
    assert wait(system, job)[0] == "killed"


def kill(system: Container, pid: int) -> None:
    """Kill a daemon, and wait until it is gone. (Before that, the bus would answer calls with an
    error.)"""
    script = 'kill -KILL "$1" && while kill -0 "$1" 2>/dev/null; do sleep 0.01; done'
    system.run("sh", "-c", script, "sh", str(pid))


def kill_daemon(system: Container) -> int:
    """Kill the daemon; return the time (CLOCK_MONOTONIC, µs)."""
    pid = main_pid(system)
    now = time.monotonic_ns() // 1000
    kill(system, pid)
    return now


def resumed(system: Container, unit: str, since: int) -> float:
    """Return the seconds from `since` until the job of the unit's guest was resumed."""
    entry = system.wait_journal(
        f"OBJECT_SYSTEMD_UNIT={unit}", f"MESSAGE_ID={MessageId.JOB_RESUMED.value}"
    )
    return (int(entry["__MONOTONIC_TIMESTAMP"]) - since) / 1e6


def signals(system: Container, unit: str) -> list[str]:
    """Wait for the end of the job of the unit's guest; return the signals that were sent."""
    matches = (f"OBJECT_SYSTEMD_UNIT={unit}", "SYSLOG_IDENTIFIER=qkilld")
    system.wait_journal(*matches, f"MESSAGE_ID={MessageId.JOB_ENDED.value}")
    entries = system.journal(*matches, f"MESSAGE_ID={MessageId.SIGNAL_SENT.value}")
    return [entry["QKILLD_SIGNAL"] for entry in entries]


def test_hardened_it_sees_as_much_as_without(
    system: Container, drop_in: Callable[[str], None]
) -> None:
    """Inspect a real QEMU of another user with its own mounts. The sandbox must hide nothing that
    the daemon must read."""
    system.run(
        *("systemd-run", "--unit=seen", "--property=PrivateTmp=yes", "--uid=65534"),
        *(
            "/usr/bin/qemu-system-x86_64",
            "-M",
            "none",
            "-nodefaults",
            "-display",
            "none",
            "-name",
            "seen",
        ),
    )
    pid = system.property("seen.service", "MainPID")

    def seen() -> dict[str, Any]:
        (found,) = call(system, "Inspect", "u", pid)
        return {key: value["data"] for key, value in found.items()}

    hardened = until(seen, lambda found: found["verdict"] == "idle")
    assert hardened.get("unseen", []) == []
    drop_in(
        "ProtectSystem=no\nProtectHome=no\nPrivateTmp=no\nPrivateDevices=no\nProtectProc=default\n"
        "ProtectControlGroups=no\nProtectKernelTunables=no\nPrivateNetwork=no\nPrivateMounts=no\n"
        "ProtectKernelLogs=no\nProtectKernelModules=no\nProtectHostname=no\nProtectClock=no\n"
        "RestrictAddressFamilies=\nSystemCallFilter=\nPrivateIPC=no\n"
        "CapabilityBoundingSet=~\nNoNewPrivileges=no\n"
    )
    plain = seen()
    system.run("systemctl", "kill", "--signal=KILL", "seen.service")
    assert hardened.keys() == plain.keys()
    for key in ("mounts", "devices", "sockets", "verdict", "reasons", "unit"):
        assert hardened.get(key) == plain.get(key), key


@pytest.mark.parametrize(
    ("script", "verdict", "flags"),
    [(STUBBORN, "idle", FORCE), (WRITING, "flushing", FORCE), (STUBBORN, "unknown", FORCE | FIXED)],
)
def test_the_daemon_is_killed(
    system: Container, start_guest: StartGuest, script: str, verdict: str, flags: int
) -> None:
    """The same job continues. Its deadline is the same, unless the guest was making progress."""
    unit, pid = start_guest(script)
    job = terminate(system, pid, flags, grace=10, stall=10, max=15)
    before = wait_verdict(system, job, verdict)
    gap = resumed(system, unit, kill_daemon(system))
    # Until the next daemon has taken two samples, it assumes that the guest may wait for storage.
    after = until(
        lambda: properties(system, job),
        lambda seen: verdict == "flushing" or seen["DeadlineUSec"] == before["DeadlineUSec"],
    )
    print(f"from SIGKILL of the daemon to the job running again: {gap * 1000:.0f} ms")
    for name in ("PID", "StartTime", "StartedUSec", "Flags", "Phase", "Name", "Unit", "UID"):
        assert after[name] == before[name], name
    assert after["DeadlineUSec"] >= before["DeadlineUSec"]
    # On a busy machine, the daemon may take some seconds to start.
    assert gap < 10
    result, receipt = wait(system, job)
    assert result == "killed"
    assert [rung[1] for rung in receipt["rungs"]] == ["SIGTERM", "SIGKILL"]
    assert signals(system, unit) == ["SIGTERM", "SIGKILL"]


def test_killed_again_and_again_until_right_before_the_deadline(
    system: Container, start_guest: StartGuest
) -> None:
    unit, pid = start_guest()
    job = terminate(system, pid, FORCE | FIXED, grace=15)
    deadline = properties(system, job)["DeadlineUSec"]
    times = 0
    while time.monotonic_ns() // 1000 < deadline - 500_000:
        kill_daemon(system)
        after = properties(system, job)
        if after["Phase"] != "terminate":  # the machine is busy, and the phase has ended
            break
        assert after["DeadlineUSec"] == deadline
        times += 1
        time.sleep(0.2)  # for the start limit
    kill_daemon(system)
    result, receipt = wait(system, job)
    assert (result, times > 1) == ("killed", True)
    assert receipt["rungs"][1][2] >= 15_000_000
    assert signals(system, unit) == ["SIGTERM", "SIGKILL"]


def test_a_guest_that_goes_while_nobody_looks(system: Container, start_guest: StartGuest) -> None:
    unit, pid = start_guest()
    job = terminate(system, pid, 0, grace=60)
    daemon = main_pid(system)
    system.run("kill", "-STOP", str(daemon))
    system.run("kill", "-KILL", str(pid))
    kill(system, daemon)
    assert wait(system, job)[0] == "exited"
    # Even a late caller gets the result. Here, a third daemon answers.
    kill_daemon(system)
    assert wait(system, job)[0] == "exited"
    assert properties(system, job)["Result"] == "exited"
    assert signals(system, unit) == ["SIGTERM"]


def test_waiting_callers_outlive_a_restart(system: Container, start_guest: StartGuest) -> None:
    unit, pid = start_guest()
    with system.spawn(
        *("qkillctl", "terminate", "--wait", "--force", "--fixed", "--grace", "20s", str(pid))
    ) as ctl:
        assert ctl.stdout is not None
        assert b"SIGTERM sent" in ctl.stdout.readline()
        job = call(system, "GetJobByPID", "u", str(pid))[0]
        before = properties(system, job)
        system.run("systemctl", "restart", "qkilld.service")
        after = properties(system, job)
        assert system.property("qkilld.service", "Result") == "success"
        assert system.property("qkilld.service", "NRestarts") == "0"
        assert after["DeadlineUSec"] == before["DeadlineUSec"]
        said = ctl.stdout.read().decode()
        assert ctl.wait(30) == 3
    assert "qkilld went away; waiting" in said
    (after_s,) = re.findall(r"gone after (\d+)\.", said)
    assert 20 <= int(after_s) < 60
    assert signals(system, unit) == ["SIGTERM", "SIGKILL"]
    assert call(system, "ListJobs")[0][-1][1] == job


def test_a_wrong_configuration_fails_once_and_loses_no_job(
    system: Container, start_guest: StartGuest
) -> None:
    unit, pid = start_guest()
    job = terminate(system, pid, FORCE | FIXED, grace=20)
    deadline = properties(system, job)["DeadlineUSec"]
    wrong = "/etc/qkilld/qkilld.conf.d/wrong.conf"
    system.write(wrong, "[Policy]\nGarceSec=5s\n")
    try:
        assert system.run("systemctl", "restart", "qkilld.service", check=False).returncode != 0
        time.sleep(1)  # twenty times RestartSec=
        assert system.property("qkilld.service", "ActiveState") == "failed"
        assert system.property("qkilld.service", "NRestarts") == "0"
        status = system.run("systemctl", "status", "qkilld.service", check=False).stdout
        assert "wrong.conf:2: " in status
        assert system.run("kill", "-0", str(pid)).returncode == 0
    finally:
        system.run("rm", wrong)
    # The next call starts it.
    assert properties(system, job)["DeadlineUSec"] == deadline
    result, receipt = wait(system, job)
    assert (result, receipt["elapsed-usec"] >= 20_000_000) == ("killed", True)
    assert signals(system, unit) == ["SIGTERM", "SIGKILL"]


def test_a_stopped_daemon_cancels_its_jobs(system: Container, start_guest: StartGuest) -> None:
    _, pid = start_guest()
    job = terminate(system, pid, FORCE | FIXED, grace=2)
    system.run("systemctl", "stop", "qkilld.service")
    time.sleep(2.5)
    # This call starts the next daemon. It knows that the job was cancelled, and leaves the guest
    # alone.
    result, receipt = wait(system, job)
    assert (result, receipt["error"]) == ("cancelled", "qkilld was stopped")
    assert system.run("kill", "-0", str(pid)).returncode == 0


def test_a_loop_that_stands_still_is_noticed(
    system: Container, start_guest: StartGuest, drop_in: Callable[[str], None]
) -> None:
    drop_in("WatchdogSec=1s")
    unit, pid = start_guest()
    job = terminate(system, pid, FORCE | FIXED, grace=5)
    stalled = main_pid(system)
    time.sleep(1.5)
    assert main_pid(system) == stalled, "it is fed while the loop runs"
    system.run("kill", "-STOP", str(stalled))
    assert resumed(system, unit, 0)
    assert main_pid(system) != stalled
    assert wait(system, job)[0] == "killed"


def test_state_that_is_torn_or_not_its_own(system: Container, start_guest: StartGuest) -> None:
    _, pid = start_guest()
    unit, good = start_guest()
    bad = terminate(system, pid, FORCE | FIXED, grace=30).rsplit("/", 1)[1]
    job = terminate(system, good, FORCE | FIXED, grace=5)
    time.sleep(0.3)
    daemon = main_pid(system)
    path = f"/run/qkilld/jobs/job-{bad}.json"
    system.run("kill", "-STOP", str(daemon))
    system.run("truncate", "--size=100", path)
    system.write("/run/qkilld/jobs/job-99999.json", "{}", 0o600)
    system.run("chown", "nobody", "/run/qkilld/jobs/job-99999.json")
    kill(system, daemon)
    resumed(system, unit, 0)
    assert system.property("qkilld.service", "ActiveState") == "active"
    aside = system.run("ls", "/run/qkilld/jobs").stdout.split()
    assert {f"job-{bad}.json.bad", "job-99999.json.bad"} <= set(aside)
    entries = system.journal(f"MESSAGE_ID={MessageId.STATE_SET_ASIDE.value}")
    said = "\n".join(entry["MESSAGE"] for entry in entries)
    assert f"Cannot use the saved job state job-{bad}.json: it is incomplete" in said
    assert "Cannot use the saved job state job-99999.json: other users own it" in said
    # Without the state, the job's flags are unknown, so the guest is left alone.
    assert f'Closed the descriptor "job-{bad}"' in said
    assert wait(system, job)[0] == "killed"
    assert system.run("kill", "-0", str(pid)).returncode == 0
    # The job's number is not used again.
    assert int(terminate(system, pid, 2).rsplit("/", 1)[1]) > int(bad)
    system.run("sh", "-c", "rm /run/qkilld/jobs/*.bad")


def test_the_bus_is_restarted(system: Container, start_guest: StartGuest) -> None:
    unit, pid = start_guest()
    job = terminate(system, pid, FORCE | FIXED, grace=6)
    daemon = main_pid(system)
    system.run("systemctl", "restart", "dbus.service")
    system.wait_journal(f"MESSAGE_ID={MessageId.BUS_LOST.value}")
    deadline = time.monotonic() + 20
    while "org.qkilld1" not in system.run("busctl", "list", "--acquired").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert wait(system, job)[0] == "killed"
    assert main_pid(system) == daemon
    assert signals(system, unit) == ["SIGTERM", "SIGKILL"]


def test_a_hundred_jobs(system: Container) -> None:
    script = f"""
        for i in $(seq 100); do
            (exec -a sh {STAND_IN} -c "trap '' TERM; read x <>/run/never") </dev/null &
        done
        wait
    """
    system.run("sh", "-c", "rm -f /run/never; mkfifo /run/never")
    system.write("/run/hundred", script)
    system.run("systemd-run", "--unit=hundred", "bash", "/run/hundred")
    deadline = time.monotonic() + 30
    while len(guests := call(system, "ListGuests")[0]) < 100:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    pids = [str(guest[0]) for guest in guests]
    since = system.run("date", "+%s.%N").stdout.strip()
    try:
        system.run("qkillctl", "terminate", "--force", "--fixed", "--grace", "10s", *pids)
        before = {job[1]: job[2] for job in call(system, "ListJobs")[0] if job[3] != "done"}
        assert len(before) == 100
        killed = kill_daemon(system)
        ready = system.wait_journal(
            f"--since=@{since}", f"MESSAGE_ID={MessageId.JOB_RESUMED.value}", timeout=30
        )
        gap = int(ready["__MONOTONIC_TIMESTAMP"]) - killed
        print(f"a hundred jobs run again after {gap / 1000:.0f} ms")
        after = {job[1]: job[2] for job in call(system, "ListJobs")[0] if job[3] != "done"}
        assert after == before
        for job in before:
            assert wait(system, job)[0] == "killed"
    finally:
        system.run("systemctl", "kill", "--signal=KILL", "hundred.service", check=False)
    entries = system.journal(f"--since=@{since}", f"MESSAGE_ID={MessageId.SIGNAL_SENT.value}")
    sent = [(entry["OBJECT_PID"], entry["QKILLD_SIGNAL"]) for entry in entries]
    assert len(sent) == len(set(sent)) == 200


_HAMMER = """
import asyncio, random, sys, time
from qkilld.bus.client import ManagerProxy
from qkilld.bus.connection import connect

async def main():
    seen = set()
    connection = await connect()
    start = time.monotonic()
    # On a busy machine, a life lasts longer.
    while time.monotonic() < start + (12 if len(seen) > 2 else 60):
        # Around the moment at which it ends.
        await asyncio.sleep(random.uniform(0.45, 0.7))
        calls = [asyncio.create_task(ManagerProxy(connection).list_jobs()) for _ in range(3)]
        for _ in range(30):
            calls.append(asyncio.create_task(ManagerProxy(connection).list_jobs()))
            await asyncio.sleep(0.002)
        await asyncio.gather(*calls)
        seen.add((await connection.request_bus("GetNameOwner", "s", "org.qkilld1"))[0])
    print(len(seen))
    connection.close()

asyncio.run(main())
"""


def test_no_call_is_lost_around_its_end_for_lack_of_work(
    system: Container, drop_in: Callable[[str], None]
) -> None:
    drop_in("ExecStart=\nExecStart=/usr/bin/qkilld --exit-idle 500ms")
    system.run("sh", "-c", "systemctl stop qkilld; rm -f /run/qkilld/jobs/job-*")
    done = system.python("-c", _HAMMER, timeout=90)
    lives = int(done.stdout)
    print(f"{lives} lives of the daemon, no call lost")
    assert lives > 2
    assert system.property("qkilld.service", "Result") == "success"


def test_it_ends_for_lack_of_work_and_is_started_by_a_call(
    system: Container, start_guest: StartGuest, drop_in: Callable[[str], None]
) -> None:
    drop_in("ExecStart=\nExecStart=/usr/bin/qkilld --exit-idle 500ms")
    system.run("sh", "-c", "systemctl stop qkilld; rm -f /run/qkilld/jobs/job-*")
    assert call(system, "ListJobs") == [[]]
    deadline = time.monotonic() + 20
    while system.property("qkilld.service", "ActiveState") != "inactive":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # The daemon does not exit while a job runs, or while a job has just ended.
    _, pid = start_guest()
    job = terminate(system, pid, FORCE | FIXED, grace=1)
    daemon = main_pid(system)
    assert wait(system, job)[0] == "killed"
    time.sleep(2)
    assert main_pid(system) == daemon


def test_a_stop_that_is_held_outlives_its_units_timeout_and_the_daemon(
    system: Container, start_guest: StartGuest
) -> None:
    unit, pid = start_guest(
        lines="ExecStop=/usr/bin/qkilld-stop --grace 6s\nNotifyAccess=exec\nTimeoutStopSec=6"
    )
    with system.spawn("systemctl", "stop", unit) as stopping:
        system.wait_journal(f"OBJECT_PID={pid}", f"MESSAGE_ID={MessageId.JOB_JOINED.value}")
        steer(system, pid, "Hold")
        system.run("systemctl", "kill", "--signal=KILL", "qkilld.service")
        time.sleep(9)
        assert "held" in system.property(unit, "StatusText")
        assert system.property(unit, "ActiveState") == "deactivating"
        system.run("qkillctl", "release", str(pid))
        stopping.wait(30)
    (receipt,) = system.journal(f"OBJECT_PID={pid}", "QKILLD_RESULT=killed")
    assert int(receipt["QKILLD_ELAPSED_USEC"]) >= 9e6
    signals = system.journal(f"OBJECT_PID={pid}", f"MESSAGE_ID={MessageId.SIGNAL_SENT.value}")
    assert [entry["QKILLD_SIGNAL"] for entry in signals] == ["SIGTERM", "SIGKILL"]


@pytest.mark.parametrize("how", [("Hold",), ("Extend", "t", str(2**64 - 1))])
def test_the_helper_keeps_holds_and_extensions_without_a_daemon(
    system: Container, start_guest: StartGuest, drop_in: Callable[[str], None], how: tuple[str, ...]
) -> None:
    drop_in("Restart=no")
    unit, pid = start_guest(
        lines="ExecStop=/usr/bin/qkilld-stop --grace 6s\nNotifyAccess=exec\nTimeoutStopSec=6"
    )
    with system.spawn("systemctl", "stop", unit) as stopping:
        system.wait_journal(f"OBJECT_PID={pid}", f"MESSAGE_ID={MessageId.JOB_JOINED.value}")
        steer(system, pid, *how)
        time.sleep(0.5)  # changes are announced five times a second
        # Stop the socket, because through it, the helper's next call would start the daemon. The
        # restart after this test starts the socket again.
        system.run("systemctl", "stop", "qkilld.socket")
        system.run("systemctl", "kill", "--signal=KILL", "qkilld.service")
        entry = system.wait_journal(f"OBJECT_PID={pid}", f"MESSAGE_ID={MessageId.STOP_ALONE.value}")
        time.sleep(8)
        assert main_pid(system) == 0
        assert system.property(unit, "ActiveState") == "deactivating"
        assert system.journal(f"OBJECT_PID={pid}", "QKILLD_SIGNAL=SIGKILL") == []
        if how == ("Hold",):
            # Without a daemon, nobody can release the job.
            assert "only a SIGTERM to qkilld-stop ends" in entry["MESSAGE"]
            system.run("systemctl", "kill", "--kill-whom=control", "--signal=TERM", unit)
            system.wait_journal(f"OBJECT_PID={pid}", "QKILLD_RESULT=killed")
        else:
            system.run("systemctl", "kill", "--signal=KILL", unit)
        stopping.wait(30)


@pytest.fixture
def stopped_journald(system: Container) -> Iterator[Callable[[], None]]:
    """A journald that does not read, with a full socket. Yields a function that makes it read
    again."""
    journald = system.property("systemd-journald.service", "MainPID")
    system.run("kill", "-STOP", journald)
    try:
        fill_journald(system)

        def read_again() -> None:
            system.run("kill", "-CONT", journald)

        yield read_again
    finally:
        system.run("kill", "-CONT", journald)


def test_a_journald_that_does_not_read(
    system: Container, start_guest: StartGuest, stopped_journald: Callable[[], None]
) -> None:
    unit, pid = start_guest()
    daemon = main_pid(system)
    job = terminate(system, pid, FORCE | FIXED, grace=4)
    slowest = 0.0
    for _ in range(8):
        began = time.monotonic()
        call(system, "ListJobs")
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.5)
    result, receipt = wait(system, job)
    print(f"slowest call {slowest * 1000:.0f} ms, SIGKILL after {receipt['rungs'][1][2]} us")
    assert result == "killed"
    assert receipt["rungs"][1][2] < 6_000_000
    assert main_pid(system) == daemon
    stopped_journald()
    assert signals(system, unit) == ["SIGTERM", "SIGKILL"]


def test_the_helper_and_a_journald_that_does_not_read(
    system: Container, start_guest: StartGuest, stopped_journald: Callable[[], None]
) -> None:
    """While a job is held, the helper continues to extend the timeout of the stop."""
    unit, pid = start_guest(
        lines="ExecStop=/usr/bin/qkilld-stop\nNotifyAccess=exec\nTimeoutStopSec=4"
    )
    with system.spawn("systemctl", "stop", unit) as stopping:
        deadline = time.monotonic() + 20
        while str(pid) not in [str(job[2]) for job in call(system, "ListJobs")[0]]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        steer(system, pid, "Hold")
        time.sleep(12)
        assert system.property(unit, "ActiveState") == "deactivating"
        assert system.run("kill", "-0", str(pid), check=False).returncode == 0
        assert stopping.poll() is None
        stopped_journald()
        assert system.journal(f"OBJECT_PID={pid}", "QKILLD_SIGNAL=SIGKILL") == []
        system.run("qkillctl", "release", str(pid))
        stopping.wait(30)


def test_the_daemon_runs_out_of_memory(system: Container, start_guest: StartGuest) -> None:
    """The kernel kills the daemon instead of the guest. The next daemon continues the job."""
    unit, pid = start_guest()
    job = terminate(system, pid, FORCE, grace=20)
    before = wait_verdict(system, job, "idle")
    daemon = main_pid(system)
    with no_memory(system, daemon) as killed:
        until(lambda: main_pid(system), lambda now: now != daemon)
        assert until(killed, bool)
    assert resumed(system, unit, 0)
    # Until the next daemon has taken two samples, it assumes that the guest may wait for storage.
    until(
        lambda: properties(system, job)["DeadlineUSec"],
        lambda deadline: deadline == before["DeadlineUSec"],
    )
    assert wait(system, job)[0] == "killed"
    assert signals(system, unit) == ["SIGTERM", "SIGKILL"]


@contextlib.contextmanager
def no_memory(system: Container, pid: int) -> Iterator[Callable[[], bool]]:
    """Limit a process of the container to the memory that it uses now. Yield a function that
    returns whether the kernel has killed a process because of this limit."""
    if system.property("qkilld.service", "MemoryCurrent").isdecimal():
        limit = ("systemctl", "set-property", "--runtime", "qkilld.service")
        system.run(*limit, "MemoryMax=4K")
        yield lambda: "oom-kill" in system.run("journalctl", "--unit=qkilld.service").stdout
        system.run(*limit, "MemoryMax=infinity")
        return
    # The container has no memory controller, because this machine has the controller in v1.
    parent = Path("/sys/fs/cgroup/memory")
    if not (parent / "memory.limit_in_bytes").exists():
        pytest.skip("no memory controller for the container")
    with temporary_group(parent) as group:
        (group / "cgroup.procs").write_text(str(system.outside(pid)))
        (group / "memory.limit_in_bytes").write_text("4096")
        yield lambda: "oom_kill 0" not in (group / "memory.oom_control").read_text()
