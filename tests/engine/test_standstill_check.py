"""The check whether QEMU can run takes only a part of the time for asking the guest."""

from __future__ import annotations

import pytest

from qkilld.engine.sampling import TIMEOUT
from qkilld.engine.standstill_check import MAX_SAMPLES
from qkilld.model.constants import Flag
from qkilld.model.guest_state import GuestOrder

from .conftest import FakeProcess, S
from .test_powerdown import UP, asked_world


@pytest.mark.parametrize(("ask_s", "asked_s"), [(2, 1), (5, 1), (9, 3), (60, MAX_SAMPLES)])
def test_waiting_for_a_sample_takes_a_third_of_the_time_for_asking(
    ask_s: int, asked_s: int
) -> None:
    """Even with little time, the check waits for one sample until its timeout."""
    world, process = asked_world(UP), FakeProcess()
    world.sampler.shows = lambda now: None
    world.stop(process, Flag.POWERDOWN, ask_at_most=ask_s * S)
    world.clock.advance(asked_s * TIMEOUT / S - 0.1)
    assert world.monitors.orders == []
    world.clock.advance(0.2)
    assert (process.sent, world.monitors.orders) == ([], [GuestOrder.BUTTON])
