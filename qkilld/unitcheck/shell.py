"""Parse a shell command line: its commands, pipes, loops and branches. Pure.

Nothing is expanded or run. Syntax that is not supported (`case`, functions, unbalanced quotes)
raises ValueError, and the effect of the line is then unknown. Source: POSIX.1-2017, Shell Command
Language.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, TypeAlias

from qkilld.model.dataclass import dataclass

MAX_TEXT: Final = 64 << 10
MAX_DEPTH: Final = 32

_OPERATORS: Final = ("&&", "||", ";;", "<<<", "<<-", "<<", ">>", "<&", ">&", "&>", "<", ">", "|&")
_SINGLE: Final = ";&|()\n"
_LOOPS: Final = frozenset(["while", "until", "for"])
_ENDS: Final = frozenset(["do", "done", "then", "elif", "else", "fi", "}", ")", "esac", ";;"])
_SUBSTITUTION: Final = re.compile(r"\$\(([^()]*)\)|`([^`]*)`")


@dataclass(frozen=True, slots=True)
class SimpleCommand:
    words: tuple[str, ...]
    """The words without quotes. `$` is not expanded."""
    text: str = ""
    """The text of a here-string on the command's standard input."""
    redirected: bool = False
    """The command's standard input is a file."""
    output: str = ""
    """The file or FIFO to which the command's output goes."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    parts: tuple[Node, ...]
    negated: bool = False
    background: bool = False
    joined_by: str = ""
    """The operator `&&` or `||` before the pipeline."""


@dataclass(frozen=True, slots=True)
class Loop:
    kind: str
    """while, until or for."""
    condition: tuple[Node, ...]
    """Empty for `for`."""
    body: tuple[Node, ...]
    words: tuple[str, ...] = ()
    """The words of `for`."""


@dataclass(frozen=True, slots=True)
class Branch:
    condition: tuple[Node, ...]
    bodies: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class CommandGroup:
    """`{ … }` or `( … )`."""

    body: tuple[Node, ...]


Node: TypeAlias = SimpleCommand | Pipeline | Loop | Branch | CommandGroup


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    is_operator: bool = False
    is_quoted: bool = False
    is_descriptor: bool = False
    """The word is a number directly before a redirection."""

    def is_word(self, word: str) -> bool:
        return self.text == word and not self.is_quoted and not self.is_operator


def read_shell(text: str) -> tuple[Node, ...]:
    """Parse a text into its commands. Raises ValueError."""
    if len(text) > MAX_TEXT:
        raise ValueError("too long")
    parser = _ShellParser(list(_tokens(text)))
    nodes = parser.commands()
    if parser.ahead is not None:
        raise ValueError(f"unexpected {parser.ahead.text!r}")
    return nodes


def substitutions(word: str) -> list[str]:
    """Return the texts of `$(…)` and of backquotes in a word."""
    return [first or second for first, second in _SUBSTITUTION.findall(word)]


# ---- words and operators ----


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    while position < len(text):
        char = text[position]
        if char in " \t\r":
            position += 1
        elif char == "#":
            while position < len(text) and text[position] != "\n":
                position += 1
        elif operator := next((o for o in _OPERATORS if text.startswith(o, position)), ""):
            yield _Token(operator, is_operator=True)
            position += len(operator)
        elif char in _SINGLE:
            yield _Token(char, is_operator=True)
            position += 1
        else:
            token, position = _word(text, position)
            yield token


def _word(text: str, position: int) -> tuple[_Token, int]:
    out: list[str] = []
    quoted = False
    while position < len(text):
        char = text[position]
        if char in " \t\r" or char in _SINGLE or char in "<>":
            break
        if char == "'":
            end = text.index("'", position + 1)
            out.append(text[position + 1 : end])
            position, quoted = end + 1, True
        elif char == '"':
            part, position = _double_quoted(text, position + 1)
            out.append(part)
            quoted = True
        elif char == "\\":
            out.append(text[position + 1 : position + 2].replace("\n", ""))
            position, quoted = position + 2, True
        elif char == "`" or text.startswith("$(", position):
            end = _substitution_end(text, position)
            out.append(text[position:end])
            position = end
        else:
            out.append(char)
            position += 1
    word = "".join(out)
    is_descriptor = word.isdecimal() and not quoted and text[position : position + 1] in ("<", ">")
    return _Token(word, is_quoted=quoted, is_descriptor=is_descriptor), position


def _double_quoted(text: str, position: int) -> tuple[str, int]:
    out = []
    while (char := text[position : position + 1]) != '"':
        if not char:
            raise ValueError("a quotation mark is open")
        if char == "\\" and text[position + 1 : position + 2] in tuple('$`"\\\n'):
            out.append(text[position + 1].replace("\n", ""))
            position += 2
        elif char == "`" or text.startswith("$(", position):
            end = _substitution_end(text, position)
            out.append(text[position:end])
            position = end
        else:
            out.append(char)
            position += 1
    return "".join(out), position + 1


def _substitution_end(text: str, position: int) -> int:
    if text[position] == "`":
        return text.index("`", position + 1) + 1
    depth = 0
    for index in range(position + 1, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    raise ValueError("a substitution is open")


# ---- commands ----


class _ShellParser:
    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._position = 0
        self._depth = 0

    @property
    def ahead(self) -> _Token | None:
        return self._tokens[self._position] if self._position < len(self._tokens) else None

    def commands(self) -> tuple[Node, ...]:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError("too deep")
        nodes: list[Node] = []
        joined_by = ""
        while (token := self.ahead) is not None:
            if token.is_operator and token.text in (";", "\n", "&"):
                self._position += 1
                continue
            if token.text in _ENDS and not token.is_quoted:
                break
            nodes.append(self._pipeline(joined_by))
            joined_by = ""
            if (token := self.ahead) is not None and token.text in ("&&", "||"):
                joined_by = token.text
                self._position += 1
        self._depth -= 1
        return tuple(nodes)

    def _pipeline(self, joined_by: str) -> Pipeline:
        negated = self._skip("!")
        parts = [self._command()]
        while self._at_operator("|") or self._at_operator("|&"):
            self._position += 1
            parts.append(self._command())
        background = self._at_operator("&")
        return Pipeline(tuple(parts), negated, background, joined_by)

    def _command(self) -> Node:
        token = self.ahead
        if token is None:
            raise ValueError("a command is missing")
        node: Node
        if token.is_operator and token.text == "(":
            self._position += 1
            node = CommandGroup(self.commands())
            self._need(")")
        elif token.is_word("{"):
            self._position += 1
            node = CommandGroup(self.commands())
            self._need("}")
        elif not token.is_quoted and token.text in _LOOPS:
            node = self._loop(token.text)
        elif token.is_word("if"):
            node = self._branch()
        elif token.is_word("case") or token.is_word("function"):
            raise ValueError(f"{token.text} is not read")
        else:
            return self._simple()
        self._redirections()
        return node

    def _loop(self, kind: str) -> Loop:
        self._position += 1
        words: list[str] = []
        condition: tuple[Node, ...] = ()
        if kind == "for":
            while (token := self.ahead) is not None and not token.is_operator:
                if token.is_word("do"):
                    break
                words.append(token.text)
                self._position += 1
            while self._at_operator(";") or self._at_operator("\n"):
                self._position += 1
        else:
            condition = self.commands()
        self._need("do")
        body = self.commands()
        self._need("done")
        return Loop(kind, condition, body, tuple(words[2:]))

    def _branch(self) -> Branch:
        self._position += 1
        condition = self.commands()
        self._need("then")
        bodies = [self.commands()]
        while self._skip("elif"):
            condition += self.commands()
            self._need("then")
            bodies.append(self.commands())
        if self._skip("else"):
            bodies.append(self.commands())
        self._need("fi")
        return Branch(condition, tuple(bodies))

    def _simple(self) -> SimpleCommand:
        words: list[str] = []
        text, redirected, output = "", False, ""
        while (token := self.ahead) is not None:
            if token.is_operator:
                if token.text not in _OPERATORS or token.text in ("&&", "||", ";;", "|&"):
                    if token.text == "(" and words:
                        raise ValueError("a function is not read")
                    break
                operator = token.text
                target = self._redirection()
                text += target if operator == "<<<" else ""
                redirected = redirected or operator == "<"
                if operator in (">", ">>", "&>") and target != "/dev/null":
                    output = target
                continue
            if not token.is_descriptor:
                words.append(token.text)
            self._position += 1
        if not words and not redirected:
            raise ValueError("a command is missing")
        return SimpleCommand(tuple(words), text, redirected, output)

    def _redirections(self) -> None:
        while (token := self.ahead) is not None and (token.is_operator or token.is_descriptor):
            if token.is_descriptor:
                self._position += 1
                continue
            if token.text not in _OPERATORS or token.text in ("&&", "||", ";;", "|&"):
                return
            self._redirection()

    def _redirection(self) -> str:
        """Skip a redirection, and return its target."""
        operator = self._tokens[self._position].text
        self._position += 1
        target = self.ahead
        if target is None or target.is_operator:
            raise ValueError("a redirection leads nowhere")
        self._position += 1
        if operator in ("<<", "<<-"):
            raise ValueError("a here-document is not read")
        return target.text

    def _at_operator(self, text: str) -> bool:
        token = self.ahead
        return token is not None and token.is_operator and token.text == text

    def _skip(self, word: str) -> bool:
        if self.ahead is not None and self.ahead.is_word(word):
            self._position += 1
            return True
        return False

    def _need(self, text: str) -> None:
        token = self.ahead
        if token is None or token.text != text or token.is_quoted:
            raise ValueError(f"{text} is missing")
        self._position += 1
