"""qkilld-stop as ExecStop= of real units, on a real systemd."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qkilld.model.event import MessageId
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.container import CHECKOUT, PYTHON, Container
from tests.lab.image import busybox
from tests.lab.process import OTHER_UID, TOP, run
from tests.lab.records import records
from tests.lab.scratch import run_directory, scratch
from tests.lab.storage import NbdServer, nbd_server
from tests.safety.contained import ContainerPolicy
from tests.safety.machine import Machine, Target

HELPER = f"{PYTHON} -m qkilld.stop"
QEMU = "/usr/bin/qemu-system-x86_64 -M none -nodefaults -display none"
ENVIRONMENT = f"Environment=PYTHONPATH={CHECKOUT} PYTHONDONTWRITEBYTECODE=1"
MIB = 1 << 20

_numbers = itertools.count(1)
StartUnit = Callable[..., str]


@pytest.fixture(scope="module")
def system(installed: Container) -> Iterator[Container]:
    """A system that runs the daemon."""
    installed.write("/etc/qkilld/qkilld.conf", "")
    installed.run("systemctl", "restart", "qkilld.service")
    yield installed
    installed.run("systemctl", "stop", "qkilld.service")


@pytest.fixture
def start_unit(system: Container) -> Iterator[StartUnit]:
    """A function that starts a guest in a unit with the helper, and with these lines in
    [Service]."""
    started = []

    def start(
        *lines: str, command: str = "", helper: str = HELPER, notify: str = "exec", name: str = ""
    ) -> str:
        unit = f"{name or f'stopped{next(_numbers)}'}.service"
        command = command or f"{QEMU} -name {unit.removesuffix('.service')}"
        text = [f"ExecStart={command}", f"ExecStop={helper}", f"NotifyAccess={notify}"]
        text += [ENVIRONMENT, *lines]
        system.write(f"/run/systemd/system/{unit}", "[Service]\n" + "\n".join(text) + "\n")
        system.run("systemctl", "daemon-reload")
        system.run("systemctl", "start", unit)
        started.append(unit)
        return unit

    yield start
    for unit in started:
        system.run("systemctl", "kill", "--signal=KILL", unit, check=False)


@dataclass
class SlowGuest:
    """A guest whose disk has acknowledged records. Its storage has become slow."""

    unit: str
    target: Target
    image: Path
    server: NbdServer

    def lost(self) -> int:
        """Return how many records are missing. Call this after the guest's exit."""
        acknowledged = self.target.acknowledged()
        assert acknowledged > 0
        return acknowledged - len(records(self.image))


@pytest.fixture
def slow_guest(system: Container, start_unit: StartUnit) -> Iterator[Callable[..., SlowGuest]]:
    """A function that starts a guest in a unit with these lines. Flushing the guest takes
    `seconds`."""
    with contextlib.ExitStack() as stack:

        def start(*lines: str, seconds: int, uid: int = 0, **options: Any) -> SlowGuest:
            directory = stack.enter_context(scratch("m"))
            image = directory / "disk.qcow2"
            qemu_img = str(needs.program("qemu-img", "qemu-utils"))
            create = ("create", "-q", "-f", "qcow2", "-o", "cluster_size=4K", str(image), "11G")
            run([qemu_img, *create], check=True)
            server = stack.enter_context(nbd_server(image, room=64 * MIB))
            stack.callback(server.rate, "10G")
            # A clean exit writes 4 KiB for every three records: at 400 kbit/s, 36 records a second.
            count = seconds * 36
            machine = Machine(
                directory,
                [f"file={server.uri},format=qcow2,cache=writeback"],
                f"lab.job=disks lab.records={count} lab.passes=3 lab.stride={32 * MIB}",
            )
            ContainerPolicy(system).show_storage()
            script = shlex.join(machine.argv()).replace(str(TOP), CHECKOUT)
            (directory / "run").write_text(f"exec {script}\n")
            socket = Path(server.uri.partition("socket=")[2])
            machine.serial.touch()
            for path in (directory, image, machine.serial, socket.parent, socket):
                os.chown(path, uid, uid)
            command = f"/bin/sh {directory}/run"
            unit = start_unit(*lines, command=command, **options)
            target = Target.find(machine)
            stack.callback(os.close, target.pidfd)
            target.wait_for("^GUEST DONE")
            server.rate("400K")
            return SlowGuest(unit, target, image, server)

        yield start


