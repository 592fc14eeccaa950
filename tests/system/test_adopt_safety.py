"""adopt reverts a result that differs from the predicted one. It can revert all units at once. It
does not shorten the timeouts of running stops."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.evidence.until import until
from tests.lab.container import CHECKOUT, Container
from tests.lab.image import busybox
from tests.lab.process import TOP

DIRECTORY = "/etc/systemd/system"
IDLE = "/usr/bin/qemu-system-x86_64 -M none -nodefaults -display none"
STUBBORN = "/usr/local/bin/qemu-system-stubborn"
OURS = "50-qkilld.conf"

_numbers = itertools.count(1)


def ctl(system: Container, *words: str, code: int = 0) -> str:
    done = system.run("qkillctl", *words, check=False, timeout=90)
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def shown(system: Container, unit: str, *names: str) -> list[str]:
    return [system.property(unit, name) for name in names]


def files(system: Container) -> str:
    places = (DIRECTORY, "/run/systemd/system")
    return system.run("find", *places, "-type", "f", "-printf", "%p %s\\n", check=False).stdout


@contextlib.contextmanager
def unit(system: Container, *lines: str, name: str = "") -> Iterator[str]:
    """A running unit with these lines. By default, it runs an idle QEMU.

    Its main process has been executed when the unit has started.
    """
    name = name or f"safety{next(_numbers)}.service"
    text = "[Service]\nType=exec\n" + "\n".join(lines or (f"ExecStart={IDLE}",)) + "\n"
    system.write(f"{DIRECTORY}/{name.partition('@')[0]}{'@.service' if '@' in name else ''}", text)
    system.run("systemctl", "daemon-reload")
    system.run("systemctl", "start", name)
    try:
        yield name
    finally:
        system.run("systemctl", "kill", "--signal=KILL", name, check=False)
        system.run("systemctl", "stop", name, check=False)
        system.run("systemctl", "reset-failed", name, check=False)
        template = f"{name.partition('@')[0]}@.service" if "@" in name else name
        system.run("rm", "-rf", f"{DIRECTORY}/{template}", f"{DIRECTORY}/{template}.d")
        system.run("systemctl", "daemon-reload")


def test_a_result_that_is_not_what_was_predicted_is_taken_back(installed: Container) -> None:
    wanted = ("ExecStop", "KillSignal", "NotifyAccess", "TimeoutStopUSec")
    with unit(installed) as name:
        settings = shown(installed, name, *wanted)
        # The prediction leaves out this drop-in, because systemd has not loaded it yet. When adopt
        # reloads systemd, the drop-in takes effect.
        later = f"{DIRECTORY}/{name}.d/90-site.conf"
        installed.write(later, "[Service]\nExecStop=\nExecStop=/bin/kill -9 $MAINPID\n")
        before = files(installed)
        said = ctl(installed, "adopt", name, code=1)
        assert "keeps less than predicted" in said and "reverted" in said
        assert files(installed) == before
        assert OURS not in installed.property(name, "DropInPaths")
        assert "kill -9" in shown(installed, name, "ExecStop")[0]
        installed.run("rm", later)
        installed.run("systemctl", "daemon-reload")
        assert shown(installed, name, *wanted) == settings
        assert "is safe" in ctl(installed, "adopt", name)


def test_an_earlier_drop_in_of_ours_comes_back_as_it_was(installed: Container) -> None:
    with unit(installed) as name:
        ctl(installed, "adopt", name)
        path = f"{DIRECTORY}/{name}.d/{OURS}"
        # adopt would add lines to its earlier drop-in. Another drop-in makes the unit worse.
        installed.write(f"{DIRECTORY}/{name}.d/10-site.conf", "[Service]\nKillMode=none\n")
        installed.run("systemctl", "daemon-reload")
        later = f"{DIRECTORY}/{name}.d/90-site.conf"
        installed.write(later, "[Service]\nExecStop=\nKillSignal=SIGKILL\n")
        text = installed.run("cat", path).stdout
        assert "reverted" in ctl(installed, "adopt", name, code=1)
        assert installed.run("cat", path).stdout == text


@pytest.mark.parametrize("number", ["INT", "HUP", "TERM"])
def test_an_interrupted_adoption_is_taken_back(installed: Container, number: str) -> None:
    slow, end = "/run/systemd/system-generators/slow", "/run/slow-end"
    with unit(installed) as name:
        before = files(installed)
        installed.write(slow, f"#!/bin/sh\nuntil [ -e {end} ]; do sleep 0.05; done\n", 0o755)
        try:
            with installed.spawn("qkillctl", "adopt", name) as adopting:
                until(lambda: files(installed), lambda found: OURS in found)
                installed.run("pkill", f"-{number}", "-f", f"python.*qkillctl adopt {name}")
                installed.run("touch", end)
                assert adopting.wait(90) == 130
                assert adopting.stdout is not None
                assert "taking the drop-in back" in adopting.stdout.read().decode()
        finally:
            installed.run("touch", end)
            installed.run("rm", slow, end)
        assert files(installed) == before
        assert OURS not in installed.property(name, "DropInPaths")


def test_a_drop_in_that_systemd_does_not_load_is_taken_back(installed: Container) -> None:
    """If it stayed, the next reload of systemd would load it, and nobody would check its effect."""
    policy = "/etc/dbus-1/system.d/no-reload.conf"
    manager = "org.freedesktop.systemd1"
    rule = f'<deny send_destination="{manager}" send_interface="{manager}.Manager"'
    rule += ' send_member="Reload"/>'
    with unit(installed) as name:
        before = files(installed)
        text = f'<busconfig><policy context="mandatory">{rule}</policy></busconfig>'
        installed.write(policy, text)
        installed.run("systemctl", "reload", "dbus.service")
        try:
            said = " ".join(ctl(installed, "adopt", name, code=1).split())
        finally:
            installed.run("rm", policy)
            installed.run("systemctl", "reload", "dbus.service")
        assert "was taken back, but reloading systemd failed" in said
        assert "systemctl daemon-reload" in said
        assert files(installed) == before


@pytest.fixture
def stubborn(installed: Container) -> str:
    """A QEMU that ignores SIGTERM."""
    installed.run("cp", f"{CHECKOUT}/{busybox().relative_to(TOP)}", STUBBORN)
    script = 'trap "" TERM; while true; do sleep 1; done'
    return f"ExecStart=@{STUBBORN} busybox sh -c '{script}'"


def test_no_time_is_taken_from_a_stop_that_runs(installed: Container, stubborn: str) -> None:
    """`daemon-reload` makes systemd forget the extensions of a running ExecStop=."""
    installed.run("systemctl", "start", "qkilld.service")
    line = "ExecStop=/bin/sh -c 'exec qkilld-stop'"
    helper = (line, "NotifyAccess=exec", "TimeoutStopSec=infinity")
    with (
        unit(installed) as name,
        unit(installed) as other,
        unit(installed, stubborn, *helper, "SendSIGKILL=no") as slow,
    ):
        ctl(installed, "adopt", other)
        pid = installed.property(slow, "MainPID")
        installed.run("systemctl", "stop", "--no-block", slow)
        hold = ("qkillctl", "hold", pid)
        until(lambda: installed.run(*hold, check=False).returncode, lambda code: code == 0)
        before = files(installed)
        with contextlib.ExitStack() as stack:
            tries = [
                stack.enter_context(installed.spawn("qkillctl", *words))
                for words in (("adopt", name), ("adopt", "--undo", other))
            ]
            # This is the command that the removal of a package runs.
            removal = stack.enter_context(installed.spawn("/usr/lib/qkilld/undo-adopt"))
            assert removal.wait(90) == 4
            assert removal.stdout is not None
            said = removal.stdout.read().decode()
            assert slow in said and "systemctl kill" in said
            for each in tries:
                assert each.wait(90) == 4
                assert each.stdout is not None
                said = each.stdout.read().decode()
                assert slow in said and "Nothing was changed" in said and "--now" in said
                assert "Writing" not in said and "Removed" not in said
        assert files(installed) == before
        assert shown(installed, name, "ExecStop") == [""]
        assert installed.property(slow, "ActiveState") == "deactivating"
        assert "is safe" in ctl(installed, "adopt", "--now", name)
        ctl(installed, "adopt", "--undo", "--now", name)
        assert OURS in files(installed)
        installed.run("/usr/lib/qkilld/undo-adopt", "--now", timeout=60)
        assert OURS not in files(installed)
        # adopt waits for the stop, and then continues.
        with installed.spawn("qkillctl", "adopt", name) as adopting:
            with pytest.raises(subprocess.TimeoutExpired):
                adopting.wait(3)
            installed.run("qkillctl", "force", pid)
            assert adopting.wait(60) == 0
        assert "qkilld-stop" in shown(installed, name, "ExecStop")[0]


def test_a_removal_does_not_wait_for_other_lines_of_a_stop(installed: Container) -> None:
    lines = ("ExecStop=/usr/bin/qkilld-stop", "ExecStop=/bin/sleep 600", "TimeoutStopSec=infinity")
    with unit(installed, f"ExecStart={IDLE}", *lines, "NotifyAccess=exec") as name:
        installed.run("systemctl", "stop", "--no-block", name)
        until(
            lambda: "sleep" in installed.run("systemctl", "status", name, check=False).stdout, bool
        )
        until(lambda: installed.property(name, "MainPID"), lambda pid: pid == "0")
        installed.run("/usr/lib/qkilld/undo-adopt", timeout=20)
        assert installed.property(name, "ActiveState") == "deactivating"


def test_everything_that_was_ever_written_is_taken_back(installed: Container) -> None:
    installed.run("systemctl", "start", "qkilld.service")
    before = files(installed)
    scope = f"safety{next(_numbers)}.scope"
    transient = f"safety{next(_numbers)}.service"
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(unit(installed))
        instance = stack.enter_context(unit(installed, name="safety-t@a.service"))
        gone = stack.enter_context(unit(installed))
        edited = stack.enter_context(unit(installed))
        foreign = stack.enter_context(unit(installed))
        installed.run("systemd-run", f"--unit={transient}", *IDLE.split())
        stack.callback(installed.run, "systemctl", "stop", transient, check=False)
        in_scope = ("systemd-run", "--scope", f"--unit={scope}", *IDLE.split())
        stack.enter_context(installed.spawn(*in_scope, stderr=subprocess.DEVNULL))
        until(lambda: installed.property(scope, "ActiveState"), lambda state: state == "active")
        units = (plain, gone, edited, "safety-t@.service", transient, scope)
        ctl(installed, "adopt", *units)
        # One unit has disappeared, the drop-in of another was edited, and a third file is not ours.
        installed.run("systemctl", "stop", gone)
        installed.run("rm", f"{DIRECTORY}/{gone}")
        path = f"{DIRECTORY}/{edited}.d/{OURS}"
        installed.run("sh", "-c", 'echo Nice=1 >>"$1"', "sh", path)
        installed.write(f"{DIRECTORY}/{foreign}.d/{OURS}", "[Service]\nNice=1\n")
        installed.run("systemctl", "daemon-reload")
        pids = {name: installed.property(name, "MainPID") for name in (plain, instance, transient)}
        guard = f"qkilld-scope@{scope}.service"
        assert installed.property(guard, "ActiveState") == "active"

        said = ctl(installed, "adopt", "--undo", "--all", "--dry-run", code=1)
        assert f"Would remove {DIRECTORY}/{plain}.d/{OURS}" in said
        assert installed.property(guard, "ActiveState") == "active"
        said = ctl(installed, "adopt", "--undo", "--all", code=1)
        assert f"{path} was edited" in said
        assert f"/{foreign}.d" not in said
        left = installed.run("find", DIRECTORY, "/run/systemd/system", "-name", OURS).stdout
        assert sorted(left.split()) == sorted([path, f"{DIRECTORY}/{foreign}.d/{OURS}"])
        for name, pid in pids.items():
            assert installed.property(name, "MainPID") == pid, f"{name} ran on"
            assert installed.property(name, "ExecStop") == ""
        assert installed.property(scope, "ActiveState") == "active"
        until(lambda: installed.property(guard, "ActiveState"), lambda state: state != "active")
        installed.run("rm", path)
        assert "nothing to undo" in ctl(installed, "adopt", "--undo", "--all")
        installed.run("systemctl", "kill", "--signal=KILL", scope)
    assert files(installed) == before


def test_adopt_is_offered_only_if_it_would_write(installed: Container) -> None:
    offer = "adopt UNIT` writes these lines"
    said = ctl(installed, "check-unit", "dbus.service", code=8)
    assert "has no known guest" in said and offer not in said
    with unit(installed) as name:
        said = ctl(installed, "check-unit", name, code=8)
        assert offer in said and "    systemd sends SIGTERM" in said


def test_a_line_that_needs_the_guest_to_be_gone_still_runs_after_it(installed: Container) -> None:
    """QEMU removes its pidfile when it exits. So if there is a copy, the guest still ran when the
    line ran."""
    pidfile, copy = "/run/adopt-copy.pid", "/run/adopt-copy"
    lines = (
        f"ExecStart={IDLE} -pidfile {pidfile}",
        "ExecStop=-/bin/kill $MAINPID",
        "ExecStop=-/bin/sh -c 'while test -d /proc/$MAINPID; do sleep 0.1; done'",
        f"ExecStop=-/bin/cp {pidfile} {copy}",
    )
    with unit(installed, *lines) as name:
        assert "is safe" in ctl(installed, "adopt", name)
        installed.run("systemctl", "restart", name)
        until(lambda: installed.run("test", "-e", pidfile, check=False).returncode, (0).__eq__)
        installed.run("systemctl", "stop", name)
        assert installed.property(name, "Result") == "success"
        assert "/bin/cp" in installed.property(name, "ExecStop")
        assert installed.run("test", "-e", copy, check=False).returncode == 1


def test_instances_with_settings_of_their_own_come_first(installed: Container) -> None:
    own = f"{DIRECTORY}/own@db.service"
    drop_in = f"{DIRECTORY}/own@web.service.d/10-site.conf"
    with unit(
        installed, f"ExecStart={IDLE}", "ExecStop=/bin/kill -9 $MAINPID", name="own@a.service"
    ):
        installed.write(own, f"[Service]\nExecStart={IDLE}\nExecStop=/usr/local/bin/db-stop %i\n")
        installed.write(drop_in, "[Service]\nExecStop=\nExecStop=/usr/local/bin/web-stop\n")
        limit = "[Service]\nMemoryMax=1G\n"
        installed.write(f"{DIRECTORY}/own@c.service.d/10-site.conf", limit)
        installed.run("ln", "-s", f"{DIRECTORY}/own@.service", f"{DIRECTORY}/own@link.service")
        installed.run("systemctl", "daemon-reload")
        try:
            said = ctl(installed, "adopt", "own@.service", code=8)
            assert "Adopt own@db.service, own@web.service first" in said
            assert OURS not in files(installed)
            ctl(installed, "adopt", "own@db.service", "own@web.service", code=8)
            assert "is safe" in ctl(installed, "adopt", "own@.service")
            for name in ("db", "web"):
                assert f"{name}-stop" in installed.property(f"own@{name}.service", "ExecStop")
            for name in ("c", "link", "other"):
                stops = installed.property(f"own@{name}.service", "ExecStop")
                assert "qkilld-stop" in stops and "kill" not in stops.replace("qkilld", "")
        finally:
            ctl(installed, "adopt", "--undo", "--all")
            installed.run("sh", "-c", f"rm -rf {DIRECTORY}/own@?*.service*")
    assert OURS not in files(installed)


def test_a_sandbox_in_which_the_helper_cannot_be_executed(installed: Container) -> None:
    paths = "/usr/bin/qemu-system-x86_64 /usr/lib /lib /lib64"
    lines = (f"ExecStart={IDLE}", "NoExecPaths=/", f"ExecPaths={paths}")
    with unit(installed, *lines) as name:
        assert "ExecStop=-+/usr/bin/qkilld-stop" in ctl(installed, "adopt", name)
        installed.run("systemctl", "restart", name)
        installed.run("systemctl", "stop", name)
        assert "status=0" in installed.property(name, "ExecStop")


@pytest.mark.parametrize(
    "command",
    [
        "/usr/bin/qkilld-stop",
        "/usr/bin/qkilld-stop --pid $MAINPID",
        "/usr/bin/qkilld-stop --unit %n",
        "/bin/sh -c '/usr/bin/qkilld-stop; exit $$?'",
        "/bin/sh -c '/usr/bin/qkilld-stop --unit %n; exit $$?'",
    ],
)
def test_the_helper_in_a_pid_namespace_of_its_own_says_so(
    installed: Container, command: str
) -> None:
    """In the namespace, $MAINPID means another process or none, and no guest is visible. The helper
    must not conclude from this that the guest is gone."""
    version = int(installed.run("systemctl", "--version").stdout.split()[1])
    lines = ["PrivatePIDs=yes", f"ExecStart={IDLE}", f"ExecStop={command}"]
    # Versions of systemd before 257 have no PrivatePIDs=, and 262 does not apply it to ExecStop=.
    if version != 257:
        lines = [f"ExecStart={IDLE}"]
        lines += [f"ExecStop=/usr/bin/unshare --pid --fork --mount-proc {command}"]
    with unit(installed, *lines) as name:
        installed.run("systemctl", "stop", name)
        assert "status=1" in installed.property(name, "ExecStop")
        said = installed.run("journalctl", "--output=cat", f"--unit={name}").stdout
        assert "PrivatePIDs=" in said


def test_a_guest_in_a_pid_namespace_of_its_own(installed: Container) -> None:
    """In adopt's line, the helper runs outside of the namespace, so it stops the guest normally.

    systemd before 257 ignores the setting."""
    with unit(installed, "PrivatePIDs=yes", f"ExecStart={IDLE}") as name:
        assert "/usr/bin/qkilld-stop" in ctl(installed, "adopt", name)
        installed.run("systemctl", "stop", name)
        said = installed.run("journalctl", "--output=cat", f"--unit={name}").stdout
    assert "Sent SIGTERM to QEMU process" in said
    assert "there is nothing to stop" not in said


def test_a_template_gets_the_lines_as_written(installed: Container) -> None:
    """The lines have two commands in one line, quotes, escapes and specifiers."""
    lines = (
        f"ExecStart={IDLE} -name %i -pidfile /run/%i.pid",
        "ExecStop=/bin/sh -c 'echo system_powerdown | socat - \"UNIX:/run/%i.mon\"' ; "
        '@/usr/bin/qkilld-stop stop --reason "unit\\x20%n" --pidfile /run/%i.pid',
        "ExecStop=-/bin/echo 100%% \\; \\",
        "  \"/run/%i stopped\"",
        "NotifyAccess=exec",
    )  # fmt: skip
    template = "safety-lines@.service"
    with unit(installed, *lines, name="safety-lines@a.service"):
        assert "is safe" in ctl(installed, "adopt", template)
        text = installed.run("cat", f"{DIRECTORY}/{template}.d/{OURS}").stdout
        assert 'qkilld-stop --reason "unit\\x20%n" --pidfile /run/%i.pid\n' in text
        other = installed.property("safety-lines@b.service", "ExecStop")
        for expected in ("UNIX:/run/b.mon", "--pidfile /run/b.pid", "100% ; /run/b stopped"):
            assert expected in other
        assert "/run/a" not in other
        ctl(installed, "adopt", "--undo", template)

    # systemd ignores the last line, so systemd's commands are not those in the files.
    with unit(installed, *lines, "ExecStop=-nonsense/", name="safety-lines@a.service"):
        before = files(installed)
        assert "daemon-reload" in ctl(installed, "adopt", template, code=8)
        assert files(installed) == before
        assert "is safe" in ctl(installed, "adopt", "safety-lines@a.service")


@pytest.mark.parametrize(("settings", "forced"), [((), True), (("SendSIGKILL=no",), False)])
def test_a_guard_kills_only_what_systemd_would_kill(
    installed: Container, stubborn: str, settings: tuple[str, ...], forced: bool
) -> None:
    installed.run("systemctl", "start", "qkilld.service")
    scope = f"safety{next(_numbers)}.scope"
    words = ["systemd-run", "--scope", f"--unit={scope}"]
    words += [f"--property={line}" for line in ("TimeoutStopSec=300", *settings)]

    def jobs() -> dict[int, list[str]]:
        listed = json.loads(ctl(installed, "--json", "jobs"))
        return {job["id"]: job["flags"] for job in listed}

    loop = 'trap "" TERM; while true; do sleep 1; done'
    script = f"exec -a busybox {STUBBORN} sh -c '{loop}'"
    with installed.spawn(*words, "bash", "-c", script, stderr=subprocess.DEVNULL):
        until(lambda: installed.property(scope, "ActiveState"), lambda state: state == "active")
        ctl(installed, "adopt", scope)
        earlier = jobs().keys()
        installed.run("systemctl", "stop", "--no-block", scope)
        try:
            until(jobs, lambda found: found.keys() - earlier)
            time.sleep(1)  # qkilld reads the settings of the unit 0.3 s after the call.
            flags = [each for number, each in jobs().items() if number not in earlier]
            assert any("force" in each for each in flags) is forced, flags
        finally:
            installed.run("systemctl", "kill", "--signal=KILL", scope, check=False)


def test_a_line_of_a_later_drop_in_is_not_run_twice(installed: Container) -> None:
    with unit(installed) as name:
        later = f"{DIRECTORY}/{name}.d/60-local.conf"
        installed.write(later, "[Service]\nExecStop=/bin/cp /run/a.img /run/b.img\n")
        installed.run("systemctl", "daemon-reload")
        before = files(installed)
        assert "60-local.conf" in ctl(installed, "adopt", name, code=8)
        assert files(installed) == before
        installed.run("mv", later, f"{DIRECTORY}/{name}.d/40-local.conf")
        installed.run("systemctl", "daemon-reload")
        assert "is safe" in ctl(installed, "adopt", name)
        assert installed.property(name, "ExecStop").count("/bin/cp") == 2  # Path and argv[0].


def test_a_template_is_not_judged_by_what_one_instance_has(installed: Container) -> None:
    """The instance is safe only because of its own drop-in. The effect of its stop line depends on
    its own environment."""
    lines = (
        f"ExecStart={IDLE} -name %i",
        "EnvironmentFile=-/run/%i.env",
        "ExecStop=/bin/sh -c ${HALT}",
    )
    installed.write("/run/a.env", "HALT=kill -9 $MAINPID\n")
    template, own = "safety-own@.service", f"{DIRECTORY}/safety-own@a.service.d"
    with unit(installed, *lines, name="safety-own@a.service"):
        said = ctl(installed, "check-unit", template, code=8)
        assert "not known what sh of its ExecStop= does" in said
        assert "sends SIGKILL" not in said
        installed.write(
            f"{own}/40-own.conf",
            "[Service]\nExecStop=\nExecStop=/usr/bin/qkilld-stop\nNotifyAccess=exec\n",
        )
        installed.run("systemctl", "daemon-reload")
        try:
            assert "is safe" in ctl(installed, "check-unit", "safety-own@a.service")
            assert "is safe" not in ctl(installed, "check-unit", template, code=8)
        finally:
            installed.run("rm", "-r", own, "/run/a.env")


def test_a_limit_of_memory_does_not_make_an_instance_special(installed: Container) -> None:
    """Only a running instance shows what the script starts."""
    script, template = "/usr/local/bin/safety-run", "safety-limit@.service"
    installed.write(script, f"#!/bin/sh\nexec {IDLE} -name $1\n")
    installed.run("chmod", "755", script)
    lines, own = (f"ExecStart={script} %i",), f"{DIRECTORY}/safety-limit@a.service.d"
    with unit(installed, *lines, name="safety-limit@a.service") as name:
        try:
            installed.run("systemctl", "set-property", name, "MemoryMax=1G")
            installed.write(f"{own}/override.conf", "[Service]\nMemoryHigh=1G\n")
            installed.run("systemctl", "daemon-reload")
            said = ctl(installed, "check-unit", template, code=8)
            assert "does not run" not in said and "ExecStop=" in said
            installed.write(f"{own}/override.conf", "[Service]\nKillSignal=SIGINT\n")
            installed.run("systemctl", "daemon-reload")
            assert f"Check {name} instead" in ctl(installed, "check-unit", template, code=8)
        finally:
            installed.run("rm", "-rf", own, f"{DIRECTORY}.control/{name}.d", script)
