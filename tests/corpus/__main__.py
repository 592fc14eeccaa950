"""`make bench-units`, or `python -m tests.corpus`: stop the units of the corpus; print a table."""

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
from tests.corpus.measure import OCCASIONS, SOFT_REBOOTS, Row, measure, newer_debian
from tests.corpus.structures import STRUCTURES, Structure
from tests.lab.needs import Missing
from tests.lab.process import run
from tests.lab.scratch import remove_run_directory, run_directory

_AT_ONCE: Final = 9
"""The number of guests on one host. On two processors, booting, adopting and stopping this many
takes half a minute."""
_FEW: Final = (
    *("plain.service", "short.service", "sigkill.service", "sigcont.service", "helper.service"),
    *("on-failure.service", "on-nbd.service", "run-plain.scope", "100.scope"),
)
"""The units that are stopped on all occasions, not only on the chosen ones."""


def main() -> int:
    arguments = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_directory()
    try:
        rows = _measure(arguments)
    except Missing as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    finally:
        remove_run_directory()
    if arguments.json:
        print(json.dumps([_as_json(row) for row in rows], indent=2))
    else:
        print(table(rows))
    worse = [row for row in rows if any(row.is_worse(occasion) for occasion, _ in row.kept)]
    for row in worse:
        print(f"{row.structure.unit} kept less after it was adopted", file=sys.stderr)
    wanted = SOFT_REBOOTS[:1] if arguments.soft_reboot else arguments.occasions
    missing = [row for row in rows if not all(map(row.is_measured, wanted))]
    for row in missing:
        print(f"{row.structure.unit} was not measured on every occasion", file=sys.stderr)
    return 1 if worse or missing or not rows else 0


def _measure(arguments: argparse.Namespace) -> list[Row]:
    chosen = [each for each in STRUCTURES if each.runs]
    if arguments.unit:
        chosen = [each for each in STRUCTURES if each.unit in arguments.unit]
    if arguments.soft_reboot:
        return _measure_soft_reboots(chosen if arguments.unit else _few(), make=True)
    rows: list[Row] = []
    for number in range(0, len(chosen), _AT_ONCE):
        rows += measure(chosen[number : number + _AT_ONCE], arguments.occasions, _say)
    if not arguments.unit:
        done = (*arguments.occasions, *SOFT_REBOOTS)
        others = [each for each in OCCASIONS if each not in done]
        more = measure(_few(), others, _say) + _measure_soft_reboots(_few(), make=False)
        by_structure = {row.structure: row for row in rows}
        for row in more:
            by_structure[row.structure].kept |= row.kept
    return rows


def _few() -> list[Structure]:
    return [each for each in STRUCTURES if each.unit in _FEW]


def _measure_soft_reboots(structures: list[Structure], *, make: bool) -> list[Row]:
    newer = newer_debian(make=make)
    if newer is None:
        _say("soft-reboot is not measured: it needs a Debian 13, which OPTIONS=--soft-reboot makes")
        return []
    by_adopting, by_service = SOFT_REBOOTS
    rows = measure(structures, [by_adopting], _say, newer=newer)
    scopes = [each for each in structures if each.is_scope]
    by_structure = {row.structure: row for row in rows}
    if scopes:
        for row in measure(scopes, [by_service], _say, newer=newer):
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
        f"systemd {_systemd()}, kernel {platform.release()}, {today}. soft-reboot: Debian 13.",
    ]
    return "\n".join(lines)


def _systemd() -> int:
    """Return the version of this machine's systemd."""
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
        description="Stop guests in units from the field, before and after adopting the units.",
        epilog="Exit codes: 0 success, 1 an adopted unit kept less, or a unit was not measured.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--unit", action="append", help="stop only this unit; may be repeated")
    parser.add_argument(
        "--occasions",
        nargs="+",
        choices=[each for each in OCCASIONS if each not in SOFT_REBOOTS],
        default=["stop", "poweroff"],
        help="occasions for every unit; the others are tried with a few units",
    )
    parser.add_argument(
        "--soft-reboot",
        action="store_true",
        help="make a Debian 13, which takes minutes, and measure only soft-reboot in it. Later "
        "runs without this option measure soft-reboot there, too",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
