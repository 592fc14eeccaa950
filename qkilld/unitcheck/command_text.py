"""Parse command lines as they are written in unit files, with their specifiers. Pure.

systemd reports commands with specifiers (%i, %n, …) resolved for one instance. A template's drop-in
needs the specifiers themselves, so its lines come from the text of the unit's files. This text is
used only if systemd provably made its command from it. Sources: systemd.service(5), "Command
lines"; systemd, src/core/load-fragment.c (config_parse_exec) and src/basic/extract-word.c.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Final

from qkilld.model.named_tuple import NamedTuple
from qkilld.model.unit import Command
from qkilld.unitcheck.command import text_after_exec, words_before_options

_SPACE: Final = " \t\r\n"
_PREFIXES: Final = "-@:+!"
_FLAGS: Final = {"+": "privileged", ":": "no-env-expand", "!!": "ambient", "!": "no-setuid"}
_ESCAPE: Final = re.compile(
    r"\\(?:(?P<letter>[abfnrtv\\\"'s])|x(?P<hex>[0-9a-fA-F]{2})|(?P<octal>[0-3][0-7]{2})"
    r"|u(?P<short>[0-9a-fA-F]{4})|U(?P<long>[0-9a-fA-F]{8}))"
)
_LETTERS: Final = dict(zip("abfnrtvs", "\a\b\f\n\r\t\v ", strict=True))
_SPECIFIER: Final = re.compile(r"%(%|[A-Za-z])")


class _Word(NamedTuple):
    text: str
    """The word without quotes and escapes."""
    start: int
    end: int
    separates: bool = False
    """The word is a `;` between two commands."""


def split_commands(value: str) -> list[str]:
    """Split the value of ExecStop= into its commands, at each word `;`. Raises ValueError if
    systemd cannot parse the value."""
    commands, start = [], 0
    for word in _words(value):
        if word.separates:
            commands.append(value[start : word.start].strip(_SPACE))
            start = word.end
    commands.append(value[start:].strip(_SPACE))
    return [command for command in commands if command]


def matching_texts(values: Sequence[str], commands: Sequence[Command]) -> tuple[str, ...]:
    """Return the text of each command. `values`: the values of all ExecStop= lines, in order. Empty
    if the files and systemd have different commands, for example because systemd has not reloaded
    the files, or has ignored a line."""
    try:
        texts = [text for value in values for text in split_commands(value)]
        same = len(texts) == len(commands) and all(map(_is_source, texts, commands))
    except ValueError:
        return ()
    return tuple(texts) if same else ()


def helper_arguments_of(text: str) -> str:
    """Return the arguments in a line of qkilld-stop, as written. Raises ValueError."""
    words = list(_words(text))
    first = 2 if "@" in _prefixes(words[0].text) else 1
    if len(words) == first + 2 and (inner := text_after_exec(words[-1].text)):
        return helper_arguments_of(inner)
    program = words[0].text.lstrip(_PREFIXES)
    first += words_before_options(program, [word.text for word in words[first:]]) - 1
    return text[words[first].start :] if len(words) > first else ""


def ignoring_failure(text: str) -> str:
    """Return a command line with the prefix `-`. Raises ValueError."""
    first = next(_words(text))
    return text if "-" in _prefixes(first.text) else f"-{text}"


def _is_source(text: str, command: Command) -> bool:
    """Return whether systemd may have made the command from this text, with some values for its
    specifiers. Raises ValueError."""
    words = [word.text for word in _words(text)]
    prefixes = _prefixes(words[0])
    path, arguments = words[0][len(prefixes) :], words[1:]
    flags = [flag for prefix, flag in _FLAGS.items() if prefix in prefixes]
    if "ambient" in flags:
        flags.remove("no-setuid")
    if ("-" in prefixes) != command.ignores_failure or set(flags) != set(command.flags):
        return False
    resolved = list(command.arguments) if "@" in prefixes else list(command.arguments[1:])
    return (
        _may_become(_simplified(path), _simplified(command.path))
        # If the text names no directory, systemd finds the program in its search path.
        or ("/" not in path and _may_become(path, PurePosixPath(command.path).name))
    ) and (len(arguments) == len(resolved) and all(map(_may_become, arguments, resolved)))


def _may_become(text: str, resolved: str) -> bool:
    """Return whether there are values for the text's specifiers that turn it into `resolved`."""
    literal, *more = _literals(text)
    if not more:
        return literal == resolved
    *between, end = more
    if not (resolved.startswith(literal) and resolved.endswith(end)):
        return False
    at, last = len(literal), len(resolved) - len(end)
    for part in between:
        if (place := resolved.find(part, at, last)) < 0:
            return False
        at = place + len(part)
    return at <= last


def _literals(text: str) -> list[str]:
    """Return the parts of a text around its specifiers."""
    parts = [""]
    for number, part in enumerate(_SPECIFIER.split(text)):
        if number % 2 and part != "%":
            parts.append("")
        else:
            parts[-1] += part
    return parts


def _simplified(path: str) -> str:
    return re.sub(r"/(?:\.?/)+", "/", path)


def _prefixes(word: str) -> str:
    return word[: len(word) - len(word.lstrip(_PREFIXES))]


def _words(value: str) -> Iterator[_Word]:
    """Split as systemd's extract_first_word() does. Raises ValueError."""
    at = 0
    while True:
        while at < len(value) and value[at] in _SPACE:
            at += 1
        if at == len(value):
            return
        for mark, separates in ((";", True), ("\\;", False)):
            end = at + len(mark)
            if value.startswith(mark, at) and value[end : end + 1] in ("", *_SPACE):
                yield _Word(";", at, end, separates)
                break
        else:
            text, end = _read_word(value, at)
            yield _Word(text, at, end)
        at = end


def _read_word(value: str, at: int) -> tuple[str, int]:
    """Return the word that begins here, and its end. Raises ValueError."""
    word, quote = bytearray(), ""
    while at < len(value):
        char = value[at]
        if char == "\\":
            if at + 1 == len(value):
                raise ValueError("a backslash ends the line")
            match = _ESCAPE.match(value, at)
            # systemd keeps a backslash that begins no escape.
            word += _unescaped(match) if match else value[at : at + 2].encode(errors=_ERRORS)
            at = match.end() if match else at + 2
            continue
        if quote and char == quote:
            quote = ""
        elif not quote and char in "\"'":
            quote = char
        elif not quote and char in _SPACE:
            break
        else:
            word += char.encode(errors=_ERRORS)
        at += 1
    if quote:
        raise ValueError("a quote is not closed")
    return word.decode(errors=_ERRORS), at


_ERRORS: Final = "surrogateescape"


def _unescaped(match: re.Match[str]) -> bytes:
    if letter := match["letter"]:
        return _LETTERS.get(letter, letter).encode()
    if (digits := match["short"] or match["long"]) is not None:
        return chr(int(digits, 16)).encode(errors=_ERRORS)
    return bytes([int(match["hex"], 16) if match["hex"] else int(match["octal"], 8)])
