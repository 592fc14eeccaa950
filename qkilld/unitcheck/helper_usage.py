"""Find out whether qkilld-stop would refuse its arguments. It then exits with 2 and stops nothing.

The options are those of stop.arguments.build_parser(), as tests/pure/test_helper_usage.py proves.
"""

from __future__ import annotations

import re
from typing import Final

from qkilld.model import timespan
from qkilld.model.policy import JOB_SPANS
from qkilld.model.unit import Command
from qkilld.unitcheck.command import helper_options, helper_program, helper_words, is_helper

SPANS: Final = frozenset(span.argument for span in JOB_SPANS)
WITH_VALUE: Final = SPANS | {"--pid", "--pidfile", "--unit", "--reason", "--socket"}
WITHOUT_VALUE: Final = frozenset(
    [
        "--all",
        "--force",
        "--no-force",
        "--powerdown",
        "--no-powerdown",
        "--dry-run",
        "--json",
        "--debug",
    ]
)
PRINTING: Final = frozenset(["-h", "--help", "--version"])
EXCLUSIVE: Final = (
    ("--pid", "--pidfile", "--unit", "--all"),
    ("--force", "--no-force"),
    ("--powerdown", "--no-powerdown"),
)
OTHER_TARGETS: Final = frozenset(["--unit", "--all", "--dry-run"])
"""With these options, qkilld-stop does not stop the guests of its unit."""
_OPTIONS: Final = WITH_VALUE | WITHOUT_VALUE | PRINTING
_VARIABLE: Final = re.compile(r"\$(?:\w+|\{\w+\})", re.ASCII)
_WORDS: Final = re.compile(r"\$\w+", re.ASCII)
"""A variable that systemd expands to any number of words, but only if it is a word by itself."""
_NUMBER: Final = re.compile(r"-\d+|-\d*\.\d+")
_MAIN_PID: Final = ("$MAINPID", "${MAINPID}")


def stops_own_unit(command: Command) -> bool:
    """Return whether it is certain that a line of ExecStop= runs qkilld-stop directly, and that it
    stops guests of its own unit."""
    if not is_helper(command) or usage_fault(command):
        return False
    options = helper_options(command)
    pid, pidfile = options.get("--pid", ""), options.get("--pidfile", "")
    if pid not in ("", *_MAIN_PID) or _WORDS.fullmatch(pidfile) or options.keys() & OTHER_TARGETS:
        return False
    # Other variables may contain anything, for example another target.
    words = (
        word.removeprefix("--pid=").removeprefix("--pidfile=") for word in helper_words(command)
    )
    return not any("$" in word for word in words if word not in (pid, pidfile))


def usage_fault(command: Command) -> str:
    """Return why this line of qkilld-stop stops nothing, as a clause without a subject; "" if its
    arguments are valid, or if that depends on a variable."""
    in_shell = helper_program(command) != command.path
    expands = in_shell or "no-env-expand" not in command.flags
    words, given = list(helper_words(command)), set()
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in PRINTING:
            return f"stops nothing, because of {word}"
        if expands and _VARIABLE.fullmatch(word) and word not in _MAIN_PID:
            # The variable may contain any options, or nothing. The next word may be its value.
            if words and not _is_option(words[0]):
                words.pop(0)
            continue
        if name not in WITH_VALUE | WITHOUT_VALUE or (equals and name in WITHOUT_VALUE):
            return f"stops nothing, because it does not accept {word}"
        given.add(name)
        if name in WITHOUT_VALUE:
            continue
        if not equals:
            if words and not _is_option(words[0]):
                value = words.pop(0)
            elif name != "--pid":
                return f"stops nothing, because {name} has no value"
        elif expands and not in_shell and _WORDS.fullmatch(value):
            return f"stops nothing, because systemd does not expand {word}. Write {name} {value}"
        if name == "--pid" and "$" in value and not expands:
            return "gets no process id, because of the prefix :"
        if name in SPANS and not (expands and "$" in value) and not _is_span(value):
            return f"stops nothing, because {name} {value} is not a time"
    for group in EXCLUSIVE:
        if len(both := [name for name in group if name in given]) > 1:
            return f"stops nothing, because it does not accept {both[0]} with {both[1]}"
    if "--json" in given and "--dry-run" not in given:
        return "stops nothing, because it accepts --json only with --dry-run"
    return ""


def _is_option(word: str) -> bool:
    """Return whether argparse takes the word for an option, and not for the value of one."""
    if not word.startswith("-") or word == "-":
        return False
    if word.partition("=")[0] in _OPTIONS or word.startswith("-h"):
        return True
    return " " not in word and _NUMBER.fullmatch(word) is None


def _is_span(text: str) -> bool:
    try:
        timespan.parse(text)
    except ValueError:
        return False
    return True