def story(system: Container, unit: str) -> list[str]:
    """Return the names of the unit's events in the journal. Changes of the verdict are left out,
    and so are the reasons why the guest could not be asked."""
    names = {message.value: message.name for message in MessageId}
    entries = system.journal("-u", unit)
    found = [names[e["MESSAGE_ID"]] for e in entries if e.get("MESSAGE_ID") in names]
    return [name for name in found if name not in ("VERDICT_TURNED", "ASKING_ENDED")]


def story_of_an_idle_one(system: Container, unit: str) -> list[str]:
    """Leave out JOB_JOINED: on a busy machine, the guest may still be running when its unit's
    settings have been read."""
    return [name for name in story(system, unit) if name != "JOB_JOINED"]


def said(system: Container, unit: str) -> str:
    return "\n".join(str(entry["MESSAGE"]) for entry in system.journal("-u", unit))


def stop(system: Container, unit: str) -> None:
    """Stop the unit, and assert success."""
    system.run("systemctl", "stop", unit, timeout=120)
    assert system.property(unit, "Result") == "success", said(system, unit)
    assert system.property(unit, "ActiveState") == "inactive"
    system.wait_journal("-u", unit, f"MESSAGE_ID={MessageId.JOB_ENDED.value}")


@contextlib.contextmanager
def stopping(system: Container, unit: str) -> Iterator[None]:
    """Stop the unit while the body of the context runs. The body begins at the first signal."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            stop(system, unit)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        system.wait_journal("-u", unit, f"MESSAGE_ID={MessageId.SIGNAL_SENT.value}")
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def no_daemon(system: Container) -> Iterator[None]:
    # Mask the units, because the socket or the bus would start the daemon again.
    units = ("qkilld.socket", "qkilld.service")
    system.run("systemctl", "mask", "--now", "--runtime", *units)
    try:
        yield
    finally:
        system.run("systemctl", "unmask", "--runtime", *units)
        system.run("systemctl", "start", "qkilld.service")


def test_an_idle_guest_by_the_daemon(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit()
    stop(system, unit)
    assert story_of_an_idle_one(system, unit) == ["JOB_STARTED", "SIGNAL_SENT", "JOB_ENDED"]
    assert f'"ExecStop of {unit}"' in said(system, unit)


def test_a_daemon_that_has_yet_to_start(system: Container, start_unit: StartUnit) -> None:
    """The helper's first call starts the daemon, and waits in the socket meanwhile. On a busy
    machine, the start may take longer than the helper waits, so there are three attempts."""
    late = "/run/systemd/system/qkilld.service.d/late.conf"
    system.write(late, "[Service]\nExecStartPre=/bin/sleep 0.5\n")
    system.run("systemctl", "daemon-reload")
    stories: list[list[str]] = []
    try:
        while len(stories) < 3 and ["JOB_STARTED", "SIGNAL_SENT", "JOB_ENDED"] not in stories:
            unit = start_unit()
            system.run("systemctl", "stop", "qkilld.service")
            stop(system, unit)
            stories.append(story_of_an_idle_one(system, unit))
    finally:
        system.run("rm", late)
        system.run("systemctl", "daemon-reload")
    assert ["JOB_STARTED", "SIGNAL_SENT", "JOB_ENDED"] in stories, stories


def test_an_idle_guest_without_the_daemon(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit()
    with no_daemon(system):
        stop(system, unit)
    assert story_of_an_idle_one(system, unit) == [
        "STOP_ALONE",
        "JOB_STARTED",
        "SIGNAL_SENT",
        "JOB_ENDED",
    ]
    (event, *_) = system.journal("-u", unit, f"MESSAGE_ID={MessageId.STOP_ALONE.value}")
    assert event["SYSLOG_IDENTIFIER"] == "qkilld-stop"


def test_a_flush_of_half_a_minute_in_a_unit_that_gives_five_seconds(
    system: Container, slow_guest: Callable[..., SlowGuest]
) -> None:
    guest = slow_guest("TimeoutStopSec=5", seconds=28)
    with stopping(system, guest.unit):
        system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.JOB_JOINED.value}")
        name = guest.target.machine.name
        until(lambda: system.property(guest.unit, "StatusText"), lambda status: name in status)
    assert guest.lost() == 0
    # The job gets FORCE, because systemd would send SIGKILL, but FORCE is not needed. On a busy
    # machine, the helper may request FORCE twice. It may also do so before SIGTERM, because SIGTERM
    # is delayed until the server of the guest's disk is found.
    first, *others, last = dict.fromkeys(story(system, guest.unit))
    assert (first, sorted(others), last) == (
        "JOB_STARTED",
        ["JOB_JOINED", "SIGNAL_SENT"],
        "JOB_ENDED",
    )
    assert "Stopping timed out" not in said(system, guest.unit)


def test_the_daemon_is_killed_while_the_guest_flushes(
    system: Container, slow_guest: Callable[..., SlowGuest]
) -> None:
    guest = slow_guest("TimeoutStopSec=6", seconds=12)
    # The daemon is not started again, so the helper continues without it.
    system.write("/run/systemd/system/qkilld.service.d/once.conf", "[Service]\nRestart=no\n")
    system.run("systemctl", "daemon-reload")
    try:
        with stopping(system, guest.unit):
            system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.VERDICT_TURNED.value}")
            system.run("systemctl", "stop", "qkilld.socket")
            system.run("systemctl", "kill", "--signal=KILL", "qkilld.service")
    finally:
        system.run("rm", "/run/systemd/system/qkilld.service.d/once.conf")
        system.run("systemctl", "daemon-reload")
        system.run("systemctl", "restart", "qkilld.service")
    assert guest.lost() == 0
    events = story(system, guest.unit)
    # The helper does not repeat the signal that the daemon has sent.
    assert events.count("SIGNAL_SENT") == 1, said(system, guest.unit)
    # When the daemon is started again, the guest is already gone.
    position = events.index("STOP_ALONE")
    rest = [name for name in events[position:] if name != "JOB_JOINED"]
    assert rest[:3] == ["STOP_ALONE", "JOB_RESUMED", "JOB_ENDED"], said(system, guest.unit)


@pytest.mark.parametrize("action", [("kill", "--signal=KILL"), ("restart",), ("stop",)])
def test_the_daemon_goes_away(
    system: Container, slow_guest: Callable[..., SlowGuest], action: tuple[str, ...]
) -> None:
    guest = slow_guest("TimeoutStopSec=3", seconds=8)
    try:
        with stopping(system, guest.unit):
            system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.VERDICT_TURNED.value}")
            system.run("systemctl", *action, "qkilld.service")
    finally:
        system.run("systemctl", "start", "qkilld.service")
    assert guest.lost() == 0
    events = story(system, guest.unit)
    assert events.count("SIGNAL_SENT") == 1, said(system, guest.unit)
    # The next daemon or the helper continues the job.
    assert "JOB_RESUMED" in events


def test_the_daemon_is_stopped_without_a_bus(
    system: Container, slow_guest: Callable[..., SlowGuest]
) -> None:
    """The daemon cannot find out whether systemd stops or restarts it. So it leaves its jobs to the
    next daemon, which is started by the helper's call."""
    guest = slow_guest("TimeoutStopSec=3", seconds=12)
    with stopping(system, guest.unit):
        system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.VERDICT_TURNED.value}")
        system.run("systemctl", "stop", "dbus.socket", "dbus.service")
        try:
            system.run("systemctl", "stop", "qkilld.service")
            until(lambda: system.property("qkilld.service", "ActiveState"), "active".__eq__)
        finally:
            system.run("systemctl", "start", "dbus.socket", "dbus.service")
    assert guest.lost() == 0
    events = story(system, guest.unit)
    assert events.count("SIGNAL_SENT") == 1, said(system, guest.unit)
    assert "JOB_RESUMED" in events and "STOP_ALONE" not in events, said(system, guest.unit)


