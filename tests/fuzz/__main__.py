"""Hostile input: `make fuzz`, or `python -m tests.fuzz` after set-up."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from types import FrameType
from typing import Final, NoReturn

from tests.fuzz.calls import CALL_KINDS
from tests.fuzz.flood import Report, flood
from tests.fuzz.messages import KIND_NAMES
from tests.lab import process
from tests.lab.needs import Missing
from tests.lab.scratch import remove_run_directory

MESSAGES: Final = 1_000_000
SECONDS: Final = 900.0
GROWTH: Final = 5_000_000
"""The largest growth of resident memory, in bytes."""
P99_S: Final = 0.2
"""The limit for the 99th percentile of the latency of the well-behaved client's calls."""

EPILOG: Final = """\
The same seed gives the same messages and the same input for the parsers. The order of messages on
different connections is not repeated.
Exit codes: 0 success, 1 a fault, or a figure over its limit, 2 something is missing on this
machine, 130 interrupted.
"""


def main() -> int:
    arguments = _parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    print(f"seed {arguments.seed}: `make fuzz OPTIONS=--seed={arguments.seed}` repeats it")
    try:
        failed = _parsers(arguments.seed, arguments.examples) if arguments.examples else False
        if arguments.messages:
            report = flood(
                arguments.seed,
                messages=arguments.messages,
                seconds=arguments.seconds,
                connections=arguments.connections,
            )
            print(table(report))
            failed = failed or bool(report.faults) or over(report)
    except Missing as missing:
        print(missing, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        remove_run_directory()
    return 1 if failed else 0


def over(report: Report) -> bool:
    """Return whether a figure exceeds its limit. On a busy host, this can happen."""
    ours = [one for name, one in report.latency.items() if name.startswith("qkilld")]
    return report.growth > GROWTH or any(one.p99 > P99_S for one in ours)


def table(report: Report) -> str:
    mb = [f"{size / 1e6:.1f}" for size in report.resident]
    lines = [
        "",
        f"{report.messages} messages in {report.seconds:.0f} s, "
        f"{report.deeds.replies} answers, {report.deeds.ended} connections ended",
        "",
        *(f"  {report.deeds.sent[name]:>9}  {name}" for name in (*KIND_NAMES, *CALL_KINDS)),
        "",
        f"resident memory   {mb[0]} MB at rest, {mb[1]} MB warm, {mb[2]} MB after; "
        f"growth {report.growth / 1e6:.1f} MB (limit {GROWTH / 1e6:.0f})",
        f"descriptors       {report.descriptors[0]} before, {report.descriptors[1]} after",
        "",
        f"{'a well-behaved client meanwhile':<34}{'calls':>7}{'p50':>10}{'p99':>10}{'longest':>10}",
    ]
    for name, one in report.latency.items():
        times = "".join(f"{1000 * s:>7.1f} ms" for s in (one.median, one.p99, one.longest))
        lines.append(f"  {name:<32}{one.calls:>7}{times}")
    lines.append("")
    lines += [f"FAULT: {fault}" for fault in report.faults] or ["no fault"]
    return "\n".join(lines)


def _parsers(seed: int, examples: int) -> bool:
    """Run the parsers' tests at length; return whether one failed."""
    words = [sys.executable, "-m", "pytest", "-q", "tests/fuzz/test_parsers.py"]
    words += [f"--hypothesis-seed={seed}", "--hypothesis-profile=fuzz", "-p", "no:cacheprovider"]
    environment = {**os.environ, "QKILLD_FUZZ_EXAMPLES": str(examples)}
    running = process.spawn(words, cwd=process.TOP, env=environment)
    try:
        return running.wait() != 0
    finally:
        process.end(running)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Send hostile input to the daemon and its parsers, and print a table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().getrandbits(32), help="repeat that run"
    )
    parser.add_argument(
        "--messages", type=int, default=MESSAGES, metavar="N", help=f"at most (default {MESSAGES})"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help=f"at most (default {SECONDS:g})"
    )
    parser.add_argument(
        "--connections",
        type=int,
        default=8,
        metavar="N",
        help="hostile connections, on the bus and on Varlink each (default 8)",
    )
    parser.add_argument(
        "--examples", type=int, default=2000, metavar="N", help="inputs of a parser (default 2000)"
    )
    return parser.parse_args()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(f"by {signal.Signals(number).name}")


if __name__ == "__main__":
    sys.exit(main())
