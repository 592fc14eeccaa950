"""Print the findings of a campaign."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tests.campaign import quality
from tests.campaign.judge import (
    FALSE_KILL,
    FALSE_WAIT,
    UNEXPECTED,
    UNSEEN,
    WRONG_RISK,
    WRONG_VERDICT,
    Finding,
    Judgement,
    kill_time,
)
from tests.campaign.pool import RunResult
from tests.campaign.run import Outcome
from tests.campaign.spec import Spec

ROW_S: Final = 60.0
"""Seconds between two rows of the running table."""
KINDS = (FALSE_KILL, FALSE_WAIT, WRONG_RISK, WRONG_VERDICT, UNEXPECTED, UNSEEN)


def line(one: RunResult) -> str:
    """Describe a run in a few lines."""
    shown = f"{one.spec.name}: {_disks(one.spec)}"
    if one.spec.noises:
        shown += f"; {', '.join(one.spec.noises)}"
    if one.outcome is None or one.judgement is None:
        return f"{shown}\n    not done: {one.failed.strip().splitlines()[-1]}"
    outcome = one.outcome
    schedule = ", ".join(
        f"{at:.1f} {change.what} {change.value or ''}".strip() + f" of {change.of}"
        for at, change in outcome.applied
    )
    killed = kill_time(outcome)
    how = f"{outcome.result} after {outcome.seconds:.1f} s"
    how += f" (SIGKILL at {killed:.1f} s)" if killed is not None else ""
    how += f", {outcome.lost} of {outcome.records} lost" if outcome.lost else ""
    how += ", bitmap lost" if outcome.bitmap_lost else ""
    how += ", at risk" if outcome.at_risk else ""
    verdicts = [f"{name} {at / 1e6:.0f}" for name, at, _ in outcome.receipt.get("verdicts", ())]
    lines = [shown, f"    schedule: {schedule}", f"    {how}; {', '.join(verdicts)}"]
    lines += [f"    {finding.kind.upper()}: {finding.text}" for finding in one.judgement.findings]
    if one.judgement.too_late:
        lines.append(f"    (samples {one.judgement.late:.1f} s late, {one.tries} tries)")
    if not one.clean:
        lines.append(f"    {outcome.trace}")
    return "\n".join(lines)


def cell(one: RunResult | None) -> str:
    """Return how a run ended, for a table that compares ways to stop."""
    if one is None or one.outcome is None:
        return "-" if one is None else "not done"
    outcome = one.outcome
    words = []
    if outcome.records:
        words.append(f"{outcome.lost}/{outcome.records} lost" if outcome.lost else "**0** lost")
    words += ["bitmap lost"] if outcome.bitmap_lost else []
    still = outcome.result == "running"
    words.append(f"{'> ' if still else ''}{outcome.seconds:.1f} s")
    words += [] if still else [outcome.result]
    words += ["at risk"] if outcome.at_risk else []
    verdicts = dict.fromkeys(name for name, _, _ in outcome.receipt.get("verdicts", ()))
    return ", ".join(words) + (f" ({', '.join(verdicts)})" if verdicts else "")


def summary(results: Sequence[RunResult]) -> str:
    judged = [one.judgement for one in results if one.judgement and not one.judgement.too_late]
    found = Counter(kind for one in judged for kind in {finding.kind for finding in one.findings})
    lines = [f"{len(results)} runs, {len(judged)} judged, {sum(one.right for one in judged)} right"]
    lines += [f"  {kind:<14}{found[kind]:>5} runs" for kind in KINDS]
    repeats = sum(one.tries - 1 for one in results)
    late = sum(bool(one.judgement and one.judgement.too_late) for one in results)
    failed = [one for one in results if one.failed]
    lines.append(f"  {repeats} repeats because samples were late, {late} runs late each time")
    lines.append(f"  {len(failed)} runs failed in the lab")
    past = [one.detection for one in judged if one.detection is not None]
    if past:
        lines.append(
            f"  given up {statistics.median(past):.2f} s (median) to {max(past):.2f} s after the"
            f" policy's time, {len(past)} runs"
        )
    ticks = sum(one.ticks for one in judged)
    right = sum(one.right_ticks for one in judged)
    lines += [f"  {right} of {ticks} verdicts are right", "", quality.table(results)]
    return "\n".join(lines)


class RunningTable:
    """A table to which a row is added every minute, for a campaign that runs unattended."""

    _HEAD = (
        *("time", "done", "judged", "right", "false kill", "false wait", "wrong risk"),
        *("verdicts", "repeats", "late", "not done", "load"),
    )

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._next = time.monotonic() + ROW_S
        self._headed = False

    def lines(self, results: Sequence[RunResult]) -> Iterator[str]:
        """Yield the rows that are due."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + ROW_S
        judged = [one.judgement for one in results if one.judgement and not one.judgement.too_late]
        found = Counter(
            kind for one in judged for kind in {finding.kind for finding in one.findings}
        )
        ticks, right = (sum(getattr(j, n) for j in judged) for n in ("ticks", "right_ticks"))
        row = (
            time.strftime("%H:%M:%S"),
            f"{len(results)}/{self._runs}",
            *(len(judged), sum(one.right for one in judged)),
            *(found[kind] for kind in (FALSE_KILL, FALSE_WAIT, WRONG_RISK)),
            f"{right}/{ticks}",
            sum(one.tries - 1 for one in results),
            sum(bool(one.judgement and one.judgement.too_late) for one in results),
            sum(bool(one.failed) for one in results),
            f"{os.getloadavg()[0]:.0f}",
        )
        if not self._headed:
            self._headed = True
            yield _row(self._HEAD)
        yield _row(row)


def _row(cells: Sequence[object]) -> str:
    return " ".join(f"{cell!s:>10}" for cell in cells)


def _disks(spec: Spec) -> str:
    return " | ".join(
        " ".join(
            str(word)
            for word in (
                *(disk.kind, "" if disk.store == "plain" else f"on {disk.store}"),
                "" if disk.kind == "vhost" else f"{disk.format} {disk.cache}",
                f"{disk.make}/{disk.transport}" if disk.kind == "nbd" else "",
                disk.aio if disk.kind == "file" else "",
                f"reconnect={disk.reconnect}" if disk.reconnect else "",
                disk.syntax if disk.syntax in ("added", "mirror") else "",
                "proxy" if disk.proxy else "",
                "in a netns" if disk.netns else "",
                "shared" if disk.shared else "",
                "logs" if disk.logs else "",
                "connects" if disk.connects else "",
            )
            if word
        )
        for disk in spec.disks
    )


def to_json(one: RunResult) -> dict[str, Any]:
    return {
        "spec": one.spec.to_json(),
        "outcome": one.outcome.to_json() if one.outcome else None,
        "judgement": dataclasses.asdict(one.judgement) if one.judgement else None,
        "tries": one.tries,
        "failed": one.failed,
    }


def from_json(value: Mapping[str, Any]) -> RunResult:
    told = value["judgement"]
    judgement = None
    if told:
        findings = [Finding(**finding) for finding in told["findings"]]
        judgement = Judgement(**{**told, "findings": findings})
    outcome = Outcome.from_json(value["outcome"]) if value["outcome"] else None
    return RunResult(
        Spec.from_json(value["spec"]), outcome, judgement, value["tries"], value["failed"]
    )
