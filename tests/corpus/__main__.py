"""`make bench-units`, or `python -m tests.corpus`: really stop the corpus, and print a table."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import signal
import sys
from collections.abc import Sequence
from typing import Final

from tests.corpus.guest import RECORDS
from tests.corpus.measure import OCCASIONS, Row, measure
from tests.corpus.structures import STRUCTURES
from tests.lab.process import run
from tests.lab.scratch import remove_run_directory, run_directory

_AT_ONCE: Final = 9
"""Guests on one host: two processors boot, adopt and stop so many in half a minute."""
_SOFT_REBOOT: Final = 254
"""The release of systemd that it came with."""
_FEW: Final = (
    *("plain.service", "short.service", "sigkill.service", "sigcont.service", "helper.service"),
    *("on-failure.service", "on-nbd.service", "run-plain.scope", "100.scope"),
)
"""For the rare occasions."""


def main() -> int:
    arguments = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_directory()
    try:
        rows = _measure(arguments)
    finally:
        remove_run_directory()
    if arguments.json:
        print(json.dumps([_as_json(row) for row in rows], indent=2))
    else:
        print(table(rows))
    worse = [row for row in rows if any(row.is_worse(occasion) for occasion, _ in row.kept)]
    for row in worse:
        print(f"{row.structure.unit} kept less after it was adopted", file=sys.stderr)
    wanted = arguments.occasions
    missing = [row for row in rows if not all(map(row.is_measured, wanted))]
    for row in missing:
        print(f"{row.structure.unit} was not measured on every occasion", file=sys.stderr)
    return 1 if worse or missing or not rows else 0


def _measure(arguments: argparse.Namespace) -> list[Row]:
    chosen = [each for each in STRUCTURES if each.runs]
    if arguments.unit:
        chosen = [each for each in STRUCTURES if each.unit in arguments.unit]
    rows: list[Row] = []
    for number in range(0, len(chosen), _AT_ONCE):
        rows += measure(chosen[number : number + _AT_ONCE], arguments.occasions, _say)
    if not arguments.unit:
        few = [each for each in STRUCTURES if each.unit in _FEW]
        others = [each for each in OCCASIONS if each not in arguments.occasions]
        if _systemd() < _SOFT_REBOOT:
            others.remove("soft-reboot")
        by_structure = {row.structure: row for row in rows}
        for row in measure(few, others, _say):
            by_structure[row.structure].kept |= row.kept
    return rows


def table(rows: Sequence[Row]) -> str:
    occasions = list(dict.fromkeys(occasion for row in rows for occasion, _ in row.kept))
    lines = [
        f"Of {RECORDS} records that its disk had acknowledged, and {RECORDS} in its memory,",
        "those that were kept, before and after `qkillctl adopt`.",
        "",
    ]
    head = f"{'unit':<26} {'verdict':<10} {'written':<8}"
    lines.append(head + "".join(f"  {occasion:<19}" for occasion in occasions))
    for row in rows:
        name = row.structure.unit + (" *" if row.structure.stand_in else "")
        written = "yes" if row.is_written else "no"
        text = f"{name:<26} {row.verdict:<10} {written:<8}"
        for occasion in occasions:
            cell = ""
            if row.is_measured(occasion):
                cell = f"{row.kept[occasion, False]} → {row.kept[occasion, True]}"
                cell += " !" if row.is_worse(occasion) else ""
            text += f"  {cell:<19}"
        lines.append(text.rstrip())
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines += [
        "",
        "*: a stand-in with the same unit properties and commands; !: less than before.",
        f"systemd {_systemd()} (soft-reboot needs {_SOFT_REBOOT}), kernel {platform.release()},"
        f" {today}",
    ]
    return "\n".join(lines)


def _systemd() -> int:
    """The version of this machine's."""
    return int(run(["systemctl", "--version"]).stdout.split()[1])


def _as_json(row: Row) -> dict[str, object]:
    return {
        "unit": row.structure.unit,
        "source": row.structure.source,
        "stand_in": row.structure.stand_in,
        "verdict": row.verdict,
        "written": row.is_written,
        "kept": [
            {"occasion": occasion, "adopted": adopted, "disks": kept.disks, "guest": kept.guest}
            for (occasion, adopted), kept in row.kept.items()
        ],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.corpus",
        description="Stop guests in units from the field, before and after adopting these.",
        epilog="Exit codes: 0 done, 1 a unit kept less after it was adopted.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    parser.add_argument("--unit", action="append", help="this one alone; may be repeated")
    parser.add_argument(
        "--occasions",
        nargs="+",
        choices=list(OCCASIONS),
        default=["stop", "poweroff"],
        help="for every unit; the others are tried with a few",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