def test_a_daemon_that_does_not_answer(
    system: Container, slow_guest: Callable[..., SlowGuest]
) -> None:
    guest = slow_guest("TimeoutStopSec=2", seconds=8)
    system.run("systemctl", "kill", "--signal=STOP", "qkilld.service")
    try:
        with stopping(system, guest.unit):
            pass
    finally:
        system.run("systemctl", "kill", "--signal=CONT", "qkilld.service")
    assert guest.lost() == 0
    assert story(system, guest.unit)[0] == "STOP_ALONE"
    assert "qkilld does not answer" in said(system, guest.unit)


def test_without_a_bus(system: Container, slow_guest: Callable[..., SlowGuest]) -> None:
    """The daemon still stops the guest, and no record is lost."""
    guest = slow_guest("TimeoutStopSec=3", seconds=8)
    units = ("dbus.socket", "dbus.service")
    system.run("systemctl", "stop", *units)
    try:
        with stopping(system, guest.unit):
            pass
    finally:
        system.run("systemctl", "start", *units)
    assert guest.lost() == 0
    events = story(system, guest.unit)
    assert events == ["JOB_STARTED", "SIGNAL_SENT", "JOB_ENDED"]
    # The daemon owns its bus name again.
    system.run("busctl", "call", "org.qkilld1", "/org/qkilld1", "org.qkilld1.Manager", "ListJobs")


