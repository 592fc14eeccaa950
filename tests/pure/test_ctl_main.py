"""The command line: options, usage errors, and errors without a bus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qkilld import __version__
from qkilld.ctl.main import main

TOP = Path(__file__).parents[2]
NOWHERE = "unix:path=/nonexistent/bus"


def exit_code(*arguments: str) -> int:
    """Return the exit code of a run that ends in argparse."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "COMMAND"),
        (["reboot"], 'no COMMAND "reboot". See qkillctl --help'),
        (["termnate", "web"], "Did you mean terminate?"),
        (["terminate", "--focre", "web"], "Did you mean --force?"),
        (["terminate", "--gracee=5s", "web"], "Did you mean --grace?"),
        (["--jason", "list"], "Did you mean --json?"),
        (["cancel", "--force", "web"], "unrecognized arguments: --force\n"),
        (["terminate"], "TARGET"),
        (["terminate"], "usage: qkillctl terminate "),
        (["terminate", "--focre", "web"], "usage: qkillctl terminate "),
        (["adopt", "--all"], "usage: qkillctl adopt "),
        (["metrics", "--json"], "metrics prints OpenMetrics text: leave out --json"),
        (["--json", "timeline", "job:1"], "timeline prints SVG: leave out --json"),
        (["terminate", "--all", "one"], "leave out either --all or one"),
        (["cancel"], "TARGET"),
        (["force"], "TARGET"),
        (["extend", "web"], "SPAN"),
        (["extend", "5min"], "TARGET"),
        (["inspect"], "TARGET"),
        (["terminate", "--wait", "--no-wait", "web"], "--no-wait"),
        (["terminate", "--no-wait", "--grace", "5s", "web"], "--grace"),
        (["terminate", "--thaw", "web"], "--thaw has no meaning without --powerdown"),
        (["terminate", "--powerdown-sec", "5s", "web"], "--powerdown-sec has no meaning"),
        (["terminate", "--powerdown", "--fixed", "web"], "--fixed"),
        (["terminate", "--powerdown-only", "--force", "web"], "--force has no meaning"),
        (["terminate", "--powerdown", "--force", "--no-wait", "web"], "--force has no meaning"),
        (["terminate", "--powerdown", "--all", "--qmp-socket", "/q"], "--qmp-socket"),
        (["terminate", "--grace", "soon", "web"], "--grace"),
        (["terminate", "--grace", "", "web"], "--grace"),
        (["terminate", "--reason", "x" * 257, "web"], "--reason"),
        (["terminate", "--reason", "\udcff", "web"], "--reason"),
        (["terminate", "--for", "web"], "--for"),  # later, an abbreviation may mean another option
        (["--user", "--system", "list"], "--system"),
        (["list", "--user", "--bus", NOWHERE], "--bus"),
        (["list", "--bus", ""], "--bus"),
        (["list", "web"], "web"),
        (["adopt"], "UNIT"),
        (["adopt", "--force", "web"], "--force"),
    ],
)
def test_usage_errors(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert part in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"qkillctl {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        *("list", "status", "inspect", "jobs", "terminate", "check-unit", "adopt"),
        *("cancel", "hold", "release", "extend", "force"),
    ],
)
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    assert f"qkillctl {command}" in capsys.readouterr().out


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    for part in ("examples", "exit codes", "pidfile:", "qkillctl terminate --wait web", "--bus"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run qkillctl as a separate program, because dbus_next keeps the socket of a failed
    connection."""
    return subprocess.run(
        [sys.executable, "-m", "qkilld.ctl", *arguments],
        env=os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": NOWHERE, "DBUS_SESSION_BUS_ADDRESS": NOWHERE},
        cwd=TOP,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--bus", NOWHERE, "list"], [NOWHERE, "qkilld --bus"]),
        (["list", "--bus", NOWHERE], [NOWHERE, "qkilld --bus"]),
        (["--user", "list"], ["session bus", "systemctl --user status qkilld"]),
        (["list"], ["system bus", "systemctl status qkilld", "--user"]),
        (["--user", "list", "--system"], ["system bus"]),
        (["--bus", "unix:path=/nowhere/bus", "list"], ["bus: No such file or directory. Check"]),
        (["--bus", "unix", "list"], ["bus at unix"]),
        (["--bus", "tcp:port=x", "list"], ["bus at tcp:port=x"]),
        (["--bus", "no-such-transport:x=y", "list"], ["no-such-transport"]),
        (["--bus", "unix:path=/\x1b[2J", "list"], ["unix:path=/\ufffd[2J"]),
    ],
)
def test_no_bus(arguments: list[str], parts: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qkillctl: cannot connect to the ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize("command", [["list"], ["status", "1"]])
def test_no_bus_as_json(command: list[str]) -> None:
    done = run("--json", *command)
    document = json.loads(done.stdout)
    assert document["exit_code"] == done.returncode == 1
    assert document["error"]["name"] == "org.qkilld1.Client.BusError"
    assert document["error"]["message"] in done.stderr


@pytest.mark.parametrize("command", ["terminate", "cancel", "hold", "extend 5s"])
def test_no_bus_as_json_for_each_target(command: str) -> None:
    done = run(*command.split(), "--json", "1", "web")
    document = json.loads(done.stdout)
    assert [outcome["target"] for outcome in document] == ["1", "web"]
    assert {outcome["error"]["name"] for outcome in document} == {"org.qkilld1.Client.BusError"}
    assert {outcome["exit_code"] for outcome in document} == {done.returncode} == {1}


def test_a_malformed_target_needs_no_bus() -> None:
    done = run("inspect", "pid:x")
    assert done.returncode == 2
    assert done.stderr.startswith('qkillctl: "x" is not a process id')
