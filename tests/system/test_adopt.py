"""Units as users write them. They are checked, adopted, stopped while the guest flushes slowly, and
reverted."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from qkilld.unitcheck.command import quoted
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.container import CHECKOUT, Container
from tests.lab.image import guest_image
from tests.lab.process import OTHER_UID, TOP, run, wait_gone
from tests.lab.records import records
from tests.lab.scratch import scratch
from tests.lab.session import ENVIRONMENT, HOME, UID, UNITS, session
from tests.lab.storage import NbdServer, nbd_server
from tests.safety.contained import ContainerPolicy
from tests.safety.machine import Machine, Target

IDLE = "/usr/bin/qemu-system-x86_64 -M none -nodefaults -display none"
TIMEOUT_S = 4
"""TimeoutStopSec= of every unit here, before and after it is adopted."""
RATE = "800K"
"""The rate of the storage during the stop, in bits per second. At this rate, QEMU's last writes
take about 10 s."""
JOB = f"lab.job=disks lab.records=900 lab.passes=3 lab.stride={32 << 20}"
MANAGERS_OWN = {"manager-timeout": "advice"}
"""Every unit of a user has this finding, because only the system's administrator can change the
limit of the user's manager."""
OVERRIDE = f"[Service]\nTimeoutStopSec={TIMEOUT_S}\n"
"""The timeout is so short that the guest keeps its data only if the timeout is extended."""

_numbers = itertools.count(1)


@dataclass
class Manager:
    """A systemd manager in the container: the system's or a user's."""

    system: Container
    user: bool = False

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        if not self.user:
            return self.system.run(*command, check=check, timeout=90)
        return self.system.run(*command, check=check, timeout=90, uid=UID, env=ENVIRONMENT)

    def systemctl(self, *words: str, check: bool = True) -> str:
        where = ["--user"] if self.user else []
        return self.run("systemctl", *where, *words, check=check).stdout.strip()

    def ctl(self, *words: str, code: int = 0) -> str:
        where = ["--user"] if self.user else []
        done = self.run("qkillctl", *where, *words, check=False)
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def check(self, unit: str, verdicts: Sequence[str] = ("safe", "manual")) -> dict[str, str]:
        """Return the severity of each finding by its key. Leave out the finding about a missing
        monitor, which most guests here have."""
        where = ["--user"] if self.user else []
        done = self.run("qkillctl", *where, "--json", "check-unit", unit, check=False)
        (document,) = json.loads(done.stdout)
        found: dict[str, str] = {f["key"]: f["severity"] for f in document["findings"]}
        unsafe = set(found.values()) & {"loses", "may-lose"}
        assert document["safe"] is not bool(unsafe), done.stdout
        assert document["verdict"] in verdicts, done.stdout
        assert done.returncode == document["exit_code"] == (8 if unsafe else 0)
        found.pop("no-monitor", None)
        return found

    @property
    def directory(self) -> str:
        """The directory of unit files."""
        return UNITS if self.user else "/etc/systemd/system"

    def write(self, name: str, text: str) -> None:
        self.system.write(f"{self.directory}/{name}", text)
        if self.user:
            self.system.run("chown", "-R", f"{UID}:{UID}", f"{HOME}/.config")
        self.systemctl("daemon-reload")

    def tree(self) -> str:
        """List everything below the directories to which adopt may write."""
        places = [self.directory, "/run/systemd/system", f"/run/user/{UID}/systemd/user"]
        return self.system.run(
            *("find", *places, "-printf", "%p %M %u %s %l\\n"), check=False
        ).stdout


@pytest.fixture(scope="module")
def manager(installed: Container) -> Iterator[Manager]:
    installed.run("systemctl", "start", "qkilld.service")
    yield Manager(installed)
    installed.run("systemctl", "stop", "qkilld.service")


@pytest.fixture(scope="module")
def users(manager: Manager) -> Iterator[Manager]:
    """The manager of a user who has a session bus."""
    with session(manager.system):
        yield Manager(manager.system, user=True)


