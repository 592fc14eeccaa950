"""The daemon as a service of a real system, the guest as one of its units."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator

import pytest

from qkilld.model.event import MessageId
from tests.evidence.until import until
from tests.lab.container import Container
from tests.lab.process import OTHER_UID

TARGET = ("org.qkilld1", "/org/qkilld1", "org.qkilld1.Manager")
FIXED_SOON = ("TerminateWithOptions", "uta{sv}")
ITS_OPTIONS = ("9", "1", "grace-usec", "t", "700000")
"""The arguments for FORCE and FIXED, with a grace shorter than ten seconds."""

_numbers = itertools.count(1)
StartGuest = Callable[..., tuple[str, int]]


@pytest.fixture(scope="module")
def system(installed: Container) -> Iterator[Container]:
    """A system that runs the daemon."""
    installed.write("/etc/qkilld/qkilld.conf", "[Policy]\nGraceSec=30s\n")
    installed.write(
        "/etc/qkilld/qkilld.conf.d/50-lab.conf", "[Policy]\nGraceSec=700ms\nStallSec=0\n"
    )
    # The daemon may still run with the configuration of another test file.
    installed.run("systemctl", "restart", "qkilld.service")
    yield installed
    installed.run("systemctl", "stop", "qkilld.service")


@pytest.fixture
def start_guest(system: Container) -> Iterator[StartGuest]:
    """A function that starts a QEMU in a unit. Returns the unit's name and the pid."""
    started = []

    def start(*properties: str, uid: int | None = None) -> tuple[str, int]:
        unit = f"guest{next(_numbers)}.service"
        user = [] if uid is None else [f"--uid={uid}"]
        system.run(
            *("systemd-run", f"--unit={unit}", "--property=Type=exec", *user),
            *(f"--property={p}" for p in properties),
            *("qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none"),
            *("-name", unit.removesuffix(".service")),
        )
        started.append(unit)
        # QEMU may not yet handle SIGTERM. SIGTERM then kills it, but this does not matter here.
        return unit, int(system.property(unit, "MainPID"))

    yield start
    for unit in started:
        system.run("systemctl", "kill", "--signal=KILL", unit, check=False)


def call(system: Container, member: str, *arguments: str, uid: int | None = None) -> str:
    done = system.run("busctl", "call", *TARGET, member, *arguments, uid=uid)
    return done.stdout.strip()


def wait(system: Container, answer: str) -> str:
    """Wait for the job in busctl's `answer`, such as `o "/org/qkilld1/job/1"`. Return its
    result."""
    job = answer.split('"')[1]
    done = system.run(
        *("busctl", "--json=short", "--timeout=60"),
        *("call", "org.qkilld1", job, "org.qkilld1.Job", "Wait"),
    )
    return str(json.loads(done.stdout)["data"][0])


def test_systemd_has_it_ready(system: Container) -> None:
    assert system.property("qkilld.service", "ActiveState") == "active"

    def owner() -> list[str]:
        names = system.run("busctl", "list", "--acquired", "--no-legend").stdout
        lines = [line.split() for line in names.splitlines()]
        return next((line for line in lines if line[0] == "org.qkilld1"), [])

    # The service is ready when it serves Varlink. It takes its name on the bus soon after that.
    until(owner, lambda line: "qkilld.service" in line)
    # A drop-in overrides the main file. Both are in the real directories.
    grace = system.run("busctl", "get-property", *TARGET, "GraceUSec").stdout
    assert grace == "t 700000\n"


