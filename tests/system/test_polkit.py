"""Which guests a caller may stop, with a real polkitd: single guests, units, and all guests at
once."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.lab import needs
from tests.lab.container import CHECKOUT, Container
from tests.lab.image import busybox
from tests.lab.process import OTHER_UID, TOP

MANAGER = ("org.qkilld1", "/org/qkilld1", "org.qkilld1.Manager")
FRIEND_UID = 1
"""The user `daemon` of every Debian. A rule of polkit lets this user stop all guests."""
PASSWORD = "correct horse"
DENIED = "Call failed: Access denied"
"""The message of busctl for AccessDenied."""
QEMU = "qemu-system-x86_64 -M none -nodefaults -display none"
FAKE = "/usr/local/bin/qemu-system-lab"
_RULES = """\
polkit.addAdminRule(function(action, subject) { return ["unix-user:0"]; });
polkit.addRule(function(action, subject) {
    if (action.id.indexOf("org.qkilld1.") != 0)
        return polkit.Result.NOT_HANDLED;
    var guest = action.lookup("guest");
    if (subject.user == "daemon" || guest.indexOf("force-") == 0)
        return polkit.Result.YES;
    if (guest.indexOf("no-") == 0)
        return polkit.Result.NO;
    if (guest.indexOf("let-") == 0 && action.id != "org.qkilld1.force")
        return polkit.Result.YES;
    return polkit.Result.NOT_HANDLED;
});
"""
_numbers = itertools.count(1)
Start = Callable[..., tuple[str, int]]


@pytest.fixture(scope="module")
def system(installed: Container) -> Iterator[Container]:
    """A system that runs polkit and the daemon."""
    needs.program("pkaction", "polkitd")
    installed.run("mkdir", "-p", "/etc/polkit-1/rules.d")
    installed.write("/etc/polkit-1/rules.d/00-lab.rules", _RULES)
    installed.write(
        "/etc/qkilld/qkilld.conf.d/60-polkit.conf", "[Policy]\nGraceSec=1\nStallSec=0\n"
    )
    source = f"{CHECKOUT}/{busybox().relative_to(TOP)}"
    installed.run("install", "-m", "755", source, FAKE)
    installed.run("systemctl", "restart", "polkit.service")
    installed.run("systemctl", "restart", "qkilld.service")
    yield installed
    installed.run("systemctl", "stop", "qkilld.service")
    installed.run("rm", "/etc/qkilld/qkilld.conf.d/60-polkit.conf")


@pytest.fixture
def start(system: Container) -> Iterator[Start]:
    """A function that starts a guest of root in a unit whose name begins with `kind`. Returns the
    unit and the main pid."""
    started = []

    def run(kind: str = "any-", command: str = QEMU, *properties: str) -> tuple[str, int]:
        name = f"{kind}polkit{next(_numbers)}"
        script = command if "{name}" in command else f"exec {command} -name {{name}}"
        system.run(
            *("systemd-run", f"--unit={name}", *(f"--property={p}" for p in properties)),
            *("bash", "-c", script.replace("{name}", name)),
        )
        started.append(name)
        unit = f"{name}.service"
        _until(lambda: name in call(system, "ListGuests"))
        return unit, int(system.property(unit, "MainPID"))

    yield run
    for unit in started:
        system.run("systemctl", "kill", "--signal=KILL", unit, check=False)


def _until(condition: Callable[[], bool], timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def command(member: str, *arguments: str, ask: bool = False) -> tuple[str, ...]:
    allow = f"--allow-interactive-authorization={'yes' if ask else 'no'}"
    return ("busctl", "--timeout=60", allow, "call", *MANAGER, member, *arguments)


def call(
    system: Container, member: str, *arguments: str, uid: int | None = None, ask: bool = False
) -> str:
    """Return the reply, or the text on standard error."""
    done = system.run(*command(member, *arguments, ask=ask), uid=uid, check=False)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


def terminate(system: Container, pid: int, flags: int = 0, **how: bool) -> str:
    """Call Terminate as OTHER_UID."""
    return call(system, "Terminate", "ut", str(pid), str(flags), uid=OTHER_UID, **how)


def alive(system: Container, pid: int) -> bool:
    return system.run("test", "-e", f"/proc/{pid}/exe", check=False).returncode == 0


def test_the_policy_is_one_that_polkit_takes(system: Container) -> None:
    for action in ("terminate", "force", "inspect"):
        text = system.run("pkaction", "--verbose", "--action-id", f"org.qkilld1.{action}").stdout
        fields = dict(re.findall(r"^ +(.+?): +(.*)$", text, re.MULTILINE))
        assert fields["implicit any"] == fields["implicit inactive"] == "auth_admin"
        assert fields["implicit active"] == "auth_admin_keep"
        assert "$(target)" in fields["message"]


ON_VARLINK = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect("/run/qkilld/org.qkilld1")
    parameters = {"pid": int(sys.argv[1])}
    call = {"method": "org.qkilld1.Terminate", "parameters": parameters}
    sock.sendall(json.dumps(call).encode() + bytes(1))
    print(sock.makefile("rb").read1().decode())
"""


