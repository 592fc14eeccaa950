"""What qkilld-stop adds to `systemctl stop` of an idle guest, beside the same unit without it.

The stopping itself is tests.bench.unit_stops, in a throwaway system.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from typing import Final

from tests.bench import progress
from tests.bench.figures import Figure, Row, at_most
from tests.bench.unit_stops import Way
from tests.lab import container

ADDED_MS: Final = 150


def measure(rounds: int) -> Figure:
    """Raises needs.Missing where there is no container, AssertionError where something fails."""
    progress.show("units: boots a throwaway system")
    samples: dict[str, list[float]] = {way: [] for way in Way}
    command = (container.PYTHON, "-m", "tests.bench.unit_stops", str(rounds))
    with contextlib.ExitStack() as stack:
        system = stack.enter_context(container.boot())
        container.install(system)
        stderr = stack.enter_context(tempfile.TemporaryFile())
        process = stack.enter_context(system.spawn(*command, stderr=stderr))
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if "progress" in said:
                progress.show(said["progress"])
            else:
                way, milliseconds = said["sample"]
                samples[way].append(milliseconds)
        code = process.wait(60)
        stderr.seek(0)
        assert code == 0, stderr.read().decode(errors="replace")
    plain = statistics.median(samples[Way.PLAIN])
    return Figure(
        "systemctl stop of an idle guest (QEMU -M none) in a unit, with and without qkilld-stop",
        rows=[Row(str(way), "ms", times) for way, times in samples.items()],
        targets=[
            at_most(
                "what it adds, medians, qkilld running",
                statistics.median(samples[Way.DAEMON]) - plain,
                ADDED_MS,
                "ms",
            )
        ],
        notes=[
            f"{what}: {statistics.median(samples[way]) - plain:.0f} ms more than without."
            for way, what in ((Way.ALONE, "Alone"), (Way.COLD, "With qkilld to be started"))
        ],
    )