@pytest.mark.parametrize("error", ["ImportError", "AttributeError", "SyntaxError"])
def test_without_a_library_for_the_bus(
    system: Container, start_unit: StartUnit, error: str
) -> None:
    """The D-Bus library is missing, or does not work with a newer Python."""
    shadow = f"/run/shadow-{error}"
    for library in ("dbus_next", "dbus_fast"):
        system.write(f"{shadow}/{library}/__init__.py", f"raise {error}('not with this Python')\n")
    unit = start_unit(f"Environment=PYTHONPATH={shadow}:{CHECKOUT}")
    with no_daemon(system):
        stop(system, unit)
    assert story_of_an_idle_one(system, unit) == [
        "STOP_ALONE",
        "JOB_STARTED",
        "SIGNAL_SENT",
        "JOB_ENDED",
    ]


LIAR = """
import json, os, pathlib, socket
pathlib.Path("/run/qkilld").mkdir(exist_ok=True)
pathlib.Path("/run/qkilld/org.qkilld1").unlink(missing_ok=True)
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/qkilld/org.qkilld1")
listener.listen()
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    call = json.loads(connection.recv(65536)[:-1])
    process = call["parameters"]
    state = {"job": 1, "pid": process["pid"], "startTime": process["startTime"], "uid": 0,
             "name": "", "phase": "done", "result": "exited"}
    reply = {"parameters": {"state": state, "receipt": {"elapsedUSec": 7}}}
    if %r:
        message = {"message": "it has just exited"}
        reply = {"error": "org.qkilld1.NoSuchProcess", "parameters": message}
    connection.sendall(json.dumps(reply).encode() + bytes(1))
"""


@pytest.mark.parametrize("refuses", [False, True])
def test_a_daemon_that_falsely_reports_an_exit(
    system: Container, start_unit: StartUnit, refuses: bool
) -> None:
    unit = start_unit()
    with no_daemon(system):
        with system.spawn(PYTHON, "-c", LIAR % refuses) as liar:
            assert liar.stdout is not None and liar.stdout.readline() == b"ready\n"
            stop(system, unit)
        system.run("rm", "/run/qkilld/org.qkilld1")
    assert "but it has not" in said(system, unit)
    assert story_of_an_idle_one(system, unit) == [
        "STOP_ALONE",
        "JOB_STARTED",
        "SIGNAL_SENT",
        "JOB_ENDED",
    ]


def test_the_helper_is_killed(system: Container, slow_guest: Callable[..., SlowGuest]) -> None:
    guest = slow_guest("TimeoutStopSec=20", seconds=8)
    with system.spawn("systemctl", "stop", guest.unit) as stopping:
        system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.VERDICT_TURNED.value}")
        helper = system.property(guest.unit, "ControlPID")
        system.run("kill", "-KILL", helper)
        # The daemon reports this at once. Its job continues, but systemd's timeout is no longer
        # extended.
        gone = system.wait_journal(
            f"OBJECT_SYSTEMD_UNIT={guest.unit}", f"MESSAGE_ID={MessageId.WAITER_GONE.value}"
        )
        assert gone["PRIORITY"] == "4"
        stopping.wait(60)
    assert guest.lost() == 0
    assert system.property(guest.unit, "Result") == "signal"
    assert story(system, guest.unit)[-2:] == ["WAITER_GONE", "JOB_ENDED"]


def test_a_unit_that_does_not_listen(
    system: Container, slow_guest: Callable[..., SlowGuest]
) -> None:
    guest = slow_guest("TimeoutStopSec=5", seconds=7, notify="none")
    system.run("systemctl", "stop", guest.unit)
    warning = system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.STOP_LIMITED.value}")
    assert "Add NotifyAccess=exec to [Service]" in warning["MESSAGE"]
    assert warning["PRIORITY"] == "4"
    # The helper exits before the timeout and sends no SIGKILL, so systemd gives the guest another
    # TimeoutStopSec=.
    assert "STOP_GIVEN_UP" in story(system, guest.unit)
    assert "Stopping timed out" not in said(system, guest.unit)
    assert system.property(guest.unit, "ExecMainStatus") == "0"
    assert guest.lost() == 0


IGNORES = "-M microvm -nodefaults -display none -m 32 -qmp unix:%t/%N/qmp,server=on,wait=off"
"""A machine that does not show whether an operating system listens to its power button. In this
guest, none does."""