def test_callers_on_varlink_are_authorized_by_their_pidfd(system: Container, start: Start) -> None:
    """polkit before 124 does not know pidfds. It denies requests of callers whom it would allow on
    D-Bus."""
    _, pid = start("any-")
    (version,) = re.findall(r"[0-9.]+", system.run("pkaction", "--version").stdout)
    said = system.run("/usr/bin/python3", "-c", ON_VARLINK, str(pid), uid=FRIEND_UID).stdout
    if float(version) >= 124:
        assert '"job":' in said
        return
    assert (
        "org.varlink.service.PermissionDenied" in said and "call the same method on D-Bus" in said
    )
    assert alive(system, pid)
    assert call(system, "Terminate", "ut", str(pid), "0", uid=FRIEND_UID).startswith("o ")


def test_another_users_guest(system: Container, start: Start) -> None:
    _, pid = start("any-")
    # A password would be needed, but nobody can be asked for it, so the call is denied.
    assert "needs authorization" in terminate(system, pid)
    for kind, sleeper in (("any-", False), ("no-", False), ("", True)):
        target = start(kind)[1] if not sleeper else _sleeper(system)
        for flags in (0, 1):
            assert terminate(system, target, flags, ask=True) == DENIED
        assert alive(system, target)
    _, let = start("let-")
    assert "needs authorization" in terminate(system, let, 1)
    assert terminate(system, let, 1, ask=True) == DENIED
    assert alive(system, let)
    job = terminate(system, let)
    assert job.startswith('o "/org/qkilld1/job/')
    _until(lambda: not alive(system, let))
    _, force = start("force-")
    assert terminate(system, force, 1).startswith("o ")


def _sleeper(system: Container) -> int:
    """Start a process of root that is not a QEMU."""
    unit = f"sleeper{next(_numbers)}.service"
    system.run("systemd-run", f"--unit={unit}", "sleep", "300")
    return int(system.property(unit, "MainPID"))


def test_errors_do_not_reveal_whether_a_process_is_qemu(system: Container, start: Start) -> None:
    _, pid = start("any-")
    answers = [
        call(system, member, *arguments, uid=OTHER_UID).replace(str(target), "PID")
        for target in (pid, _sleeper(system))
        for member, *arguments in (
            ("Terminate", "ut", str(target), "1"),
            ("Inspect", "u", str(target)),
            ("Plan", "uta{sv}", str(target), "0", "0"),
        )
    ]
    assert len(set(answers)) == 1, answers


def test_inspecting_and_cancelling(system: Container, start: Start) -> None:
    _, let = start("let-")
    assert '"verdict" s' in call(system, "Inspect", "u", str(let), uid=OTHER_UID)
    for kind, allowed in (("let-", True), ("no-", False)):
        unit, pid = start(kind)
        system.run("systemctl", "kill", "--signal=STOP", unit)
        # With FIXED, the job takes no samples, so it still runs when it is cancelled.
        job = call(system, "TerminateWithOptions", "uta{sv}", str(pid), "8", "0").split('"')[1]
        where = ("org.qkilld1", job, "org.qkilld1.Job", "Cancel")
        done = system.run("busctl", "call", *where, uid=OTHER_UID, check=False)
        assert (done.returncode == 0) is allowed, done.stderr


@contextlib.contextmanager
def stopped_polkit(system: Container) -> Iterator[None]:
    # polkit may have exited since the last test.
    system.run("systemctl", "start", "polkit.service")
    system.run("systemctl", "kill", "--signal=STOP", "polkit.service")
    try:
        yield
    finally:
        system.run("systemctl", "kill", "--signal=CONT", "polkit.service")


def test_a_polkit_that_hangs_holds_up_nobody(system: Container, start: Start) -> None:
    (_, pid), (_, other) = start("force-"), start("any-")
    with stopped_polkit(system):
        began = time.monotonic()
        with system.spawn(*command("Terminate", "ut", str(pid), "1"), uid=OTHER_UID) as waiting:
            assert str(pid) in call(system, "ListGuests")
            assert call(system, "Terminate", "ut", str(other), "0").startswith("o ")
            _until(lambda: not alive(system, other))
            assert waiting.stdout is not None
            assert DENIED.encode() in waiting.stdout.read()
        assert 4 < time.monotonic() - began < 60
        # One user may have only a few requests to polkit open.
        with contextlib.ExitStack() as stack:
            many = [
                stack.enter_context(
                    system.spawn(*command("Terminate", "ut", str(pid), "1"), uid=OTHER_UID)
                )
                for _ in range(12)
            ]
            said = [process.stdout.read() for process in many if process.stdout]
        assert any(b"Too many requests" in text for text in said)
    assert alive(system, pid)
    assert terminate(system, pid, 1).startswith("o ")


