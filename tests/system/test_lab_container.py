"""The container itself: a real systemd that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.lab import container as lab_container
from tests.lab import needs, process
from tests.lab.container import Container
from tests.lab.log import Log


def test_its_systemd_comes_up_with_nothing_failed() -> None:
    with lab_container.boot() as fresh:
        assert fresh.run("systemctl", "is-system-running").stdout == "running\n"


def test_a_guest_runs_as_a_unit_of_the_container(container: Container) -> None:
    container.run(
        *("systemd-run", "--unit=lab-guest", "qemu-system-x86_64"),
        *("-M", "none", "-nodefaults", "-display", "none"),
    )
    assert int(container.property("lab-guest.service", "MainPID")) > 1
    container.run("systemctl", "stop", "lab-guest.service")
    entry = container.wait_journal("-u", "lab-guest.service", "--grep=^Stopped")
    assert entry["_COMM"] == "systemd"
    assert entry in container.journal("-u", "lab-guest.service")


def test_it_holds_the_checkout_and_nothing_written_shows_outside(container: Container) -> None:
    done = container.python("-c", "import qkilld, systemd.journal; print(qkilld.__file__)")
    assert done.stdout == "/opt/qkilld/qkilld/__init__.py\n"
    path = f"/etc/qkilld-lab-{os.getpid()}/file"
    container.write(path, "text\n", 0o600)
    assert container.run("stat", "-c", "%a %s", path).stdout == "600 5\n"
    assert not Path(path).exists()
    assert container.run("id", "-u", uid=process.OTHER_UID).stdout == f"{process.OTHER_UID}\n"


def test_a_command_that_is_given_up_is_gone_inside_too(container: Container) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        container.run("sleep", "987654", timeout=0.5)
    assert "sleep" not in container.run("ps", "-eo", "comm").stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_container_outlives_a_run_that_is_ended(lab_dir: Path, number: signal.Signals) -> None:
    needs.root("a container")
    script = f"""
        import pathlib, signal
        from tests.lab import container, scratch
        def interrupt(number, frame):
            raise KeyboardInterrupt
        signal.signal(signal.SIGTERM, interrupt)
        try:
            with container.boot() as booted:
                up = f"{{booted.leader}} {{booted.name}}\\n"
                pathlib.Path({str(lab_dir)!r}, "up").write_text(up)
                signal.pause()
        finally:
            scratch.remove_run_directory()
    """
    log = Log(lab_dir / "up")
    runner = process.spawn(
        [sys.executable, "-c", textwrap.dedent(script)],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(process.TOP)},
    )
    pidfds = {runner.pid: os.pidfd_open(runner.pid)}
    try:
        up = log.wait_for(r"^(\d+) (\S+)\n", pidfd=pidfds[runner.pid])
        for pid in [int(up[1]), *process.children(runner.pid)]:
            pidfds[pid] = os.pidfd_open(pid)
        assert len(pidfds) == 4, "the runner, nspawn, the guard of its cgroup, systemd"
        runner.send_signal(number)
        assert all(process.wait_gone(pidfd, 30) for pidfd in pidfds.values())
    finally:
        process.end(runner)
        process.close_and_reap(pidfds)
    # Unlike rglob, os.walk ignores groups of other tests that are removed meanwhile.
    assert [path for path, _, _ in os.walk("/sys/fs/cgroup") if Path(path).name == up[2]] == []
