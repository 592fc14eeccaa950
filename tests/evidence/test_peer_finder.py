"""Finding the other end of a connection on a host where others have very many sockets."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path

import pytest

from qkilld.adapters import blockable
from qkilld.adapters.blockable import Unanswered
from qkilld.evidence import descriptor_search, peer_finder
from qkilld.evidence.descriptor_search import (
    Candidate,
    DescriptorHolder,
    by_turns,
    search_pair,
)
from qkilld.evidence.peer_finder import PeerFinder
from tests.evidence.until import until
from tests.lab.process import OTHER_UID
from tests.lab.stuck import stuck_guests

LONG_S = 60.0


@contextmanager
def with_sockets(count: int, processes: int = 1) -> Iterator[tuple[int, int]]:
    """Start processes that share the same sockets. Yield the pid of the last process, and the inode
    of one socket."""
    # All read the same input, and exit when it ends.
    code = (
        "import os, resource, socket, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (5000, 5000))\n"
        f"kept = [socket.socket(socket.AF_UNIX) for _ in range({count})]\n"
        "pid = os.getpid()\n"
        f"for _ in range({processes - 1}):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        break\n"
        "else:\n"
        "    print(pid, os.fstat(kept[0].fileno()).st_ino, flush=True)\n"
        "sys.stdin.read()\n"
        "while pid:\n"
        "    try:\n"
        "        os.wait()\n"
        "    except ChildProcessError:\n"
        "        break"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            pid, inode = process.stdout.readline().split()
            yield int(pid), int(inode)
        finally:
            process.stdin.close()  # Ends all of them.


def looks_until_found(finder: PeerFinder, inode: int) -> tuple[int, float]:
    """Return the process, and the processor time (s) of the costliest search, in all threads."""
    end, most = time.monotonic() + LONG_S, 0.0
    while time.monotonic() < end:
        before = time.process_time()
        found = finder.find([inode])
        most = max(most, time.process_time() - before)
        if found:
            return found[inode], most
        time.sleep(0.01)
    raise TimeoutError


@pytest.mark.parametrize("count", [1, 4000])
def test_a_server_is_found_whatever_sockets_others_have(count: int) -> None:
    with with_sockets(4000, processes=20), with_sockets(count) as (pid, inode):
        found, most = looks_until_found(PeerFinder(), inode)
        assert found == pid
        assert most < 4 * peer_finder.SEARCH_S


def test_a_server_with_few_is_found_before_others_are_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_finder, "SEARCH_S", LONG_S)
    with with_sockets(4000, processes=20), with_sockets(1) as (pid, inode):
        before = time.process_time()
        assert PeerFinder().find([inode]) == {inode: pid}
        # Reading all 80,000 descriptors of the other processes would take 0.24 s.
        assert time.process_time() - before < 0.1


def test_a_closed_socket_is_forgotten() -> None:
    finder = PeerFinder()
    with with_sockets(1) as (pid, inode):
        assert looks_until_found(finder, inode)[0] == pid
    assert finder.find([inode]) == {}


def test_a_failed_search_is_not_repeated_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_finder, "SEARCH_S", LONG_S)
    monkeypatch.setattr(peer_finder, "RETRY_S", LONG_S)
    monkeypatch.setattr(peer_finder, "PAUSE_FACTOR", 0)
    for pid in range(1000):
        (tmp_path / f"{pid}/fd").mkdir(parents=True)
    finder = PeerFinder(tmp_path)
    assert finder.searches([1])
    assert finder.find([1]) == {}
    assert not finder.searches([1])
    before = time.process_time()
    for _ in range(100):
        finder.find([1])
    assert time.process_time() - before < 0.01


def test_a_search_that_fails_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1/fd").mkdir(parents=True)
    (search, _) = search_pair(tmp_path, pause_factor=0, valid_s=60)
    search.want(["socket:[1]"])
    list_directory = os.listdir

    def fail(path: str) -> list[str]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "listdir", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="Too many open files"):
            list(search.go_on(time.monotonic() + 60))
    monkeypatch.setattr(os, "listdir", list_directory)
    assert search.wants_any and search.searched("socket:[1]") is None
    list(search.go_on(time.monotonic() + 60))
    assert search.searched("socket:[1]") is not None


def test_users_take_turns_by_their_descriptors() -> None:
    hostile = [Candidate(pid, 1000, 200) for pid in range(100, 150)]
    others = [Candidate(200, 0, 20), Candidate(201, 0, 20), Candidate(300, 64055, 250)]
    order = [process.pid for process in by_turns([*hostile, *others])]
    assert set(order[:4]) == {100, 200, 201, 300}


def test_few_descriptors_come_before_many() -> None:
    big, small = Candidate(1, 0, 4000), Candidate(2, 0, 3)
    assert by_turns([big, small]) == [small, big]


def test_a_process_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any user can have a stuck process. The kernel does not show its descriptors."""
    monkeypatch.setattr(descriptor_search, "by_turns", partial(sorted, key=attrgetter("pid")))
    monkeypatch.setattr(peer_finder, "SEARCH_S", LONG_S)
    with stuck_guests() as guests:
        stuck = guests.make_stuck(OTHER_UID)
        with with_sockets(1) as (pid, inode):
            assert pid > stuck.pid
            finder, found = PeerFinder(), []
            thread = threading.Thread(target=lambda: found.append(finder.find([inode])))
            thread.start()
            thread.join(LONG_S / 2)
            assert found == [{inode: pid}]
    until(lambda: blockable.shared.blocked, lambda blocked: not blocked)


def test_a_server_that_was_stuck_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finder searches for the server again before RETRY_S has passed."""
    monkeypatch.setattr(peer_finder, "SEARCH_S", LONG_S)
    monkeypatch.setattr(peer_finder, "PAUSE_FACTOR", 0)
    monkeypatch.setattr(peer_finder, "RETRY_S", LONG_S)
    finder = PeerFinder()
    each = blockable.shared.each
    with with_sockets(1) as (pid, inode):
        with monkeypatch.context() as patch:
            patch.setattr(
                blockable.shared,
                "each",
                lambda directories, read: [
                    Unanswered() if directory == f"/proc/{pid}" else answer
                    for directory, answer in zip(directories, each(directories, read), strict=True)
                ],
            )
            assert finder.find([inode]) == {}
        assert finder.find([inode]) == {inode: pid}


class _Places(dict[str, DescriptorHolder]):
    """Records whether the lock was held whenever the oldest place was looked up."""

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__()
        self._is_locked = lock.locked
        self.locked: list[bool] = []

    def __iter__(self) -> Iterator[str]:
        self.locked.append(self._is_locked())
        return super().__iter__()


def test_old_places_are_dropped_while_no_other_thread_adds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another thread added a place meanwhile, the iterator would fail."""
    monkeypatch.setattr(peer_finder, "SEARCH_S", LONG_S)
    monkeypatch.setattr(peer_finder, "MAX_PLACES", 1)
    (tmp_path / "7/fd").mkdir(parents=True)
    for inode in (5, 6):
        (tmp_path / f"7/fd/{inode}").symlink_to(f"socket:[{inode}]")
    finder = PeerFinder(tmp_path)
    finder._places = places = _Places(finder._lock)
    assert len(finder.find([5, 6])) == 1
    assert places.locked == [True]
