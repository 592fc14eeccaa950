"""For a guest without movement, the short judgement has the same result as the full one."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qkilld.decision import verdict
from qkilld.decision.verdict import Assessment, assess
from qkilld.model.sample import Sample
from qkilld.model.trace import decode
from tests.pure.test_verdict import FDATASYNC, IDLE, NBD, NO_IO, S

TRACES = Path(__file__).parents[1] / "traces"
LOOKS: list[dict[str, Any]] = [
    *[{}] * 6,
    *[{"pluggable": True}] * 3,
    {"term_pending": True},
    {"running": 1},
    {"running": 2, "cpu": 50},
    {"state": "T"},
    {"state": "D", "threads": (FDATASYNC,)},
    {"exiting": True},
    {"io": replace(NO_IO, write_bytes=9_000_000)},
    {"io": None},
    {"sockets": None},
    {"rings": None},
    {"rings": 3},
    {"direct": True},
    {"nodes": (NBD,)},
    {"io": None, "threads": None, "sockets": None},
]


def judged(samples: Iterable[Sample]) -> list[Assessment]:
    known: Assessment | None = None
    found = []
    for sample in samples:
        known = assess(known, sample)
        found.append(known)
    return found


def in_both_ways(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of samples judged in the short way."""
    short = []
    is_still, at_length = verdict._is_still, judged_at_length(samples, monkeypatch)

    def noted(before: Assessment, sample: Sample) -> bool:
        short.append(is_still(before, sample))
        return short[-1]

    with monkeypatch.context() as patch:
        patch.setattr(verdict, "_is_still", noted)
        assert judged(samples) == at_length
    return sum(short)


def judged_at_length(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> list[Assessment]:
    with monkeypatch.context() as patch:
        patch.setattr(verdict, "_is_still", lambda before, sample: False)
        return judged(samples)


def test_a_still_guest_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_both_ways([replace(IDLE, at=n * S) for n in range(20)], monkeypatch) == 18


@pytest.mark.parametrize("path", sorted(TRACES.rglob("*.jsonl")), ids=lambda path: path.stem)
def test_recorded_jobs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge every sample three times, as if nothing had moved for a while."""
    recorded = decode(path.read_text()).of(Sample)
    samples = [
        replace(sample, at=sample.at + (3 * number + again) * S)
        for number, sample in enumerate(recorded)
        for again in range(3)
    ]
    in_both_ways(samples, monkeypatch)


@pytest.mark.parametrize("seed", range(200))
def test_made_up_ones(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    at, samples = 0, []
    for _ in range(30):
        look = chance.choice(LOOKS)
        for _ in range(chance.randint(1, 5)):
            at += chance.choice((S // 4, S, S, 2 * S, 7 * S))
            samples.append(replace(IDLE, at=at, **look))
    in_both_ways(samples, monkeypatch)
