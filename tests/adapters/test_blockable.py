"""Processes that block the reading of their identity: real ones, in execve(2) on a FUSE mount."""

from __future__ import annotations

import _thread
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from qkilld.adapters import blockable, host, procfs
from qkilld.adapters.blockable import BlockableReads, Unanswered
from qkilld.adapters.host import LocalHost
from qkilld.adapters.process import adopt_process, open_process
from qkilld.model.errors import UnknownIdentity
from qkilld.model.guest import Unit
from qkilld.model.policy import Config
from qkilld.stop import process as stop_process
from qkilld.stop.finder import ProcessFinder
from qkilld.stop.options import Options
from qkilld.stop.process import ProcessHandle
from qkilld.stop.targets import Targets
from tests.evidence.until import until
from tests.lab.guest import Guest, own_qemus
from tests.lab.process import OTHER_UID
from tests.lab.stuck import StuckGuests, stuck_guests

Make = Callable[..., Guest]


def executable(directory: str) -> Path:
    return Path(directory, "exe").readlink()


@pytest.fixture
def stuck() -> Iterator[StuckGuests]:
    with stuck_guests() as guests:
        yield guests
    until(lambda: blockable.shared.blocked, lambda blocked: not blocked)


def test_a_process_cannot_be_identified_while_it_is_stuck(stuck: StuckGuests) -> None:
    guest = stuck.make(OTHER_UID)
    process = open_process(guest.pid)
    try:
        stuck.stick(guest)
        for _ in range(3):
            with pytest.raises(UnknownIdentity, match="file system that does not answer"):
                process.identify()
            with pytest.raises(UnknownIdentity):
                open_process(guest.pid)
            with pytest.raises(Unanswered):
                procfs.read_stat(guest.pid)
        assert blockable.shared.blocked == 1
        assert not process.exited() and not process.dying() and not process.collected()
        assert process.exit_status() == 0
        stuck.free()
        until(lambda: blockable.shared.blocked, lambda blocked: not blocked)
        assert process.identify().key == (guest.pid, guest.start_time)
    finally:
        process.close()


def test_only_the_first_reader_waits(stuck: StuckGuests) -> None:
    guest = stuck.make_stuck(OTHER_UID)

    def read() -> float:
        began = time.monotonic()
        with pytest.raises(Unanswered):
            procfs.read_executable(guest.pid)
        return time.monotonic() - began

    read()
    took = sorted(read() for _ in range(50))
    assert took[25] < blockable.PATIENCE_S / 2, took


def test_a_stored_pidfd_is_used_although_its_process_is_stuck(stuck: StuckGuests) -> None:
    """The job checks the identity before it sends a signal."""
    guest = stuck.make(OTHER_UID)
    before = open_process(guest.pid)
    before.close()
    stuck.stick(guest)
    process = adopt_process(os.pidfd_open(guest.pid), before.guest)
    try:
        assert process.identity == before.identity
        with pytest.raises(UnknownIdentity):
            process.identify()
    finally:
        process.close()


