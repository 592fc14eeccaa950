"""Run the shutdown matrix, and print it as a table.

python -m tests.shutdown [--rows A,B] [--columns A,B] [--at-once N] [--cells FILE]
python -m tests.shutdown cell ROW COLUMN        one cell, as JSON
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.lab import needs
from tests.lab.process import wait_gone
from tests.lab.scratch import remove_run_directory, run_directory, scratch
from tests.shutdown import rows, systems
from tests.shutdown.libvirt import libvirt
from tests.shutdown.policies import LONGEST_S, POLICIES
from tests.shutdown.scene import Launcher, ProcessLauncher, Row

ROWS: Final = {**systems.ROWS, **rows.ROWS}
CELL_S: Final = 1200
SLOTS: Final = 2
"""The number of guests that boot or shut down at a time. Further guests wait."""


def measure(row: str, column: str) -> dict[str, Any]:
    """Measure one cell: how many records were kept, how long the stop took, and how it ended."""
    what = ROWS[row]
    slot = _Slot()
    try:
        with (
            _launcher(what, column) as launcher,
            scratch("s") as directory,
            what.make(directory, launcher) as scene,
        ):
            timers = [threading.Timer(after, do) for after, do in scene.later]
            timers.append(threading.Timer(what.works_s, slot.release))
            for timer in timers:
                timer.start()
            began = time.monotonic()
            stop = POLICIES[column][1](scene, what)
            took = time.monotonic() - began
            for timer in timers:
                timer.cancel()
            if stop.ended == "survived" and scene.target.domain is not None:
                scene.target.domain.destroy()
            scene.target.signal(signal.SIGKILL)
            scene.recover()
            assert wait_gone(scene.target.pidfd, 60)
            kept = scene.count()
    finally:
        slot.release()
    return {
        "kept": kept.count,
        "of": kept.of,
        "notes": kept.notes,
        "seconds": round(took, 1),
        "ended": stop.ended,
        "sigterm_s": None if stop.sigterm_s is None else round(stop.sigterm_s, 1),
        "rungs": stop.rungs,
        "at_risk": stop.at_risk,
        "verdicts": stop.verdicts,
        "asked": stop.asked,
    }


@contextlib.contextmanager
def _launcher(row: Row, column: str) -> Iterator[Launcher]:
    if column != "virsh" and not row.by_libvirt:
        yield ProcessLauncher()
        return
    with libvirt(installed=column == "qkilld") as launcher:
        yield launcher


class _Slot:
    """The permission to keep a processor busy. If the run limits the number of slots (SLOTS),
    __init__ waits for a free one."""

    def __init__(self) -> None:
        self._file = None
        directory = os.environ.get("LAB_SLOTS")
        while directory and self._file is None:
            for number in range(SLOTS):
                file = (Path(directory) / f"slot{number}").open("w")
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.close()
                else:
                    self._file = file
                    return
            time.sleep(0.2)

    def release(self) -> None:
        """Give the slot to another guest. May be called twice."""
        if self._file is not None:
            self._file.close()


def shown(cell: dict[str, Any] | None) -> str:
    """Return the text of a cell of the table."""
    if cell is None:
        return "-"
    if "error" in cell:
        return "not measured"
    words = [f"**{cell['kept']}**/{cell['of']}"] if cell["of"] else []
    over = cell["ended"] == "survived" and cell["seconds"] >= LONGEST_S
    words += cell["notes"]
    words.append(f"> {LONGEST_S} s" if over else f"{cell['seconds']} s, {cell['ended']}")
    if cell.get("sigterm_s") is not None:
        words.append(f"SIGTERM at {cell['sigterm_s']} s")
    text = ", ".join(words)
    details = [", ".join(cell["verdicts"])] if cell["verdicts"] else []
    details += [f"asked: {cell['asked']}"] if cell["asked"] else []
    details += [f"at risk: {', '.join(cell['at_risk'])}"] if cell["at_risk"] else []
    return f"{text} ({'; '.join(details)})" if details else text


def table(names: list[str], columns: list[str], cells: dict[tuple[str, str], Any]) -> str:
    lines = [f"| the guest | {' | '.join(POLICIES[column][0] for column in columns)} |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for name in names:
        texts = [shown(cells.get((name, column))) for column in columns]
        lines.append(f"| {ROWS[name].title} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _measure_apart(row: str, column: str, slots: Path) -> dict[str, Any]:
    argv = [sys.executable, "-m", "tests.shutdown", "cell", row, column]
    environment = os.environ | {"LAB_SLOTS": str(slots)}
    try:
        process = subprocess.run(
            argv, capture_output=True, text=True, timeout=CELL_S, check=False, env=environment
        )
        cell: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        stderr = "" if isinstance(error, subprocess.TimeoutExpired) else process.stderr
        print(f"{row} {column}: {error}\n{stderr}", file=sys.stderr)
        return {"error": True}
    print(f"{row} {column}: {json.dumps(cell)}", file=sys.stderr)
    return cell


def main() -> int:
    if sys.argv[1:2] == ["cell"]:
        try:
            print(json.dumps(measure(*sys.argv[2:4])))
        except needs.Missing as missing:
            print(missing, file=sys.stderr)
            return 1
        finally:
            remove_run_directory()
        return 0
    parser = argparse.ArgumentParser(description="Run the shutdown matrix.")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--columns", default=",".join(POLICIES))
    parser.add_argument(
        "--at-once", type=int, default=8, help=f"cells at a time; at most {SLOTS} of them work"
    )
    parser.add_argument(
        "--cells", type=Path, help="do not measure the cells in this file again; add new ones to it"
    )
    options = parser.parse_args()
    names, columns = options.rows.split(","), options.columns.split(",")
    cells: dict[tuple[str, str], Any] = {}
    if options.cells and options.cells.exists():
        for line in options.cells.read_text().splitlines():
            row, column, cell = json.loads(line)
            cells[row, column] = cell
    wanted = [
        (row, column)
        for row in names
        for column in columns
        if column in ROWS[row].columns and (row, column) not in cells
    ]
    try:
        with concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
            running = {pool.submit(_measure_apart, *cell, run_directory()): cell for cell in wanted}
            for future in concurrent.futures.as_completed(running):
                cells[running[future]] = cell = future.result()
                if options.cells and "error" not in cell:
                    with options.cells.open("a") as file:
                        file.write(json.dumps([*running[future], cell]) + "\n")
    finally:
        remove_run_directory()
    print(table(names, columns, cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
