"""Stops while everything fails: `make chaos`, or `python -m tests.chaos` after set-up."""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections import Counter
from types import FrameType
from typing import Final, NoReturn

from tests.chaos import plan
from tests.chaos.run import Report, prepared, run
from tests.lab.needs import Missing
from tests.lab.process import become_subreaper
from tests.lab.scratch import remove_run_directory

JOBS: Final = 50
JOURNALD_JOBS: Final = 20
SECONDS: Final = 60.0

EPILOG: Final = """\
The same seed with the same options gives the same guests, calls and incidents at the same times,
but not to the millisecond.
Exit codes: 0 success, 1 a rule is broken, 2 something is missing on this machine, 130 interrupted.
"""


def main() -> int:
    arguments = _parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    become_subreaper()
    print(f"seed {arguments.seed}: --seed={arguments.seed} with the same options repeats it")
    whole = _plan(arguments)
    try:
        with prepared() as system:
            report = run(system, whole)
    except Missing as missing:
        print(missing, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        remove_run_directory()
    print(table(report))
    return 1 if report.broken() else 0


def _plan(arguments: argparse.Namespace) -> plan.Plan:
    seed, jobs, qemus = arguments.seed, arguments.jobs, arguments.qemus
    if arguments.kills:
        return plan.kills(
            seed,
            jobs=jobs or JOBS,
            count=arguments.kills,
            qemus=qemus,
            realtime=arguments.realtime,
        )
    if arguments.journald:
        return plan.journald(
            seed,
            jobs=jobs or JOURNALD_JOBS,
            lasts=arguments.journald,
            realtime=arguments.realtime,
        )
    return plan.make(seed, jobs=jobs or JOBS, seconds=arguments.seconds, qemus=qemus)


def table(report: Report) -> str:
    faults = Counter(incident.fault for incident, _, _ in report.incidents)
    kinds: dict[str, Counter[str]] = {}
    for record in report.records:
        word = record.result or ("killed" if record.killed else "no result")
        kinds.setdefault(record.guest.kind, Counter())[word] += 1
    again = sum(len(record.signals) > 1 for record in report.records)
    lines = ["", f"{len(report.records)} guests in {report.seconds:.0f} s", ""]
    lines += [f"  {count:>5}  {fault}" for fault, count in faults.most_common()]
    lines += ["", f"  {'guests':<34}{'':>3}  results of their jobs"]
    for kind, results in kinds.items():
        shown = ", ".join(f"{count} {word}" for word, count in results.most_common())
        lines.append(f"  {kind:<34}{results.total():>3}  {shown}")
    lines += ["", "accounted for:"]
    lines += [f"  {count:>5}  {word}" for word, count in report.outcomes().most_common()]
    lines += [
        "",
        f"SIGKILLs to the daemon: {report.kills}, its restarts by systemd: {report.restarts}",
        f"guests that got SIGTERM more than once: {again}",
        "",
    ]
    if (figures := report.late()) is not None:
        lines += [figures.table(), ""]
    lines += [f"FAULT: {text}" for text in report.broken()] or ["no fault"]
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Stop guests while the daemon, the bus, the journal and systemd fail.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().getrandbits(32), help="repeat that run"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help=f"guests (default {JOBS}; {JOURNALD_JOBS} with --journald)",
    )
    parser.add_argument(
        "--qemus", type=int, default=8, metavar="N", help="real QEMUs among the guests (default 8)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help=f"default {SECONDS:g}"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--kills",
        type=int,
        default=0,
        metavar="N",
        help="kill the daemon this many times while all jobs run, and let nothing else fail",
    )
    only.add_argument(
        "--journald",
        type=float,
        default=0.0,
        metavar="S",
        help="stop journald for this time, fill its socket, and measure how late signals are",
    )
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="with --kills or --journald: give the daemon a real-time priority, so that it is not "
        "late because the machine is busy",
    )
    return parser.parse_args()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(f"by {signal.Signals(number).name}")


if __name__ == "__main__":
    sys.exit(main())
