"""Names of guests whose command lines block: a deadline for all, and few threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest.mock import Mock

import pytest

from qkilld.adapters import names as names_module
from qkilld.adapters.names import (
    MAX_SHARED,
    MAX_THREADS,
    RESERVED_FOR_ROOT,
    UNKNOWN,
    NameReader,
    Names,
    keys_of,
)
from qkilld.engine.long_replies import STEP_S
from qkilld.model.guest import Identity


def identity(pid: int, uid: int = 1000, start_time: int = 1) -> Identity:
    return Identity(pid, start_time, uid, "qemu", "S", "/usr/bin/qemu-system-x86_64", False)


@dataclass
class CommandLines:
    """Reading pids below 1000 blocks until `release`."""

    release: threading.Event = field(default_factory=threading.Event)
    read: list[int] = field(default_factory=list)

    def __call__(self, pid: int) -> Names:
        self.read.append(pid)
        if pid < 1000:
            self.release.wait()
        return f"guest{pid}", "", False, False


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[CommandLines]:
    # A hundred threads must start within this time, even on a busy host.
    monkeypatch.setattr(names_module, "TIMEOUT_S", 3.0)
    before = set(threading.enumerate())
    lines = CommandLines()
    yield lines
    lines.release.set()
    for thread in set(threading.enumerate()) - before:
        thread.join()


def threads() -> int:
    return sum(thread.name.startswith("names-") for thread in threading.enumerate())


def test_blocking_names_are_waited_for_once_and_take_few_threads(lines: CommandLines) -> None:
    async def ask() -> None:
        reader = NameReader(lines)
        hostile = [identity(pid) for pid in range(1, 61)]
        others = [identity(pid, uid=2000) for pid in range(1000, 1100)]
        began = time.monotonic()
        names = await reader.names([*hostile, *others])
        took = time.monotonic() - began
        assert took >= names_module.TIMEOUT_S
        assert names == [UNKNOWN] * 60 + [
            (f"guest{pid}", "", False, False) for pid in range(1000, 1100)
        ]
        assert threads() <= MAX_SHARED + 1
        # Later calls do not wait for these names, and read new names of other users as usual.
        for pid in range(1100, 1105):
            began = time.monotonic()
            names = await reader.names([*hostile, identity(pid, uid=2000)])
            assert names[-1] == (f"guest{pid}", "", False, False)
            assert time.monotonic() - began < took
        lines.release.set()
        for _ in range(3000):
            if UNKNOWN not in (names := await reader.names(hostile)):
                break
            await asyncio.sleep(0.01)
        assert names == [(f"guest{pid}", "", False, False) for pid in range(1, 61)]

    asyncio.run(ask())
    assert sorted(lines.read) == sorted({*range(1, 61), *range(1000, 1105)})


@pytest.mark.parametrize("lacks", ["room", "a thread"])
def test_a_late_name_is_read_once_there_is_a_thread(
    lines: CommandLines, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    monkeypatch.setattr(names_module, "TIMEOUT_S", 0.1)

    async def ask() -> None:
        reader, late = NameReader(lines), [identity(1000, uid=2000)]
        with pytest.MonkeyPatch.context() as patch:
            if lacks == "room":
                patch.setattr(reader._threads, "has_room", lambda uid: False)
            else:
                patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError))
            assert await reader.names(late) == [UNKNOWN]
        for _ in range(1000):
            if UNKNOWN not in (names := await reader.names(late)):
                break
            await asyncio.sleep(0.01)
        assert names == [("guest1000", "", False, False)]

    asyncio.run(ask())


def test_time_in_which_nobody_ran_does_not_count(lines: CommandLines) -> None:
    async def ask() -> None:
        names = asyncio.create_task(NameReader(lines).names([identity(1)]))
        await asyncio.sleep(0.1)
        # Pause the whole process for the timeout. Then the command line becomes readable.
        time.sleep(names_module.TIMEOUT_S)  # noqa: ASYNC251
        lines.release.set()
        assert await names == [("guest1", "", False, False)]

    asyncio.run(ask())


def test_users_together_leave_threads_for_root(lines: CommandLines) -> None:
    async def ask() -> None:
        reader = NameReader(lines)
        await reader.names([identity(pid, uid=1000 + pid) for pid in range(1, 101)])
        assert threads() == MAX_THREADS - RESERVED_FOR_ROOT
        assert await reader.names([identity(1000, uid=0)]) == [("guest1000", "", False, False)]
        # Only the total limit applies to root's processes.
        await reader.names([identity(pid, uid=0) for pid in range(201, 301)])
        assert threads() == MAX_THREADS

    asyncio.run(ask())


def test_thousands_that_answer_are_all_read(lines: CommandLines) -> None:
    everyone = [identity(pid) for pid in range(1000, 6000)]
    names = asyncio.run(NameReader(lines).names(everyone))
    assert names == [(f"guest{pid}", "", False, False) for pid in range(1000, 6000)]


def test_many_guests_hide_no_others_and_do_not_block_the_loop(
    lines: CommandLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user can run tens of thousands of processes that pass for guests."""
    count = 5000
    monkeypatch.setattr(names_module, "MAX_NAMES", count)
    others = [identity(pid) for pid in range(1001, 1001 + count)]
    everyone = [identity(1000, uid=0), *others]

    async def ask() -> None:
        reader = NameReader(lines)
        for _ in range(2):
            names = await reader.names(everyone)
            assert names[0] == ("guest1000", "", False, False)
            assert UNKNOWN not in names
            assert len(reader._names) == count
        # Almost all names are known already, so the loop's thread does the work.
        asking = asyncio.create_task(reader.names(everyone[:-1]))
        steps = []
        while not asking.done():
            before = time.thread_time()
            await asyncio.sleep(0)
            steps.append(time.thread_time() - before)
        assert len(steps) > 1 and max(steps) < 5 * STEP_S

    asyncio.run(ask())


