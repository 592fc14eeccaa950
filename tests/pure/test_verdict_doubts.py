"""Doubtful movement of one wait, while other waits do not move."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qkilld.model.sample import Mount, Sample, Thread
from tests.pure.test_verdict import (
    CLOSING,
    FDATASYNC,
    IDLE,
    NBD,
    NFS,
    NO_IO,
    OF_NBD,
    ON_MOUNT,
    SERVER,
    STRANGER,
    UNIX,
    served,
)
from tests.pure.test_verdict_unreadable import DISK, kill_time


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


def joining(thread: Thread, second: int) -> tuple[Thread, ...]:
    """Every 20 s, one more thread waits, and none returns."""
    return tuple(replace(thread, tid=100 + n) for n in range(1 + second // 20))


@pytest.mark.parametrize("on_mount", [False, True])
def test_threads_that_join_a_hung_storage_are_no_progress(on_mount: bool) -> None:
    thread = ON_MOUNT if on_mount else FDATASYNC
    mounts = (replace(NFS, operations=None),) if on_mount else ()
    assert kill_time(lambda n: replace(IDLE, threads=joining(thread, n), mounts=mounts)) == 60


@pytest.mark.parametrize("shared", [False, True, None])
def test_calls_that_join_the_hung_calls_of_a_server_are_no_progress(shared: bool | None) -> None:
    def shown(second: int) -> Sample:
        peer = replace(SERVER, shared=shared, threads=joining(ON_MOUNT, second))
        return replace(IDLE, **served(peer))

    assert kill_time(shown) == 60


def test_a_thread_that_returns_while_another_joins_is_progress() -> None:
    def shown(second: int) -> Sample:
        tids = range(second // 20, second // 20 + 3)
        return replace(IDLE, threads=tuple(replace(FDATASYNC, tid=100 + n) for n in tids))

    assert kill_time(shown) is None


def test_another_mount_at_the_same_place_of_the_list_is_no_progress() -> None:
    """The first mount disappears, so the second one becomes the first."""
    mounts = (replace(NFS, operations=10), replace(NFS, operations=500, number="0:10"))

    def shown(second: int) -> Sample:
        return replace(
            IDLE, threads=(CLOSING,), devices=(), mounts=mounts[1:] if second >= 30 else mounts
        )

    assert kill_time(shown) == 60


def test_a_guest_that_cannot_take_sigterm_makes_no_progress_beside_doubtful_movement() -> None:
    """The first thread waits for a file system that others use. The guest still runs, and writes to
    another disk."""
    waiting = replace(ON_MOUNT, first=True)
    disk = replace(DISK, in_flight=1)

    def shown(second: int) -> Sample:
        return replace(
            IDLE,
            term_pending=True,
            threads=(waiting,),
            mounts=(fuse("0:9", second),),
            rings=4,
            devices=(replace(disk, writes=disk.writes + second),),
        )

    assert kill_time(shown, 400) == 300


def test_a_shared_disk_is_no_progress_if_the_requests_are_unreadable() -> None:
    """Other processes write to the disk, and an NBD server is frozen."""
    disk = replace(DISK, in_flight=1)

    def shown(second: int, *, own: bool = False) -> Sample:
        return replace(
            IDLE,
            rings=None,
            nodes=(NBD,),
            sockets=(replace(UNIX, send_queue=700),),
            devices=(replace(disk, writes=disk.writes + second, own=own),),
        )

    assert kill_time(shown, 400) == 60
    assert kill_time(lambda second: shown(second, own=True), 400) is None


@pytest.mark.parametrize("every", [2, 10, 50])
@pytest.mark.parametrize("takes_sigterm", [True, False])
def test_a_hung_request_counts_although_its_source_is_often_unreadable(
    every: int, takes_sigterm: bool
) -> None:
    """A thread waits for a hung disk. A program on a connection of unknown use writes its log or,
    if SIGTERM is not taken, the guest writes to another disk."""
    thread = replace(FDATASYNC, disks=("8:16",), first=not takes_sigterm)
    hung = replace(DISK, number="8:16", in_flight=1)
    logger = replace(SERVER, pid=95)

    def shown(second: int) -> Sample:
        busy = replace(logger, io=replace(NO_IO, write_bytes=second << 16))
        socket = replace(UNIX, node="", role="unknown", peer=busy)
        other = replace(DISK, writes=second, in_flight=1)
        return replace(
            IDLE,
            term_pending=not takes_sigterm,
            threads=None if second % every == 1 else (thread,),
            devices=(hung,) if takes_sigterm else (hung, other),
            sockets=(socket,) if takes_sigterm else (),
            rings=0 if takes_sigterm else 4,
            ringless=() if takes_sigterm else ("8:16",),
        )

    killed = kill_time(shown, 600)
    assert killed is not None and killed <= 30 + 300


@pytest.mark.parametrize(
    ("has_run", "completes", "killed"),
    [(True, False, None), (False, False, 61), (False, True, None)],
)
def test_a_call_of_a_thread_that_has_not_run_is_not_over(
    has_run: bool, completes: bool, killed: int | None
) -> None:
    """The file for which the thread waits is found only in every other sample."""

    def shown(second: int) -> Sample:
        thread = replace(FDATASYNC, switches=second if has_run else 5)
        lost = replace(thread, target="", disks=())
        disk = replace(DISK, writes=second if completes else 0, in_flight=1)
        return replace(IDLE, threads=(thread if second % 2 else lost,), devices=(disk,))

    assert kill_time(shown) == killed


@pytest.mark.parametrize("last", [1, 50])
def test_a_call_that_may_have_ended_unseen_hides_no_doubtful_movement(last: int) -> None:
    """The threads become unreadable for good, and the disk completes a request each second."""

    def shown(second: int) -> Sample:
        disk = replace(DISK, writes=second, in_flight=1)
        thread = replace(FDATASYNC, first=True)
        threads = (thread,) if second <= last else None
        return replace(IDLE, term_pending=second <= last, threads=threads, devices=(disk,))

    killed = kill_time(shown, 600)
    assert killed is not None and killed >= 300


def test_a_call_of_unknown_end_does_not_prove_that_the_guest_still_runs() -> None:
    """The process has taken SIGTERM since then, and requests on its io_urings complete."""

    def shown(second: int) -> Sample:
        disk = replace(DISK, writes=second, in_flight=1)
        threads = None if second else (replace(FDATASYNC, first=True),)
        return replace(IDLE, term_pending=not second, threads=threads, devices=(disk,), rings=4)

    assert kill_time(shown, 600) is None


@pytest.mark.parametrize("until", [0, 1, 5])
def test_a_call_whose_place_is_known_only_at_first_still_makes_progress(until: int) -> None:
    """The first thread cannot take SIGTERM before its flush is done."""

    def shown(second: int) -> Sample:
        thread = replace(FDATASYNC, first=True, switches=5)
        lost = replace(thread, target="", disks=())
        disk = replace(DISK, writes=second, in_flight=1)
        threads = (thread if second <= until else lost,)
        return replace(IDLE, term_pending=True, threads=threads, devices=(disk,))

    assert kill_time(shown, 600) is None


def test_a_new_connection_of_unknown_use_starts_nothing_again() -> None:
    """An added iSCSI disk connects to a frozen server again. The server of a third disk runs for
    itself, as an iSCSI server does."""

    def shown(second: int) -> Sample:
        busy = replace(SERVER, threads=(), switches=10 * second)
        new = replace(STRANGER, inode=100 + second // 20, peer=busy)
        sockets = () if second % 20 == 19 else (new,)
        return replace(IDLE, pluggable=True, switches=100 + second, sockets=sockets)

    assert kill_time(shown, 400) == 60
