"""The examples under dbus/examples, unchanged, with a real daemon."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import bus as lab_bus
from tests.lab import needs
from tests.lab.bus import Daemon
from tests.lab.guest import Guest
from tests.lab.process import TOP, end, run, spawn

Make = Callable[..., Guest]
EXAMPLES = TOP / "dbus/examples"
GI = "python3-gi"


def environment(daemon: Daemon) -> dict[str, str]:
    """The environment of an example. It hides the project's modules, because the example must not
    need them."""
    return {
        name: value
        for name, value in lab_bus.environment(daemon.bus.address).items()
        if name != "PYTHONPATH"
    }


def system_python(daemon: Daemon) -> str:
    """Debian's Python, which has GLib's bindings."""
    python = str(needs.program("/usr/bin/python3", "python3"))
    done = run([python, "-c", "import gi"], env=environment(daemon))
    if done.returncode:
        raise needs.Missing(f"{GI}: apt install {GI} gir1.2-gtk-3.0")
    return python


def test_python_with_dbus_fast(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu(name="web")
    command: list[str | Path] = [sys.executable, EXAMPLES / "stop.py"]
    done = run([*command, "nobody"], env=environment(daemon))
    assert (done.returncode, done.stdout) == (7, "0 guests have this name\n")
    done = run([*command, "web"], env=environment(daemon), check=True)
    assert done.stdout.splitlines()[-1].startswith("exited after ")
    assert not guest.alive


def test_python_with_glib(daemon: Daemon, fake_qemu: Make) -> None:
    guest = fake_qemu()
    command: list[str | Path] = [system_python(daemon), EXAMPLES / "stop_glib.py"]
    done = run([*command, str(guest.pid)], env=environment(daemon), check=True)
    assert done.stdout.splitlines()[-1].startswith("exited after ")
    done = run([*command, str(os.getpid())], env=environment(daemon))
    assert done.returncode == 1 and "is not a QEMU" in done.stdout


def test_c_with_sd_bus(daemon: Daemon, fake_qemu: Make, lab_dir: Path) -> None:
    guest = fake_qemu()
    compiler = needs.program("cc", "gcc")
    found = run(["pkg-config", "--cflags", "--libs", "libsystemd"])
    if found.returncode:
        raise needs.Missing("libsystemd-dev")
    flags = found.stdout.split()
    source, program = EXAMPLES / "stop.c", lab_dir / "stop"
    run([compiler, "-Wall", "-Wextra", "-Werror", source, *flags, "-o", program], check=True)
    done = run([program, str(guest.pid)], env=environment(daemon), check=True)
    path, last = done.stdout.splitlines()
    assert path == "/org/qkilld1/job/1" and last.startswith("exited after ")
    done = run([program, str(os.getpid())], env=environment(daemon))
    assert done.returncode == 1 and "is not a QEMU" in done.stderr


@contextlib.contextmanager
def display(directory: Path) -> Iterator[str]:
    """A virtual X display."""
    server = needs.program("Xvfb", "xvfb")
    said = directory / "display"
    with said.open("wb") as out:
        process = spawn([server, "-displayfd", "1", "-screen", "0", "640x480x24"], stdout=out)
    try:
        with subprocess.Popen(["tail", "-F", said], stdout=subprocess.PIPE, text=True) as reading:
            assert reading.stdout is not None
            number = reading.stdout.readline().strip()
            reading.terminate()
        yield f":{number}"
    finally:
        end(process)


def test_the_window(daemon: Daemon, fake_qemu: Make, lab_dir: Path) -> None:
    """The window lists guests, stops the selected one, and shows its exit."""
    fake_qemu(name="other")
    guest = fake_qemu(name="web")
    python = system_python(daemon)
    if run([python, "-c", "import gi; gi.require_version('Gtk', '3.0')"]).returncode:
        raise needs.Missing("gir1.2-gtk-3.0")
    with display(lab_dir) as number:
        env = environment(daemon) | {"DISPLAY": number, "NO_AT_BRIDGE": "1"}
        done = run([python, EXAMPLES / "guests.py", "web"], env=env, check=True, timeout=120)
    assert done.stdout == "web is gone\n"
    assert not guest.alive


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.*")), ids=lambda path: str(path.name))
def test_each_example_is_told_of(path: Path) -> None:
    assert f"examples/{path.name}" in (TOP / "dbus/README.md").read_text()
