"""Commands of unit files as text: systemd.service(5), "Command lines"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Final

from qkilld.model.unit import Command

HELPER: Final = "qkilld-stop"
_INTERPRETER: Final = re.compile(r"(?:python|perl|ruby)[\d.]*|(?:ba|da)?sh|env|nice|snap|run")


def is_helper(command: Command) -> bool:
    words = command.arguments
    return PurePosixPath(command.path).name == HELPER or any(
        pair == ("-m", "qkilld.stop") for pair in pairwise(words)
    )


def programs_of(command: Command) -> Iterator[str]:
    """Yield the name of the program that a command runs and, if it is an interpreter, of its
    script."""
    for word in (command.path, *command.arguments[1:]):
        if word.startswith("-") or "=" in word:
            continue
        name = PurePosixPath(word).name
        yield name
        if _INTERPRETER.fullmatch(name) is None:
            return


def line_of(command: Command, *, ignore_failure: bool = False) -> str:
    """Format a command as the value of `ExecStop=`.

    systemd reports commands with quotes and specifiers resolved, but not `$`: systemd.service(5),
    "Command lines".
    """
    prefixes = {"privileged": "+", "no-setuid": "!", "ambient": "!!", "no-env-expand": ":"}
    front = "-" if ignore_failure or command.ignores_failure else ""
    front += "".join(prefixes.get(flag, "") for flag in command.flags)
    words = list(command.arguments) or [command.path]
    if words[0] == command.path:
        return front + " ".join(quoted(word) for word in words)
    return f"{front}@" + " ".join(quoted(word) for word in (command.path, *words))


def quoted(word: str) -> str:
    """Quote a word: in quotes if necessary, `%` doubled, and bytes outside plain ASCII escaped.
    Source: systemd.syntax(7) and systemd.unit(5)."""
    word = word.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./$(){}-]+", word, re.ASCII):
        return word
    return '"' + "".join(_escaped(byte) for byte in word.encode(errors="surrogateescape")) + '"'


def _escaped(byte: int) -> str:
    if chr(byte) in '"\\':
        return "\\" + chr(byte)
    return chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
