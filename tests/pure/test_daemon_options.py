"""A command line that is read plainly means the same to argparse."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qkilld import daemon_options
from qkilld.daemon_arguments import build_parser, parse
from qkilld.daemon_options import DaemonOptions, read_plainly


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--exit-idle 60s",
        "--user",
        "--bus unix:path=/run/bus --root /tmp/r --debug",
        "--check-config --root ''",
        "--varlink /run/socket --trace-dir traces --exit-idle '1min 30s'",
    ],
)
def test_plain_ones(line: str) -> None:
    argv = shlex.split(line)
    assert read_plainly(argv) == parse(argv)


def test_what_is_read() -> None:
    assert read_plainly(["--exit-idle", "1min", "--root", "/r"]) == DaemonOptions(
        exit_idle_s=60, root=Path("/r")
    )


@pytest.mark.parametrize(
    "line",
    [
        *("--help", "--version", "--nonsense", "word", "--", "-h"),
        *("--exit-idle", "--exit-idle soon", "--exit-idle=60s", "--exit 60s"),
        *("--root", "--root --user", "--bus -x", "--user --bus ADDRESS", "--user --user"),
        "--root a --root b",
    ],
)
def test_all_others_are_left_to_argparse(line: str) -> None:
    assert read_plainly(shlex.split(line)) is None


def test_every_option_can_be_read_plainly() -> None:
    options = {option for action in build_parser()._actions for option in action.option_strings}
    plain = {*daemon_options.FLAGS, *daemon_options.VALUES}
    assert plain == options - {"-h", "--help", "--version"}


def test_a_start_takes_no_argparse(tmp_path: Path) -> None:
    program = (
        "import sys; from qkilld.daemon import main; code = main(); costly = "
        "{'argparse', 'shutil', 'locale', 'uuid', 'platform'}; "
        "print(code, *sorted(costly & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--root", str(tmp_path), "--check-config"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["The configuration is good.", "0"], done.stderr
