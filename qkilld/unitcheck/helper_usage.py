"""Find out whether qkilld-stop would refuse its arguments. It then exits with 2 and stops nothing.

The options are those of stop.arguments.build_parser(), as tests/pure/test_helper_usage.py proves.
"""

from __future__ import annotations

import re
from typing import Final

from qkilld.model import timespan
from qkilld.model.policy import JOB_SPANS
from qkilld.model.text import check_reason, is_pid, printable
from qkilld.model.unit import Command
from qkilld.unitcheck.command import helper_program, helper_words, is_helper

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
    if not is_helper(command):
        return False
    fault, options = _read(command)
    if fault or options.keys() & OTHER_TARGETS:
        return False
    # Other variables may contain anything, for example another target.
    return not any(
        ("$" in name + value and name not in ("--pid", "--pidfile"))
        or (name == "--pid" and value not in ("", *_MAIN_PID))
        or (name == "--pidfile" and _WORDS.fullmatch(value))
        for name, values in options.items()
        for value in values
    )


def usage_fault(command: Command) -> str:
    """Return why this line of qkilld-stop stops nothing, as a clause without a subject; "" if its
    arguments are valid, or if that depends on a variable."""
    return _read(command)[0]


def helper_options(command: Command) -> dict[str, str]:
    """Return the options of a helper's line, with their values; "" for options without a value. If
    an option is repeated, its last value counts."""
    return {name: values[-1] for name, values in _read(command)[1].items()}


def _read(command: Command) -> tuple[str, dict[str, list[str]]]:
    """Return what `usage_fault` returns, and the options that argparse would see, with all their
    values. Variables that may contain options are among these, by their names."""
    in_shell = helper_program(command) != command.path
    expands = in_shell or "no-env-expand" not in command.flags
    words, faults = list(helper_words(command)), list[str]()
    given: dict[str, list[str]] = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in PRINTING:
            faults.append(f"stops nothing, because of {word}")
        elif expands and _VARIABLE.fullmatch(word) and word not in _MAIN_PID:
            # The variable may contain any options, or nothing. The next word may be its value.
            given[word] = [""]
            if words and not _is_option(words[0]):
                words.pop(0)
        elif name not in WITH_VALUE | WITHOUT_VALUE or (equals and name in WITHOUT_VALUE):
            faults.append(f"stops nothing, because it does not accept {word}")
        else:
            if name in WITH_VALUE and not equals:
                if words and not _is_option(words[0]):
                    value = words.pop(0)
                elif name != "--pid":
                    faults.append(f"stops nothing, because {name} has no value")
            elif expands and not in_shell and _WORDS.fullmatch(value):
                faults.append(
                    f"stops nothing, because systemd does not expand {word}. Write {name} {value}"
                )
            given.setdefault(name, []).append(value)
            if name == "--pid" and "$" in value and not expands:
                faults.append("gets no process id, because of the prefix :")
            elif not (expands and "$" in value) and (fault := _value_fault(name, value)):
                faults.append(f"stops nothing, because {fault}")
    for group in EXCLUSIVE:
        if len(both := [name for name in group if name in given]) > 1:
            faults.append(f"stops nothing, because it does not accept {both[0]} with {both[1]}")
    if "--json" in given and "--dry-run" not in given:
        faults.append("stops nothing, because it accepts --json only with --dry-run")
    return (faults[0] if faults else ""), given


def _value_fault(name: str, value: str) -> str:
    """Return why argparse refuses the value of an option; "" if it does not."""
    try:
        if name in SPANS:
            timespan.parse(value)
        elif name == "--reason":
            check_reason(value)
    except ValueError as error:
        return f"{name} {printable(value)} is not a time" if name in SPANS else f"{name}: {error}"
    if name == "--pid" and value and not is_pid(value):
        return f"{name} {printable(value)} is not the id of a process"
    return ""


def _is_option(word: str) -> bool:
    """Return whether argparse takes the word for an option, and not for the value of one."""
    if not word.startswith("-") or word == "-":
        return False
    if word.partition("=")[0] in _OPTIONS or word.startswith("-h"):
        return True
    return " " not in word and _NUMBER.fullmatch(word) is None
