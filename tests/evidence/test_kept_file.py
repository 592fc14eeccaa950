"""Files stay open for the next read, as long as there are descriptors for many more guests."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qkilld.evidence import sampler
from qkilld.evidence.file_budget import PER_JOB, SPARE, FileBudget
from qkilld.evidence.kept_file import KeptFile, kept_files
from qkilld.evidence.sampler import EvidenceSampler, HostTables, Reader, TargetWatch
from qkilld.model.sample import Sample
from tests.engine.conftest import FakeProcess, make_guest
from tests.lab.guest import Guest

COUNTERS: dict[str, Any] = {
    "at": 0,
    "cpu": 0,
    "io": None,
    "switches": 0,
    "cgroup": None,
    "host": None,
}
EACH = 10


def links_below(pid: int) -> list[Path]:
    """Return the paths that this process has open in /proc/PID, including the directory itself."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(link.readlink())
    return [link for link in links if link.is_relative_to(f"/proc/{pid}")]


def files_of(guest: Guest) -> list[Path]:
    """Return the files below /proc/PID that this process has open."""
    return [link for link in links_below(guest.pid) if link != Path(f"/proc/{guest.pid}")]


class FakeWatch:
    """A watch that reads EACH files, and keeps them open after a sample if the budget allows it."""

    def __init__(self, budget: FileBudget, path: Path) -> None:
        self._budget = budget
        self._files = [KeptFile(path) for _ in range(EACH)]
        self.keeps = False

    def look(self) -> bool:
        """Take a sample; return whether the files were still open."""
        kept, self.keeps = self.keeps, self._budget.admit(self)
        for file in self._files:
            file.read()
        if not self.keeps:
            self.stop_keeping()
        return kept

    def stop_keeping(self) -> None:
        self.keeps = False
        for file in self._files:
            file.close()


class Crowd:
    """Watches that share a budget, one for each job."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self.budget = FileBudget(limit)
        self.budget.jobs = lambda: len(self.watches)
        self.watches: list[FakeWatch] = []

    def add(self) -> None:
        self.watches.append(FakeWatch(self.budget, self._path))
        self.watches[-1].look()

    def in_use(self) -> int:
        """Return how many descriptors are in use if each job needs PER_JOB."""
        return PER_JOB * len(self.watches) + kept_files()


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[Callable[[int], Crowd]]:
    """A function that makes a Crowd whose budget has this limit of descriptors."""
    (tmp_path / "file").write_text("text")
    before = kept_files()
    assert before == 0  # Another test has left files open.
    crowds = []

    def make(limit: int) -> Crowd:
        crowds.append(Crowd(tmp_path / "file", limit))
        return crowds[-1]

    yield make
    for one in crowds:
        for watch in one.watches:
            watch.stop_keeping()
    assert kept_files() == before


def test_a_file_stays_open_until_it_is_closed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    before = kept_files()
    file = KeptFile(tmp_path / "file")
    assert file.read() == b"one"
    assert kept_files() == before + 1
    (tmp_path / "file").write_text("two")
    assert file.read() == b"two"
    file.close()
    file.close()
    assert kept_files() == before
    assert file.read() == b"two"
    file.close()


def test_a_file_that_cannot_be_read_does_not_count(tmp_path: Path) -> None:
    before = kept_files()
    for path in (tmp_path / "missing", tmp_path):
        assert KeptFile(path).read_or_none() is None
    assert kept_files() == before


def test_a_few_guests_keep_their_files(crowd: Callable[[int], Crowd]) -> None:
    few = crowd(1024)
    for _ in range(20):
        few.add()
    kept = [watch.look() for watch in few.watches]
    assert all(kept)


def test_files_are_closed_at_once_for_more_jobs(crowd: Callable[[int], Crowd]) -> None:
    limit = 3000
    many = crowd(limit)
    most = 0
    while PER_JOB * len(many.watches) < limit:
        many.add()
        most = max(most, many.in_use())
        # This is true at once, before the earlier guests are sampled again.
        assert many.in_use() <= max(limit * 2 // 3, PER_JOB * len(many.watches) + EACH)
    assert most > limit * 2 // 3 - SPARE - EACH
    assert kept_files() == 0


def test_most_of_those_that_have_room_keep_it_in_each_turn(crowd: Callable[[int], Crowd]) -> None:
    many = crowd(3000)
    for _ in range(300):
        many.add()
    turns = [[watch.look() for watch in many.watches] for _ in range(4)]
    assert turns[1] == turns[2] == turns[3]
    room = 3000 * 2 // 3 - PER_JOB * 300
    assert room - SPARE - EACH <= EACH * sum(turns[3]) <= room


def test_the_room_of_one_that_ends_is_given_to_others(crowd: Callable[[int], Crowd]) -> None:
    many = crowd(3000)
    for _ in range(300):
        many.add()
    gone = [watch for watch in many.watches if watch.keeps]
    for watch in gone:
        watch.stop_keeping()
        many.budget.forget(watch)
        many.watches.remove(watch)
    for _ in range(2):
        kept = [watch.look() for watch in many.watches]
    assert sum(kept) >= len(gone)


def stop(guest: Guest) -> None:
    """Stop a guest with SIGSTOP and return when none of its threads runs, so that only counters
    may differ between two of its samples."""
    guest.signal(signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while any(
        path.read_text().rpartition(") ")[2][0] != "T"
        for path in Path(f"/proc/{guest.pid}/task").glob("*/stat")
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_guest_is_seen_alike(qemu: Callable[..., Guest]) -> None:
    guest = qemu()
    stop(guest)
    reader = Reader(guest.pid, HostTables())
    kept = reader.read()
    assert len(files_of(guest)) >= 4
    reader.close_files()
    assert files_of(guest) == []
    scarce = reader.read()
    reader.close()
    reader.close_files()
    assert files_of(guest) == []
    assert replace(scarce, **COUNTERS) == replace(kept, **COUNTERS)
    for name in COUNTERS:
        assert getattr(scarce, name) is not None


def test_a_guest_needs_one_descriptor_between_samples(
    fake_qemu: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = fake_qemu()
    monkeypatch.setattr(sampler, "FileBudget", lambda: FileBudget(0))

    async def look(watch: TargetWatch) -> Sample:
        taken: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        watch.take_sample(taken.set_result, detail=True)
        async with asyncio.timeout(30):
            return await taken

    async def take() -> list[Sample]:
        evidence = EvidenceSampler(lambda doing, error: None)
        watch = evidence.watch(FakeProcess(make_guest(pid=guest.pid)))
        try:
            samples = []
            for _ in range(3):
                samples.append(await look(watch))
                assert links_below(guest.pid) == [Path(f"/proc/{guest.pid}")]
            return samples
        finally:
            watch.close()
            evidence.close()

    samples = asyncio.run(take())
    assert all(sample.threads is not None and sample.cgroup is not None for sample in samples)
    assert links_below(guest.pid) == []
