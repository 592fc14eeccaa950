"""Commands of unit files as text: systemd.service(5), "Command lines"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Final

from qkilld.model.unit import Command

HELPER: Final = "qkilld-stop"
SHELLS: Final = frozenset(["sh", "bash", "dash", "zsh", "ksh", "ash", "mksh"])
_EXEC: Final = re.compile(
    r"[ \t]*exec[ \t]+((?:[\w./=:,@%+ \t-]|\$?\$(?:MAINPID\b|\{MAINPID\}))+)", re.ASCII
)
_WITHIN_WORD: Final = re.compile(r"(?<=\S)\$MAINPID\b|\$MAINPID\b(?=\S)", re.ASCII)
_PYTHON: Final = re.compile(r"python[\d.]*")
_FLAG: Final = re.compile(r"-[BEIOPSsu]+")
"""Options of Python that take no value."""
_INTERPRETER: Final = re.compile(r"(?:python|perl|ruby)[\d.]*|(?:ba|da)?sh|env|nice|snap|run")


def is_helper(command: Command) -> bool:
    """Return whether a command runs qkilld-stop, by itself or as `sh -c 'exec qkilld-stop …'`."""
    command = _without_shell(command)
    is_program = PurePosixPath(command.path).name == HELPER
    return is_program or words_before_options(command.path, command.arguments[1:]) > 1


def helper_program(command: Command) -> str:
    """Return the path, or the name, of qkilld-stop in a line for which `is_helper` is True."""
    return _without_shell(command).path


def runs_alike(one: Command, other: Command) -> bool:
    """Return whether two helper's lines run the same program with the same rights, both or neither
    through a shell."""
    programs = [(each.path, helper_program(each), {*each.flags}) for each in (one, other)]
    return programs[0] == programs[1]


def _without_shell(command: Command) -> Command:
    words = command.arguments
    is_shell = PurePosixPath(command.path).name in SHELLS and words[1:2] == ("-c",)
    if is_shell and len(words) == 3 and (text := text_after_exec(words[2])):
        return replace(command, path=text.split()[0], arguments=tuple(text.split()))
    return command


def text_after_exec(text: str) -> str:
    """Return what a shell executes in place of itself, as words for a unit file; "" if the text is
    more than one `exec`, or has words that the shell would change."""
    match = _EXEC.fullmatch(text)
    if match is None:
        return ""
    # In a unit file, `$$` is the `$` of a shell. Within a word, systemd expands only `${MAINPID}`.
    return _WITHIN_WORD.sub("${MAINPID}", match[1].replace("$$", "$"))


def helper_words(command: Command) -> tuple[str, ...]:
    """Return the arguments of a helper's line."""
    command = _without_shell(command)
    first = words_before_options(command.path, command.arguments[1:])
    return command.arguments[first:]


def helper_arguments(command: Command) -> str:
    """Return the arguments of a helper's line, as in a unit file."""
    return " ".join(map(quoted, helper_words(command)))


def words_before_options(program: str, words: Sequence[str]) -> int:
    """Return how many words of a helper's line, including argv[0], precede its arguments: 1, or
    more if Python runs the helper as a module. `words`: those after argv[0]."""
    if _PYTHON.fullmatch(PurePosixPath(program).name):
        at = next((n for n, word in enumerate(words) if not _FLAG.fullmatch(word)), 0)
        if tuple(words[at : at + 2]) == ("-m", "qkilld.stop"):
            return at + 3
    return 1


def programs_of(command: Command) -> Iterator[str]:
    """Yield the name of a command's program. If that is an interpreter or a wrapper such as env,
    also yield the name of the program that it runs."""
    for word in (command.path, *command.arguments[1:]):
        if word.startswith("-") or "=" in word:
            continue
        name = PurePosixPath(word).name
        yield name
        if _INTERPRETER.fullmatch(name) is None:
            return


def line_of(command: Command, *, ignore_failure: bool = False) -> str:
    """Format a command as the value of `ExecStop=`.

    In a command that systemd reports, quotes and specifiers are resolved, but `$` is as written:
    systemd.service(5), "Command lines".
    """
    prefixes = {"privileged": "+", "no-setuid": "!", "ambient": "!!", "no-env-expand": ":"}
    front = "-" if ignore_failure or command.ignores_failure else ""
    front += "".join(prefixes.get(flag, "") for flag in command.flags)
    words = list(command.arguments) or [command.path]
    if words[0] == command.path:
        return front + " ".join(quoted(word) for word in words)
    return f"{front}@" + " ".join(quoted(word) for word in (command.path, *words))


def quoted(word: str) -> str:
    """Format a word for a unit file: double each `%`; if necessary, add quotes, and escape all
    bytes that are not printable ASCII. Source: systemd.syntax(7) and systemd.unit(5)."""
    word = word.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./$(){}-]+", word, re.ASCII):
        return word
    return '"' + "".join(_escaped(byte) for byte in word.encode(errors="surrogateescape")) + '"'


def _escaped(byte: int) -> str:
    if chr(byte) in '"\\':
        return "\\" + chr(byte)
    return chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
