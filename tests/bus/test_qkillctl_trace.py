"""qkillctl trace with the real daemon and a running guest: its output, its end, and that it stops
nothing."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.lab import bus as lab_bus
from tests.lab.bus import Bus, Daemon
from tests.lab.guest import Guest
from tests.lab.process import TOP, end, spawn

Make = Callable[..., Guest]


@contextmanager
def trace(bus: Bus, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = spawn(
        [sys.executable, "-m", "qkilld.ctl", "--bus", bus.address, "trace", *arguments],
        cwd=TOP,
        env=lab_bus.environment(bus.address),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        end(process)


def next_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode()


def test_until_it_is_gone(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(name="\x1b[2Jweb")
    with trace(daemon.bus, str(guest.pid)) as trace_process:
        assert next_line(trace_process) == f"\ufffd[2Jweb (pid {guest.pid}), sampled every second\n"
        assert re.match(r" +0\.\d s  idle: nothing moves", next_line(trace_process))
        assert guest.alive
        guest.signal(signal.SIGKILL)
        assert re.match(r" +\d+\.\d s  gone$", next_line(trace_process))
        assert trace_process.wait(30) == 0


def test_each_change_is_a_line(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu()
    with trace(daemon.bus, "--json", str(guest.pid)) as trace_process:
        assert json.loads(next_line(trace_process))["verdict"] == "idle"
        guest.signal(signal.SIGSTOP)
        stopped = json.loads(next_line(trace_process))
        assert stopped["verdict"] == "stopped"
        assert stopped["reasons"] == ["it is stopped (SIGSTOP)"]
        assert stopped["at_usec"] > 500_000
        guest.signal(signal.SIGCONT)
        assert json.loads(next_line(trace_process))["verdict"] == "idle"
        trace_process.send_signal(signal.SIGINT)
        assert trace_process.wait(30) == 130
    assert guest.alive


def test_it_ends_with_its_reader(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu()
    with trace(daemon.bus, str(guest.pid)) as trace_process:
        next_line(trace_process)
        next_line(trace_process)
        assert trace_process.stdout is not None
        trace_process.stdout.close()
        guest.signal(signal.SIGSTOP)  # qkillctl reports it
        assert trace_process.wait(30) == 0
    assert guest.alive


@pytest.mark.parametrize(("target", "code"), [("4194304", 7), ("no-such-guest", 7)])
def test_an_unobservable_target_has_its_exit_code(daemon: Daemon, target: str, code: int) -> None:
    with trace(daemon.bus, target) as trace_process:
        assert trace_process.wait(30) == code
        assert next_line(trace_process) == ""
