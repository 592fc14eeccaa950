"""The safety matrix: `make bench-safety`, or `python -m tests.safety` after set-up."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Final, NoReturn

from tests.bench import progress
from tests.lab.image import CACHE
from tests.lab.keeper import Keeper
from tests.lab.process import TOP, spawn
from tests.safety import table
from tests.safety.cases import CASES, REVISION, Case
from tests.safety.cell import Cell, wrong
from tests.safety.policies import COLUMNS, OURS, Column

AT_ONCE: Final = 2
"""The number of cells that are measured at a time. A cell needs a processor only to boot its guest
and to count records."""
_KEPT: Final = CACHE / "safety"

EPILOG: Final = """\
A cell whose storage was not as its row has it is measured again, three times at most.
What was measured with this qkilld is kept in .lab/safety and not measured again but with --fresh.
Exit codes: 0 done, 1 a cell could not be measured or one of qkilld's is not as expected,
130 interrupted.
"""


@dataclass(frozen=True)
class CellResult:
    """The outcome for one cell: a measurement, or why there is none."""

    cell: Cell | None = None
    missing: str = ""
    failed: str = ""


Key = tuple[str, str]


def main() -> int:
    arguments = _parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    rows = [CASES[name] for name in arguments.rows or CASES]
    columns = [COLUMNS[name] for name in arguments.columns or COLUMNS]
    began = time.monotonic()
    try:
        with Keeper():
            found = _measure(rows, columns, arguments.jobs, arguments.fresh, arguments.traces)
    except KeyboardInterrupt:
        progress.show("")
        print("interrupted: what is measured is kept, the same command goes on", file=sys.stderr)
        return 130
    progress.show("")
    if arguments.json:
        arguments.json.write_text(json.dumps(_as_json(found), indent=2) + "\n")
    cells = {key: one.cell for key, one in found.items() if one.cell}
    print(table.table(rows, columns, cells))
    print(f"\n{len(found)} cells, those not measured before in {time.monotonic() - began:.0f} s")
    for (row, column), one in found.items():
        if one.cell is None:
            print(f"{row}, {column}: not measured: {one.missing or one.failed}")
    bad = any(one.failed or (one.cell and one.cell.wrong) for one in found.values())
    return 1 if bad else 0


@dataclass(frozen=True)
class _CellProcess:
    row: Case
    column: Column
    process: subprocess.Popen[bytes]
    pidfd: int
    said: IO[bytes]
    errors: IO[bytes]

    @classmethod
    def start(cls, row: Case, column: Column, traces: Path | None) -> _CellProcess:
        """Measure the cell in its own process, so that a failure does not affect other cells."""
        more = [str(traces)] if traces else []
        said, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        process = spawn(
            [sys.executable, "-m", "tests.safety.cell", row.name, column.name, *more],
            stdout=said,
            stderr=errors,
            cwd=TOP,
        )
        return cls(row, column, process, os.pidfd_open(process.pid), said, errors)

    def close(self) -> None:
        """At SIGTERM, the process of the cell ends its guest and its disks."""
        self.process.terminate()
        self.process.wait()
        os.close(self.pidfd)
        self.said.close()
        self.errors.close()

    def result(self) -> CellResult:
        for file in (self.said, self.errors):
            file.seek(0)
        if text := self.said.read():
            value = json.loads(text)
            if "cell" in value:
                return CellResult(Cell.from_json(value["cell"]))
            return CellResult(**value)
        errors = self.errors.read().decode(errors="replace").strip()
        return CellResult(failed=errors[-2000:] or "it ended without a word")


def _measure(
    rows: Sequence[Case], columns: Sequence[Column], at_once: int, fresh: bool, traces: Path | None
) -> dict[Key, CellResult]:
    """Measure the cells for which no earlier result is kept, the long ones first."""
    # The keys are in the order of the table.
    found = {(row.name, column.name): CellResult() for row in rows for column in columns}
    todo: list[tuple[Case, Column]] = []
    for row in rows:
        for column in columns:
            if not fresh and (kept := _kept(row, column)):
                found[row.name, column.name] = CellResult(kept)
            else:
                todo.append((row, column))
    todo.sort(key=lambda cell: -cell[0].weight)
    total = len(todo)
    running: list[_CellProcess] = []
    try:
        while todo or running:
            while todo and len(running) < at_once:
                running.append(_CellProcess.start(*todo.pop(0), traces))
            names = ", ".join(f"{one.row.name}/{one.column.name}" for one in running)
            progress.show(f"{total - len(todo) - len(running)} of {total} cells; now {names}")
            ended = select.select([one.pidfd for one in running], [], [])[0]
            for one in [one for one in running if one.pidfd in ended]:
                running.remove(one)
                result = one.result()
                one.close()
                found[one.row.name, one.column.name] = result
                if result.cell is not None:
                    _keep(one.row, one.column, result.cell)
    finally:
        for one in running:
            one.close()
    return found


def _kept(row: Case, column: Column) -> Cell | None:
    try:
        cell = Cell.from_json(json.loads(_path(row, column).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    if column.name == OURS:
        cell.wrong = wrong(row, cell)  # the expectation may have changed
    return cell


def _keep(row: Case, column: Column, cell: Cell) -> None:
    path = _path(row, column)
    with contextlib.suppress(OSError):  # a checkout may be read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(cell)))


def _path(row: Case, column: Column) -> Path:
    """Return the path for a cell. The name contains everything on which the cell depends and that
    may change between runs."""
    of = _qkilld() if column.of_qkilld else "peer"
    return _KEPT / f"{row.name}.{column.name}.{REVISION}.{of}.json"


@functools.cache
def _qkilld() -> str:
    """Return a hash of qkilld's source as it is in the checkout."""
    digest = hashlib.sha256()
    for path in sorted((TOP / "qkilld").rglob("*.py")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _as_json(found: Mapping[Key, CellResult]) -> list[dict[str, Any]]:
    return [
        {"row": row, "column": column} | dataclasses.asdict(one)
        for (row, column), one in found.items()
    ]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.safety",
        description="Stop real guests on storage of every kind in every way, and print a table.",
        epilog=f"rows:\n{_listed(CASES)}\n\ncolumns:\n{_listed(COLUMNS)}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="+", choices=CASES, metavar="ROW", help="these alone")
    parser.add_argument(
        "--columns", nargs="+", choices=COLUMNS, metavar="COLUMN", help="these alone"
    )
    parser.add_argument(
        "--jobs", type=int, default=AT_ONCE, metavar="N", help=f"cells at once (default {AT_ONCE})"
    )
    parser.add_argument("--fresh", action="store_true", help="measure all of it again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found there")
    parser.add_argument(
        "--traces", type=Path, metavar="DIR", help="have qkilld record its samples in DIR/ROW"
    )
    return parser.parse_args()


def _listed(what: Mapping[str, Case] | Mapping[str, Column]) -> str:
    """Return names and titles, one on each line."""
    return "\n".join(f"  {name:<16}{one.title}" for name, one in what.items())


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(f"by {signal.Signals(number).name}")


if __name__ == "__main__":
    sys.exit(main())