def start_deaf(system: Container, start_unit: StartUnit, *lines: str, **options: Any) -> str:
    """Start such a guest, and wait for its monitor; return the unit."""
    command = f"/usr/bin/qemu-system-x86_64 {IGNORES}"
    unit = start_unit("RuntimeDirectory=%N", *lines, command=command, **options)
    path = f"/run/{unit.removesuffix('.service')}/qmp"
    until(lambda: system.run("test", "-S", path, check=False), lambda done: done.returncode == 0)
    return unit


@pytest.mark.parametrize("daemon", [True, False])
def test_asking_leaves_time_in_a_unit_that_does_not_listen(
    system: Container, start_unit: StartUnit, daemon: bool
) -> None:
    unit = start_deaf(system, start_unit, "TimeoutStopSec=14", notify="none")
    with contextlib.nullcontext() if daemon else no_daemon(system):
        system.run("systemctl", "stop", unit)
    assert system.property(unit, "Result") == "success"
    text = said(system, unit)
    assert "Add NotifyAccess=exec to [Service]" in text
    assert "no more time was given for asking it" in text
    assert "Stopping timed out" not in text
    (after,) = re.findall(r"Sent SIGTERM to .* after (\d+)\.\d+ s", text)
    # On a busy host, the request comes some time after the start of the stop.
    assert 3 <= int(after) <= 7, "half of TimeoutStopSec= is left"
    ended = system.wait_journal("-u", unit, "QKILLD_RESULT=exited")
    assert ended["QKILLD_GUEST_ASKED"] == "ignored"


def test_a_sandbox_of_another_user_with_a_second_to_stop(
    system: Container, slow_guest: Callable[..., SlowGuest]
) -> None:
    guest = slow_guest(
        *(f"User={OTHER_UID}", "TimeoutStopSec=1", "ProtectProc=invisible", "ProtectSystem=strict"),
        *(
            "PrivateTmp=yes",
            f"BindPaths={run_directory()}",
            "NoNewPrivileges=yes",
            "ProtectHome=yes",
        ),
        seconds=6,
        uid=OTHER_UID,
    )
    with stopping(system, guest.unit):
        pass
    assert guest.lost() == 0


@pytest.mark.parametrize("options", ["", " --pid $MAINPID"])
def test_a_shell_around_the_guest(system: Container, start_unit: StartUnit, options: str) -> None:
    unit = start_unit(
        "ExecStartPost=/bin/sh -c 'until pgrep -P $MAINPID; do sleep 0.05; done'",
        command=f"/bin/sh -c '{QEMU} -name inner; exit 0'",
        helper=f"{HELPER}{options}",
    )
    stop(system, unit)
    assert story(system, unit)[-1] == "JOB_ENDED"


