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
    guests: int
    """How many guests of each kind run beside the measured one."""
    rest_s: int
    jobs: int
    samples: int
    at_once: int
    very_many: int
    starts: int
    asked: int
    """Small guests, for each way; a third as many Debian guests."""


FULL: Final = Rounds(
    libvirt=10,
    libvirt_reaped_late=3,
    units=20,
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
What is not measured says why; for libvirt it takes root. A target that is missed is told in the
table and is no failure. Exit codes: 0 done, 1 something went wrong, 130 interrupted.
"""


def main() -> int:
    arguments = _parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    rounds = QUICK if arguments.quick else FULL
    began, stalled = time.monotonic(), _stalled_s()
    try:
        run_directory()
        found, failed = _measure(rounds)
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
        print(json.dumps({"about": about, "figures": [f.as_json() for f in found]}, indent=2))
    else:
        print(figures.table(found))
        told = ", ".join(f"{key}: {value}" for key, value in about.items())
        print("\n" + textwrap.fill(told, 100))
    return 1 if failed else 0


def _measure(rounds: Rounds) -> tuple[list[Figure], bool]:
    """The figures, and whether one of them failed other than for something missing."""
    parts: list[tuple[str, Callable[[], list[Figure]]]] = [
        (
            "Beside libvirt",
            lambda: beside_libvirt.measure(rounds.libvirt, rounds.libvirt_reaped_late),
        ),
        ("Beside systemd", lambda: beside_systemd.measure(rounds.units)),
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
    found: list[Figure] = []
    failed = False
    for title, measure in parts:
        try:
            found += measure()
        except needs.Missing as missing:
            found.append(Figure(title, not_measured=str(missing)))
        except Exception as error:
            found.append(Figure(title, not_measured=f"it failed: {error}"))
            failed = True
    return found, failed


def _about() -> dict[str, Any]:
    """The facts by which a reader can judge the figures."""
    return {
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "qemu": _version("qemu-system-x86_64", "--version"),
        "libvirt": _version("virsh", "--version"),
    }


def _stalled_s() -> float | None:
    """For how many seconds since boot some task was ready to run and had no processor.

    Much of it means that the machine does other things at the same time and the figures are no
    good. Source: Documentation/accounting/psi.rst. None if the kernel does not say.
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
        description="Measure qkilld beside what else stops a guest, and print a table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a look")
    parser.add_argument("--json", action="store_true", help="print JSON and no table")
    return parser.parse_args()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(f"by {signal.Signals(number).name}")


if __name__ == "__main__":
    sys.exit(main())
