"""qkillctl watch with a real daemon: on terminals, in pipes, and during an outage of the daemon."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from qkilld.model.constants import JOB_INTERFACE
from tests.bus.test_qkillctl import HOSTILE, StartCtl, argv, start_ctl
from tests.lab import bus as lab_bus
from tests.lab.bus import Bus, Client, Daemon
from tests.lab.guest import Guest
from tests.lab.terminal import OnTerminal, on_terminal

Make = Callable[..., Guest]
Start = Callable[..., Daemon]
FORCE = 1
__all__ = ["start_ctl"]  # the fixture is in another file


@contextlib.contextmanager
def watching(bus: Bus, *, columns: int = 100, rows: int = 24) -> Iterator[OnTerminal]:
    environment = {
        name: value
        for name, value in lab_bus.environment(bus.address).items()
        if name not in ("COLUMNS", "LINES")
    }
    env = environment | {"TERM": "xterm-256color"}
    with on_terminal(argv(bus, "watch"), env, size=(columns, rows), keys=True) as running:
        yield running


def start(client: Client, fake_qemu: Make, name: str, flags: int = FORCE) -> tuple[Guest, str]:
    guest = fake_qemu(name=name, stubborn=True)
    spans = {"grace_usec": ("t", 3600_000_000), "stall_usec": ("t", 3600_000_000)}
    return guest, client.terminate(guest.pid, flags, **spans)


def test_keys_steer_the_chosen_job(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    web, job = start(client, fake_qemu, f"web{HOSTILE}")
    with watching(daemon.bus, columns=140) as running:
        screen = running.screen
        screen.wait_for_new(r"1 guest is being stopped")
        screen.wait_for_new(rf"\(pid {web.pid}\) .*\d:\d\d .*SIGKILL (in|only after) (1h|59min)")
        db, other = start(client, fake_qemu, "db")
        screen.wait_for_new(r"2 guests are being stopped(?s:.*)db \(pid")
        screen.type("h")
        screen.wait_for_new(rf"\(pid {web.pid}\) held: no more signals until")
        assert client.properties(job, JOB_INTERFACE)["Held"] is True
        screen.type("r")
        screen.wait_for_new("released: the stop continues")
        screen.type("e")
        screen.wait_for_new("Send .* no SIGKILL for")
        screen.type("2hx\x7f\r")
        screen.wait_for_new("extended: no SIGKILL for 2h")
        screen.type("\x1b[B")
        screen.type("f")
        screen.wait_for_new(rf"Send db \(pid {db.pid}\) SIGKILL now.*Type yes")
        screen.type("y\r")
        screen.wait_for_new("Nothing was done")
        assert db.alive
        screen.type("fyes\r")
        screen.wait_for_new(rf"db \(pid {db.pid}\): gone after .* by SIGKILL")
        assert client.wait(other)[0] == "killed"
        screen.type("kcyes\r")
        screen.wait_for_new("cancelled after")
        assert client.wait(job)[0] == "cancelled" and web.alive
        screen.type("?")
        screen.wait_for_new("Press any key to return")
        screen.type(" q")
        assert running.process.wait(30) == 0
    assert "\u202e" not in screen.text and "[bold]" in screen.text


@pytest.mark.parametrize(
    ("how", "code"),
    [("q", 0), (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_the_terminal_is_given_back(
    daemon: Daemon, client: Client, fake_qemu: Make, how: str | signal.Signals, code: int
) -> None:
    start(client, fake_qemu, "web")
    with watching(daemon.bus) as running:
        before = running.settings()
        running.screen.wait_for_new("web")
        assert running.settings() != before
        if isinstance(how, str):
            running.screen.type(how)
        else:
            running.process.send_signal(how)
        assert running.process.wait(30) == code
        assert running.settings() == before
        # The cursor and the earlier content of the terminal are visible again.
        running.screen.wait_for(r"\x1b\[\?1049h(?s:.*)\x1b\[\?1049l")
        running.screen.wait_for(r"\x1b\[\?25l(?s:.*)\x1b\[\?25h")
    assert "Traceback" not in running.screen.text


def test_ctrl_z_gives_it_back_for_a_while(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    start(client, fake_qemu, "web")
    with watching(daemon.bus) as running:
        before = running.settings()
        running.screen.wait_for_new("web")
        running.process.send_signal(signal.SIGTSTP)
        os.waitid(os.P_PID, running.process.pid, os.WSTOPPED)
        assert running.settings() == before
        running.process.send_signal(signal.SIGCONT)
        running.screen.wait_for(r"\x1b\[\?1049l(?s:.*)\x1b\[\?1049h(?s:.*)web")
        assert running.settings() != before
        running.screen.type("q")
        assert running.process.wait(30) == 0
        assert running.settings() == before


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_every_width(daemon: Daemon, client: Client, fake_qemu: Make, columns: int) -> None:
    start(client, fake_qemu, "a-guest-with-a-rather-long-name-indeed")
    with watching(daemon.bus, columns=columns, rows=10) as running:
        running.screen.wait_for_new(r"\d:\d\d +SIGKILL")
        running.resize(120, 24)
        running.process.send_signal(signal.SIGWINCH)
        running.screen.wait_for_new("SIGKILL (only after|in .* unless)")
        running.screen.type("q")
        assert running.process.wait(30) == 0


def test_a_daemon_that_goes_and_comes_back(
    start_daemon: Start, private_bus: Bus, fake_qemu: Make
) -> None:
    first = start_daemon()
    with private_bus.client() as client, watching(private_bus) as running:
        running.screen.wait_for_new("No guest is being stopped")
        start(client, fake_qemu, "web")
        running.screen.wait_for_new("web")
        first.stop(signal.SIGKILL)
        running.screen.wait_for_new("qkilld is not running; this list may be outdated")
        running.screen.type("h")
        running.screen.wait_for_new("web .*not running")
        start_daemon()
        start(client, fake_qemu, "db")
        running.screen.wait_for_new(r"db \(pid")
        running.screen.type("q")
        assert running.process.wait(30) == 0


def test_in_a_pipe_there_are_lines(
    daemon: Daemon, client: Client, fake_qemu: Make, start_ctl: StartCtl
) -> None:
    guest, job = start(client, fake_qemu, "web")
    running = start_ctl("watch")
    running.wait_for(rf"web \(pid {guest.pid}\): (SIGTERM sent|idle, does not exit); SIGKILL")
    client.cancel(job)
    running.wait_for(rf"web \(pid {guest.pid}\): cancelled after")
    second, _ = start(client, fake_qemu, "db", flags=2)
    running.wait_for(rf"db \(pid {second.pid}\): SIGTERM was sent, and the process is not watched")
    signal.pidfd_send_signal(running.pidfd, signal.SIGINT)
    assert running.wait() == 130


def test_as_json_there_is_an_object_on_each_line(
    daemon: Daemon, client: Client, fake_qemu: Make, start_ctl: StartCtl
) -> None:
    guest, job = start(client, fake_qemu, "web")
    running = start_ctl("--json", "watch")
    running.wait_for('"verdict": "idle"')
    client.cancel(job)
    running.wait_for('"result": "cancelled"(?=.*"receipt": {)')
    documents = [json.loads(line) for line in running.out.lines()]
    assert documents[0]["job"]["pid"] == guest.pid
    assert documents[-1]["job"]["receipt"]["requested_by"] == os.getuid()
    signal.pidfd_send_signal(running.pidfd, signal.SIGINT)
    assert running.wait() == 130


def test_without_a_bus_it_says_so(private_bus: Bus, start_ctl: StartCtl) -> None:
    private_bus.stop()
    running = start_ctl("watch")
    assert running.wait() == 1
    assert "cannot connect to the bus" in running.err.text()


def test_a_hundred_jobs(daemon: Daemon, client: Client, fake_qemu: Make) -> None:
    """There are too many jobs for the screen, and for the open calls of one connection."""
    for number in range(100):
        start(client, fake_qemu, f"guest{number}")
    with watching(daemon.bus) as running:
        running.screen.wait_for_new("100 guests are being stopped", timeout=60)
        running.screen.wait_for_new(r"… and \d+ more")
        began = time.monotonic()
        running.screen.type("q")
        assert running.process.wait(30) == 0
        assert time.monotonic() - began < 20
