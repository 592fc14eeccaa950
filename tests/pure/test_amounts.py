"""The amounts of written data."""

from __future__ import annotations

from dataclasses import replace

from qkilld.decision.amounts import MAX_SERVERS, NOTHING_COUNTED, count_amounts
from tests.pure.test_verdict import IDLE, NO_IO, SERVER, S, served


def test_servers_that_are_started_again_and_again_are_not_all_remembered() -> None:
    """Each server writes 1,000 bytes between two samples, and is then replaced."""
    amounts = NOTHING_COUNTED
    for start in range(3 * MAX_SERVERS):
        for written in (0, 1_000):
            peer = replace(SERVER, pid=1_000 + start, io=replace(NO_IO, write_bytes=written))
            sample = replace(IDLE, at=start * S, **served(peer))
            amounts = count_amounts(amounts, IDLE, sample)
    assert amounts.served == 3 * MAX_SERVERS * 1_000
    assert len(amounts.servers) == MAX_SERVERS
    assert amounts.servers[-1].pid == 1_000 + 3 * MAX_SERVERS - 1
