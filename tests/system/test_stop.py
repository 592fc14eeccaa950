"""qkilld-stop as ExecStop= of real units, on a real systemd."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from typing import Any

import pytest

from qkilld.engine.events import MessageId
from tests.lab import needs
from tests.lab.container import CHECKOUT, PYTHON, Container
from tests.lab.process import OTHER_UID, TOP, run
from tests.lab.records import records
from tests.lab.scratch import run_directory, scratch
from tests.lab.storage import NbdServer, nbd_server
from tests.safety.contained import Contained
from tests.safety.machine import Machine, Target

HELPER = f"{PYTHON} -m qkilld.stop"
QEMU = "/usr/bin/qemu-system-x86_64 -M none -nodefaults -display none"
ENVIRONMENT = f"Environment=PYTHONPATH={CHECKOUT} PYTHONDONTWRITEBYTECODE=1"
MIB = 1 << 20

_numbers = itertools.count(1)
StartUnit = Callable[..., str]


@pytest.fixture(scope="module")
def system(installed: Container) -> Iterator[Container]:
    """With the daemon up."""
    installed.write("/etc/qkilld/qkilld.conf", "")
    installed.run("systemctl", "restart", "qkilld.service")
    yield installed
    installed.run("systemctl", "stop", "qkilld.service")


@pytest.fixture
def start_unit(system: Container) -> Iterator[StartUnit]:
    """A function: starts a guest as a unit with the helper, with these lines more in [Service]."""
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
class Slow:
    """A guest with records that its disk has acknowledged and whose storage is slow by now."""

    unit: str
    target: Target
    image: Path
    server: NbdServer

    def lost(self) -> int:
        """Records that are not there any more, the guest being gone."""
        acknowledged = self.target.acknowledged()
        assert acknowledged > 0
        return acknowledged - len(records(self.image))


@pytest.fixture
def slow_guest(system: Container, start_unit: StartUnit) -> Iterator[Callable[..., Slow]]:
    """A function: a guest that takes `seconds` to flush, in a unit with these lines."""
    with contextlib.ExitStack() as stack:

        def start(*lines: str, seconds: int, uid: int = 0, **options: Any) -> Slow:
            directory = stack.enter_context(scratch("m"))
            image = directory / "disk.qcow2"
            qemu_img = str(needs.program("qemu-img", "qemu-utils"))
            create = ("create", "-q", "-f", "qcow2", "-o", "cluster_size=4K", str(image), "11G")
            run([qemu_img, *create], check=True)
            server = stack.enter_context(nbd_server(image, room=64 * MIB))
            stack.callback(server.rate, "10G")
            # A table of 4 KiB for each three records that a clean exit writes: 12 in a second.
            count = seconds * 36
            machine = Machine(
                directory,
                [f"file={server.uri},format=qcow2,cache=writeback"],
                f"lab.job=disks lab.records={count} lab.passes=3 lab.stride={32 * MIB}",
            )
            Contained(system).show_storage()
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
            return Slow(unit, target, image, server)

        yield start


def story(system: Container, unit: str) -> list[str]:
    """The names of the events that the journal has of the unit, without changes of the verdict."""
    names = {message.value: message.name for message in MessageId}
    entries = system.journal("-u", unit)
    found = [names[e["MESSAGE_ID"]] for e in entries if e.get("MESSAGE_ID") in names]
    return [name for name in found if name != "VERDICT_TURNED"]


def story_of_an_idle_one(system: Container, unit: str) -> list[str]:
    """On a busy machine it may live long enough for its unit's settings to be asked for."""
    return [name for name in story(system, unit) if name != "JOB_JOINED"]


def said(system: Container, unit: str) -> str:
    return "\n".join(str(entry["MESSAGE"]) for entry in system.journal("-u", unit))


def stop(system: Container, unit: str) -> None:
    """Stops it, which goes well."""
    system.run("systemctl", "stop", unit, timeout=120)
    assert system.property(unit, "Result") == "success", said(system, unit)
    assert system.property(unit, "ActiveState") == "inactive"
    system.wait_journal("-u", unit, f"MESSAGE_ID={MessageId.JOB_ENDED.value}")


