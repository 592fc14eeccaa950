"""check-unit knows which arguments qkilld-stop refuses."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace

import pytest

from qkilld.model.unit import Command
from qkilld.stop.arguments import build_parser, parse
from qkilld.unitcheck import helper_usage
from qkilld.unitcheck.helper_usage import stops_own_unit, usage_fault


def line(*words: str) -> Command:
    return Command("/usr/bin/qkilld-stop", ("qkilld-stop", *words))


def test_the_options_are_those_of_the_program() -> None:
    parser = build_parser()
    options = {name: action for action in parser._actions for name in action.option_strings}
    printing = {
        name
        for name, action in options.items()
        if isinstance(action, argparse._HelpAction | argparse._VersionAction)
    }
    assert printing == helper_usage.PRINTING
    with_value = {name for name, action in options.items() if action.nargs != 0}
    assert with_value == helper_usage.WITH_VALUE
    assert options.keys() - with_value - printing == helper_usage.WITHOUT_VALUE
    exclusive = [
        tuple(action.option_strings[0] for action in group._group_actions)
        for group in parser._mutually_exclusive_groups
    ]
    assert exclusive == list(helper_usage.EXCLUSIVE)


@pytest.mark.parametrize(
    ("words", "is_valid"),
    [
        ("", True),
        ("--pid 1 --force --debug", True),
        ("--pid=1 --max=3s --reason=x=y", True),
        ("--pidfile /run/a.pid --stall 1min --no-powerdown", True),
        ("--dry-run --json", True),
        ("--json", False),
        ("123", False),
        ("--max", False),
        ("--max --force", False),
        ("--max soon", False),
        ("--max=", False),
        ("--timeout 5min", False),
        ("--force=yes", False),
        ("--pid 1 --pidfile /run/a.pid", False),
        ("--force --no-force", False),
        ("--powerdown --no-powerdown", False),
        ("-f", False),
        ("--reason -5", True),
        ("--reason '-stop now'", True),
        ("--reason -stop", False),
        ("--reason '--max=3 s'", False),
        ("--pidfile -", True),
        ("--socket '-x y'", True),
        (f"--reason {'x' * 256}", True),
        (f"--reason {'x' * 257}", False),
        ("--reason \udcff", False),
        ("--pid '--x y'", False),
        ("--pid=x --pid 1", False),
        ("--pid 1 --pid=0", False),
        ("--max soon --max 3", False),
        ("--pid 2147483648", False),
    ],
)
def test_what_the_program_accepts(
    capsys: pytest.CaptureFixture[str], words: str, is_valid: bool
) -> None:
    try:
        parse(shlex.split(words))
        accepted = True
    except SystemExit as error:
        assert error.code == 2
        accepted = False
    assert accepted is is_valid
    assert (not usage_fault(line(*shlex.split(words)))) is is_valid


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("$MAINPID", "does not accept $MAINPID"),
        ("${MAINPID}", "does not accept ${MAINPID}"),
        ("--pid=$MAINPID", "does not expand --pid=$MAINPID"),
        ("--version", "because of --version"),
        ("--pid $MAINPID", ""),
        ("--pid ${MAINPID}", ""),
        ("--pid=${MAINPID}", ""),
        ("--pid", ""),
        ("$OPTIONS --max $MAX", ""),
        ("$OPTION 5min", ""),
        ("${OPTION} 5min --force", ""),
        ("--max ${MAX}", ""),
        ("--max=${MAX}", ""),
        ("--max=$MAX", "does not expand --max=$MAX. Write --max $MAX"),
        ("--pidfile=$FILE", "does not expand --pidfile=$FILE"),
    ],
)
def test_variables(words: str, fault: str) -> None:
    found = usage_fault(line(*words.split()))
    assert fault in found if fault else not found
    if words == "--pid=$MAINPID":  # A shell expands it.
        shell = Command("/bin/sh", ("sh", "-c", f"exec qkilld-stop {words}"))
        assert usage_fault(shell) == ""


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--max ${MAX}", "--max ${MAX} is not a time"),
        ("$OPTIONS", "does not accept $OPTIONS"),
        ("--pid $MAINPID", "gets no process id"),
        ("--pidfile /run/a.pid", ""),
    ],
)
def test_a_line_in_which_systemd_expands_nothing(words: str, fault: str) -> None:
    command = replace(line(*words.split()), flags=("no-env-expand",))
    assert fault in usage_fault(command) if fault else not usage_fault(command)


@pytest.mark.parametrize(
    ("words", "certain"),
    [
        ("", True),
        ("--force --reason x --max 3s", True),
        ("--pid $MAINPID", True),
        ("--pid=${MAINPID}", True),
        ("--pidfile /run/b.pid", True),
        ("--pidfile ${DIRECTORY}/b.pid", True),
        ("--pidfile=${FILE}", True),
        ("--pidfile $FILE", False),
        ("--pidfile=$FILE", False),
        ("--pid 7", False),
        ("--unit web", False),
        ("--all", False),
        ("--dry-run", False),
        ("$OPTIONS", False),
        ("${OPTIONS} --pidfile /run/b.pid", False),
        ("--max $MAX", False),
        ("--pid $MAINPID $OPTIONS", False),
        ("--version", False),
        ("--max soon", False),
        # systemd drops the word if the main process is gone.
        ("--reason $MAINPID --pid $MAINPID", False),
        ("--pid=7 --pid $MAINPID", False),
        ("--pidfile $FILE --pidfile a", False),
        (f"--reason {'x' * 257}", False),
    ],
)
def test_a_line_that_certainly_stops_guests_of_its_unit(words: str, certain: bool) -> None:
    assert stops_own_unit(line(*words.split())) is certain
    assert stops_own_unit(Command("/bin/sh", ("sh", "-c", f"qkilld-stop {words} || x"))) is False
    if "$" not in words:
        shell = Command("/bin/sh", ("sh", "-c", f"exec qkilld-stop {words}"))
        assert stops_own_unit(shell) is certain
    wrapped = Command("/usr/bin/timeout", ("timeout", "60", "qkilld-stop", *words.split()))
    assert not stops_own_unit(wrapped)
