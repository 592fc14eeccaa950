"""The command line of the daemon."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import qkilld
from qkilld.daemon_arguments import build_parser
from qkilld.daemon_options import DaemonOptions, parse

UNITS = Path(__file__).parents[2] / "units"


def command_line_of(unit: str) -> list[str]:
    lines = re.findall(r"^ExecStart=\S+ (.*)$", (UNITS / unit).read_text(), re.MULTILINE)
    return str(lines[0]).split()


OF_UNIT = command_line_of("qkilld.service")
OF_USER_UNIT = command_line_of("user/qkilld.service")
START = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import gc
import qkilld.daemon
import qkilld.daemon_options
import qkilld.startup
assert gc.isenabled()
qkilld.startup.run = lambda options: 0 if not gc.isenabled() else 1
assert qkilld.daemon.main() == 0
print(*sorted(name for name, module in sys.modules.items() if type(module) is type(sys)))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        OF_UNIT,
        OF_USER_UNIT,
        ["--exit-idle=5min"],
        ["--user", "--root", "/r"],
        ["--bus", "b", "--debug"],
        ["--varlink", "/s", "--trace-dir", "/t", "--bus", "b", "--bus", "c"],
        ["--exit", "5"],
    ],
)
def test_the_same_with_and_without_argparse(arguments: list[str]) -> None:
    assert parse(arguments) == DaemonOptions(**vars(build_parser().parse_args(arguments)))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--exit-idle", "soon"],
        ["--exit-idle"],
        ["exit"],
        ["--user", "--bus", "b"],
        ["--bus", "--user"],
        ["--trace-dir", "-t"],
    ],
)
def test_a_wrong_one(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert "usage: qkilld" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [OF_UNIT, OF_USER_UNIT])
def test_the_unit_starts_it_without_argparse(arguments: list[str]) -> None:
    """No garbage collection runs during the imports, either."""
    top = str(Path(qkilld.__file__).parents[1])
    command = [sys.executable, "-I", "-S", "-c", START, top, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {"argparse", "gettext", "locale", "shutil"} & set(done.stdout.split())
