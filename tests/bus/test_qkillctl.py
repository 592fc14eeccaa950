"""qkillctl with the real daemon: its output, its JSON, and every exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qkilld import __version__
from tests.lab import bus as lab_bus
from tests.lab import needs, terminal
from tests.lab.bus import Bus, Client, Daemon, lab_config
from tests.lab.guest import Guest
from tests.lab.log import Log
from tests.lab.process import OTHER_UID, end, run, spawn
from tests.lab.terminal import Screen

Make = Callable[..., Guest]
Start = Callable[..., Daemon]
HOSTILE = "\x1b[2J\n[bold]\u202ex"


def argv(bus: Bus, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "qkilld.ctl", "--bus", bus.address, *arguments]


def as_user(uid: int | None) -> list[str]:
    """Return a prefix that runs a command as a user who may read root's checkout."""
    if uid is None:
        return []
    needs.root("to be another user")
    ids = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--pdeathsig=KILL"]
    may_read = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
    return ["setpriv", *ids, *may_read, "--"]


def ctl(
    bus: Bus, *arguments: str, code: int = 0, uid: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run qkillctl to its end, and assert its exit code."""
    command = as_user(uid) + argv(bus, *arguments)
    done = run(command, env=lab_bus.environment(bus.address))
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def ctl_json(bus: Bus, *arguments: str, code: int = 0, uid: int | None = None) -> Any:
    """Run qkillctl with --json; return the document that it prints."""
    return json.loads(ctl(bus, "--json", *arguments, code=code, uid=uid).stdout)


@dataclass
class CtlProcess:
    """A running qkillctl."""

    process: subprocess.Popen[bytes]
    pidfd: int
    out: Log
    err: Log

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a match in its standard output."""
        return self.out.wait_for(pattern, 30, pidfd=self.pidfd)

    def wait(self) -> int:
        return self.process.wait(30)


@pytest.fixture
def start_ctl(private_bus: Bus, lab_dir: Path) -> Iterator[Callable[..., CtlProcess]]:
    """A function that starts qkillctl with these arguments. The output goes to a file."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> CtlProcess:
            out, err = Log(lab_dir / "out"), Log(lab_dir / "err")
            with out.path.open("wb") as stdout, err.path.open("wb") as stderr:
                process = spawn(
                    argv(private_bus, *arguments),
                    stdout=stdout,
                    stderr=stderr,
                    env=lab_bus.environment(private_bus.address),
                )
            stack.callback(end, process)
            pidfd = os.pidfd_open(process.pid)
            stack.callback(os.close, pidfd)
            return CtlProcess(process, pidfd, out, err)

        yield start


StartCtl = Callable[..., CtlProcess]


# Looking


def test_empty_lists(start_daemon: Start) -> None:
    daemon = start_daemon(config="[Target]\nExecutables=/nonexistent/qemu\n")
    assert ctl(daemon.bus, "list").stdout == "No QEMU guests found.\n"
    assert ctl(daemon.bus, "jobs").stdout == "No jobs.\n"
    assert ctl_json(daemon.bus, "list") == ctl_json(daemon.bus, "jobs") == []


def test_list(daemon: Daemon, fake_qemu: Make) -> None:
    web, hostile = fake_qemu(name="web"), fake_qemu(name=HOSTILE)
    text = ctl(daemon.bus, "list").stdout
    assert text.split("\n")[0].split() == [
        "PID",
        "NAME",
        "UUID",
        "USER",
        "CPU",
        "MEMORY",
        "UPTIME",
        "UNIT",
    ]
    row = rf"^{web.pid} +web +{web.uuid} +\S+ +\d\S*( \d\S*)? +[\d.]+[BKM] +\d\S*( \d\S*)?  +\S"
    assert re.search(row, text, re.MULTILINE)
    assert all(line.isprintable() for line in text.split("\n"))
    assert "[bold]" in text

    rows = {row["pid"]: row for row in ctl_json(daemon.bus, "list")}
    stats = {"cpu_usec", "memory_bytes", "uptime_usec"}
    assert rows[web.pid].keys() == {"pid", "name", "uuid", "uid", "user", "unit", "covered"} | stats
    assert rows[web.pid]["memory_bytes"] > 0
    # The uptime is computed from btime, which has a precision of 1 s.
    assert 0 <= rows[web.pid]["uptime_usec"] < 600_000_000
    assert (rows[web.pid]["name"], rows[web.pid]["uid"]) == ("web", os.getuid())
    assert hostile.pid in rows


def test_status_of_the_daemon(start_daemon: Start, fake_qemu: Make) -> None:
    bus = start_daemon(config=lab_config("GraceSec=90s\nReapSec=7s")).bus
    text = ctl(bus, "status").stdout
    assert f"qkilld {__version__} on the bus at {bus.address}" in text
    assert re.search(r"^  grace: +1min 30s ", text, re.MULTILINE)
    assert re.search(r"^  max: +infinity ", text, re.MULTILINE)
    assert "No job is running." in text

    guest = fake_qemu(name="web", stubborn=True)
    ctl(bus, "terminate", "--fixed", "web")
    row = rf"^1 +{guest.pid} +web +terminate +unknown +- +"
    assert re.search(rf"{row}gives up in 1?\ds$", ctl(bus, "status").stdout, re.MULTILINE)
    document = ctl_json(bus, "status")
    assert document["version"] == __version__
    assert document["policy"]["reap_usec"] == 7_000_000
    assert document["policy"]["max_usec"] is None
    job = {"id": 1, "path": "/org/qkilld1/job/1", "pid": guest.pid, "name": "web"}
    deadline = document["jobs"][0]["deadline_usec"]
    assert 0 < deadline - time.monotonic_ns() // 1000 < 15_000_000
    job |= {"phase": "terminate", "verdict": "unknown", "result": None, "held": False}
    job |= {
        "unit": ctl_json(bus, "list")[0]["unit"],
        "next_rung": "give-up",
        "deadline_usec": deadline,
    }
    assert job.items() <= document["jobs"][0].items()
    assert ctl_json(bus, "jobs") == document["jobs"]
    assert document["jobs"][0].keys() == ctl_json(bus, "status", "job:1")["job"].keys()
    ctl(bus, "hold", "web")
    assert re.search(rf"{row}held$", ctl(bus, "jobs").stdout, re.MULTILINE)
    (held,) = ctl_json(bus, "jobs")
    assert (held["held"], held["deadline_usec"]) == (True, None)
    assert "would stop it, but is held" in ctl(bus, "terminate", "web").stdout


def test_status_of_a_guest_and_of_its_job(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(name="web", stubborn=True)
    text = ctl(daemon.bus, "status", "web").stdout
    assert text.startswith(f"web (pid {guest.pid})\n")
    assert re.search(r"^  job: +none$", text, re.MULTILINE)
    assert ctl_json(daemon.bus, "status", str(guest.pid))["job"] is None

    ctl(daemon.bus, "terminate", "--force", "web")
    text = ctl(daemon.bus, "status", guest.uuid).stdout
    assert re.search(r"^  memory: +[\d.]+[KM]$", text, re.MULTILINE)
    assert re.search(r"^  flags: +force$", text, re.MULTILINE)
    assert re.search(r"^  next: +SIGKILL in \d+s$", text, re.MULTILINE)
    document = ctl_json(daemon.bus, "status", "job:1")
    assert document["guest"]["name"] == "web"
    assert document["job"]["flags"] == ["force"]
    assert document["job"]["pid"] == guest.pid
    # The guest's state may have changed meanwhile.
    again = ctl_json(daemon.bus, "status", "/org/qkilld1/job/1")
    assert (again["guest"]["uuid"], again["job"]["id"]) == (guest.uuid, 1)
    assert again["guest"]["memory_bytes"] > 0
    ctl(daemon.bus, "status", "job:2", code=7)


def test_the_result_of_a_job_that_has_ended(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(name="web")
    ctl(daemon.bus, "terminate", "--wait", "web")
    (job,) = ctl_json(daemon.bus, "jobs")
    assert (job["phase"], job["result"]) == ("done", "exited")
    row = rf"^1 +{guest.pid} +web +done +\S+ +exited +-$"
    assert re.search(row, ctl(daemon.bus, "jobs").stdout, re.MULTILINE)
    document = ctl_json(daemon.bus, "status", "job:1")
    assert document["job"]["result"] == "exited"
    assert [rung["action"] for rung in document["job"]["receipt"]["rungs"]] == ["SIGTERM"]
    text = ctl(daemon.bus, "status", "job:1").stdout
    assert re.search(r"^  end: +gone after \S+, without SIGKILL", text, re.MULTILINE)
    assert re.search(r"^  rungs: +SIGTERM after \S+$", text, re.MULTILINE)
    # No statistics are read, because another process may have the pid by now.
    assert document["guest"]["memory_bytes"] is None


def test_inspect(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(name="web")
    document = ctl_json(daemon.bus, "inspect", "web")
    assert document["start_time"] == guest.start_time
    assert document["executable"] == str(guest.executable)
    assert document["executable_deleted"] is False
    text = ctl(daemon.bus, "inspect", f"pid:{guest.pid}").stdout
    assert re.search(rf"^  executable: +{guest.executable}$", text, re.MULTILINE)
    assert re.search(r"^  executable deleted: +no$", text, re.MULTILINE)


def test_look_at_another_users_guest(daemon: Daemon, fake_qemu: Make) -> None:
    needs.root("to be another user")
    guest = fake_qemu(name="web", uuid="5f0c3c1e-6a0e-4a53-9f1a-0d6a4be4b6c5")
    ctl(daemon.bus, "inspect", "web", code=6, uid=OTHER_UID)
    # `status` shows every user what `list` shows.
    document = ctl_json(daemon.bus, "status", str(guest.pid), uid=OTHER_UID)
    assert (document["guest"]["name"], document["guest"]["user"]) == ("web", "root")


# Stopping


def test_a_real_guest(daemon: Daemon, linux_guest: Make) -> None:
    guest = linux_guest(name="web", pidfile=True)
    (order,) = ctl_json(daemon.bus, "terminate", "--wait", "web", "--reason", "maintenance")
    assert guest.wait_gone() == 0
    receipt = order.pop("receipt")
    assert order == {
        "target": "web",
        "pid": guest.pid,
        "job": "/org/qkilld1/job/1",
        "result": "exited",
        "error": None,
        "exit_code": 0,
    }
    assert receipt["reason"] == "maintenance"
    (rung,) = receipt["rungs"]
    assert (rung["phase"], rung["action"]) == ("terminate", "SIGTERM")
    assert receipt["requested_by"] == os.getuid()
    assert receipt["error"] is None


@pytest.mark.parametrize("kind", ["pid", "name", "uuid", "pidfile"])
def test_each_kind_of_target(daemon: Daemon, qemu: Make, kind: str) -> None:
    guest = qemu(name="web", pidfile=True)
    guest.pidfile.chmod(0o644)  # type: ignore[union-attr]
    target = {"pid": guest.pid, "name": "web", "uuid": guest.uuid, "pidfile": guest.pidfile}[kind]
    done = ctl(daemon.bus, "terminate", "--wait", str(target))
    assert guest.wait_gone() == 0
    assert re.search(
        rf"^web \(pid {guest.pid}\): gone after \S+, without SIGKILL$", done.stdout, re.MULTILINE
    )
    assert done.stderr == ""


def test_without_wait_it_says_how_to_follow(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(name="web", stubborn=True)
    text = ctl(daemon.bus, "terminate", "web").stdout
    assert text.startswith(f"web (pid {guest.pid}): /org/qkilld1/job/1 is stopping it.")
    (follow, call_off) = re.findall(r"`(qkillctl --bus [^`]*)`", text)
    assert follow.endswith(f"{daemon.bus.address} status job:1")
    assert call_off.endswith(f"{daemon.bus.address} cancel job:1")
    (order,) = ctl_json(daemon.bus, "terminate", "web")
    assert (order["job"], order["result"], order["receipt"]) == ("/org/qkilld1/job/1", None, None)


def test_killed(start_daemon: Start, fake_qemu: Make) -> None:
    bus = start_daemon().bus
    guest = fake_qemu(name="web", stubborn=True)
    done = ctl(bus, "terminate", "--wait", "--force", "--grace", "3s", "web", code=3)
    assert guest.wait_gone() == -signal.SIGKILL
    first, *_, last = done.stdout.splitlines()
    assert re.fullmatch(rf"web \(pid {guest.pid}\): SIGTERM sent; SIGKILL (in [1-3]s|now)", first)
    # Nothing is lost, because the guest has no disks.
    assert re.fullmatch(r".*: gone after \S+ by SIGKILL, with nothing left to write", last)


def test_survived(start_daemon: Start, fake_qemu: Make) -> None:
    bus = start_daemon(config=lab_config("GraceSec=100ms\nReapSec=100ms")).bus
    guest = fake_qemu(name="web", stubborn=True)
    done = ctl(bus, "terminate", "--wait", "web", code=4)
    assert re.search(r"still there after ([2-9]\d\dms|\d\.\d+s)", done.stdout)
    assert "--force" in done.stdout
    assert guest.alive


def test_cancelled(daemon: Daemon, fake_qemu: Make, start_ctl: StartCtl) -> None:
    fake_qemu(name="web", stubborn=True)
    running = start_ctl("terminate", "--wait", "web")
    running.wait_for("SIGTERM sent")
    assert "job 1 cancelled" in ctl(daemon.bus, "cancel", "web").stdout
    assert running.wait() == 4
    assert "cancelled after" in running.out.text()
    for target in ("web", "job:1"):
        done = ctl(daemon.bus, "cancel", target, code=7)
        assert "Job 1 has ended already (cancelled)" in done.stderr
    ctl(daemon.bus, "cancel", "job:99", code=7)
    (order,) = ctl_json(daemon.bus, "cancel", "job:1", code=7)
    assert order["error"]["name"] == "org.qkilld1.Error.NoSuchJob"


def test_held_extended_and_forced(daemon: Daemon, fake_qemu: Make, start_ctl: StartCtl) -> None:
    guest = fake_qemu(name="web", stubborn=True)
    running = start_ctl("terminate", "--wait", "--force", "web")
    running.wait_for("SIGTERM sent; SIGKILL in 10s")
    done = ctl(daemon.bus, "hold", "web")
    assert "job 1 held: no more signals until" in done.stdout
    running.wait_for("held")
    assert "held" in ctl(daemon.bus, "status", "web").stdout
    done = ctl(daemon.bus, "extend", "1h", "job:1")
    assert "job 1 extended: no SIGKILL for 1h from now on" in done.stdout
    assert "next: held" in done.stdout
    assert "job 1 released: the stop continues" in ctl(daemon.bus, "release", "web").stdout
    # This is one line, or two lines if the next step was not known at once.
    running.wait_for(r"released(;|\n).*no SIGKILL for (1h|59min)")
    assert "job 1 was not held" in ctl(daemon.bus, "release", "web").stdout
    done = ctl(daemon.bus, "extend", "1s", "web")
    assert re.search("job 1 has more time already.*; next: no SIGKILL for (1h|59min)", done.stdout)
    ctl(daemon.bus, "extend", "2h", "web")
    running.wait_for("extended; no SIGKILL for (2h|1h 59min)")
    assert "job 1 forced: SIGKILL was sent" in ctl(daemon.bus, "force", str(guest.pid)).stdout
    assert running.wait() == 3
    for command in (("hold",), ("release",), ("extend", "5s"), ("force",)):
        done = ctl(daemon.bus, *command, "job:1", code=7)
        assert f"has ended already (killed): there is nothing to {command[0]}" in done.stderr


def test_extended_without_force(daemon: Daemon, fake_qemu: Make) -> None:
    fake_qemu(name="web", stubborn=True)
    ctl(daemon.bus, "terminate", "web")
    said = ctl(daemon.bus, "extend", "1h", "web").stdout
    assert re.search("no SIGKILL is sent anyway; next: gives up in (1h|59min)", said)


def test_cancel_as_json(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(name="web", stubborn=True)
    ctl(daemon.bus, "terminate", "web")
    (order,) = ctl_json(daemon.bus, "cancel", "web")
    assert (order["pid"], order["job"], order["error"]) == (guest.pid, "/org/qkilld1/job/1", None)


@pytest.mark.parametrize(("flags", "fate"), [((), 0), (("--force",), -signal.SIGKILL)])
def test_no_wait(daemon: Daemon, qemu: Make, flags: tuple[str, ...], fate: int) -> None:
    guest = qemu(name="web")
    done = ctl(daemon.bus, "terminate", "--no-wait", *flags, "web")
    assert guest.wait_gone() == fate
    sent = "SIGKILL" if flags else "SIGTERM"
    assert f"web (pid {guest.pid}): {sent} was sent" in done.stdout


def test_no_wait_as_json(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    (order,) = ctl_json(daemon.bus, "terminate", "--no-wait", str(guest.pid))
    assert order["result"] == "signalled"
    assert [rung["action"] for rung in order["receipt"]["rungs"]] == ["SIGTERM"]


def test_no_wait_that_joins_a_job_does_not_wait_for_it(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(stubborn=True)
    ctl(daemon.bus, "terminate", str(guest.pid))
    (order,) = ctl_json(daemon.bus, "terminate", "--no-wait", str(guest.pid))
    assert (order["job"], order["result"]) == ("/org/qkilld1/job/1", None)


# Errors


def test_not_a_qemu(daemon: Daemon) -> None:
    (order,) = ctl_json(daemon.bus, "terminate", "--wait", str(os.getpid()), code=5)
    assert order["error"]["name"] == "org.qkilld1.Error.NotQemu"
    assert order["exit_code"] == 5


def test_another_process_than_the_pidfile_was_written_for(
    daemon: Daemon, fake_qemu: Make, lab_dir: Path
) -> None:
    guest = fake_qemu()
    pidfile = lab_dir / "pid"
    pidfile.write_text(str(guest.pid))
    pidfile.chmod(0o644)
    old = time.time() - 3600
    os.utime(pidfile, (old, old))
    done = ctl(daemon.bus, "terminate", "--force", "--no-wait", str(pidfile), code=5)
    assert f"Process {guest.pid} is not the one that pidfile {pidfile}" in done.stderr
    assert guest.alive


def test_not_permitted(daemon: Daemon, fake_qemu: Make) -> None:
    needs.root("to be another user")
    guest = fake_qemu(name="web")
    for target in ("web", str(guest.pid)):
        (order,) = ctl_json(daemon.bus, "terminate", target, code=6, uid=OTHER_UID)
        assert order["error"]["name"] == "org.freedesktop.DBus.Error.AccessDenied"
    assert guest.alive


def test_ones_own_guest(daemon: Daemon, fake_qemu: Make) -> None:
    needs.root("to be another user")
    guest = fake_qemu(name="web", uid=OTHER_UID)
    ctl(daemon.bus, "terminate", "--wait", "web", uid=OTHER_UID)
    assert guest.wait_gone() == -signal.SIGTERM


def test_not_found(daemon: Daemon, fake_qemu: Make) -> None:
    done = ctl(daemon.bus, "terminate", "nobody", "nobody.service", HOSTILE, code=7)
    assert len(done.stderr.splitlines()) == 3
    assert all(line.isprintable() for line in done.stderr.split("\n"))
    assert 'qkillctl: No running guest has the name, UUID or unit "nobody"' in done.stderr
    assert done.stderr.count("nobody") == 2  # The second match is nobody.service.
    assert "`qkillctl list`" in done.stderr
    guest = fake_qemu()
    guest.signal(signal.SIGKILL)
    guest.wait_gone()
    ctl(daemon.bus, "terminate", str(guest.pid), code=7)


def test_ambiguous(daemon: Daemon, fake_qemu: Make) -> None:
    twins = [fake_qemu(name="web") for _ in range(2)]
    done = ctl(daemon.bus, "terminate", "--force", "--no-wait", "web", code=7)
    for twin in twins:
        assert str(twin.pid) in done.stderr
        assert twin.alive


def test_malformed_target_among_good_ones(daemon: Daemon, qemu: Make) -> None:
    guest = qemu(name="web")
    orders = ctl_json(daemon.bus, "terminate", "--wait", "pid:x", "web", "nobody", code=7)
    assert [order["exit_code"] for order in orders] == [2, 0, 7]
    assert guest.wait_gone() == 0


def test_several_end_as_the_worst_of_them(daemon: Daemon, qemu: Make, fake_qemu: Make) -> None:
    """All jobs run at the same time, so together they take as long as the slowest job."""
    stubborn = [fake_qemu(name=f"stubborn{i}", stubborn=True) for i in range(3)]
    polite = qemu(name="polite")
    names = [guest.name for guest in (*stubborn, polite)]
    began = time.monotonic()
    orders = ctl_json(daemon.bus, "terminate", "--wait", "--force", "--grace", "6s", *names, code=3)
    assert time.monotonic() - began < 18
    assert [order["result"] for order in orders] == ["killed"] * 3 + ["exited"]
    assert polite.wait_gone() == 0


def test_more_targets_than_a_bus_allows_calls_on_a_connection(
    daemon: Daemon, fake_qemu: Make
) -> None:
    guests = [fake_qemu(name=f"g{i}", stubborn=True) for i in range(140)]
    orders = ctl_json(
        daemon.bus,
        *("terminate", "--wait", "--force", "--grace", "1s"),
        *(str(guest.pid) for guest in guests),
        code=3,
    )
    assert {order["result"] for order in orders} == {"killed"}


def test_no_daemon(private_bus: Bus) -> None:
    done = ctl(private_bus, "list", code=1)
    assert "qkilld is not running on this bus" in done.stderr
    assert private_bus.address in done.stderr
    assert done.stderr.count("\n") == 1
    (order,) = ctl_json(private_bus, "terminate", "--wait", "web", code=1)
    assert order["error"]["name"] == "org.qkilld1.Client.BusError"


def test_the_daemon_dies_half_way(daemon: Daemon, fake_qemu: Make, start_ctl: StartCtl) -> None:
    guest = fake_qemu(name="web", stubborn=True)
    running = start_ctl("terminate", "--wait", "web")
    running.wait_for("SIGTERM sent")
    daemon.stop(signal.SIGKILL)
    assert running.wait() == 1
    (line,) = running.err.lines()
    assert line.startswith(f"qkillctl: web (pid {guest.pid}): job:1 could not be followed")
    assert "may still be running" in line


def test_the_bus_dies_half_way(
    daemon: Daemon, client: Client, fake_qemu: Make, start_ctl: StartCtl
) -> None:
    fake_qemu(name="web", stubborn=True)
    client.subscribe()
    running = start_ctl("terminate", "--wait", "--json", "web")
    client.signal("JobNew")
    daemon.bus.stop()
    assert running.wait() == 1
    (order,) = json.loads(running.out.text())
    assert order["exit_code"] == 1
    assert "connection to the bus is lost" in running.err.text()


def test_the_daemon_is_stopped_half_way(
    daemon: Daemon, fake_qemu: Make, start_ctl: StartCtl
) -> None:
    fake_qemu(name="web", stubborn=True)
    running = start_ctl("terminate", "--wait", "web")
    running.wait_for("SIGTERM sent")
    assert daemon.stop() == 0
    assert running.wait() == 4
    assert "cancelled after" in running.out.text()


def test_ctrl_c_ends_the_waiting_and_not_the_job(
    daemon: Daemon, fake_qemu: Make, start_ctl: StartCtl
) -> None:
    guest = fake_qemu(name="web", stubborn=True)
    running = start_ctl("terminate", "--wait", "web", "nobody")
    running.wait_for("SIGTERM sent")
    signal.pidfd_send_signal(running.pidfd, signal.SIGINT)
    assert running.wait() == 130
    missing, interrupted = running.err.lines()
    assert "nobody" in missing
    assert f"interrupted: web (pid {guest.pid}): job:1 continues" in interrupted
    assert "cancel job:1`" in interrupted
    assert [job["phase"] for job in ctl_json(daemon.bus, "jobs")] == ["terminate"]


def test_plain_lines_are_one_for_each_change(
    daemon: Daemon, client: Client, fake_qemu: Make, start_ctl: StartCtl
) -> None:
    """Signals from other senders are ignored, because anyone on the bus may send them."""
    guest = fake_qemu(name="web", stubborn=True)
    others = set(_names(client))
    running = start_ctl("terminate", "--wait", "web")
    running.wait_for("SIGTERM sent")
    (waiting,) = (name for name in _names(client) if name[0] == ":" and name not in others)
    _send_forged_change(daemon.bus, waiting, "/org/qkilld1/job/1")
    ctl(daemon.bus, "terminate", "--force", "--no-wait", "web")  # Joins the job, and kills at once.
    assert running.wait() == 3
    lines = running.out.lines()
    assert not any("forged" in line for line in lines)
    assert len(lines) == len(set(lines))
    assert all(line.startswith(f"web (pid {guest.pid}): ") for line in lines)


def _names(client: Client) -> list[str]:
    (names,) = client.call(
        "ListNames",
        path="/org/freedesktop/DBus",
        interface="org.freedesktop.DBus",
        destination="org.freedesktop.DBus",
    )
    return list(names)


def _send_forged_change(bus: Bus, to: str, path: str) -> None:
    change = ["org.qkilld1.Job", "1", "Phase", "s", "forged", "0"]
    bus.busctl(
        *("emit", f"--destination={to}", path, "org.freedesktop.DBus.Properties"),
        *("PropertiesChanged", "sa{sv}as", *change),
    )


# On a terminal


@contextlib.contextmanager
def on_terminal(
    bus: Bus, *arguments: str, env: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Screen]]:
    """Run qkillctl with its output on a terminal of 100 columns and 24 rows."""
    around = lab_bus.environment(bus.address) | {"NO_COLOR": "", "COLUMNS": "100"} | env
    with terminal.on_terminal(argv(bus, *arguments), around) as running:
        yield running.process, running.screen


def test_the_live_line(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(name=f"web{HOSTILE}", stubborn=True)
    command = ("terminate", "--wait", "--force", "--grace", "30s", str(guest.pid))
    with on_terminal(daemon.bus, *command, env={"TERM": "xterm-256color"}) as (process, screen):
        screen.wait_for(rf"\(pid {guest.pid}\).*(SIGTERM sent|idle).*\d:\d\d.*SIGKILL in \d\ds")
        # The live line counts down between the daemon's signals.
        screen.wait_for(r"SIGKILL in (\d+)s(?s:.*)SIGKILL in (?!\1)\d+s")
        ctl(daemon.bus, "cancel", str(guest.pid))
        screen.read_to_end()
        assert process.wait(30) == 4
    last = screen.text.rpartition("cancelled after")
    assert f"(pid {guest.pid}): " in last[0]
    assert "\x1b[?25h" in screen.text  # the cursor is visible again
    assert "\x1b[2J" not in screen.text
    assert "\u202e" not in screen.text
    assert "[bold]" in screen.text


def test_ctrl_c_on_a_terminal(daemon: Daemon, fake_qemu: Make) -> None:
    fake_qemu(name="web", stubborn=True)
    command = ("terminate", "--wait", "web")
    with on_terminal(daemon.bus, *command, env={"TERM": "xterm"}) as (process, screen):
        screen.wait_for("gives up in")
        process.send_signal(signal.SIGINT)
        screen.read_to_end()
        assert process.wait(30) == 130
    assert "\x1b[?25h" in screen.text
    assert "continues without this program" in screen.text


@pytest.mark.parametrize(
    ("env", "styled", "coloured"),
    [
        ({"TERM": "xterm-256color"}, True, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_terminals(
    daemon: Daemon, fake_qemu: Make, env: dict[str, str], styled: bool, coloured: bool
) -> None:
    fake_qemu(name="web", stubborn=True)
    with on_terminal(daemon.bus, "list", env=env) as (process, screen):
        screen.read_to_end()
        assert process.wait(30) == 0
    assert "web" in screen.text
    assert ("\x1b[" in screen.text) is styled
    command = ("terminate", "--wait", "--force", "--grace", "1s", "web")
    with on_terminal(daemon.bus, *command, env=env) as (process, screen):
        screen.read_to_end()
        assert process.wait(30) == 3
    assert ("\x1b[?25l" in screen.text) is styled
    assert (re.search(r"\x1b\[(\d+;)*3\dm", screen.text) is not None) is coloured


def test_asking_first(daemon: Daemon, fake_qemu: Make, start_ctl: StartCtl) -> None:
    """The guest has no monitor, and the receipt says so."""
    guest = fake_qemu(name="web")
    planned = ctl(daemon.bus, "terminate", "--powerdown", "--dry-run", "web").stdout
    assert planned.splitlines()[1] == "  SIGTERM at once (terminate)"
    assert "  ask at once" not in planned
    assert "  asking: the guest has no monitor; give the guest a unix socket" in planned
    assert guest.alive
    text = ctl(daemon.bus, "terminate", "--powerdown", "--wait", "web").stdout
    assert text.splitlines()[-1].endswith("without SIGKILL; it could not be asked to shut down")
    assert not guest.alive
    fake_qemu(name="web")
    only = ("terminate", "--powerdown-only", "--wait", "web")
    planned = ctl(daemon.bus, *only[:2], "--dry-run", "web").stdout
    assert planned.splitlines()[1] == "  gives up: at once"
    (document,) = ctl_json(daemon.bus, *only, code=4)
    assert document["result"] == "survived"
    assert document["receipt"]["guest_asked"] == "unreachable"
    assert document["receipt"]["rungs"] == []


def test_a_guest_that_does_not_shut_down(daemon: Daemon, qemu: Make, start_ctl: StartCtl) -> None:
    """A real QEMU without an operating system."""
    guest = qemu(name="web", arguments=["-M", "q35", "-m", "32"])
    planned = ctl(daemon.bus, "terminate", "--powerdown", "--dry-run", "web").stdout
    assert "  ask at once (powerdown)\n  SIGTERM after 1min (terminate)\n" in planned
    assert "asking: the monitor at /" in planned
    assert "does not listen, gets SIGTERM within seconds" in planned
    only = ("terminate", "--powerdown-only", "--powerdown-sec", "1s", "--wait", "web")
    running = start_ctl(*only)
    running.wait_for(r"is about to be asked(; gives up in 1s unless it can be asked)?$")
    running.wait_for(r"still there after .*, without any signal; ")
    assert running.wait() == 4
    assert guest.alive


def test_dry_run(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(name="web")
    forced = ["terminate", "--dry-run", "--force", "--stall", "20s", "web"]
    text = ctl(daemon.bus, *forced).stdout
    assert text.splitlines() == [
        f"web (pid {guest.pid})",
        "  SIGTERM at once (terminate)",
        "  SIGKILL after 20s at the soonest (kill)",
        "  gives up: after 25s at the soonest",
    ]
    (document,) = ctl_json(daemon.bus, *forced)
    assert document["pid"] == guest.pid
    killed = {"phase": "kill", "action": "SIGKILL", "at_usec": 20_000_000}
    assert document["rungs"][1] == killed
    assert "without FORCE" in ctl(daemon.bus, "terminate", "--dry-run", "web").stdout
    good, bad = ctl_json(daemon.bus, "terminate", "--dry-run", "web", "nobody", code=7)
    assert bad.keys() <= good.keys()
    assert (good["target"], good["error"], good["exit_code"]) == ("web", None, 0)
    assert (bad["target"], bad["error"] is None, bad["exit_code"]) == ("nobody", False, 7)
    assert guest.alive
    assert ctl_json(daemon.bus, "jobs") == []
