"""Measure the start of the daemon, of an earlier daemon, and of Python alone."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Final

from tests.bench import progress
from tests.bench.earlier import COMMIT, OURS, environment_of, trees
from tests.bench.figures import Figure, Row, at_most
from tests.bench.processor_usage import ProcessorUsage
from tests.bench.rest import resident
from tests.lab.bus import Bus, daemon, private_bus
from tests.lab.process import end, spawn
from tests.lab.scratch import scratch

_FLOOR: Final = "python3 -I -c pass"
_IMPORT: Final = re.compile(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)$", re.MULTILINE)
_MOST: Final = 8
"""The number of packages that are listed with their import times."""


def measure(rounds: int) -> Figure:
    figure = Figure(f"The daemon's start, from exec to READY=1, beside {COMMIT}")
    with contextlib.ExitStack() as stack:
        checkouts, notes = stack.enter_context(trees())
        bytecode = stack.enter_context(scratch("y"))
        bus = stack.enter_context(private_bus())
        wall: dict[str, list[float]] = {name: [] for name in checkouts}
        spent: dict[str, list[float]] = {name: [] for name in (*checkouts, _FLOOR)}
        memory: dict[str, list[float]] = {name: [] for name in (*checkouts, _FLOOR)}
        for number in range(rounds + 1):
            progress.show(f"starts: round {number} of {rounds}")
            for name, tree in checkouts.items():
                took, processor, megabytes = _start(bus, environment_of(tree, bytecode))
                if number:  # The first round writes the bytecode.
                    wall[name].append(took)
                    spent[name].append(processor)
                    memory[name].append(megabytes)
            processor, megabytes = _floor()
            spent[_FLOOR].append(processor)
            memory[_FLOOR].append(megabytes)
        imports = _imports(bus, environment_of(checkouts[OURS], bytecode))
    for label, unit, values in (
        ("wall", "ms", wall),
        ("processor time", "ms", spent),
        ("resident (VmRSS) then", "MB", memory),
    ):
        figure.rows += [
            Row(label if name == OURS else f"  {name}", unit, samples)
            for name, samples in values.items()
        ]
    if COMMIT in checkouts:
        for what, values in (("processor time", spent), ("resident", memory)):
            ratio = statistics.median(values[OURS]) / statistics.median(values[COMMIT])
            figure.targets.append(at_most(f"{what} to {COMMIT}'s", ratio, 1.0, "times"))
    figure.notes += [*imports, *notes]
    return figure


def _start(bus: Bus, env: Mapping[str, str]) -> tuple[float, float, float]:
    """Start a daemon. Return the wall time (ms), the processor time (ms) and the memory (MB)."""
    began = time.monotonic()
    with daemon(bus, env=env) as running:
        took = (time.monotonic() - began) * 1000
        return took, ProcessorUsage.of(running.pid).processor_ms, resident(running.pid)


def _floor() -> tuple[float, float]:
    """Return the processor time (ms) and the memory (MB) of a Python that does nothing."""
    process = spawn([sys.executable, *_FLOOR.split()[1:3], "pass"])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    # A second Python shows the memory. The ru_maxrss of the first one is too high: it includes
    # memory that the first one shared with this process before execve(2).
    waiting = "print(flush=True); input()"
    process = spawn(
        [sys.executable, *_FLOOR.split()[1:3], waiting],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        megabytes = resident(process.pid)
    finally:
        end(process)
    return (used.ru_utime + used.ru_stime) * 1000, megabytes


def _imports(bus: Bus, env: Mapping[str, str]) -> list[str]:
    """Return the import time by package, from -X importtime."""
    with daemon(
        bus, env=env, program=(sys.executable, "-X", "importtime", "-m", "qkilld")
    ) as running:
        told = running.stderr.text()
    spent: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for microseconds, name in _IMPORT.findall(told):
        package = name.split(".")[0]
        spent[package] += int(microseconds)
        modules[package] += 1
    listed = [
        f"{package} {time_spent / 1000:.1f} ({modules[package]})"
        for package, time_spent in spent.most_common(_MOST)
    ]
    return [
        f"Imports: {spent.total() / 1000:.0f} ms of wall time for {modules.total()} modules,",
        f"in ms (modules): {', '.join(listed)}.",
    ]
