"""The cases of the campaign, and twenty random runs with a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice

import pytest

from tests.campaign import report
from tests.campaign.cases import CASES
from tests.campaign.draw import draw
from tests.campaign.keep import keep
from tests.campaign.pool import RunResult, run_all
from tests.campaign.spec import Spec
from tests.campaign.truth import BOUNDED, truth
from tests.lab import needs

SEED = 1
RUNS = 20
LONGEST_S = 40.0
"""The longest planned time of a random run, in seconds."""


@pytest.fixture(autouse=True)
def storage() -> None:
    """Check for everything that a run may need."""
    needs.root("storage of all kinds")
    for name, package in (("tgtd", "tgt"), ("nbdkit", "nbdkit"), ("qemu-nbd", "qemu-utils")):
        needs.program(name, package)


@pytest.mark.timeout(600)
def test_every_case_is_right() -> None:
    _all_right([case.spec for case in CASES.values()])


@pytest.mark.timeout(600)
def test_random_runs_are_right() -> None:
    drawn = (draw(SEED, number) for number in count())
    _all_right(list(islice((spec for spec in drawn if _length(spec) <= LONGEST_S), RUNS)))


def _length(spec: Spec) -> float:
    """Return the seconds that the run takes if everything is right."""
    last = truth(spec, [(change.at, change) for change in spec.changes]).spans[-1]
    return last.since + (spec.storage_stall if last.state in BOUNDED else 0)


def _all_right(specs: Sequence[Spec]) -> None:
    """Check each run, except runs whose samples were late every time.

    A wrong run is repeated once, with fewer other runs at the same time. The reason: on a busy
    host, the page cache is written back late, and the schedule does not contain this movement of a
    healthy disk.
    """
    wrong = _wrong(specs)
    repeated = _wrong([one.spec for one in wrong])
    lines = [report.line(keep(one)) for one in repeated]
    assert not lines, "\n" + "\n".join(lines)


def _wrong(specs: Sequence[Spec]) -> list[RunResult]:
    return [
        one
        # Allow only two attempts, so that the test does not take too long on a busy host.
        for one in (run_all(specs, most=2) if specs else ())
        if not one.clean and not (one.judgement and one.judgement.too_late)
    ]