def test_many_guests_hide_none_from_a_second_call(
    lines: CommandLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names_module, "MAX_NAMES", 10)
    everyone = [identity(pid) for pid in range(1, 21)]

    async def ask() -> None:
        reader = NameReader(lines)
        calls = [reader.names(everyone), reader.names(everyone[::-1])]
        asyncio.get_running_loop().call_later(0.05, lines.release.set)
        for names in await asyncio.gather(*calls):
            assert UNKNOWN not in names
        assert len(reader._names) == 10 and not reader._needed

    asyncio.run(ask())


def test_a_search_keeps_the_name_that_a_call_waits_for(lines: CommandLines) -> None:
    """A search lists only the processes that it has found. The call may be about a newer one."""

    async def ask() -> None:
        reader = NameReader(lines)
        blocked = [identity(pid) for pid in range(1, MAX_SHARED + 2)]
        late = asyncio.create_task(reader.names(blocked))
        while threads() <= MAX_SHARED:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        asking = asyncio.create_task(reader.names([identity(1000)]))
        await asyncio.sleep(0)
        reader.keep(keys_of(blocked))
        lines.release.set()
        assert await asking == [("guest1000", "", False, False)]
        await late

    asyncio.run(ask())


def test_a_search_keeps_the_name_that_a_call_is_about_to_return(lines: CommandLines) -> None:
    """The name was read, but the call still waits for another name."""

    async def ask() -> None:
        reader = NameReader(lines)
        asking = asyncio.create_task(reader.names([identity(1000), identity(1, uid=1001)]))
        while identity(1000).key not in [key[:2] for key in reader._names]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        reader.keep(keys_of([identity(1, uid=1001)]))
        lines.release.set()
        assert UNKNOWN not in await asking

    asyncio.run(ask())


def test_processes_that_are_gone_are_forgotten(
    lines: CommandLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        reader = NameReader(lines)
        await reader.names([identity(pid) for pid in range(1, 61)])
        for start_time in range(2, 50):
            new = [identity(pid, start_time=start_time) for pid in range(1, 61)]
            reader.keep(keys_of(new))
            await reader.names(new[:1])
        # Only names that are being read, and those requested last, are kept.
        kept = (reader._names, reader._pending, reader._late_keys)
        assert all(len(each) <= MAX_SHARED + 1 + 1 for each in kept)

    monkeypatch.setattr(names_module, "TIMEOUT_S", 0.02)
    asyncio.run(ask())


def test_a_thread_that_cannot_be_started_takes_no_place(
    lines: CommandLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = threading.Thread.start
    failures = [RuntimeError("can't start new thread")] * 5

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("names-") and failures:
            raise failures.pop()
        starts(thread)

    async def ask() -> None:
        # If each failure kept its place, no thread could be started any more.
        reader = NameReader(lines)
        assert await reader.names([identity(1000)]) == [("guest1000", "", False, False)]
        assert not failures

    monkeypatch.setattr(threading.Thread, "start", start)
    asyncio.run(ask())
