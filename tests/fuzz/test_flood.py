"""A short flood of hostile messages with a fixed seed. `make fuzz` is the long flood."""

from __future__ import annotations

from tests.fuzz.__main__ import table
from tests.fuzz.calls import CALL_KINDS, CallSource
from tests.fuzz.flood import flood
from tests.fuzz.messages import Aims, Source

SEED = 20121


def test_the_same_seed_gives_the_same_messages() -> None:
    first, second = (Source("1/2", Aims((3, 4), (5,))) for _ in range(2))
    assert [first.next() for _ in range(500)] == [second.next() for _ in range(500)]
    one, two = (CallSource("1/2", Aims((3, 4), (5,))) for _ in range(2))
    assert [one.next() for _ in range(500)] == [two.next() for _ in range(500)]


def test_a_flood_of_hostile_messages() -> None:
    """The daemon keeps no memory and no descriptors, and answers another client meanwhile."""
    report = flood(SEED, messages=8_000, seconds=60)
    print(table(report))
    assert report.faults == []
    assert report.messages > 1_000
    assert all(report.deeds.sent[kind] for kind in CALL_KINDS)
    # This limit is not strict, because memory becomes fragmented at first. `make fuzz` has a
    # stricter one.
    assert report.growth < 10_000_000
    assert report.descriptors[1] - report.descriptors[0] < 200
    assert all(one.longest < 30 for one in report.latency.values())
