"""The number of threads that targets can block is limited for each user separately."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from qkilld.adapters.target_threads import (
    MAX_OF_TARGET,
    MAX_SHARED,
    MAX_THREADS,
    RESERVED_FOR_ROOT,
    AllThreadsBlocked,
    TargetThreads,
)
from qkilld.model.guest import Identity


def target(pid: int, uid: int = 1000) -> Identity:
    return Identity(pid, 1, uid, "qemu", "S", "/usr/bin/qemu-system-x86_64", False)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


def blocked(threads: TargetThreads, gate: threading.Event, pids: range, uid: int) -> int:
    """Return how many threads the targets of the user `uid` could block."""
    count = 0
    for pid in pids:
        try:
            while True:
                threads.run(target(pid, uid), gate.wait)
                count += 1
        except AllThreadsBlocked:
            pass
    return count


def test_a_blocking_target_gets_no_more_threads(gate: threading.Event) -> None:
    async def work() -> None:
        threads = TargetThreads()
        assert blocked(threads, gate, range(1, 2), 1000) == MAX_OF_TARGET
        gate.set()
        while True:  # A place is free again once a thread has returned.
            try:
                await threads.run(target(1), lambda: None)
                break
            except AllThreadsBlocked:
                await asyncio.sleep(0.01)

    asyncio.run(work())


def test_one_user_leaves_room_for_others_and_all_for_root(gate: threading.Event) -> None:
    async def work() -> None:
        threads = TargetThreads()
        assert blocked(threads, gate, range(1, 100), 1000) == MAX_SHARED + 1
        others = sum(
            blocked(threads, gate, range(uid * 100, uid * 100 + 99), uid) for uid in range(1, 99)
        )
        assert others == MAX_THREADS - RESERVED_FOR_ROOT - MAX_SHARED - 1
        roots = blocked(threads, gate, range(10_000, 10_100), 0)
        assert roots == RESERVED_FOR_ROOT
        gate.set()

    asyncio.run(work())


def test_exceptions_reach_the_caller_and_free_the_thread() -> None:
    def fail() -> None:
        raise OSError("no")

    async def work() -> None:
        threads = TargetThreads()
        for _ in range(3 * MAX_OF_TARGET):
            with pytest.raises(OSError):
                await threads.run(target(1), fail)

    asyncio.run(work())


def test_threads_of_readers_count_with_them(gate: threading.Event) -> None:
    async def work() -> None:
        threads = TargetThreads()
        started = []
        with pytest.raises(AllThreadsBlocked):
            for pid in range(1, 100):
                started.append(threads.start(pid, 1000, gate.wait))
        assert len(started) == MAX_SHARED + 1
        with pytest.raises(AllThreadsBlocked):
            threads.run(target(500), gate.wait)
        await threads.run(target(501, uid=0), lambda: None)
        gate.set()
        for thread in started:
            thread.join()
        await threads.run(target(500), lambda: None)

    asyncio.run(work())


def test_a_function_that_fails_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    threads = TargetThreads()

    def fail() -> None:
        raise MemoryError

    for _ in range(MAX_OF_TARGET + 1):
        threads.start(5, 1000, fail).join()
