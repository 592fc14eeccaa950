"""The lab itself: its guests are real, and it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab import bus, guest, process, records
from tests.lab.log import Log, WaitTimeout

Factory = Callable[..., guest.Guest]
DBUS: Any = {
    "destination": "org.freedesktop.DBus",
    "path": "/org/freedesktop/DBus",
    "interface": "org.freedesktop.DBus",
}


def test_a_guest_runs_linux_and_a_clean_exit_keeps_what_it_wrote(linux_guest: Factory) -> None:
    running = linux_guest(job="writer", records=64, stride=32 << 20, passes=2)
    running.wait_for(r"^WRITER DONE 64")
    running.signal(signal.SIGTERM)
    assert running.wait_gone() == 0
    assert records.records(running.directory / "disk.qcow2") == set(range(64))


@pytest.mark.parametrize("daemonize", [False, True])
def test_qemu_takes_sigterm_when_it_is_up(qemu: Factory, daemonize: bool) -> None:
    running = qemu(daemonize=daemonize)
    assert Path(f"/proc/{running.pid}/exe").readlink() == running.executable
    running.signal(signal.SIGTERM)
    assert running.wait_gone() == (None if daemonize else 0)


def test_a_fake_qemu_goes_by_its_executable(fake_qemu: Factory) -> None:
    running = fake_qemu(name="web\n1")
    exe = Path(f"/proc/{running.pid}/exe").readlink()
    assert exe == running.executable
    assert exe.match(guest.own_qemus())
    assert b"\0-name\0web\n1\0" in Path(f"/proc/{running.pid}/cmdline").read_bytes()
    running.signal(signal.SIGTERM)
    assert running.wait_gone() == -signal.SIGTERM


def test_a_stubborn_one_ignores_sigterm(fake_qemu: Factory) -> None:
    running = fake_qemu(stubborn=True)
    status = Path(f"/proc/{running.pid}/status").read_text()
    ignored = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    assert int(ignored, 16) & 1 << (signal.SIGTERM - 1)
    running.signal(signal.SIGKILL)
    assert running.wait_gone() == -signal.SIGKILL


def test_a_closed_guest_is_gone_in_whatever_state(qemu: Factory) -> None:
    running = qemu()
    running.signal(signal.SIGSTOP)
    running.close()
    assert not running.directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(running.pid, 0)


def test_three_clients_meet_on_the_private_bus(private_bus: bus.Bus) -> None:
    with private_bus.client() as client:
        listed = private_bus.busctl("list", "--unique").stdout
        assert f"{client.unique_name} " in listed
        called = private_bus.gdbus(
            *("call", "-d", DBUS["destination"], "-o", DBUS["path"]),
            *("-m", "org.freedesktop.DBus.GetConnectionUnixProcessID", client.unique_name),
        )
        assert called.stdout == f"(uint32 {os.getpid()},)\n"


def test_a_client_may_be_another_user(private_bus: bus.Bus) -> None:
    with private_bus.client() as client, private_bus.client(process.OTHER_UID) as other:
        asked = client.call("GetConnectionUnixUser", "s", other.unique_name, **DBUS)
        assert asked == (process.OTHER_UID,)
    name = "GetConnectionUnixUser"
    with private_bus.client() as client:
        done = private_bus.busctl(
            *("call", *DBUS.values()), name, "s", client.unique_name, uid=process.OTHER_UID
        )
    assert done.stdout == "u 0\n"


def test_a_client_keeps_signals_and_replies_apart(private_bus: bus.Bus) -> None:
    with private_bus.client() as client:
        client.subscribe("type='signal',interface='org.freedesktop.DBus',arg0='a.b'")
        first = client.send("RequestName", "su", "a.b", 4, **DBUS)
        second = client.send("GetNameOwner", "s", "a.b", **DBUS)
        assert client.reply(second) == (client.unique_name,)
        assert client.reply(first) == (1,)
        _, body = client.signal("NameOwnerChanged")
        assert body == ("a.b", "", client.unique_name)
        with pytest.raises(bus.CallError, match="NameHasNoOwner") as caught:
            client.call("GetNameOwner", "s", "c.d", **DBUS)
        assert caught.value.name == "org.freedesktop.DBus.Error.NameHasNoOwner"


def test_a_log_tells_of_a_writer_that_ended(lab_dir: Path) -> None:
    log = Log(lab_dir / "log")
    with log.path.open("wb") as written:
        writer = process.spawn(["sh", "-c", "echo one; echo two"], stdout=written)
    pidfd = os.pidfd_open(writer.pid)
    try:
        assert log.wait_for("^t(wo)$", pidfd=pidfd)[1] == "wo"
        with pytest.raises(WaitTimeout, match="the process ended without 'three'"):
            log.wait_for("three", pidfd=pidfd)
    finally:
        os.close(pidfd)
        process.end(writer)


def test_a_program_starts_with_the_default_action_of_signals_that_we_ignore() -> None:
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        done = process.run(["grep", "^SigIgn", "/proc/self/status"], check=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    ignored = int(done.stdout.split()[1], 16)
    assert not [number for number in numbers if ignored & 1 << (number - 1)]


PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-c", "/dev/null"),
    *("-p", "tests.conftest", "-p", "no:cacheprovider"),
)
each_way = pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])


def _run_tests(
    directory: Path, text: str, *more: str, ci: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run another pytest with the same conftest on a new test file."""
    (directory / "test_it.py").write_text(textwrap.dedent(text))
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    return process.run(
        [*PYTEST, f"--rootdir={directory}", *more, directory],
        env=environment | {"PYTHONPATH": str(process.TOP)} | ({"CI": "true"} if ci else {}),
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("subprocess.Popen(['sleep', '1000'])", "a process: "),
        ("os.system('sleep 1000 &')", "a process: "),
        ("os.open('/dev/zero', 0)", "/dev/zero"),
        ("threading.Thread(target=threading.Event().wait, daemon=True).start()", "a thread: "),
        ("asyncio.run(leave_task())", "a task: "),
    ],
)
def test_a_leak_fails_the_test_that_made_it(lab_dir: Path, line: str, told: str) -> None:
    done = _run_tests(
        lab_dir,
        f"""
        import asyncio, os, subprocess, threading
        kept = []
        async def leave_task():
            kept.append(asyncio.create_task(asyncio.sleep(1000)))
        def test_that_leaks():
            kept.append({line})
        def test_after_it():
            pass
        """,
    )
    assert "2 passed, 1 error" in done.stdout, done.stdout
    assert "ERROR at teardown of test_that_leaks" in done.stdout
    assert told in done.stdout


