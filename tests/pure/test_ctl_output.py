"""Output is aligned, and contains no terminal escape sequences."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qkilld.ctl.output import MAX_PADDING, Output, aligned, user_name, width

HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07",
    "line\nbreak\r\tand tab",
    "\u202egnp.exe\u2066",
    "[bold red]markup[/] :skull: [link=file:///]x[/link]",
    "\x9b31m C1",
    "\u2028\u2029\u0085\x00\x7f",
    "zero\u200bwidth\ufeff",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize(
    "print_it", [Output.table, Output.fields, Output.error], ids=lambda f: f.__name__
)
def test_hostile_names(
    name: str, rich: bool, print_it: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color" if rich else "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()
    output = Output(out, out)
    match print_it:
        case Output.table:
            output.table(("PID", "NAME"), [("1", name), ("2", "web")])
        case Output.fields:
            output.fields([("name", name)])
        case _:
            output.error(f"{name}: no such guest")
    text = out.getvalue()
    lines = text.split("\n")
    assert all(line.isprintable() for line in _without_styles(lines, rich)), ascii(text)
    assert len(lines) == (4 if print_it is Output.table else 2), ascii(text)
    if "[bold" in name:
        assert name in text


def _without_styles(lines: list[str], rich: bool) -> list[str]:
    """Remove the styles: even with NO_COLOR, rich writes bold headings."""
    if not rich:
        return lines
    return [line.replace("\x1b[1m", "").replace("\x1b[0m", "") for line in lines]


def test_json_is_ascii_and_one_document() -> None:
    out = io.StringIO()
    Output(out, out).json([{"name": name} for name in HOSTILE])
    assert out.getvalue().isascii()
    assert "\x1b" not in out.getvalue()
    assert [item["name"] for item in json.loads(out.getvalue())] == HOSTILE


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ([], []),
        ([["PID", "NAME"], ["1", "a"]], ["PID  NAME", "1    a"]),
        ([["A", "B", "C"], ["", "b", ""]], ["A  B  C", "   b"]),
        ([["NAME", "X"], ["仮想", "x"], ["é", "x"]], ["NAME  X", "仮想  x", "é     x"]),
        ([["N", "X"], ["e\u0301", "x"]], ["N  X", "e\u0301  x"]),
    ],
)
def test_aligned(rows: list[list[str]], lines: list[str]) -> None:
    assert aligned(rows) == lines


def test_a_very_long_cell_leaves_the_other_rows_alone() -> None:
    lines = aligned([["NAME", "X"], ["n" * 300, "x"], ["short", "x"]])
    assert [width(line) for line in lines] == [MAX_PADDING + 3, 300 + 3, MAX_PADDING + 3]


def test_user_name() -> None:
    assert user_name(0) == "root"
    assert user_name(2**32 - 2) == str(2**32 - 2)


@pytest.mark.parametrize(
    ("term", "capable"),
    [("xterm", True), ("linux", True), ("dumb", False), ("", False), ("unknown", False)],
)
def test_capable_terminal(term: str, capable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    assert Output(Terminal(), io.StringIO()).rich is capable
    assert Output(io.StringIO(), io.StringIO()).rich is False


PRINT_TWICE = """
import sys
from qkilld.ctl.output import Output
output = Output()
output.line("one")
output.json({"two": 2})
print("still here", output.failure, file=sys.stderr)
"""


def test_a_reader_who_goes_away_ends_the_printing_only() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PRINT_TWICE], stdout=write, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"still here None\n")


def test_a_full_disk_is_told() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINT_TWICE], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 0
    assert b"No space left on device" in done.stderr


def test_closed_streams() -> None:
    program = "from qkilld.ctl.output import Output; o = Output(); o.line('x'); o.error('x')"
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, program], check=False
    )
    assert done.returncode == 0


def test_a_locale_without_the_character() -> None:
    program = "from qkilld.ctl.output import Output; Output().line('\u4eee')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"\\u4eee\n"


def test_rich_is_not_loaded_for_a_pipe() -> None:
    program = (
        "import sys; from qkilld.ctl import main; from qkilld.ctl.output import Output; "
        "Output().table(('A',), [('x',)]); print([m for m in sys.modules if m.startswith('rich')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"A\nx\n[]\n"


@pytest.mark.parametrize(("terminal", "width"), [("60", 60), ("200", 96), ("10", 40)])
def test_text_wraps_at_the_width_of_the_terminal(
    terminal: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", terminal)
    assert Output(Terminal()).columns(96) == width
    assert Output(io.StringIO()).columns(96) == 96, "a pipe has no width"


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_word_of_a_table_is_cut(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    uuid, unit = "5f0c3c1e-1111-2222-3333-444455556666", "qemu-guest@database.service"
    Output(terminal, io.StringIO()).table(("NAME", "UUID", "UNIT"), [("web", uuid, unit)])
    _, row, *rest = terminal.getvalue().splitlines()
    assert (row.split(), rest) == (["web", uuid, unit], [])
    # Text in the last column wraps between words.
    terminal = Terminal()
    reasons = "it waits for storage and nothing moves, " * 6
    Output(terminal, io.StringIO()).table(("AFTER", "WHY"), [("1min 5s", reasons)])
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in terminal.getvalue().splitlines()]
    assert max(map(len, lines)) <= columns and len(lines) > 1
    assert " ".join(" ".join(lines[1:]).split()) == f"1min 5s {reasons.strip()}"