def test_a_scan_skips_them(
    stuck: StuckGuests, fake_qemu: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    guests = [stuck.make_stuck(OTHER_UID) for _ in range(4)]
    web = fake_qemu(name="web")

    monkeypatch.setattr(procfs, "pids", lambda proc: [web.pid, *(guest.pid for guest in guests)])

    async def scan() -> None:
        local, theirs = LocalHost(), {guest.pid for guest in guests}
        for is_first in (True, False):
            began = time.monotonic()
            known, unidentified = await local.identities()
            assert (time.monotonic() - began > host._TIMEOUT_S) is is_first
            pids = {identity.pid for identity in known}
            assert web.pid in pids and not theirs & pids
            assert theirs <= {each.pid for each in unidentified}
            assert all(each.uid == OTHER_UID for each in unidentified if each.pid in theirs)

    asyncio.run(scan())
    assert blockable.shared.blocked >= len(guests)  # Other tests may also have stuck guests.


def test_a_search_waits_for_a_process_that_is_stuck_for_a_moment(stuck: StuckGuests) -> None:
    """This may happen on a host that thrashes."""
    import asyncio

    guest = stuck.make_stuck(OTHER_UID)

    async def scan() -> set[int]:
        threading.Timer(0.5, stuck.free).start()
        known, unidentified = await LocalHost().identities()
        assert guest.pid not in {each.pid for each in unidentified}
        return {identity.pid for identity in known}

    assert guest.pid in asyncio.run(scan())


def test_qkilld_stop_finds_the_others(
    stuck: StuckGuests, fake_qemu: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_process, "IDENTITY_TIMEOUT_S", 0.2)
    guest, web = stuck.make_stuck(OTHER_UID), fake_qemu(name="web")
    finder = ProcessFinder(Options(), {})
    processes = finder.of_manager([own_qemus()])
    for process, _ in processes:
        process.close()
    pids = [process.pid for process, _ in processes]
    assert web.pid in pids and guest.pid not in pids
    assert guest.pid in finder.unidentified
    assert f"{guest.pid}" in str(finder.unknown_identity())
    with pytest.raises(UnknownIdentity, match="Try again"):
        ProcessFinder(Options(pid=guest.pid), {}).named()
    threading.Timer(0.3, stuck.free).start()
    monkeypatch.setattr(stop_process, "IDENTITY_TIMEOUT_S", 30)
    # The pidfd is opened only once, so that another process that reuses the pid is not taken for
    # the guest.
    with patch.object(os, "pidfd_open", wraps=os.pidfd_open) as opened:
        named = ProcessFinder(Options(pid=guest.pid), {}).named()
    opened.assert_called_once_with(guest.pid)
    assert named is not None and named.start_time == guest.start_time
    named.close()


@pytest.mark.parametrize("others", [0, 1])
def test_a_stuck_process_of_the_unit_is_not_taken_for_none(
    stuck: StuckGuests, fake_qemu: Make, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """If the process were ignored, systemd would run the next ExecStop= line while the guest
    runs."""
    monkeypatch.setattr(stop_process, "IDENTITY_TIMEOUT_S", 0.2)
    guest, foreign = stuck.make_stuck(OTHER_UID), stuck.make_stuck(OTHER_UID)
    there = {fake_qemu().pid for _ in range(others)}
    units = dict.fromkeys({guest.pid, *there}, Unit("web.service"))
    units |= {foreign.pid: Unit("db.service"), os.getpid(): Unit("a.service")}
    monkeypatch.setattr(procfs, "pids", lambda: list(units))
    monkeypatch.setattr(procfs, "read_unit", lambda pid: units[pid])
    finder = ProcessFinder(Options(unit="web.service"), {})
    if there:
        processes = finder.in_unit([own_qemus()])
        for process in processes:
            process.close()
        assert {process.pid for process in processes} == there
    else:
        with pytest.raises(UnknownIdentity, match=f"whether process {guest.pid} is"):
            finder.in_unit([own_qemus()])
    assert finder.unidentified == [guest.pid]
    threading.Timer(0.3, stuck.free).start()
    monkeypatch.setattr(stop_process, "IDENTITY_TIMEOUT_S", 30)
    processes = finder.in_unit([own_qemus()])
    for process in processes:
        process.close()
    assert {process.pid for process in processes} == {guest.pid, *there}
    assert not finder.unidentified


def test_a_process_that_was_stuck_at_the_start_does_not_count_at_the_end(
    stuck: StuckGuests, fake_qemu: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may be a shell of another user, or gone."""
    guest, web = stuck.make_stuck(OTHER_UID), fake_qemu()
    targets = Targets(Options(all_guests=True))
    monkeypatch.setattr(targets, "_config", Config(executables=(own_qemus(),)))
    with subprocess.Popen(["/bin/sleep", "600"]) as other:
        gone = subprocess.Popen(["/bin/true"])
        until(lambda: _exited(gone.pid), bool)  # A zombie.
        try:
            targets.finder.unidentified = [gone.pid, other.pid, guest.pid, web.pid]
            assert targets.codes() == [1]
            assert targets.finder.unidentified == [guest.pid, web.pid]
            targets.finder.unidentified = [gone.pid, other.pid]
            assert targets.codes() == []
        finally:
            other.kill()
        assert gone.wait() == 0
    targets.finder.unidentified = [gone.pid, other.pid]
    assert targets.codes() == []


def _exited(pid: int) -> bool:
    process = ProcessHandle(pid, os.pidfd_open(pid), None)
    try:
        return process.exited()
    finally:
        process.close()


def test_a_program_that_may_block_reads_without_threads(
    fake_qemu: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(*arguments: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", no_thread)
    reads, own = BlockableReads(), f"/proc/{os.getpid()}"
    with pytest.raises(Unanswered):
        reads.one(own, executable)
    reads.may_block_caller = True
    assert reads.one(own, executable) == executable(own)
    assert list(reads.each([own, own], executable)) == [executable(own)] * 2


def test_a_user_with_many_of_them_leaves_room(
    stuck: StuckGuests, fake_qemu: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockable, "MAX_THREADS", 6)
    monkeypatch.setattr(blockable, "MAX_OF_ROOT", 1)
    monkeypatch.setattr(blockable, "MAX_SHARED", 2)
    reads = BlockableReads()

    def blocks(guest: Guest) -> bool:
        """Return whether reading the guest blocks one more thread."""
        before = reads.blocked
        with pytest.raises(Unanswered):
            reads.one(f"/proc/{guest.pid}", executable)
        return reads.blocked > before

    assert [blocks(stuck.make_stuck(OTHER_UID)) for _ in range(4)] == [True, True, True, False]
    # No more processes of this user are read, not even one that would not block. Processes of other
    # users are still read.
    own = fake_qemu(uid=OTHER_UID)
    with pytest.raises(Unanswered):
        reads.one(f"/proc/{own.pid}", executable)
    another = fake_qemu(uid=OTHER_UID + 1)
    assert reads.one(f"/proc/{another.pid}", executable)
    assert [blocks(stuck.make_stuck(OTHER_UID + n)) for n in (1, 1, 2, 3)] == [
        *(True, False, True, False)
    ]
    assert [blocks(stuck.make_stuck()) for _ in range(2)] == [True, False]
    stuck.free()
    until(lambda: reads.blocked, lambda blocked: not blocked)
    assert reads.one(f"/proc/{own.pid}", executable)


def test_searches_leave_room_for_reads_of_one_process(
    stuck: StuckGuests, fake_qemu: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searches meet the stuck processes of all users, but a job must be able to read its own
    process."""
    monkeypatch.setattr(blockable, "MAX_THREADS", 5)
    monkeypatch.setattr(blockable, "MAX_OF_ROOT", 1)
    monkeypatch.setattr(blockable, "MAX_SHARED", 2)
    monkeypatch.setattr(blockable, "MAX_OF_SEARCHES", 3)
    monkeypatch.setattr(blockable, "MAX_SHARED_OF_SEARCHES", 1)
    reads = BlockableReads()
    guests = [stuck.make_stuck(OTHER_UID - n) for n in range(4)]
    web = fake_qemu(uid=OTHER_UID - 4)
    directories = [f"/proc/{guest.pid}" for guest in guests]
    assert all(isinstance(each, Unanswered) for each in reads.each(directories, executable))
    assert reads.blocked == 2
    (outcome,) = reads.each([f"/proc/{web.pid}"], executable)
    assert isinstance(outcome, Unanswered)
    assert reads.one(f"/proc/{web.pid}", executable) == executable(f"/proc/{web.pid}")
    stuck.free()
    until(lambda: reads.blocked, lambda blocked: not blocked)
    assert list(reads.each([f"/proc/{web.pid}"], executable)) == [executable(f"/proc/{web.pid}")]


def test_a_busy_interpreter_is_not_a_blocked_process() -> None:
    """A read that only waits for the interpreter is not given up."""

    def slow(directory: str) -> str:
        time.sleep(5 * blockable.PATIENCE_S)
        return directory

    assert BlockableReads().one("/proc/1", slow) == "/proc/1"


def test_the_order_and_the_errors_of_many_reads() -> None:
    def read(directory: str) -> int:
        if directory == "b":
            raise KeyError(directory)
        return ord(directory)

    first, second, third = BlockableReads().each(["a", "b", "c"], read)
    assert (first, third) == (97, 99)
    assert isinstance(second, KeyError)
    assert list(BlockableReads().each([], read)) == []


class _MainThreadFirst:
    """A lock that the main thread gets before the others, once `begins` is set."""

    def __init__(self) -> None:
        self.begins, self._done = threading.Event(), threading.Event()
        self._lock, self._main = threading.Lock(), threading.get_ident()

    def __enter__(self) -> None:
        if self.begins.is_set() and threading.get_ident() != self._main:
            self._done.wait(0.5)
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        if self.begins.is_set() and threading.get_ident() == self._main:
            self._done.set()


def test_a_read_that_ends_while_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The read ends after it was found to be blocked, but before it is counted as blocked."""
    reads, lock = BlockableReads(), _MainThreadFirst()
    monkeypatch.setattr(reads, "_lock", lock)

    def read(directory: str) -> str:
        if directory == "last":
            lock.begins.wait(10)
        return directory

    def seems_blocked(reader: object) -> bool:
        lock.begins.set()
        time.sleep(0.1)
        return True

    monkeypatch.setattr(blockable._ReadingThread, "is_blocked", seems_blocked)
    assert list(reads.each(["first", "last"], read)) == ["first", "last"]
    assert reads.blocked == 0
