"""--debug and SYSTEMD_LOG_LEVEL: ignored failures are logged on request."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from qkilld import debug_log, log_setup
log_setup.set_up("program", debug=sys.argv[1] == "yes")
with debug_log.ignore("reading /x", OSError):
    raise FileNotFoundError("not\\x1b there")
try:
    with debug_log.ignore("reading /y", OSError):
        raise ValueError
except ValueError:
    pass
import logging
logging.getLogger("dbus_next").error("only its maintainers want to know")
"""


def run(*argv: str, level: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "SYSTEMD_LOG_LEVEL"}
    env |= {} if level is None else {"SYSTEMD_LOG_LEVEL": level}
    command = [sys.executable, *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("option", "level", "shown"),
    [
        ("no", None, False),
        ("yes", None, True),
        ("no", "debug", True),
        ("no", "7", True),
        ("no", "info", False),
        ("no", "nonsense", False),
    ],
)
def test_ignored_errors_are_logged(option: str, level: str | None, shown: bool) -> None:
    done = run("-c", PROGRAM, option, level=level)
    line = "program: debug: ignored while reading /x: FileNotFoundError: not\ufffd there\n"
    assert (done.returncode, done.stderr) == (0, line if shown else "")


@pytest.mark.parametrize(
    "argv",
    [
        ("-m", "qkilld.ctl", "--bus", "unix:path=/nonexistent", "list"),
        ("-m", "qkilld.stop", "--pid", "2147483646"),
        ("-m", "qkilld", "--bus", "unix:path=/nonexistent"),
    ],
)
def test_every_program_has_the_debug_option(argv: tuple[str, ...]) -> None:
    """The option changes neither the other output nor the exit code."""
    quiet, loud = run(*argv), run(*argv, "--debug")
    assert loud.returncode == quiet.returncode
    assert loud.stderr.endswith(quiet.stderr) or "debug: " in loud.stderr
    assert "Traceback" not in loud.stderr


REPEATED = """
from qkilld import debug_log, log_setup
log_setup.set_up("program", debug=True)
for pid in (7, 7, 8):
    debug_log.about(pid)
    debug_log.note_once("reading io", PermissionError(13, "Permission denied"))
    debug_log.note_once("reading io", PermissionError(13, "in other words"))
    debug_log.note_once("reading io", FileNotFoundError(2, "gone"))
    debug_log.note_unknown(["io"])
import logging
logging.shutdown()
"""


def test_repeated_failures_are_logged_once_per_process_and_cause() -> None:
    lines = run("-c", REPEATED).stderr.splitlines()
    each = [
        "program: debug: ignored while reading io of process {}: PermissionError: "
        "[Errno 13] Permission denied",
        "program: debug: ignored while reading io of process {}: FileNotFoundError: [Errno 2] gone",
        "program: debug: not known of process {}: io",
    ]
    assert lines == [line.format(pid) for pid in (7, 8) for line in each]


BROKEN = """
import os, sys, time
from qkilld import debug_log, log_setup
log_setup.set_up("program", debug=True)
sys.stderr.close()
debug_log.note_once("testing", "a line that cannot be written")
import logging
logging.shutdown()
times = os.times()
print(times.user + times.system < 5)
"""


def test_a_log_that_cannot_be_written_is_no_endless_loop() -> None:
    assert run("-c", BROKEN).stdout == "True\n"