@dataclass
class FlushingGuest:
    """A guest with a disk on an NBD server. During the stop, the server is slow."""

    machine: Machine
    image: Path
    server: NbdServer
    target: Target | None = None

    def command(self, *more: str) -> str:
        """The value of ExecStart=."""
        words = [*self.machine.argv(), *more]
        return " ".join(quoted(word.replace(str(TOP), CHECKOUT)) for word in words)

    def wait(self) -> None:
        """Wait until the disk has acknowledged all records."""
        self.target = Target.find(self.machine)
        self.target.wait_for("^GUEST DONE")

    def lost(self) -> int:
        """Return how many acknowledged records are missing. Call this after the guest's exit."""
        assert self.target is not None
        self.server.rate(None)
        assert wait_gone(self.target.pidfd, 60)
        acknowledged = self.target.acknowledged()
        assert acknowledged >= 900
        return acknowledged - len(records(self.image))

    def close(self) -> None:
        if self.target is not None:
            os.close(self.target.pidfd)


@pytest.fixture
def flushing(manager: Manager) -> Iterator[list[FlushingGuest]]:
    """Six guests that are not yet started. Their files are visible in the container."""
    guest_image()
    with contextlib.ExitStack() as stack:
        guests = []
        for number in range(6):
            directory = stack.enter_context(scratch("m"))
            image = directory / "disk.qcow2"
            run(
                [
                    *(needs.program("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2"),
                    *("-o", "cluster_size=4K", image, "10G"),
                ],
                check=True,
            )
            server = stack.enter_context(nbd_server(image, room=64 << 20))
            # One of the guests runs as a user.
            Path(server.uri.partition("socket=")[2]).chmod(0o777)
            directory.chmod(0o777)
            drive = f"file={server.uri},format=qcow2,cache=writeback"
            machine = Machine(directory, [drive], JOB, 96, f"wild{number}")
            guests.append(FlushingGuest(machine, image, server))
            stack.callback(guests[-1].close)
        ContainerPolicy(manager.system).show_storage()
        yield guests


def service(*lines: str) -> str:
    return "[Service]\n" + "\n".join([*lines, f"TimeoutStopSec={TIMEOUT_S}"]) + "\n"


def test_a_slow_flush_is_lost_before_and_not_after(
    manager: Manager, users: Manager, flushing: list[FlushingGuest]
) -> None:
    control, plain, forking, shell, scope, users_own = flushing
    before = manager.tree(), users.tree()
    manager.write("wild-control.service", service(f"ExecStart={control.command()}"))
    manager.write("wild-plain.service", service(f"ExecStart={plain.command()}"))
    manager.write(
        "wild-forking.service",
        service("Type=forking", f"ExecStart={forking.command('-daemonize')}"),
    )
    script = shell.machine.directory / "run"
    script.write_text(f"{shell.command()}; true\n")
    manager.write("wild-shell.service", service("KillMode=mixed", f"ExecStart=/bin/sh {script}"))
    users.write("wild-user.service", service(f"ExecStart={users_own.command()}"))
    in_scope = ("systemd-run", "--scope", "--unit=wild-1", f"--property=TimeoutStopSec={TIMEOUT_S}")
    words = [word.replace(str(TOP), CHECKOUT) for word in scope.machine.argv()]
    system = ["wild-plain.service", "wild-forking.service", "wild-shell.service"]
    names = [*system, "wild-1.scope"]
    with manager.system.spawn(*in_scope, *words, stderr=subprocess.DEVNULL):
        manager.systemctl("start", "wild-control.service", *system)
        users.systemctl("start", "wild-user.service")
        for guest in flushing:
            guest.wait()
        # Check the units before they are adopted.
        assert manager.check("wild-plain.service") == {"no-exec-stop": "loses"}
        assert manager.check("wild-forking.service") == {
            "no-exec-stop": "loses",
            "forking-pid-file": "advice",
        }
        assert manager.check("wild-shell.service") == {
            "no-exec-stop": "loses",
            "kill-mode": "loses",
        }
        assert manager.check("wild-1.scope") == {"no-guard": "loses"}
        assert users.check("wild-user.service") == {"no-exec-stop": "loses", **MANAGERS_OWN}
        # Without a name, qkillctl checks every unit in which a QEMU runs.
        everyone = manager.ctl("check-unit", code=8)
        assert all(f"{name}: loses data" in everyone for name in [*names, "wild-control.service"])
        manager.ctl("adopt", *names)
        users.ctl("adopt", "wild-user.service")
        for name in names:
            assert set(manager.check(name).values()) <= {"advice"}, name
        assert users.check("wild-user.service") == MANAGERS_OWN
        for name in system:
            manager.write(f"{name}.d/60-lab.conf", OVERRIDE)
        users.write("wild-user.service.d/60-lab.conf", OVERRIDE)
        for guest in flushing:
            guest.server.rate(RATE)
        began = time.monotonic()
        with manager.system.spawn(
            *("systemctl", "--user", "stop", "wild-user.service"), uid=UID, env=ENVIRONMENT
        ) as stopping:
            manager.systemctl("stop", "wild-control.service", *names)
            took = time.monotonic() - began
            assert stopping.wait(60) == 0
        lost = {guest.machine.name: guest.lost() for guest in flushing}
    assert lost.pop(control.machine.name) > 0, "the storage was not slow enough to show anything"
    assert set(lost.values()) == {0}, lost
    assert took > TIMEOUT_S + 1, "the flush was over before the timeout"
    for name in system:
        assert manager.systemctl("show", "--value", "-p", "Result", name) == "success"
    assert users.systemctl("show", "--value", "-p", "Result", "wild-user.service") == "success"
    # Reverting leaves nothing behind.
    manager.ctl("adopt", "--undo", *system)
    users.ctl("adopt", "--undo", "wild-user.service")
    remove = ("rm", "-r", *(f"{manager.directory}/{name}.d" for name in system))
    manager.run(*remove, f"{users.directory}/wild-user.service.d")
    units = [f"{manager.directory}/{name}" for name in ["wild-control.service", *system]]
    manager.run("rm", *units, f"{users.directory}/wild-user.service")
    manager.systemctl("daemon-reload")
    assert (manager.tree(), users.tree()) == before


@contextlib.contextmanager
def idle(manager: Manager, *lines: str, unit: str = "") -> Iterator[str]:
    """A unit with a QEMU that does nothing. QEMU has been executed when the unit has started."""
    unit = unit or f"wild-idle{next(_numbers)}.service"
    manager.write(unit, service("Type=exec", *(lines or (f"ExecStart={IDLE}",))))
    manager.systemctl("start", unit)
    try:
        yield unit
    finally:
        manager.systemctl("kill", "--signal=KILL", unit, check=False)
        manager.systemctl("stop", unit, check=False)
        manager.systemctl("reset-failed", unit, check=False)
        manager.run("rm", "-rf", f"{manager.directory}/{unit}", f"{manager.directory}/{unit}.d")
        manager.systemctl("daemon-reload")


def shown(manager: Manager, unit: str, name: str) -> str:
    return manager.systemctl("show", "--value", f"--property={name}", unit)


def test_a_stop_command_that_reads_what_is_not_there(manager: Manager) -> None:
    reads = "/bin/sh -c 'read answer; echo quit'"
    with idle(manager, f"ExecStart={IDLE}", f"ExecStop={reads}") as unit:
        assert manager.check(unit) == {"exec-stop-early": "loses"}
        before = manager.tree()
        manager.ctl("adopt", unit)
        assert manager.check(unit) == {}
        text = manager.run("cat", f"{manager.directory}/{unit}.d/50-qkilld.conf").stdout
        assert f"ExecStop=-{reads}\nExecStop=-/usr/bin/qkilld-stop\n" in text
        pid = int(shown(manager, unit, "MainPID"))
        assert pid > 0
        manager.ctl("adopt", "--undo", unit)
        assert manager.tree() == before
        assert manager.check(unit) == {"exec-stop-early": "loses"}
        assert int(shown(manager, unit, "MainPID")) == pid, "the guest ran on"
        manager.ctl("adopt", unit)
        manager.systemctl("stop", unit)
        assert shown(manager, unit, "Result") == "success"
        ended = manager.system.journal("-u", unit, "QKILLD_RESULT=exited")
        assert len(ended) == 1


def test_a_guest_that_cannot_be_asked(manager: Manager) -> None:
    said = "cannot be asked to shut down: the guest has no monitor"
    with idle(manager, f"ExecStart={IDLE}") as unit:
        text = " ".join(manager.ctl("check-unit", unit, code=8).split())
        assert said in text
        assert "-qmp unix:%t/%N/qmp,server=on,wait=off" in text
    qmp = f"{IDLE} -qmp unix:%t/%N/qmp,server=on,wait=off"
    with idle(manager, f"ExecStart={qmp}", "RuntimeDirectory=%N") as unit:
        assert said not in " ".join(manager.ctl("check-unit", unit, code=8).split())
        manager.systemctl("stop", unit)
        assert said not in " ".join(manager.ctl("check-unit", unit, code=8).split())


def test_kill_mode_none(manager: Manager) -> None:
    with idle(manager, f"ExecStart={IDLE}", "KillMode=none") as unit:
        assert manager.check(unit) == {"kill-mode": "loses", "no-exec-stop": "loses"}
        manager.ctl("adopt", unit)
        assert manager.check(unit) == {}
        assert shown(manager, unit, "KillMode") == "control-group"
        manager.systemctl("stop", unit)
        assert shown(manager, unit, "Result") == "success"


def test_a_stop_command_that_kills(manager: Manager) -> None:
    with idle(manager, f"ExecStart={IDLE}", "ExecStop=/bin/kill -9 $MAINPID") as unit:
        assert manager.check(unit) == {"exec-stop-kills": "loses"}
        assert "is safe" in manager.ctl("adopt", unit)
        assert shown(manager, unit, "NotifyAccess") == "exec"
        manager.systemctl("stop", unit)
        assert shown(manager, unit, "Result") == "success"
        assert len(manager.system.journal("-u", unit, "QKILLD_RESULT=exited")) == 1


def test_a_unit_whose_helper_has_gone_still_stops(manager: Manager) -> None:
    helper = "/usr/bin/qkilld-stop"
    ended = 'ExecStopPost=/bin/sh -c "echo $EXIT_CODE $EXIT_STATUS >/run/%N.end"'
    with idle(manager, f"ExecStart={IDLE}", ended) as unit:
        manager.ctl("adopt", unit)
        manager.run("mv", helper, f"{helper}.gone")
        try:
            manager.systemctl("stop", unit)
        finally:
            manager.run("mv", f"{helper}.gone", helper)
        # QEMU has exited at systemd's SIGTERM.
        assert shown(manager, unit, "Result") == "success"
        assert manager.run("cat", f"/run/{unit.removesuffix('.service')}.end").stdout == (
            "exited 0\n"
        )


def test_a_stop_that_failed_is_told_where_systemd_does_not_tell_it(manager: Manager) -> None:
    start, stop = "ExecStart=/usr/bin/sleep 600", "ExecStop=-/usr/bin/qkilld-stop"
    with idle(manager, start, stop, "NotifyAccess=exec") as unit:
        manager.systemctl("stop", unit)
        assert shown(manager, unit, "Result") == "success", "by systemd's SIGTERM"
        errors = manager.system.journal("-u", unit, "-p", "err")
        assert ["exit status 5" in each["MESSAGE"] for each in errors] == [True]


def test_drop_ins_that_override_ours_are_named(manager: Manager) -> None:
    with idle(manager) as unit:
        manager.write(f"{unit}.d/override.conf", "[Service]\nKillSignal=SIGKILL\n")
        path = f"{manager.directory}/{unit}.d/override.conf"
        named = f"{path} sorts after 50-qkilld.conf and sets KillSignal="
        assert named in manager.ctl("check-unit", unit, code=8)
        assert named in manager.ctl("adopt", "--dry-run", unit)
        said = manager.ctl("adopt", unit, code=8)
        assert named in said and "for you to decide" not in said
        adopted = manager.tree()
        assert named in manager.ctl("adopt", unit, code=8)
        assert manager.tree() == adopted, "it was all there already"
        (document,) = json.loads(manager.ctl("--json", "check-unit", unit, code=8))
        assert document["overrides"] == [{"path": path, "keys": ["KillSignal="]}]
        manager.run("rm", path)
        manager.systemctl("daemon-reload")
        assert manager.check(unit) == {}
        # If a drop-in was written but not loaded, adopt makes systemd load it.
        text = manager.run("cat", f"{manager.directory}/{unit}.d/50-qkilld.conf").stdout
        manager.ctl("adopt", "--undo", unit)
        manager.system.write(f"{manager.directory}/{unit}.d/50-qkilld.conf", text)
        assert "is safe" in manager.ctl("adopt", unit)


def test_a_user_of_its_own_in_a_sandbox(manager: Manager) -> None:
    sandbox = ("ProtectProc=invisible", "RestrictAddressFamilies=AF_INET", "PrivateUsers=yes")
    with idle(manager, f"ExecStart={IDLE}", "User=nobody", *sandbox) as unit:
        assert manager.check(unit) == {"no-exec-stop": "loses"}
        assert "+ ExecStop=-+/usr/bin/qkilld-stop" in manager.ctl("adopt", unit)
        assert manager.check(unit) == {}
        manager.systemctl("stop", unit)
        assert shown(manager, unit, "Result") == "success"
        assert len(manager.system.journal("-u", unit, "QKILLD_RESULT=exited")) == 1


@pytest.mark.parametrize(
    ("command", "sandbox"),
    [
        (f"/bin/sh -c '{IDLE}; true'", "PrivateUsers=yes"),
        (IDLE, "PrivateUsers=yes"),
        (IDLE, "SystemCallFilter=~pidfd_open"),
    ],
)
def test_a_sandbox_that_hides_the_guest(manager: Manager, command: str, sandbox: str) -> None:
    """With PrivateUsers=, only the daemon could read a guest that is the main process."""
    lines = ("ExecStop=-/usr/bin/qkilld-stop", "NotifyAccess=exec", "TimeoutStopSec=90s")
    with idle(manager, f"ExecStart={command}", sandbox, *lines) as unit:
        assert manager.check(unit)["helper-sandbox"] == "loses"
        assert "+ ExecStop=-+/usr/bin/qkilld-stop" in manager.ctl("adopt", unit)
        assert manager.check(unit) == {}
        manager.systemctl("stop", unit)
        assert len(manager.system.journal("-u", unit, "QKILLD_RESULT=exited")) == 1


def test_a_guest_that_may_not_be_seen_is_not_taken_for_none(manager: Manager) -> None:
    """If the helper reported that there is no guest, systemd would run the next line while the
    guest still runs."""
    command = f"/bin/sh -c '{IDLE} & exec sleep 0.3'"
    lines = ("Type=forking", "GuessMainPID=no", "PrivateUsers=yes", "ExecStop=/bin/touch /run/next")
    stop = f"ExecStop={CHECKOUT}/.venv/bin/python -m qkilld.stop"
    sandbox = (f"Environment=PYTHONPATH={CHECKOUT}", "NotifyAccess=exec")
    with idle(manager, f"ExecStart={command}", *sandbox, stop, *lines) as unit:
        manager.systemctl("stop", unit)
        manager.run("test", "!", "-e", "/run/next")
        said = " ".join(str(entry["MESSAGE"]) for entry in manager.system.journal("-u", unit))
        assert "not permitted to see its executable" in said and "Write + before" in said


def test_a_line_that_cannot_stop_the_guest(manager: Manager) -> None:
    helper = "ExecStop=/usr/bin/qkilld-stop"
    with idle(manager, f"ExecStart=+{IDLE}", "User=nobody", helper, "NotifyAccess=exec") as unit:
        assert manager.check(unit)["helper-target"] == "loses"
        manager.systemctl("stop", unit)
        said = " ".join(str(entry["MESSAGE"]) for entry in manager.system.journal("-u", unit))
        assert "status=6" in said
    with idle(manager, f"ExecStart={IDLE}", "ExecStop=/usr/local/qkilld-stop") as unit:
        assert "which does not exist" in " ".join(manager.ctl("check-unit", unit, code=8).split())


def test_a_session_of_pam_is_not_taken_for_a_guest(manager: Manager) -> None:
    """Each command of the unit has a process (sd-pam) of systemd. The unit's user may not read the
    executable of this process."""
    stop = f"ExecStop={CHECKOUT}/.venv/bin/python -m qkilld.stop"
    sandbox = (f"Environment=PYTHONPATH={CHECKOUT}", "NotifyAccess=exec", "TimeoutStopSec=90s")
    lines = ("ExecStart=/bin/sleep 0.3", f"User={OTHER_UID}", "PAMName=login")
    with idle(manager, *lines, *sandbox, stop) as unit:
        until(lambda: shown(manager, unit, "ActiveState"), {"inactive", "failed"}.__contains__)
        said = [str(entry["MESSAGE"]) for entry in manager.system.journal("-u", unit)]
        assert shown(manager, unit, "Result") == "success", said


def test_disks_on_the_network(manager: Manager) -> None:
    disk = "-drive file=nbd://storage.example/disk"
    with idle(manager, f"ExecStart=-{IDLE} {disk}") as unit:
        found = {"no-exec-stop": "loses", "network-order": "loses"}
        assert manager.check(unit) == found
        manager.ctl("adopt", unit)
        assert manager.check(unit) == {}
        assert "network.target" in shown(manager, unit, "After").split()


def test_the_template_of_our_own_is_safe(manager: Manager) -> None:
    assert manager.check("qemu-guest@any.service") == {}


def test_a_transient_service(manager: Manager) -> None:
    unit = "wild-run.service"
    before = manager.tree()
    limit = f"--property=TimeoutStopSec={TIMEOUT_S}"
    manager.run("systemd-run", f"--unit={unit}", limit, *IDLE.split())
    assert manager.check(unit) == {"no-exec-stop": "loses"}
    said = manager.ctl("adopt", unit)
    assert f"/run/systemd/system/{unit}.d/50-qkilld.conf" in said
    assert manager.check(unit) == {}
    manager.systemctl("stop", unit)
    assert len(manager.system.journal("-u", unit, "QKILLD_RESULT=exited")) == 1
    # The unit has disappeared with its guest.
    manager.ctl("adopt", "--undo", unit)
    assert manager.tree() == before


def test_the_configuration_decides_what_a_qemu_is(manager: Manager) -> None:
    vmm, unit, conf = "/usr/local/bin/my-vmm", "wild-vmm.service", "/etc/qkilld/qkilld.conf"
    manager.run("cp", "/usr/bin/sleep", vmm)
    manager.write(unit, f"[Service]\nExecStart={vmm} 1000\nKillMode=process\n")
    manager.systemctl("start", unit)
    try:
        assert unit not in manager.ctl("check-unit")
        # Users other than root may not see which programs root runs.
        done = manager.system.run("qkillctl", "check-unit", check=False, uid=OTHER_UID)
        assert (done.returncode, "may be missing" in done.stderr) == (8, True)
        assert "No QEMU runs in it" in manager.ctl("check-unit", unit, code=8)
        assert "not changed" in manager.ctl("adopt", unit, code=8)
        manager.system.write(conf, f"[Target]\nExecutables={vmm}\n")
        assert unit in manager.ctl("check-unit", code=8)
        assert manager.check(unit)["kill-mode"] == "advice"
    finally:
        manager.run("rm", "-f", conf)
        manager.systemctl("stop", unit)
        manager.run("rm", f"/etc/systemd/system/{unit}", vmm)
        manager.systemctl("daemon-reload")


def test_a_guard_is_taken_from_a_scope_without_a_stop(manager: Manager) -> None:
    before = manager.tree()
    with manager.system.spawn(
        *("systemd-run", "--scope", "--unit=wild-2", *IDLE.split()), stderr=subprocess.DEVNULL
    ):
        deadline = time.monotonic() + 30
        while shown(manager, "wild-2.scope", "ActiveState") != "active":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        said = manager.ctl("adopt", "--dry-run", "wild-2.scope")
        assert "Would start qkilld-scope@wild-2.scope.service" in said
        assert manager.check("wild-2.scope") == {"no-guard": "loses"}
        manager.ctl("adopt", "wild-2.scope")
        assert manager.check("wild-2.scope") == {}
        manager.ctl("adopt", "--undo", "wild-2.scope")
        assert manager.check("wild-2.scope") == {"no-guard": "loses"}
        assert shown(manager, "wild-2.scope", "ActiveState") == "active"
        assert "nothing to undo" in manager.ctl("adopt", "--undo", "wild-2.scope", code=1)
        manager.systemctl("kill", "--signal=KILL", "wild-2.scope")
    assert manager.tree() == before


def test_a_users_scope_is_told_what_to_do_instead(users: Manager) -> None:
    in_scope = ("systemd-run", "--user", "--scope", "--unit=wild-3", *IDLE.split())
    with users.system.spawn(*in_scope, stderr=subprocess.DEVNULL, uid=UID, env=ENVIRONMENT):
        deadline = time.monotonic() + 30
        while shown(users, "wild-3.scope", "ActiveState") != "active":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # A user's scope can have no guard, so adopt cannot improve it.
        found = users.check("wild-3.scope", verdicts=("manual",))
        assert found == {"no-guard": "loses", **MANAGERS_OWN}
        assert "start the guest as a service" in users.ctl("adopt", "wild-3.scope", code=1)
        users.systemctl("kill", "--signal=KILL", "wild-3.scope")


def test_dry_run_templates_instances_and_aliases(manager: Manager) -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(manager.systemctl, "daemon-reload")
        path = f"{manager.directory}/wild-t@.service"
        stack.callback(manager.run, "rm", "-rf", path, f"{path}.d")
        manager.write("wild-t@.service", service(f"ExecStart={IDLE} -name %i"))
        before = manager.tree()
        said = manager.ctl("adopt", "--dry-run", "wild-t@.service")
        assert f"Would write {path}.d/50-qkilld.conf" in said
        assert "+ ExecStop=-/usr/bin/qkilld-stop" in said
        assert manager.tree() == before
        manager.ctl("adopt", "wild-t@1")
        assert manager.check("wild-t@1.service") == {}
        assert manager.check("wild-t@2.service")["no-exec-stop"] == "loses"
        manager.ctl("adopt", "--undo", "wild-t@1.service")
        assert manager.tree() == before
        manager.ctl("adopt", "wild-t@.service")
        assert manager.check("wild-t@2.service") == {}
        assert manager.check("wild-t@.service") == {}
        # The second time, adopt has nothing to do.
        adopted = manager.tree()
        assert "adopt --undo wild-t@.service`" in manager.ctl("adopt", "--undo", "wild-t@a", code=1)
        assert "is safe" in manager.ctl("adopt", "wild-t@.service")
        assert manager.tree() == adopted
        manager.ctl("adopt", "--undo", "wild-t@.service")
        assert manager.tree() == before
    with idle(manager) as unit:
        alias = f"{manager.directory}/wild-alias.service"
        manager.run("ln", "-s", f"{manager.directory}/{unit}", alias)
        manager.systemctl("daemon-reload")
        assert f"{unit}.d/50-qkilld.conf" in manager.ctl("adopt", "wild-alias")
        assert manager.check(unit) == {}
        manager.run("rm", alias)


def test_adopt_and_check_unit_refuse_these_names(manager: Manager) -> None:
    assert 'knows no unit "wild-no.service"' in manager.ctl("adopt", "wild-no", code=7)
    assert 'knows no unit "wild-no@.service"' in manager.ctl("check-unit", "wild-no@", code=7)
    assert "not the name of a unit" in manager.ctl("check-unit", "/etc/passwd", code=2)
    manager.systemctl("mask", "wild-masked.service")
    assert "unmask" in manager.ctl("adopt", "wild-masked.service", code=1)
    manager.systemctl("unmask", "wild-masked.service")
    with idle(manager) as unit:
        assert "was not adopted" in manager.ctl("adopt", "--undo", unit, code=1)
        foreign = f"{unit}.d/50-qkilld.conf"
        manager.write(foreign, "[Service]\nNice=1\n")
        assert "left alone" in manager.ctl("adopt", unit, code=1)
        assert "left alone" in manager.ctl("adopt", "--undo", unit, code=1)
        assert manager.run("cat", f"{manager.directory}/{foreign}").stdout.endswith("Nice=1\n")
        manager.run("rm", f"{manager.directory}/{foreign}")
        refused = manager.system.run("qkillctl", "adopt", unit, check=False, uid=OTHER_UID)
        assert refused.returncode == 6
        assert "only root can write: run this as root" in refused.stderr
        assert f"qkillctl --user adopt {unit}" in refused.stderr
        assert "polkit" not in refused.stderr
        assert "Writing" not in refused.stdout
