"""What qkillctl prints: tables, lines and JSON.

Names of guests are whatever somebody put on a command line. All text that came over the bus passes
`printable` on its way to a terminal, and rich gets it as Text, which knows no markup.
"""

from __future__ import annotations

import functools
import json
import os
import pwd
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from qkilld.model.text import printable

if TYPE_CHECKING:
    from rich.console import Console

MAX_MESSAGE: Final = 2000
MAX_PADDING: Final = 64
"""A longer cell sticks out instead of pushing the next column away in every row."""


class Output:
    """Standard output and standard error of one run.

    A reader of standard output who goes away (`| head`) ends the printing and nothing else: what
    is being waited for is waited for, and the exit code stays what it is. Any other failure to
    write is kept in `failure`.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        # The interpreter has None for a stream that was closed before it started.
        self._out = out or sys.stdout or _null()
        self._err = err or sys.stderr or _null()
        self.failure: OSError | None = None
        self.abandoned = False
        """What is printed on standard output goes nowhere any more."""
        for stream in (self._out, self._err):
            # A locale that cannot show a character is no reason to fail.
            if reconfigure := getattr(stream, "reconfigure", None):
                reconfigure(errors="backslashreplace")

    @property
    def rich(self) -> bool:
        """Whether tables and live lines may be drawn: standard output is a capable terminal."""
        return self._out.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")

    def console(self) -> Console:
        """A console on standard output. It honours NO_COLOR."""
        from rich.console import Console

        return Console(file=self._out, highlight=False, markup=False, emoji=False)

    def line(self, text: str = "") -> None:
        """A line on standard output. It must be printable."""
        self._write(text + "\n")

    def error(self, text: str) -> None:
        """A line on standard error, after the program's name; made printable here."""
        try:
            print(f"qkillctl: {printable(text, MAX_MESSAGE)}", file=self._err, flush=True)
        except OSError:
            _silence(self._err)

    def json(self, document: Any) -> None:
        """The document on standard output, in ASCII."""
        self._write(json.dumps(document, indent=2, ensure_ascii=True) + "\n")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Aligned columns. A cell may be any text; "" is shown as "-"."""
        cells = [[printable(cell) or "-" for cell in row] for row in rows]
        if self.rich:
            self._rich_table(columns, cells)
        else:
            for text in aligned([list(columns), *cells]):
                self.line(text)

    def fields(self, pairs: Iterable[tuple[str, str]]) -> None:
        """One line for each name and its value, the values aligned."""
        for text in aligned([[f"  {key}:", printable(value) or "-"] for key, value in pairs]):
            self.line(text)

    def _rich_table(self, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold", no_wrap=column in ("PID", "ID"))
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        try:
            self.console().print(table)
        except OSError as error:
            self._failed(error)

    def _write(self, text: str) -> None:
        if self.failure:
            return
        try:
            self._out.write(text)
            self._out.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.abandoned = True
        if not isinstance(error, BrokenPipeError):
            self.failure = error
        _silence(self._out)


def _null() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _silence(stream: TextIO) -> None:
    """Send what is still to come, and what the interpreter flushes at its end, nowhere."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, stream.fileno())
    os.close(null)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, their columns two blanks apart."""
    widths = [
        min(max(width(row[column]) for row in rows), MAX_PADDING)
        for column in range(len(rows[0]) if rows else 0)
    ]
    return [
        "  ".join(
            cell + " " * (size - width(cell)) for cell, size in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def width(text: str) -> int:
    """Terminal columns that printable text takes."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


@functools.cache
def user_name(uid: int) -> str:
    """The user's name, or the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)