@pytest.mark.parametrize(
    ("text", "skips"),
    [
        (
            """
            def test_it(): pytest.skip('the reason')
            def test_what_is_missing(): raise Missing('the reason')
            """,
            2,
        ),
        ("pytest.skip('the reason', allow_module_level=True)", 1),
    ],
    ids=["tests", "module"],
)
@each_way
def test_a_skip_is_a_failure_in_ci_alone(
    lab_dir: Path, text: str, skips: int, workers: tuple[str, ...]
) -> None:
    text = f"import pytest\nfrom tests.lab.needs import Missing\n{textwrap.dedent(text)}\n"
    at_home = _run_tests(lab_dir, text, *workers)
    assert f"{skips} skipped" in at_home.stdout, at_home.stdout
    in_ci = _run_tests(lab_dir, text, *workers, ci=True)
    assert in_ci.returncode == 1 or in_ci.returncode == 2, in_ci.stdout
    told = "skipped, which CI=true does not allow: Skipped: the reason"
    assert in_ci.stdout.count(f"\n{told}\n") == skips, in_ci.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@each_way
def test_nothing_outlives_a_run_that_is_ended(
    lab_dir: Path, workers: tuple[str, ...], number: signal.Signals
) -> None:
    (lab_dir / "run").mkdir()
    (lab_dir / "run/test_it.py").write_text(
        textwrap.dedent(
            f"""
            import os, pathlib, signal
            def test_it(fake_qemu, qemu):
                targets = [fake_qemu(stubborn=True), qemu(), qemu(daemonize=True)]
                pids = " ".join(map(str, [os.getpid(), *(target.pid for target in targets)]))
                pathlib.Path({str(lab_dir)!r}, "pids").write_text(pids + " up")
                signal.pause()
            """
        )
    )
    log = Log(lab_dir / "pids")
    runner = process.spawn(
        [*PYTEST, f"--rootdir={lab_dir}", *workers, lab_dir / "run"],
        stdout=subprocess.DEVNULL,
        env=dict(os.environ) | {"PYTHONPATH": str(process.TOP)},
    )
    pidfds = {runner.pid: os.pidfd_open(runner.pid)}
    try:
        up = log.wait_for("^(.*) up$", pidfd=pidfds[runner.pid])
        tests, *targets = map(int, up[1].split())
        # The children include the process that kills the daemonized guest.
        families = {*targets, *process.children(tests), *process.children(runner.pid)}
        for pid in families:
            pidfds[pid] = os.pidfd_open(pid)
        runner.send_signal(number)
        assert all(process.wait_gone(pidfd, 30) for pidfd in pidfds.values())
    finally:
        process.end(runner)
        process.close_and_reap(pidfds)