def test_a_guest_that_is_a_unit_and_its_story_in_the_journal(
    system: Container, start_guest: StartGuest
) -> None:
    unit, pid = start_guest()
    assert f'{pid} "{unit.removesuffix(".service")}" "" 0 "{unit}"' in call(system, "ListGuests")
    assert wait(system, call(system, "Terminate", "ut", str(pid), "0")) == "exited"
    receipt = system.wait_journal(
        f"OBJECT_SYSTEMD_UNIT={unit}", f"MESSAGE_ID={MessageId.JOB_ENDED.value}"
    )
    assert receipt["QKILLD_RESULT"] == "exited"
    assert receipt["QKILLD_PHASE"] == "done"
    assert receipt["QKILLD_VERDICT"] in ("gone", "zombie")
    assert receipt["QKILLD_GUEST"] == unit.removesuffix(".service")
    assert int(receipt["QKILLD_ELAPSED_USEC"]) > 0
    assert receipt["OBJECT_PID"] == str(pid)
    assert receipt["PRIORITY"] == "6"
    assert receipt["_SYSTEMD_UNIT"] == "qkilld.service"
    # `journalctl -u` with the guest's unit shows all entries, although the process is gone.
    entries = [e for e in system.journal("-u", unit) if e.get("SYSLOG_IDENTIFIER") == "qkilld"]
    assert {str(entry["OBJECT_SYSTEMD_UNIT"]) for entry in entries} == {unit}
    assert [entry["MESSAGE_ID"] for entry in entries] == [
        MessageId.JOB_STARTED.value,
        MessageId.SIGNAL_SENT.value,
        MessageId.JOB_ENDED.value,
    ]


def test_its_output_to_the_journal_is_no_storage(
    system: Container, start_guest: StartGuest
) -> None:
    unit, pid = start_guest()
    system.run("systemctl", "kill", "--signal=STOP", unit)
    answer = system.run("busctl", "--json=short", "call", *TARGET, "Inspect", "u", str(pid)).stdout
    (guest,) = json.loads(answer)["data"]
    assert guest["sockets"]["data"] == []
    assert guest["verdict"]["data"] == "stopped"


def test_a_stuck_guest_is_killed_and_the_catalogue_explains_it(
    system: Container, start_guest: StartGuest
) -> None:
    unit, pid = start_guest()
    system.run("systemctl", "kill", "--signal=STOP", unit)
    assert wait(system, call(system, *FIXED_SOON, str(pid), *ITS_OPTIONS)) == "killed"
    kill = system.wait_journal(f"OBJECT_SYSTEMD_UNIT={unit}", "QKILLD_SIGNAL=SIGKILL")
    assert (kill["QKILLD_PHASE"], kill["PRIORITY"]) == ("kill", "5")
    text = system.run("journalctl", "-x", "--no-pager", "-u", unit).stdout
    assert "Subject: The job of a QEMU guest has ended: killed" in text
    assert "Data that it had not written is lost, so check its disk images" in text
    assert f"(process {pid})" in text


def test_the_units_of_users_and_who_may_stop_them(
    system: Container, start_guest: StartGuest
) -> None:
    _, roots = start_guest()
    unit, own = start_guest(uid=OTHER_UID)
    refused = system.run(
        "busctl", "call", *TARGET, "Terminate", "ut", str(roots), "1", check=False, uid=OTHER_UID
    )
    assert refused.returncode != 0
    assert "Access denied" in refused.stderr
    answer = call(system, "Terminate", "ut", str(own), "0", uid=OTHER_UID)
    assert wait(system, answer) == "exited"
    assert system.property(unit, "MainPID") == "0"


def test_the_bus_policy_denies_what_is_not_ours(system: Container) -> None:
    script = (
        "import asyncio\n"
        "from qkilld.bus.connection import connect\n"
        "async def main():\n"
        "    connection = await connect()\n"
        "    try:\n"
        "        await connection.request_bus('RequestName', 'su', 'org.qkilld1', 4)\n"
        "    finally:\n"
        "        connection.close()\n"
        "asyncio.run(main())\n"
    )
    done = system.python("-c", script, check=False, uid=OTHER_UID)
    assert "RefusedByBus: the policy of the bus does not allow" in done.stderr
    done = system.run(
        *("busctl", "set-property", *TARGET, "NJobs", "u", "1"), check=False, uid=OTHER_UID
    )
    # The bus forwards the call, and the daemon answers with the standard error.
    assert done.returncode != 0 and "NJobs cannot be set" in done.stderr


def test_qkillctl_on_the_system_bus(system: Container, start_guest: StartGuest) -> None:
    unit, pid = start_guest()
    listed = json.loads(system.run("qkillctl", "--json", "list").stdout)
    assert pid in [guest["pid"] for guest in listed]
    done = system.run("qkillctl", "terminate", "--wait", unit)
    assert done.returncode == 0
    assert system.property(unit, "MainPID") == "0"


