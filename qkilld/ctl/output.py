"""The output of qkillctl: tables, lines and JSON.

Users choose the names of their guests, so all text from the bus passes `printable` before it
reaches a terminal, and the rich library gets it as Text, without markup.
"""

from __future__ import annotations

import functools
import json
import os
import pwd
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from qkilld.model.text import printable

if TYPE_CHECKING:
    from rich.console import Console

MAX_MESSAGE: Final = 2000
_LEAST_WIDTH: Final = 40
MAX_PADDING: Final = 64
"""A cell longer than this does not widen its column."""


class Output:
    """Standard output and standard error of one run.

    If the reader of standard output disappears (`| head`), qkillctl stops printing, but still waits
    for its jobs and returns the same exit code. Any other write error is stored in `failure`.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        # sys.stdout and sys.stderr are None if they were closed at startup.
        self._out = out or sys.stdout or _null()
        self._err = err or sys.stderr or _null()
        self.failure: OSError | None = None
        self.abandoned = False
        """Whether standard output is discarded."""
        for stream in (self._out, self._err):
            # Escape characters that the locale cannot encode.
            if reconfigure := getattr(stream, "reconfigure", None):
                reconfigure(errors="backslashreplace")

    @property
    def rich(self) -> bool:
        """Whether standard output is a terminal that can show tables and live lines."""
        return self._out.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")

    def columns(self, most: int) -> int:
        """Return the width at which text wraps: that of the terminal, but not more than `most`."""
        if not self._out.isatty():
            return most
        return max(_LEAST_WIDTH, min(most, shutil.get_terminal_size().columns))

    def console(self) -> Console:
        """Return a console on standard output. It honours NO_COLOR."""
        from rich.console import Console

        return Console(file=self._out, highlight=False, markup=False, emoji=False)

    def line(self, text: str = "") -> None:
        """Print a line on standard output. `text` must be printable."""
        self._write(text + "\n")

    def error(self, text: str) -> None:
        """Print any text on standard error, after the program's name."""
        try:
            print(f"qkillctl: {printable(text, MAX_MESSAGE)}", file=self._err, flush=True)
        except OSError:
            _silence(self._err)

    def json(self, document: Any) -> None:
        """Print the document on standard output, in ASCII."""
        self._write(json.dumps(document, indent=2, ensure_ascii=True) + "\n")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print aligned columns. A cell may be any text; "" is shown as "-"."""
        cells = [[printable(cell) or "-" for cell in row] for row in rows]
        if self.rich:
            self._rich_table(columns, cells)
        else:
            for text in aligned([list(columns), *cells]):
                self.line(text)

    def fields(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Print each pair of name and value on a line, with the values aligned."""
        for text in aligned([[f"  {key}:", printable(value) or "-"] for key, value in pairs]):
            self.line(text)

    def _rich_table(self, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        # The widths below include the blanks between columns, because versions of rich differ in
        # whether a width includes the padding.
        table = Table(box=None, pad_edge=False, padding=0, header_style="bold")
        # Only the last column wraps, and only between words. If a line is still too long, let the
        # terminal wrap it: then a UUID or the name of a unit can be copied in one piece.
        *least, last = _least_widths([columns, *cells])
        widths = [size + 2 for size in least]
        for column, size in zip(columns, [*widths, None], strict=True):
            table.add_column(column, width=size, overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        console = self.console()
        console.width = max(console.width, sum(widths) + last)
        try:
            console.print(table)
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


def _least_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the smallest width of each column at which no cell wraps; in the last column, the
    width at which cells wrap only between words."""
    *fixed, last = zip(*rows, strict=True)
    words = [word for cell in last for word in cell.split()]
    return [min(max(map(width, cells), default=0), MAX_PADDING) for cells in (*fixed, words)]


def _null() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _silence(stream: TextIO) -> None:
    """Discard all further output, including what the interpreter flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, stream.fileno())
    os.close(null)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines, with columns two blanks apart."""
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
    """Return the number of terminal columns that printable text takes."""
    visible = [character for character in text if not unicodedata.combining(character)]
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in visible)


@functools.cache
def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)
