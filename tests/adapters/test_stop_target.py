"""Taking hold of what the helper is to stop."""

from __future__ import annotations

import os

import pytest

from qkilld.model.errors import NoSuchProcess
from qkilld.stop.target import hold


@pytest.mark.parametrize("pid", [2**31, 2**32 - 1, 9_999_999_999, 2**70])
def test_a_number_that_no_process_can_have(pid: int) -> None:
    with pytest.raises(NoSuchProcess):
        hold(pid)


def test_another_process_of_the_same_number() -> None:
    target = hold(os.getpid())
    target.close()
    assert target.start_time is not None
    with pytest.raises(NoSuchProcess):
        hold(os.getpid(), target.start_time + 1)