def test_a_shell_that_starts_the_guest_again(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit(
        "ExecStartPost=/bin/sh -c 'until pgrep -P $MAINPID; do sleep 0.05; done'",
        command=f"/bin/sh -c '{QEMU} -name first; {QEMU} -name second; exit 0'",
    )
    stop(system, unit)
    assert "another QEMU runs in the unit" in said(system, unit)
    assert story(system, unit).count("JOB_ENDED") == 2


def test_a_guest_beside_the_main_process(system: Container, start_unit: StartUnit) -> None:
    """Without the helper, systemd would send SIGKILL to such a guest after the timeout."""
    beside = "/usr/local/bin/qemu-system-beside"
    system.run("cp", f"{CHECKOUT}/{busybox().relative_to(TOP)}", beside)
    slow = "trap 'sleep 2; echo saved; exit' TERM; while true; do sleep 0.1; done"
    script = f'(exec -a busybox {beside} sh -c "{slow}") &\nexec {QEMU}\n'
    system.write("/run/beside", script)
    unit = start_unit("TimeoutStopSec=1", command="/bin/bash /run/beside")
    stop(system, unit)
    assert "another QEMU runs in the unit" in said(system, unit)
    assert "saved" in said(system, unit)
    # With this KillMode=, the guest beside the main process is meant to keep running, even if the
    # main process exits by itself.
    unit = start_unit("KillMode=process", command="/bin/bash /run/beside")
    stop(system, unit)
    system.run("pkill", "-KILL", "-f", "echo saved")
    assert "another QEMU" not in said(system, unit)
    system.write("/run/beside.only", script.partition("\n")[0])
    unit = start_unit("KillMode=process", "ExecStartPost=/bin/bash /run/beside.only")
    system.run("systemctl", "kill", "--kill-who=main", unit)
    until(lambda: system.property(unit, "ActiveState"), "inactive".__eq__)
    system.run("pkill", "-KILL", "-f", "echo saved")
    assert "saved" not in said(system, unit)
    # systemd may stop this guest, but the helper cannot read the unit's settings.
    unit = start_unit("InaccessiblePaths=/run/dbus", command="/bin/bash /run/beside")
    system.run("systemctl", "stop", unit)
    assert "KillMode= cannot be read" in said(system, unit)
    assert "failed with exit status 4" in said(system, unit)


def test_a_main_process_that_exits_by_itself(system: Container, start_unit: StartUnit) -> None:
    """If the main process exits by itself, systemd runs ExecStop= without $MAINPID."""
    unit = start_unit(helper=f"{HELPER} --pid $MAINPID")
    system.run("systemctl", "kill", "--kill-who=main", unit)
    until(lambda: system.property(unit, "ActiveState"), {"inactive", "failed"}.__contains__)
    assert system.property(unit, "Result") == "success", said(system, unit)
    assert "there is nothing to stop" in said(system, unit)


def test_a_pidfile_in_a_sandbox(system: Container, start_unit: StartUnit) -> None:
    """ProcSubset=pid hides /proc/stat, which has the boot time."""
    unit = start_unit(
        "ProcSubset=pid",
        command=f"{QEMU} -pidfile /run/sandboxed.pid",
        helper=f"{HELPER} --pidfile /run/sandboxed.pid",
    )
    until(
        lambda: system.run("test", "-s", "/run/sandboxed.pid", check=False).returncode, (0).__eq__
    )
    stop(system, unit)
    assert "Therefore" not in said(system, unit)


def test_a_line_for_each_guest(system: Container, start_unit: StartUnit) -> None:
    """The first line is not for the main process."""
    unit = start_unit(
        f"ExecStartPost={QEMU} -daemonize -name second -pidfile /run/second.pid",
        f"ExecStop={HELPER} --pidfile /run/first.pid --reason first",
        command=f"{QEMU} -name first -pidfile /run/first.pid",
        helper=f"{HELPER} --pidfile /run/second.pid --reason second",
    )
    stop(system, unit)
    started = f"MESSAGE_ID={MessageId.JOB_STARTED.value}"
    entries = system.journal("-u", unit, started)
    reasons = [(entry["QKILLD_GUEST"], entry["QKILLD_REASON"]) for entry in entries]
    assert reasons == [("second", "second"), ("first", "first")]
    assert "another QEMU" not in said(system, unit)


def test_a_line_for_each_guest_and_a_reload(
    system: Container, start_unit: StartUnit, slow_guest: Callable[..., SlowGuest]
) -> None:
    """A reload makes systemd forget which line is running."""
    guest = slow_guest(
        f"ExecStartPost={QEMU} -daemonize -name second -pidfile /run/reloaded.pid",
        f"ExecStop={HELPER} --pidfile /run/reloaded.pid --reason second",
        seconds=6,
        helper=f"{HELPER} --pid $MAINPID --reason first",
    )
    with system.spawn("systemctl", "stop", guest.unit) as stopping:
        system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.JOB_STARTED.value}")
        system.run("systemctl", "daemon-reload")
        stopping.wait(60)
    assert guest.lost() == 0
    entries = system.journal("-u", guest.unit, f"MESSAGE_ID={MessageId.JOB_STARTED.value}")
    assert [entry["QKILLD_REASON"] for entry in entries] == ["first", "second"]
    assert "another QEMU" not in said(system, guest.unit)


@pytest.mark.parametrize("content", [None, "no number"])
def test_lines_whose_pidfiles_are_of_no_use(
    system: Container, start_unit: StartUnit, content: str | None
) -> None:
    """The last line stops the guests. systemd expands an unknown variable to nothing."""
    if content is not None:
        system.write("/run/none-a.pid", content)
        system.write("/run/none-b.pid", content)
    unit = start_unit(
        f"ExecStartPost={QEMU} -daemonize -name second",
        f"ExecStop={HELPER} --pidfile ${{UNKNOWN}}/run/none-b.pid --reason last",
        command=f"{QEMU} -name first",
        helper=f"{HELPER} --pidfile ${{UNKNOWN}}/run/none-a.pid --reason former",
    )
    stop(system, unit)
    entries = system.journal("-u", unit, f"MESSAGE_ID={MessageId.JOB_STARTED.value}")
    reasons = [(entry["QKILLD_GUEST"], entry["QKILLD_REASON"]) for entry in entries]
    assert sorted(reasons) == [("first", "last"), ("second", "last")]


