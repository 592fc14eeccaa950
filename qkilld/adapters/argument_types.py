"""Argument types, and a parser with suggestions, for all programs."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Sequence
from typing import Any, Final, NoReturn

from qkilld.model import timespan
from qkilld.model.text import check_reason

_INVALID_CHOICE: Final = re.compile(r"argument (\S+): invalid choice: '(.*?)' ")


class SuggestingParser(ArgumentParser):
    """Suggests the right option or command for a mistyped one."""

    def parse_args(  # type: ignore[override]  # no caller passes another type of namespace
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> Namespace:
        arguments, rest = self.parse_known_args(args, namespace)
        if rest:
            options = [*self._option_string_actions]
            for command in self._command_parsers(arguments):
                options += command._option_string_actions
            words = [each.partition("=")[0] for each in rest if each.startswith("--")]
            message = f"unrecognized arguments: {' '.join(rest)}{_suggestion(words, options)}"
            self.command_parser(arguments).error(message)
        return arguments

    def error(self, message: str) -> NoReturn:
        """Print the message and a suggestion, and exit with 2."""
        if match := _INVALID_CHOICE.match(message):
            choices = [name for group in self._command_groups() for name in group]
            hint = _suggestion([match[2]], choices) or f". See {self.prog} --help"
            message = f'there is no {match[1]} "{match[2]}"{hint}'
        super().error(message)

    def _command_groups(self) -> list[dict[str, Any]]:
        return [action.choices for action in self._actions if isinstance(action.choices, dict)]

    def command_parser(self, arguments: Namespace) -> ArgumentParser:
        """Return the parser of the command in `arguments`, or this parser if there is no
        command."""
        return next(iter(self._command_parsers(arguments)), self)

    def _command_parsers(self, arguments: Namespace) -> list[ArgumentParser]:
        name = getattr(arguments, "command", None)
        return [group[name] for group in self._command_groups() if name in group]


def _suggestion(words: Iterable[str], choices: Sequence[str]) -> str:
    import difflib  # Imported only here, to save memory in the daemon.

    best = [match for word in words for match in difflib.get_close_matches(word, choices, n=1)]
    return f". Did you mean {' '.join(best)}?" if best else ""


def span(text: str) -> int:
    """Parse a time span of systemd.time(7) into µs. Raises ArgumentTypeError."""
    try:
        return timespan.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def reason(text: str) -> str:
    """Raises ArgumentTypeError as text.check_reason() raises ValueError."""
    try:
        check_reason(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return text