@contextlib.contextmanager
def stopping(system: Container, unit: str) -> Iterator[None]:
    """The same while the body runs, from the first signal on."""
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
    # The bus would start it again.
    system.run("systemctl", "mask", "--now", "--runtime", "qkilld.service")
    try:
        yield
    finally:
        system.run("systemctl", "unmask", "--runtime", "qkilld.service")
        system.run("systemctl", "start", "qkilld.service")


def test_an_idle_guest_by_the_daemon(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit()
    stop(system, unit)
    assert story_of_an_idle_one(system, unit) == ["JOB_STARTED", "SIGNAL_SENT", "JOB_ENDED"]
    assert f'"ExecStop of {unit}"' in said(system, unit)


def test_a_daemon_that_has_yet_to_start(system: Container, start_unit: StartUnit) -> None:
    """Its unit's settings are known before the daemon is; it is asked for the stop once only."""
    unit = start_unit()
    late = "/run/systemd/system/qkilld.service.d/late.conf"
    system.write(late, "[Service]\nExecStartPre=/bin/sleep 0.5\n")
    system.run("systemctl", "daemon-reload")
    system.run("systemctl", "stop", "qkilld.service")
    try:
        with system.spawn("busctl", "monitor", "org.qkilld1") as monitor:
            assert monitor.stdout is not None
            assert b"Monitoring" in monitor.stdout.readline()
            stop(system, unit)
            monitor.send_signal(SIGINT)
            calls = monitor.stdout.read().decode()
    finally:
        system.run("rm", late)
        system.run("systemctl", "daemon-reload")
    assert story(system, unit) == ["JOB_STARTED", "SIGNAL_SENT", "JOB_ENDED"]
    assert calls.count("Member=TerminateWithOptions") == 1


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
    (alone, *_) = system.journal("-u", unit, f"MESSAGE_ID={MessageId.STOP_ALONE.value}")
    assert alone["SYSLOG_IDENTIFIER"] == "qkilld-stop"


def test_a_flush_of_half_a_minute_in_a_unit_that_gives_five_seconds(
    system: Container, slow_guest: Callable[..., Slow]
) -> None:
    guest = slow_guest("TimeoutStopSec=5", seconds=28)
    with stopping(system, guest.unit):
        system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.JOB_JOINED.value}")
        status = system.property(guest.unit, "StatusText")
        assert guest.target.machine.name in status, status
    assert guest.lost() == 0
    # FORCE is allowed where systemd would have killed it, and was not needed.
    assert story(system, guest.unit) == ["JOB_STARTED", "SIGNAL_SENT", "JOB_JOINED", "JOB_ENDED"]
    assert "Stopping timed out" not in said(system, guest.unit)


def test_the_daemon_is_killed_while_the_guest_flushes(
    system: Container, slow_guest: Callable[..., Slow]
) -> None:
    guest = slow_guest("TimeoutStopSec=3", seconds=12)
    # Nothing starts it again: the helper is alone from then on.
    system.write(
        "/run/systemd/system/qkilld.service.d/once.conf", "[Service]\nRestart=no\nBusName=\n"
    )
    system.run("systemctl", "daemon-reload")
    try:
        with stopping(system, guest.unit):
            system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.VERDICT_TURNED.value}")
            system.run("systemctl", "kill", "--signal=KILL", "qkilld.service")
    finally:
        system.run("rm", "/run/systemd/system/qkilld.service.d/once.conf")
        system.run("systemctl", "daemon-reload")
        system.run("systemctl", "restart", "qkilld.service")
    assert guest.lost() == 0
    told = story(system, guest.unit)
    # What the daemon had sent is not sent again.
    assert told.count("SIGNAL_SENT") == 1, told
    # The daemon that comes back last finds the guest gone.
    alone = told.index("STOP_ALONE")
    assert told[alone : alone + 3] == ["STOP_ALONE", "JOB_RESUMED", "JOB_ENDED"]