def test_it_is_stopped_for_good_and_starts_again(
    system: Container, start_guest: StartGuest
) -> None:
    unit, pid = start_guest()
    system.run("systemctl", "kill", "--signal=STOP", unit)
    call(system, "Terminate", "ut", str(pid), "9")
    system.run("systemctl", "stop", "qkilld.service")
    assert system.property("qkilld.service", "Result") == "success"
    # The running job is cancelled, and the guest is left alone.
    receipt = system.wait_journal(f"OBJECT_SYSTEMD_UNIT={unit}", "QKILLD_RESULT=cancelled")
    assert receipt["QKILLD_GUEST"] == unit.removesuffix(".service")
    assert system.property(unit, "MainPID") == str(pid)
    # The bus starts the daemon again. The guest was stopped by SIGSTOP, so it gets SIGCONT, and
    # then handles the pending SIGTERM.
    assert wait(system, call(system, "Terminate", "ut", str(pid), "1")) == "exited"
    turn = system.wait_journal(f"OBJECT_SYSTEMD_UNIT={unit}", "QKILLD_SIGNAL=SIGCONT")
    assert turn["QKILLD_VERDICT"] == "stopped"


def test_a_stop_by_hand_names_the_socket_that_starts_it_again(
    system: Container, start_guest: StartGuest
) -> None:
    """The socket has neither PartOf= nor StopPropagatedFrom=. With either, systemctl would warn
    less often. But the helper would have to stop the guest without the daemon, and so with less
    evidence, and the next test would fail. During a shutdown, the helper could not start the daemon
    (test_a_guest_that_is_stopped_when_the_bus_has_gone).

    The socket unit for sock_diag(7) is stopped with the service, because nobody can connect to it.
    """
    unit, _ = start_guest("ExecStop=/usr/bin/qkilld-stop", "NotifyAccess=exec", uid=OTHER_UID)
    done = system.run("systemctl", "stop", "qkilld.service")
    assert "qkilld.socket" in done.stderr
    until(lambda: system.property("qkilld-diag.socket", "ActiveState"), "inactive".__eq__)
    assert system.property("qkilld.service", "ActiveState") == "inactive"
    system.run("systemctl", "stop", unit)
    receipt = system.wait_journal(f"OBJECT_SYSTEMD_UNIT={unit}", "QKILLD_RESULT=exited")
    assert receipt["SYSLOG_IDENTIFIER"] == "qkilld"
    assert system.property("qkilld-diag.socket", "ActiveState") == "active"
    system.run("systemctl", "stop", "qkilld.service")
    until(lambda: system.property("qkilld-diag.socket", "ActiveState"), "inactive".__eq__)
    call(system, "ListJobs")  # the bus starts the daemon, which starts the socket
    assert system.property("qkilld-diag.socket", "ActiveState") == "active"
    system.run("systemctl", "restart", "qkilld.service")
    assert system.property("qkilld-diag.socket", "ActiveState") == "active"
    # This is the command in qkilld(8). If a socket were missing in it, systemctl would sometimes
    # warn about this socket.
    units = ("qkilld.socket", "qkilld-diag.socket", "qkilld.service")
    assert system.run("systemctl", "stop", *units).stderr == ""
    assert {system.property(unit, "ActiveState") for unit in units} == {"inactive"}
    system.run("systemctl", "start", "qkilld.socket")


def test_after_a_crash_the_next_daemon_answers_a_call_from_before(system: Container) -> None:
    """The socket must not be stopped with the service (PartOf=, StopPropagatedFrom=). Otherwise, a
    crash would also close the socket, and the calls in its queue would be lost."""
    system.run("systemctl", "start", "qkilld.service")
    pid = system.property("qkilld.service", "MainPID")
    system.run("kill", "-STOP", pid)
    script = (
        "import socket\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.connect('/run/qkilld/org.qkilld1')\n"
        'sock.sendall(b\'{"method": "org.qkilld1.GetStatus"}\\0\')\n'
        "print('sent', flush=True)\n"
        "print(sock.recv(1 << 16).decode(), flush=True)\n"
    )
    with system.spawn("python3", "-c", script) as caller:
        assert caller.stdout is not None and caller.stdout.readline() == b"sent\n"
        system.run("kill", "-KILL", pid)
        answer = caller.stdout.readline()
    assert b'"parameters"' in answer and b'"error"' not in answer