def test_without_polkit(system: Container, start: Start) -> None:
    _, pid = start("force-")
    system.run("systemctl", "mask", "--runtime", "--now", "polkit.service")
    try:
        for ask in (False, True):
            assert terminate(system, pid, ask=ask) == DENIED
        assert alive(system, pid)
    finally:
        system.run("systemctl", "unmask", "--runtime", "polkit.service")
        system.run("systemctl", "start", "polkit.service")


@pytest.mark.parametrize(
    ("then", "error"),
    [("exec /bin/sleep 300", "is not a QEMU"), ("exit", "exited"), ("", "belongs to another user")],
)
def test_a_process_that_changes_while_polkit_is_asked(
    system: Container, start: Start, then: str, error: str
) -> None:
    fifo = f"/run/swap{next(_numbers)}"
    system.run("mkfifo", fifo)
    changes_user = not then
    if changes_user:
        as_friend = f"/usr/bin/setpriv --reuid={FRIEND_UID}"
        then = f'exec {as_friend} /bin/bash -c "exec -a sleep {FAKE} 300"'
    # A fake QEMU: busybox chooses its applet by argv[0].
    script = f"exec -a sh {FAKE} -c 'read x <{fifo}; {then}' sh -name {{name}}"
    _, pid = start("force-", script)
    daemon = system.property("qkilld.service", "MainPID")
    with stopped_polkit(system):
        asking = command("Terminate", "ut", str(pid), "3", ask=True)
        process = system.spawn(*asking, uid=OTHER_UID)
        with process as waiting:
            held = f"grep -qE '^Pid:\\s+{pid}$' /proc/{daemon}/fdinfo/*"
            _until(lambda: system.run("sh", "-c", held, check=False).returncode == 0)
            time.sleep(0.3)  # wait until polkit has been asked, which cannot be observed
            system.run("sh", "-c", f"echo >{fifo}")
            if changes_user:
                _until(lambda: f"Uid:\t{FRIEND_UID}\t" in _status(system, pid))
            _until(lambda: ("lab" in _executable(system, pid)) is changes_user)
            system.run("systemctl", "kill", "--signal=CONT", "polkit.service")
            assert waiting.stdout is not None
            assert error in waiting.stdout.read().decode()
    assert alive(system, pid) is (then != "exit")


def _executable(system: Container, pid: int) -> str:
    return system.run("readlink", f"/proc/{pid}/exe", check=False).stdout


def _status(system: Container, pid: int) -> str:
    return system.run("cat", f"/proc/{pid}/status", check=False).stdout


def test_a_password_on_the_terminal(system: Container, start: Start) -> None:
    """qkillctl starts the real agent."""
    needs.program("pkttyagent", "polkitd")
    # Agents of newer releases of polkit need this socket, which is not enabled in the container.
    system.run("systemctl", "start", "polkit-agent-helper.socket", check=False)
    system.run("chpasswd", input=f"root:{PASSWORD}\n")
    for password, code in (("wrong", 6), (PASSWORD, 0)):
        unit, pid = start("any-")
        run = f"qkillctl terminate --wait {unit}; echo CODE $?"
        with system.spawn(
            *("script", "-qec", run, "/dev/null"), stdin=subprocess.PIPE, uid=OTHER_UID
        ) as terminal:
            assert terminal.stdin is not None
            said = _read_until(terminal, b"Password: ")
            assert unit.removesuffix(".service") in said
            assert "which is not yours" in said
            # The agent discards input that arrives after its prompt but before it has turned off
            # the echo.
            for _ in range(10):
                terminal.stdin.write(f"{password}\n".encode())
                terminal.stdin.flush()
                said += _read_until(terminal, b"CODE ", more=1, timeout=4)
                if "CODE " in said:
                    break
            assert f"CODE {code}" in said
        assert alive(system, pid) is (code != 0)
    assert system.run("pgrep", "pkttyagent", check=False).returncode == 1
    _, pid = start("any-")
    run = f"qkillctl --no-ask-password terminate {pid}; echo CODE $?"
    done = system.run("script", "-qec", run, "/dev/null", uid=OTHER_UID)
    assert "CODE 6" in done.stdout
    assert "administrator. Run this as root" in done.stdout


def _read_until(
    process: subprocess.Popen[bytes], mark: bytes, more: int = 0, timeout: float = 60
) -> str:
    """Return the output up to `mark`, or until the process has printed nothing for this long
    (s)."""
    assert process.stdout is not None
    text = b""
    while mark not in text or len(text) < text.index(mark) + len(mark) + more:
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        if not ready:
            break
        part = os.read(process.stdout.fileno(), 4096)
        assert part, f"it ended: {text.decode()}"
        text += part
    return text.decode()


