"""The time that qkilld-stop adds to `systemctl stop`. For comparison, the same unit is stopped
without a helper, and with a helper that starts Python and does nothing (the floor).

tests.bench.unit_stops and tests.bench.many_stops stop the units in a throwaway system.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests.bench import progress
from tests.bench.figures import Figure, Row, at_most
from tests.bench.many_stops import ManyWay
from tests.bench.unit_stops import Way
from tests.lab import container
from tests.lab.image import busybox
from tests.lab.process import TOP

DEBIAN_PYTHON: Final = "/usr/bin/python3"
"""The Python that runs qkilld and the floor in the container, with Debian's packages."""
AT_ONCE: Final = 60
MANY: Final = 200
WARM, COLD, AT_ONCE_RATIO = 3, 10, 2.5
LINEAR: Final = 1.25
"""The maximum cost of a stop if MANY run at a time, divided by its cost if AT_ONCE run."""


def measure(rounds: int) -> list[Figure]:
    """Stop units in a container. Raises needs.Missing if none can be booted, AssertionError if a
    stop fails."""
    progress.show("units: boots a throwaway system")
    with container.boot() as system:
        container.install(system, f"PYTHON={DEBIAN_PYTHON}")
        system.run("mkdir", "-p", "/usr/local/bin")
        inside = "/usr/local/bin/qemu-system-lab"
        relative = busybox().relative_to(TOP)
        system.run("cp", f"{container.CHECKOUT}/{relative}", inside)
        many = list(_many(system, max(1, rounds // 5)))
        return [_one(system, rounds), *many]


def _one(system: container.Container, rounds: int) -> Figure:
    samples: dict[str, list[float]] = {way: [] for way in Way}

    def take(sample: Any) -> None:
        way, milliseconds = sample
        samples[way].append(milliseconds)

    _run(system, "tests.bench.unit_stops", [rounds], take)
    plain = statistics.median(samples[Way.PLAIN])
    added = {way: statistics.median(samples[way]) - plain for way in Way}
    floor = added[Way.FLOOR]
    return Figure(
        "systemctl stop of an idle guest (QEMU -M none) in a unit, with and without qkilld-stop",
        rows=[Row(str(way), "ms", times) for way, times in samples.items()],
        targets=[
            at_most(
                "what it adds to the floor's, qkilld running",
                added[Way.DAEMON] / floor,
                WARM,
                "times",
            ),
            at_most("the same, qkilld started by it", added[Way.COLD] / floor, COLD, "times"),
        ],
        notes=[f"{way}: {more:.0f} ms more than without." for way, more in added.items()],
    )


def _many(system: container.Container, rounds: int) -> Iterator[Figure]:
    walls: dict[tuple[str, int], list[float]] = {}
    spent: dict[tuple[str, int], list[float]] = {}

    def take(sample: Any) -> None:
        way, count, wall, processor = sample
        walls.setdefault((way, count), []).append(wall)
        spent.setdefault((way, count), []).append(processor)

    _run(system, "tests.bench.many_stops", [rounds, AT_ONCE, MANY], take)
    ratios = {}
    for count in (AT_ONCE, MANY):
        rows, floor, daemon = [], (ManyWay.FLOOR, count), (ManyWay.DAEMON, count)
        for way in ManyWay:
            rows.append(Row(f"{way}: wall", "ms", walls[way, count]))
            rows.append(Row("  processor time", "ms", spent[way, count]))
        median = statistics.median
        ratios[count] = median(spent[daemon]) / count
        yield Figure(
            f"{count} units with idle guests (stand-ins) stopped at once",
            rows=rows,
            targets=[
                at_most(
                    "processor time to the floor's",
                    median(spent[daemon]) / median(spent[floor]),
                    AT_ONCE_RATIO,
                    "times",
                ),
                at_most(
                    "wall time to the floor's",
                    median(walls[daemon]) / median(walls[floor]),
                    AT_ONCE_RATIO,
                    "times",
                ),
                *(
                    []
                    if count == AT_ONCE
                    else [
                        at_most(
                            f"one of {count} to one of {AT_ONCE}, processor time",
                            ratios[MANY] / ratios[AT_ONCE],
                            LINEAR,
                            "times",
                        )
                    ]
                ),
            ],
        )


def _run(
    system: container.Container, program: str, arguments: list[int], take: Callable[[Any], None]
) -> None:
    command = (container.PYTHON, "-m", program, *map(str, arguments))
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(tempfile.TemporaryFile())
        process = stack.enter_context(system.spawn(*command, stderr=stderr))
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if "progress" in said:
                progress.show(said["progress"])
            else:
                take(said["sample"])
        code = process.wait(60)
        stderr.seek(0)
        assert code == 0, stderr.read().decode(errors="replace")