@pytest.mark.parametrize("action", [("kill", "--signal=KILL"), ("restart",), ("stop",)])
def test_the_daemon_goes_away(
    system: Container, slow_guest: Callable[..., Slow], action: tuple[str, ...]
) -> None:
    guest = slow_guest("TimeoutStopSec=3", seconds=8)
    try:
        with stopping(system, guest.unit):
            system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.VERDICT_TURNED.value}")
            system.run("systemctl", *action, "qkilld.service")
    finally:
        system.run("systemctl", "start", "qkilld.service")
    assert guest.lost() == 0
    told = story(system, guest.unit)
    assert told.count("SIGNAL_SENT") == 1, told
    # Its next life goes on with the job, or the helper does.
    assert "JOB_RESUMED" in told


def test_a_daemon_that_does_not_answer(system: Container, slow_guest: Callable[..., Slow]) -> None:
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


def test_without_a_bus(system: Container, slow_guest: Callable[..., Slow]) -> None:
    guest = slow_guest("TimeoutStopSec=3", seconds=8)
    units = ("dbus.socket", "dbus.service")
    system.run("systemctl", "stop", *units)
    try:
        with stopping(system, guest.unit):
            pass
    finally:
        system.run("systemctl", "start", *units)
        # Without a bus it has been started too often.
        system.run("systemctl", "reset-failed", "qkilld.service", check=False)
        system.run("systemctl", "restart", "qkilld.service")
    assert guest.lost() == 0
    assert story(system, guest.unit)[0] == "STOP_ALONE"


def test_the_helper_is_killed(system: Container, slow_guest: Callable[..., Slow]) -> None:
    guest = slow_guest("TimeoutStopSec=20", seconds=8)
    with system.spawn("systemctl", "stop", guest.unit) as stopping:
        system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.VERDICT_TURNED.value}")
        helper = system.property(guest.unit, "ControlPID")
        system.run("kill", "-KILL", helper)
        # Said at once, while systemd's own clock runs and the daemon goes on.
        gone = system.wait_journal(
            f"OBJECT_SYSTEMD_UNIT={guest.unit}", f"MESSAGE_ID={MessageId.WAITER_GONE.value}"
        )
        assert gone["PRIORITY"] == "4"
        stopping.wait(60)
    assert guest.lost() == 0
    assert system.property(guest.unit, "Result") == "signal"
    assert story(system, guest.unit)[-2:] == ["WAITER_GONE", "JOB_ENDED"]


def test_a_unit_that_does_not_listen(system: Container, slow_guest: Callable[..., Slow]) -> None:
    guest = slow_guest("TimeoutStopSec=5", seconds=7, notify="none")
    system.run("systemctl", "stop", guest.unit)
    warning = system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.STOP_LIMITED.value}")
    assert "Add NotifyAccess=exec to [Service]" in warning["MESSAGE"]
    assert warning["PRIORITY"] == "4"
    # It leaves before systemd's limit and kills nothing, so the guest has that time once more.
    assert "STOP_LEFT" in story(system, guest.unit)
    assert "Stopping timed out" not in said(system, guest.unit)
    assert system.property(guest.unit, "ExecMainStatus") == "0"
    assert guest.lost() == 0


def test_a_sandbox_of_another_user_with_a_second_to_stop(
    system: Container, slow_guest: Callable[..., Slow]
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


def test_a_shell_around_the_guest(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit(
        "ExecStartPost=/bin/sh -c 'until pgrep -P $MAINPID; do sleep 0.05; done'",
        command=f"/bin/sh -c '{QEMU} -name inner; exit 0'",
    )
    stop(system, unit)
    assert story(system, unit)[-1] == "JOB_ENDED"


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
    system: Container, slow_guest: Callable[..., Slow]
) -> None:
    """It forgets what it was extended by, and its own ladder begins."""
    guest = slow_guest("TimeoutStopSec=4", seconds=16)
    with system.spawn("systemctl", "stop", guest.unit) as stopping:
        system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.JOB_JOINED.value}")
        time.sleep(6)
        system.run("systemctl", "daemon-reload")
        system.wait_journal("-u", guest.unit, f"MESSAGE_ID={MessageId.STOP_OVERRUN.value}")
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


def test_what_is_no_qemu(system: Container, start_unit: StartUnit) -> None:
    unit = start_unit(command="/bin/sleep infinity")
    system.run("systemctl", "stop", unit)
    assert "nor is another of its unit" in said(system, unit)
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