@pytest.mark.parametrize(
    ("script", "properties"),
    [
        (f"exec {QEMU} -name {{name}}", ()),
        (f"{QEMU} -name {{name}}; true", ()),
        (f"{QEMU} -name {{name}} -daemonize", ("Type=forking",)),
    ],
    ids=["plain", "shell", "daemonize"],
)
def test_a_unit(system: Container, start: Start, script: str, properties: tuple[str, ...]) -> None:
    unit, _ = start("any-", script, *properties)
    assert "needs authorization" in call(system, "TerminateUnit", "st", unit, "0", uid=OTHER_UID)
    assert call(system, "TerminateUnit", "st", unit, "0").startswith("o ")
    _until(lambda: unit not in call(system, "ListGuests"))


def test_a_scope(system: Container) -> None:
    run = ("systemd-run", "--scope", "--unit=polkit.scope", *QEMU.split(), "-name", "inscope")
    with system.spawn(*run) as process:
        _until(lambda: '"polkit.scope"' in call(system, "ListGuests"))
        assert call(system, "TerminateUnit", "st", "polkit.scope", "0").startswith("o ")
        process.wait(30)  # SIGTERM may have reached QEMU before its main loop ran


def test_units_without_exactly_one_guest_are_refused(system: Container, start: Start) -> None:
    two, _ = start("any-", f"{QEMU} -name {{name}} & {QEMU} & wait")
    _until(lambda: call(system, "ListGuests").count(f'"{two}"') == 2)
    for unit, part in (
        (two, "has 2 QEMU processes"),
        ("nosuch.service", 'systemd knows no unit "nosuch.service"'),
        ("polkit.service", "No QEMU runs in polkit.service"),
        ("systemd-tmpfiles-setup.service", "is not running"),
        ("../../etc.service", "is not the name of"),
    ):
        assert part in call(system, "TerminateUnit", "st", unit, "0"), unit
    done = system.run("qkillctl", "terminate", "polkit.service", check=False)
    assert (done.returncode, "No QEMU runs in" in done.stderr) == (5, True)


def test_an_alias(system: Container) -> None:
    text = f"[Service]\nExecStart=/usr/bin/{QEMU}\n[Install]\nAlias=guest-alias.service\n"
    system.write("/etc/systemd/system/guest-real.service", text)
    system.run("systemctl", "enable", "--now", "guest-real.service")
    _until(lambda: '"guest-real.service"' in call(system, "ListGuests"))
    done = system.run("qkillctl", "terminate", "--wait", "guest-alias.service")
    assert "gone after" in done.stdout
    system.run("systemctl", "disable", "--now", "guest-real.service")


def _listed(system: Container) -> list[dict[str, object]]:
    guests: list[dict[str, object]] = json.loads(system.run("qkillctl", "--json", "list").stdout)
    return guests


def test_all_guests(system: Container, start: Start) -> None:
    fake = f"exec -a sh {FAKE} -c 'read x </run/never' sh -name {{name}}$i"
    loop = f"for i in {{1..100}}; do ({fake}) & done; wait"
    system.run("sh", "-c", "test -p /run/never || mkfifo /run/never")
    start("many-", loop)
    own = start("any-", f"exec setpriv --reuid={OTHER_UID} --clear-groups {QEMU} -name {{name}}")[1]
    _until(lambda: len(_listed(system)) >= 101)
    guests = _listed(system)
    planned = system.run("qkillctl", "--json", "terminate", "--all", "--dry-run", uid=OTHER_UID)
    assert [plan["pid"] for plan in json.loads(planned.stdout)] == [own]
    # If the caller has no authorization, qkillctl stops only the caller's own guests.
    done = system.run("qkillctl", "terminate", "--all", "--wait", uid=OTHER_UID)
    assert done.stdout.count("gone after") == 1
    assert "left alone, as they are not yours" in done.stderr
    assert not alive(system, own)
    answer = call(system, "TerminateAll", "ta{sv}", "0", "0", uid=OTHER_UID)
    assert "needs authorization" in answer
    assert len(_listed(system)) == len(guests) - 1
    # If the caller has one, qkillctl stops all guests, with a single request to polkit.
    began = time.monotonic()
    done = system.run("qkillctl", "--json", "terminate", "--all", "--wait", uid=FRIEND_UID)
    print(f"100 guests by TerminateAll: {time.monotonic() - began:.2f} s")
    stopped = json.loads(done.stdout)
    assert len(stopped) == len(guests) - 1
    assert {order["result"] for order in stopped} == {"exited"}
    assert _listed(system) == []
    assert "No QEMU guests to stop" in system.run("qkillctl", "terminate", "--all").stdout
