"""The benchmark: `make bench`, or `python -m tests.bench` after set-up."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from tests.bench import (
    answer,
    beside_libvirt,
    beside_systemd,
    crash,
    evidence,
    facts,
    figures,
    guest_asks,
    progress,
    rest,
    start,
    whole_stop,
)
from tests.bench.figures import Figure
from tests.lab import needs
from tests.lab.process import run
from tests.lab.scratch import remove_run_directory, run_directory


@dataclass(frozen=True, slots=True)
class Rounds:
    libvirt: int
    libvirt_reaped_late: int
    units: int
    stops: int
    guests: int
    """The number of guests of each kind that run beside the measured guest."""
    rest_s: int
    jobs: int
    samples: int
    at_once: int
    very_many: int
    starts: int
    asked: int
    """The number of small guests for each way to stop a guest. There are a third as many Debian
    guests."""


FULL: Final = Rounds(
    libvirt=10,
    libvirt_reaped_late=3,
    units=20,
    stops=100,
    guests=200,
    rest_s=30,
    jobs=1000,
    samples=200,
    at_once=1000,
    very_many=5000,
    starts=10,
    asked=15,
)
QUICK: Final = Rounds(
    libvirt=2,
    libvirt_reaped_late=1,
    units=3,
    stops=10,
    guests=20,
    rest_s=5,
    jobs=50,
    samples=20,
    at_once=100,
    very_many=100,
    starts=2,
    asked=3,
)

EPILOG: Final = """\
If something cannot be measured, the table says why; libvirt needs root. A target that is missed is
shown in the table and is not a failure. Exit codes: 0 success, 1 failure, 130 interrupted.
"""


def main() -> int:
    arguments = _parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    rounds = QUICK if arguments.quick else FULL
    began, stalled = time.monotonic(), _stalled_s()
    try:
        run_directory()
        measurements, failed = _measure(rounds)
    except KeyboardInterrupt:
        progress.show("")
        print("interrupted: nothing of the benchmark is left", file=sys.stderr)
        return 130
    finally:
        remove_run_directory()
    progress.show("")
    took = time.monotonic() - began
    about = _about() | {"seconds": round(took)}
    stalled_now = _stalled_s()
    if stalled is not None and stalled_now is not None:
        share = (stalled_now - stalled) / took
        about["time in which something was kept waiting for a processor"] = f"{share:.0%}"
    if arguments.json:
        document = {"about": about, "figures": [figure.as_json() for figure in measurements]}
        print(json.dumps(document, indent=2))
    else:
        print(figures.table(measurements))
        told = ", ".join(f"{key}: {value}" for key, value in about.items())
        print("\n" + textwrap.fill(told, 100))
    return 1 if failed else 0


def _measure(rounds: Rounds) -> tuple[list[Figure], bool]:
    """Return the figures, and whether a measurement failed, not counting missing programs."""
    parts: list[tuple[str, Callable[[], list[Figure]]]] = [
        (
            "Beside libvirt",
            lambda: beside_libvirt.measure(rounds.libvirt, rounds.libvirt_reaped_late),
        ),
        ("Beside systemd", lambda: beside_systemd.measure(rounds.units)),
        ("From Terminate to the answer", lambda: [whole_stop.measure(rounds.stops)]),
        ("From a guest's exit to the answer", lambda: [answer.measure(rounds.guests)]),
        (
            "Asking a guest",
            lambda: guest_asks.measure(rounds.asked, rounds.asked // 3, rounds.samples),
        ),
        ("At rest", lambda: rest.measure(rounds.rest_s, rounds.jobs)),
        ("The start", lambda: [start.measure(rounds.starts)]),
        ("Facts", lambda: [facts.measure(rounds.samples)]),
        ("Samples", lambda: [evidence.measure_samples(rounds.samples)]),
        ("Many jobs", lambda: [evidence.measure_jobs(rounds.at_once)]),
        ("A crash", lambda: [crash.measure(rounds.very_many)]),
    ]
    measurements: list[Figure] = []
    failed = False
    for title, measure in parts:
        try:
            measurements += measure()
        except needs.Missing as missing:
            measurements.append(Figure(title, not_measured=str(missing)))
        except Exception as error:
            measurements.append(Figure(title, not_measured=f"it failed: {error}"))
            failed = True
    return measurements, failed


def _about() -> dict[str, Any]:
    """Return facts about the machine that help to judge the figures."""
    return {
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "qemu": _version("qemu-system-x86_64", "--version"),
        "libvirt": _version("virsh", "--version"),
    }


def _stalled_s() -> float | None:
    """Return how many seconds since boot a task was ready to run and had no processor.

    If this is long, the machine does other work, and the figures are of no use. None if the kernel
    does not report the time. Source: Documentation/accounting/psi.rst.
    """
    try:
        some, *_ = Path("/proc/pressure/cpu").read_text().splitlines()
    except OSError:
        return None
    return int(some.rpartition("total=")[2]) / 1e6


def _version(program: str, option: str) -> str:
    try:
        said = run([needs.program(program, program), option], check=True).stdout
    except needs.Missing:
        return "none"
    return said.split("version ")[-1].split()[0]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure qkilld and other ways to stop a guest, and print a table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="do fewer rounds")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(f"by {signal.Signals(number).name}")


if __name__ == "__main__":
    sys.exit(main())
