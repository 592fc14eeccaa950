"""The choice of the D-Bus library. qkilld behaves the same with each library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import library
from tests.lab.process import TOP

MESSAGES = """
import sys
from qkilld.bus.library import Message, MessageFlag, MessageType, Variant, encode
values = {"k": Variant("a(sst)", [["a", "b", 1]]), "n": Variant("t", 2**64 - 1)}
for serial, message in enumerate([
    Message(destination="a.b", path="/c", interface="d.e", member="F"),
    Message(destination="a.b", path="/c", interface="d.e", member="F", signature="uta{sv}",
            body=[1, 2, values], flags=MessageFlag.NO_REPLY_EXPECTED | MessageFlag.NO_AUTOSTART),
    Message(message_type=MessageType.METHOD_RETURN, reply_serial=7, destination=":1.5",
            signature="sa{sv}", body=["\\u00e4", values]),
    Message.new_signal("/a", "org.freedesktop.DBus.Properties", "PropertiesChanged", "sa{sv}as",
                       ["x.y", values, ["Held"]]),
], 1):
    message.serial = serial
    print(bytes(encode(message)).hex())
print(sys.modules[Message.__module__.partition(".")[0]].__name__, file=sys.stderr)
"""


FIRST = "dbus_next" if sys.version_info < (3, 15) else "dbus_fast"
"""The library that is used if both are installed."""


def run_with(*hidden: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run MESSAGES in a Python that cannot import these modules."""
    for name in hidden:
        for package in (directory / name, directory / name / "_private"):
            package.mkdir()
            (package / "__init__.py").write_text(f"raise AttributeError('no {name} here')\n")
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", MESSAGES],
        env={"PYTHONPATH": f"{directory}:{TOP}"},
        capture_output=True,
        text=True,
    )


def test_both_send_the_same_bytes(lab_dir: Path) -> None:
    (lab_dir / "nothing").mkdir()
    first = run_with(directory=lab_dir / "nothing")
    second = run_with("dbus_next", directory=lab_dir)
    assert (first.stderr, second.stderr) == (f"{FIRST}\n", "dbus_fast\n")
    assert first.stdout == second.stdout
    assert len(first.stdout.splitlines()) == 4


def test_glib_is_not_imported(lab_dir: Path) -> None:
    """Both libraries would import GLib, but qkilld does not need it."""
    for hidden, taken in (([], FIRST), (["dbus_next"], "dbus_fast")):
        directory = lab_dir / f"{taken}{len(hidden)}"
        directory.mkdir()
        done = run_with("gi", *hidden, directory=directory)
        assert (done.returncode, done.stderr) == (0, f"{taken}\n")


def test_neither_is_there(lab_dir: Path) -> None:
    done = run_with("dbus_next", "dbus_fast", directory=lab_dir)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "neither dbus-next (no dbus_next here) nor dbus-fast (no dbus_fast here)" in last
    assert "python3-dbus-fast" in last


def test_the_daemon_with_dbus_fast(request: pytest.FixtureRequest) -> None:
    """This runs some tests with dbus-fast. `make test-dbus-fast` runs all tests of the bus with
    it."""
    if request.config.getoption("--dbus-library") != library.NAMES[0]:
        pytest.skip("it is what runs")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("--dbus-library=dbus-fast", "-m", "each_library", "tests/bus", "tests/pure"),
        ],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
