"""Compute the quality of qkilld and of simpler policies as failure detectors, on the same runs.

The metrics are those of Chen, Toueg and Aguilera (On the Quality of Service of Failure Detectors,
IEEE Trans. Computers 51(5), 2002). The failure is a permanent standstill of a run's storage or
process. The suspicion is SIGKILL, which is final:

    detection time             from the permanent standstill to SIGKILL
    mistake                    SIGKILL to a process that would have finished, or before the policy's
                               limit
    mistake recurrence time    observed time for each mistake
    query accuracy             the share of the time up to the failure, or up to the end of the
                               process, in which SIGKILL was not sent yet

The other detectors are not run. The time of their SIGKILL is computed from qkilld's runs: from the
timeout for the fixed clock, and from the trace for the counter. If qkilld has killed a process that
would have finished, the end of the schedule counts as the time at which it would have finished.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.campaign.judge import kill_time, rightly_killed, truth_of
from tests.campaign.pool import RunResult
from tests.campaign.truth import BOUNDED

FIXED_S: Final = 10.0
"""The fixed timeout that libvirt has used since 2012."""
INFINITY: Final = float("inf")


@dataclass
class Quality:
    detections: list[float] = field(default_factory=list)
    missed: int = 0
    """The number of processes for which the policy would wait forever."""
    mistakes: int = 0
    watched: float = 0
    """The time (s) until the storage failed or, if it did not, until the process ended; summed over
    all runs."""
    trusted: float = 0


def _ours(one: RunResult) -> float:
    killed = kill_time(one.outcome) if one.outcome else None
    return INFINITY if killed is None else killed


def _counter(one: RunResult) -> float:
    assert one.judgement is not None
    return one.judgement.counter_kill


POLICIES: Final[Mapping[str, Callable[[RunResult], float]]] = {
    "qkilld": _ours,
    "fixed clock, 10 s": lambda one: FIXED_S,
    "one counter (wchar), 10 s": _counter,
    "SIGTERM and patience": lambda one: INFINITY,
}


def quality(results: Sequence[RunResult], kills: Callable[[RunResult], float]) -> Quality:
    """Judge a policy. `kills` returns the time (s) at which the policy sends SIGKILL to a process
    that is still there."""
    found = Quality()
    for one in results:
        if one.outcome is None or one.judgement is None or one.judgement.too_late:
            continue
        known = truth_of(one.spec, one.outcome)
        last = known.spans[-1]
        killed = kills(one)
        if last.state in BOUNDED and one.outcome.result != "exited":
            since = last.since
            if killed == INFINITY:
                found.missed += 1
            elif rightly_killed(known, killed):
                found.detections.append(killed - since)
            else:
                found.mistakes += 1
            found.watched += since
            found.trusted += min(since, killed)
            continue
        # The time at which the process finished, or would have finished. If qkilld killed the
        # process, this is after the end of the schedule.
        finished = one.outcome.seconds - one.outcome.delay
        if one.outcome.result != "exited":
            finished = max([finished, *(change.at for change in one.spec.changes)])
        if killed < finished and rightly_killed(known, killed):
            continue
        found.watched += finished
        found.trusted += min(finished, killed)
        found.mistakes += killed < finished
    return found


def table(results: Sequence[RunResult]) -> str:
    lines = [
        "| policy | detection time, median and most | never detected | mistakes |"
        " mistake recurrence time | query accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for name, kills in POLICIES.items():
        found = quality(results, kills)
        detected = "none"
        if found.detections:
            median, most = statistics.median(found.detections), max(found.detections)
            detected = f"{median:.1f} s, {most:.1f} s ({len(found.detections)})"
        recurrence = f"{found.watched / found.mistakes:.0f} s" if found.mistakes else "none seen"
        accuracy = f"{found.trusted / found.watched:.3f}" if found.watched else "-"
        lines.append(
            f"| {name} | {detected} | {found.missed} | {found.mistakes} | {recurrence} |"
            f" {accuracy} |"
        )
    return "\n".join(lines)
