"""A program, run as `python -m tests.safety.cell ROW COLUMN [TRACES]`: one cell of the matrix.

It prints one line of JSON: {"cell": ...}, {"missing": TEXT} or {"failed": TEXT}. qkilld's traces
are written to TRACES/ROW.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from tests.lab import needs
from tests.lab.process import run, wait_gone
from tests.lab.records import records
from tests.lab.scratch import remove_run_directory, run_directory
from tests.safety.cases import CASES, Case, Scene, StorageMismatch
from tests.safety.machine import Target
from tests.safety.outcome import Outcome, Stopper
from tests.safety.policies import COLUMNS, OURS, Column

RECOVERY_S: Final = 120
ATTEMPTS: Final = 3


@dataclass
class Cell:
    row: str
    column: str
    acknowledged: int
    lost: int
    """The number of acknowledged records that are missing on the disks."""
    corrupt: int
    """The number of errors that `qemu-img check` finds, not counting leaked clusters."""
    outcome: Outcome
    wrong: list[str]
    """The differences from the expected result; only for qkilld."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cell:
        return cls(**value | {"outcome": Outcome(**value["outcome"])})


def measure(case: Case, column: Column, traces: Path | None) -> Cell:
    """Stop a guest. If the storage did not behave as described in the row, repeat this with another
    guest.

    Raises needs.Missing, AssertionError if the guest does not start, and StorageMismatch if the
    storage never behaves as described.
    """
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(StorageMismatch):
            return _measure(case, column, traces)
        for trace in traces.iterdir() if traces else ():
            trace.unlink()
    return _measure(case, column, traces)


def _measure(case: Case, column: Column, traces: Path | None) -> Cell:
    with contextlib.ExitStack() as stack:
        stopper = stack.enter_context(column.policy(traces))
        scene = stack.enter_context(case.make(stopper.network))
        with stopper.launch(scene.machine) as target:
            acknowledged, outcome = _stop(scene, stopper, target)
        if outcome.result == "exited" and outcome.seconds < case.busy:
            raise StorageMismatch(
                f"gone after {outcome.seconds:.1f} s, its storage needs {case.busy} s"
            )
        found, corrupt = 0, 0
        for image in scene.images:
            corrupt += _check(image)
            found += len(records(image))
    cell = Cell(
        case.name, column.name, acknowledged, acknowledged - found, corrupt, outcome, wrong=[]
    )
    if column.name == OURS:
        cell.wrong = wrong(case, cell)
    return cell


def _stop(scene: Scene, stopper: Stopper, target: Target) -> tuple[int, Outcome]:
    target.wait_for("^GUEST DONE")
    scene.started(target)
    acknowledged = target.acknowledged()
    timers: list[threading.Timer] = []
    try:
        scene.strike(target)
        timers += [threading.Timer(after, action) for after, action in scene.later]
        for timer in timers:
            timer.start()
        outcome = stopper.stop(target)
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
        scene.recover()
    # A guest that was given up, or that waited in the kernel, can exit now.
    wait_gone(target.pidfd, RECOVERY_S)
    return acknowledged, outcome


def _check(image: Path) -> int:
    """Wait until no process has the image open, then return the number of errors in it.

    The kernel keeps the files of an io_uring open until its last request is done. This may be long
    after the exit of the process.
    """
    check = ["check", "-f", "qcow2", "--output=json", str(image)]
    deadline = time.monotonic() + RECOVERY_S
    while True:
        done = run([needs.program("qemu-img", "qemu-utils"), *check], timeout=300)
        if done.stdout:
            return int(json.loads(done.stdout).get("corruptions", 0))
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.5)


def wrong(case: Case, cell: Cell) -> list[str]:
    """Describe how qkilld's cell differs from the case's expectation."""
    outcome, expected = cell.outcome, case.expected
    found = []
    if outcome.result not in expected.result:
        found.append(f"{outcome.result} and not {' or '.join(sorted(expected.result))}")
    if outcome.seconds > expected.within:
        found.append(f"{outcome.seconds:.1f} s and not within {expected.within:g} s")
    if outcome.seconds < expected.not_before:
        found.append(f"{outcome.seconds:.1f} s and not {expected.not_before:g} s at least")
    if expected.nothing_lost and cell.lost:
        found.append(f"{cell.lost} records lost")
    if expected.nothing_lost and cell.corrupt:
        found.append(f"{cell.corrupt} errors in the image")
    found += _wrong_ticks(case, outcome)
    return found


def _wrong_ticks(case: Case, outcome: Outcome) -> list[str]:
    """Describe the spans with a wrong verdict, from the first `since` on."""
    runs: list[tuple[str, float, float, str]] = []
    killed = _killed_at(outcome)
    for at, verdict in outcome.ticks:
        right = [rule for rule in case.right if rule.since <= at]
        if not right or at >= killed or verdict in right[-1].verdicts:
            continue
        wanted = " or ".join(sorted(right[-1].verdicts))
        if runs and runs[-1][0] == verdict and runs[-1][3] == wanted and at - runs[-1][2] < 0.8:
            runs[-1] = (verdict, runs[-1][1], at, wanted)
        else:
            runs.append((verdict, at, at, wanted))
    return [f"{v} and not {w} from {a:g} s to {b:g} s" for v, a, b, w in runs]


def _killed_at(outcome: Outcome) -> float:
    """Return the time of SIGKILL. Verdicts after it are not compared with `right`."""
    rungs = outcome.details.get("receipt", {}).get("rungs", [])
    return min((at / 1e6 for _, name, at in rungs if "KILL" in str(name)), default=float("inf"))


def main() -> int:
    row, column, *traces = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        run_directory()
        directory = Path(traces[0]) / row if traces else None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        cell = measure(CASES[row], COLUMNS[column], directory)
        print(json.dumps({"cell": dataclasses.asdict(cell)}), flush=True)
    except needs.Missing as missing:
        print(json.dumps({"missing": str(missing)}), flush=True)
    except StorageMismatch as unlike:
        print(json.dumps({"failed": f"{ATTEMPTS} times: {unlike}"}), flush=True)
    finally:
        remove_run_directory()
    return 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(f"by {signal.Signals(number).name}")


if __name__ == "__main__":
    sys.exit(main())