def test_a_script_with_a_call_for_each_guest(system: Container, start_unit: StartUnit) -> None:
    names = ("one", "two")
    script = [f"{HELPER} --pidfile /run/{name}.pid --reason {name}" for name in names]
    system.write("/run/stop-them", "\n".join(script) + "\n")
    unit = start_unit(
        f"ExecStartPost={QEMU} -daemonize -name two -pidfile /run/two.pid",
        command=f"{QEMU} -name one -pidfile /run/one.pid",
        helper="/bin/bash /run/stop-them",
    )
    stop(system, unit)
    entries = system.journal("-u", unit, f"MESSAGE_ID={MessageId.JOB_STARTED.value}")
    reasons = [(entry["QKILLD_GUEST"], entry["QKILLD_REASON"]) for entry in entries]
    # The first call does not know whether the script has a call for the other guest.
    assert reasons == [("one", "one"), ("two", "one")]
    assert "another QEMU runs in the unit: stopping it too" in said(system, unit)
    assert system.property(unit, "Result") == "success"


def test_a_unit_that_stops_one_of_its_guests(system: Container, start_unit: StartUnit) -> None:
    """systemd has started the shell that runs qkilld-stop, but is not stopping the unit."""
    options = ["--pidfile /run/one.pid", "--pidfile /run/one.pid", '--pid ""', ""]
    script = [
        *(f"{QEMU} -name {name} -daemonize -pidfile /run/{name}.pid" for name in ("one", "two")),
        *(f"{HELPER} {each}; echo code $?" for each in options),
        "kill -0 $(cat /run/two.pid) && echo it still runs",
        "exec sleep infinity",
    ]
    system.write("/run/manager", "\n".join(script) + "\n")
    unit = start_unit(command="/bin/bash /run/manager")
    text = until(lambda: said(system, unit), lambda text: text.count("code ") == 4)
    assert re.findall("code .|it still runs", text) == [
        "code 0",
        "code 0",
        "code 2",
        "code 2",
        "it still runs",
    ]
    stop(system, unit)


def test_a_sandbox_in_which_no_unit_can_be_read(system: Container, start_unit: StartUnit) -> None:
    """The main process is a shell. The helper cannot read in which unit a QEMU runs, but it can
    read which QEMUs are in its own control group."""
    sandbox = (
        *("ProtectProc=invisible", f"User={OTHER_UID}", "TimeoutStopSec=3"),
        "ExecStartPost=/bin/sh -c 'until pgrep -P $MAINPID; do sleep 0.05; done'",
    )
    command = f"/bin/sh -c '{QEMU} -name inner; exit 0'"
    units = [start_unit(*sandbox, command=command) for _ in range(3)]
    stop(system, units[0])
    assert [story(system, unit) for unit in units[1:]] == [[], []]
    # Each shell runs as long as its guest.
    state = system.run("systemctl", "is-active", *units[1:]).stdout.split()
    assert state == ["active", "active"]
    # With Delegate=, systemd runs ExecStop= in a control group of its own.
    stop(system, start_unit(*sandbox, "Delegate=yes", command=command))
    assert [story(system, unit) for unit in units[1:]] == [[], []]


def test_a_shell_that_is_gone_before_its_guest(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit(
        "ExecStartPost=/bin/sh -c 'until pgrep -P $MAINPID; do sleep 0.05; done'",
        command=f"/bin/sh -c '{QEMU} -name inner; exit 0'",
        helper=f"/bin/sh -c 'kill -KILL $MAINPID; sleep 0.3; exec {HELPER}'",
    )
    system.run("systemctl", "stop", unit)
    assert story_of_an_idle_one(system, unit) == ["JOB_STARTED", "SIGNAL_SENT", "JOB_ENDED"]


def test_a_pidfile_that_is_not_there(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit(helper=f"{HELPER} --pidfile /run/no-such.pid")
    stop(system, unit)
    assert story_of_an_idle_one(system, unit) == ["JOB_STARTED", "SIGNAL_SENT", "JOB_ENDED"]


def test_systemd_is_reloaded_when_the_stop_has_outlived_its_timeout(
    system: Container, slow_guest: Callable[..., SlowGuest]
) -> None:
    """A reload makes systemd forget the extensions. So the timeout expires, and systemd sends its
    own signals."""
    guest = slow_guest("TimeoutStopSec=4", seconds=60)
    with system.spawn("systemctl", "stop", guest.unit) as stopping:
        system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.JOB_JOINED.value}")
        time.sleep(6)
        # Stop the helper with SIGSTOP, because systemd would still handle an extension that the
        # helper sends during the reload.
        helper = system.property(guest.unit, "ControlPID")
        system.run("kill", "-STOP", helper)
        system.run("systemctl", "daemon-reload")
        system.run("kill", "-CONT", helper)
        system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.STOP_OVERRUN.value}")
        guest.server.rate("10G")
        stopping.wait(60)
    assert guest.lost() == 0
    assert story(system, guest.unit)[-2:] == ["STOP_OVERRUN", "JOB_ENDED"]


