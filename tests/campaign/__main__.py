"""The campaign: `make bench-judgement`, or `python -m tests.campaign` after set-up."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from tests.bench import progress
from tests.campaign import report
from tests.campaign.cases import CASES
from tests.campaign.draw import draw
from tests.campaign.keep import KEPT, keep
from tests.campaign.pool import AT_ONCE, RunResult, run_all
from tests.campaign.spec import HOST, Spec
from tests.campaign.ways import OURS, WAYS

EPILOG: Final = f"""\
A run whose samples were late is repeated up to three times, and counted.
Results are kept in .lab/{KEPT.name}; --continue skips the runs that were judged.
Exit codes: 0 all runs are right, 1 some runs are wrong or failed, 130 interrupted.
"""


def main() -> int:
    arguments = _parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) ignores SIGHUP.
            signal.signal(number, _interrupt)
    specs = _specs(arguments)
    if arguments.compare:
        return _compare(specs, arguments.jobs)
    KEPT.mkdir(parents=True, exist_ok=True)
    log = KEPT / f"seed-{arguments.seed}.jsonl"
    before = _before(log) if arguments.go_on else {}
    began = time.monotonic()
    results: list[RunResult] = []
    try:
        with log.open("a" if arguments.go_on else "w") as file:
            todo = [spec for spec in specs if spec.name not in before]
            table = report.RunningTable(len(todo))
            for one in run_all(todo, arguments.jobs, progress.show):
                results.append(keep(one))
                file.write(json.dumps(report.to_json(one)) + "\n")
                file.flush()
                if arguments.verbose or not one.clean:
                    progress.show("")
                    print(report.line(one), flush=True)
                for line in table.lines(results):
                    progress.show("")
                    print(line, flush=True)
    except KeyboardInterrupt:
        progress.show("")
        print("interrupted: repeat the command with --continue to resume", file=sys.stderr)
        return 130
    progress.show("")
    every = [*before.values(), *results]
    print(report.summary(every))
    print(f"\n{len(results)} runs in {time.monotonic() - began:.0f} s")
    return 0 if all(one.clean for one in every) else 1


def _specs(arguments: argparse.Namespace) -> list[Spec]:
    if arguments.replay:
        return [Spec.from_json(json.loads(path.read_text())) for path in arguments.replay]
    if arguments.case:
        names = CASES if "all" in arguments.case else arguments.case
        return [CASES[name].spec for name in names]
    first = arguments.first
    return [draw(arguments.seed, number) for number in range(first, first + arguments.runs)]


def _compare(specs: Sequence[Spec], jobs: int) -> int:
    """Print a table that shows how the same runs end with each way to stop."""
    ends: dict[str, dict[str, RunResult]] = {spec.name: {} for spec in specs}
    for way in WAYS:
        # Leave out runs that pause the host: the other ways run in the lab's process, which is not
        # paused.
        todo = [spec for spec in specs if way in (OURS, "fixed") or not _pauses(spec)]
        for one in run_all(todo, jobs, lambda text, way=way: progress.show(f"{way}: {text}"), way):  # type: ignore[misc]
            ends[one.spec.name][way] = one
    progress.show("")
    print("| " + " | ".join(["case", *(title for title, _ in WAYS.values())]) + " |")
    print("|" + " --- |" * (len(WAYS) + 1))
    for spec in specs:
        title = CASES[spec.name].title if spec.name in CASES else spec.name
        cells = [report.cell(ends[spec.name].get(way)) for way in WAYS]
        print("| " + " | ".join([f"{title} (`{spec.name}`)", *cells]) + " |", flush=True)
    return 0


def _pauses(spec: Spec) -> bool:
    return any(change.of == HOST for change in spec.changes)


def _before(log: Path) -> dict[str, RunResult]:
    """Return the earlier runs that were judged, by name. The other runs must be repeated."""
    found: dict[str, RunResult] = {}
    for text in log.read_text().splitlines() if log.exists() else ():
        # The last line may be cut off.
        with contextlib.suppress(ValueError):
            one = report.from_json(json.loads(text))
            if one.judgement is not None and not one.judgement.too_late:
                found[one.spec.name] = one
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign",
        description="Stop real QEMUs on random storage whose behaviour is known, and judge qkilld.",
        epilog=EPILOG
        + "\ncases:\n"
        + "\n".join(f"  {name:<24}{case.title}" for name, case in CASES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="(default 200)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="(default 1)")
    parser.add_argument(
        "--first", type=int, default=0, metavar="N", help="begin with the run of this number"
    )
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="skip runs that were already judged"
    )
    parser.add_argument(
        "--case", nargs="+", choices=[*CASES, "all"], metavar="NAME", help="run fixed cases instead"
    )
    parser.add_argument(
        "--replay", nargs="+", type=Path, metavar="FILE", help="repeat runs that were kept"
    )
    parser.add_argument(
        "--jobs", type=int, default=AT_ONCE, metavar="N", help=f"at once (default {AT_ONCE})"
    )
    parser.add_argument(
        "--compare", action="store_true", help="stop in other ways, too, and print a table"
    )
    parser.add_argument("--verbose", action="store_true", help="report runs that are right, too")
    return parser.parse_args()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(f"by {signal.Signals(number).name}")


if __name__ == "__main__":
    sys.exit(main())
