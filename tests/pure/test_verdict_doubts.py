"""Doubtful movement of one wait, while other waits do not move."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qkilld.model.sample import Mount, Sample
from tests.pure.test_verdict import IDLE, NBD, OF_NBD, ON_MOUNT
from tests.pure.test_verdict_unreadable import kill_time


def fuse(number: str, answered: int) -> Mount:
    return Mount("fuse", None, None, number, waiting=1_000 - answered)


def two_mounts(first: int, second: int) -> Sample:
    threads = (replace(ON_MOUNT, tid=7), replace(ON_MOUNT, tid=8, mount="0:10"))
    mounts = (fuse("0:9", first), fuse("0:10", second))
    return replace(IDLE, threads=threads, mounts=mounts)


@pytest.mark.parametrize("every", [1, 12, 25])
def test_two_slow_storages_delay_sigkill_although_they_take_turns(every: int) -> None:
    def shown(second: int) -> Sample:
        return two_mounts(second // every, (second + every // 2 + 1) // every)

    assert kill_time(shown, 310) == 300


def test_a_storage_that_stands_for_30_seconds_hides_doubtful_movement_again() -> None:
    """Both storages move for 20 s, then one hangs for ever."""
    assert kill_time(lambda second: two_mounts(second, min(second, 20)), 310) in range(105, 115)


def test_all_connections_of_a_node_show_progress() -> None:
    """A node has 200 connections, and only the last one moves."""

    def shown(second: int) -> Sample:
        moved = [0] * 199 + [second * 10_000]
        sockets = tuple(
            replace(OF_NBD, inode=1_000 + n, acked=20_000 + size, received=20_000 + size)
            for n, size in enumerate(moved)
        )
        return replace(IDLE, nodes=(NBD,), sockets=sockets)

    assert kill_time(shown, 100) is None
