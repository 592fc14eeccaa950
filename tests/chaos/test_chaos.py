"""A short run with a fixed seed. `make chaos` is the long run."""

from __future__ import annotations

from tests.chaos import plan
from tests.chaos.__main__ import table
from tests.chaos.run import prepared, run

SEED = 20121


def test_stops_while_everything_fails() -> None:
    """The test has its own system, because the failures would affect other tests."""
    with prepared() as system:
        report = run(system, plan.make(SEED, jobs=12, seconds=10, qemus=2))
    print(table(report))
    assert report.broken() == []
    assert report.restarts > 0