def test_a_guest_that_made_itself_a_daemon(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit("Type=forking", command=f"{QEMU} -daemonize")
    stop(system, unit)
    assert story_of_an_idle_one(system, unit) == ["JOB_STARTED", "SIGNAL_SENT", "JOB_ENDED"]


def test_a_guest_that_is_gone_already(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit("RemainAfterExit=yes", command="/bin/true")
    system.run("systemctl", "stop", unit)
    assert system.property(unit, "Result") == "success"
    assert "there is nothing to stop" in said(system, unit)


def test_a_unit_without_qemu_exits_with_5(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit(command="/bin/sleep infinity")
    system.run("systemctl", "stop", unit)
    assert "its unit has no other QEMU" in said(system, unit)
    status = system.property(unit, "ExecStop")
    assert "status=5" in status, status


def test_a_hundred_idle_guests_at_once(system: Container) -> None:
    text = (
        f"[Service]\nExecStart={QEMU} -name many%i\n"
        f"ExecStop={HELPER}\nNotifyAccess=exec\n{ENVIRONMENT}\n"
    )
    system.write("/run/systemd/system/many@.service", text)
    system.run("systemctl", "daemon-reload")
    units = [f"many@{number}.service" for number in range(100)]
    system.run("systemctl", "start", *units, timeout=120)
    shown = system.run("systemctl", "show", "--property=MainPID", "--value", *units).stdout
    pids = set(shown.split())
    assert len(pids) == 100
    system.run("systemctl", "stop", "many@*", timeout=120)
    results = system.run("systemctl", "show", "--property=Result", "--value", *units).stdout
    assert set(results.split()) == {"success"}
    ended = system.journal(f"MESSAGE_ID={MessageId.JOB_ENDED.value}", "QKILLD_RESULT=exited")
    assert pids <= {entry["OBJECT_PID"] for entry in ended}


def test_the_guest_of_a_unit_that_runs_elsewhere_is_named(
    system: Container, start_unit: StartUnit
) -> None:
    """Another process starts the unit's guest in another unit, as with `virsh start` and `su -`."""
    words = f"{QEMU} -name elsewhere1"
    start = f"/usr/bin/systemd-run --collect --unit=other-place {words}"
    unit = start_unit("Type=oneshot", "RemainAfterExit=yes", command=start)
    guest = int(system.property("other-place.service", "MainPID"))
    # The guest in the other unit is not the guest of this unit. This unit's own QEMU has exited by
    # itself.
    own = start_unit()
    system.run("systemctl", "kill", "--signal=TERM", own)
    until(lambda: system.property(own, "ActiveState"), lambda state: state == "inactive")
    assert system.property(own, "Result") == "success"

    system.run("systemctl", "stop", unit, check=False)
    assert (system.property(unit, "Result"), system.property(unit, "ActiveState")) == (
        "exit-code",
        "failed",
    )
    line = f'the guest of this unit, "elsewhere1" (process {guest}), runs in other-place.service'
    assert line in said(system, unit)
    assert system.property("other-place.service", "ActiveState") == "active"
    system.run("systemctl", "stop", "other-place.service")
    # Now the guest in the other unit is gone, too.
    system.run("systemctl", "reset-failed", unit)
    system.run("systemctl", "stop", unit)
    # Now the unit has a main process that is not a QEMU.
    main = start_unit(command=f"/bin/sh -c '{start}; exec sleep 1000'")
    until(lambda: system.property("other-place.service", "MainPID"), lambda pid: int(pid or 0))
    system.run("systemctl", "stop", main, check=False)
    assert "its unit has no other QEMU" in said(system, main)
    assert "runs in other-place.service" in said(system, main)
    assert "status=5" in said(system, main)
    system.run("systemctl", "stop", "other-place.service")
