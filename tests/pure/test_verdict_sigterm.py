"""The first thread waits in a call. So QEMU does not handle SIGTERM, and the guest continues to
write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qkilld.decision.verdict import assess
from qkilld.model.constants import Verdict
from tests.pure.test_verdict import BUSY_DISK, FDATASYNC, HUNG, IDLE, ON_HUNG, S, verdict

STUCK = replace(ON_HUNG, tid=1, first=True)
UNTAKEN: dict[str, Any] = {
    "term_pending": True,
    "threads": (STUCK, FDATASYNC),
    "devices": (HUNG, *BUSY_DISK),
}
MOVED = (HUNG, replace(BUSY_DISK[0], writes=5_000))


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({}, {}, Verdict.STORAGE_WAIT),
        ({}, {"devices": MOVED}, Verdict.UNKNOWN),
        # A write of the guest has ended.
        ({}, {"threads": (STUCK,)}, Verdict.UNKNOWN),
        # The disk for which the first thread waits makes progress.
        ({}, {"devices": (replace(HUNG, writes=11), *BUSY_DISK)}, Verdict.FLUSHING),
        ({}, {"threads": (FDATASYNC,)}, Verdict.FLUSHING),
        # SIGTERM was handled, so QEMU finishes its disks.
        ({"term_pending": False}, {"devices": MOVED}, Verdict.FLUSHING),
        ({"term_pending": None}, {"devices": MOVED}, Verdict.FLUSHING),
        # Another thread waits, too, for another disk.
        ({"threads": (ON_HUNG, FDATASYNC)}, {"devices": MOVED}, Verdict.FLUSHING),
    ],
)
def test_before_sigterm_is_taken(
    before: dict[str, Any], now: dict[str, Any], expected: Verdict
) -> None:
    assert verdict({**UNTAKEN, **before}, now) is expected


def test_the_guest_does_not_delay_sigkill_for_ever() -> None:
    now = None
    for second in range(60):
        moved = (HUNG, replace(BUSY_DISK[0], writes=2_000 + second))
        sample = replace(IDLE, at=second * S, **{**UNTAKEN, "devices": moved})
        now = assess(now, sample)
    assert now is not None
    assert (now.progress_at, now.doubt_at) == (None, now.last.at)
