"""Jobs are saved to files and loaded. Incomplete files and those of others are set aside."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest

from qkilld.adapters import background, job_store, process, procfs, state_dir
from qkilld.adapters.job_store import JobStore
from qkilld.adapters.process import PidfdProcess
from qkilld.adapters.service_manager import ServiceManager
from qkilld.adapters.state_dir import MAX_BAD, RESERVE, StateDirectory
from qkilld.decision.verdict import assess
from qkilld.engine.job import Job
from qkilld.engine.snapshot import VERSION, Snapshot
from qkilld.model.constants import Flag, Phase, Result
from qkilld.model.event import MessageId
from qkilld.model.guest import Guest, Identity, Label
from qkilld.model.job import Request, Rung
from qkilld.model.policy import Config, Policy
from qkilld.model.sample import Sample, Socket
from tests.engine.conftest import FakeProcess, World
from tests.lab import needs
from tests.lab.guest import Guest as LabGuest
from tests.lab.process import OTHER_UID

GUEST = Guest(Identity(4711, 99, 1000, "qemu", "S", "/usr/bin/qemu-system-x86_64", False), Label())
Open = Callable[[], StateDirectory]


def snapshot(number: int, term_at: int = 5) -> Snapshot:
    return Snapshot.of_signals(GUEST, Request(Flag.FORCE), Policy(), number=number, started=term_at)


@pytest.fixture
def errors() -> list[str]:
    return []


@pytest.fixture
def opened(lab_dir: Path, errors: list[str]) -> Iterator[Open]:
    """A function that opens the directory, as the next daemon does."""
    lab_dir.chmod(0o700)
    made: list[StateDirectory] = []

    def open_directory() -> StateDirectory:
        made.append(StateDirectory(lab_dir, errors.append))
        return made[-1]

    yield open_directory
    for directory in made:
        directory.close(0)


@pytest.fixture
def world() -> World:
    return World()


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_saved_jobs_are_loaded_again(lab_dir: Path, opened: Open) -> None:
    first = opened()
    assert first.load() == ([], 0, [])
    for number in (10, 9, 8):
        first.save(snapshot(number))
    first.save(snapshot(9, term_at=6))
    first.forget(8)
    first.forget(7)
    first.close(10)
    assert files(lab_dir) == ["job-10.json", "job-9.json", "numbers.json"]
    assert {(lab_dir / name).stat().st_mode & 0o777 for name in files(lab_dir)} == {0o600}
    assert opened().load() == ([snapshot(9, term_at=6), snapshot(10)], 10, [])


def test_what_sigkill_waits_for_is_written_before_other_jobs(lab_dir: Path, opened: Open) -> None:
    directory = opened()
    directory.load()
    goes_on = threading.Event()
    written: list[list[str]] = []
    directory.when_written(lambda: None if goes_on.wait(10) else written.append([]))
    for number in range(1, 50):
        directory.save(snapshot(number))
    directory.save(snapshot(49, term_at=6))
    directory.write_first(49, lambda: written.append(files(lab_dir)))
    directory.write_first(48, lambda: written.append(files(lab_dir)))
    # This job is not saved, so there is nothing to write.
    directory.write_first(99, lambda: written.append(files(lab_dir)))
    goes_on.set()
    directory.save(snapshot(48, term_at=7))
    directory.close(49)
    first, second, third = (set(names) - {"numbers.json"} for names in written)
    assert (first, second) == ({"job-49.json"}, {"job-48.json", "job-49.json"})
    assert second == third
    saved, _, _ = opened().load()
    assert [job.number for job in saved] == list(range(1, 50))
    assert saved[-2:] == [snapshot(48, term_at=7), snapshot(49, term_at=6)]


def test_it_is_told_when_that_cannot_be_written(
    lab_dir: Path, opened: Open, errors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = opened()
    directory.load()
    called = threading.Event()

    def write(name: str, text: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(directory, "_write", write)
    directory.save(snapshot(1))
    directory.write_first(1, called.set)
    assert called.wait(10)
    directory.close(1)
    assert errors == ["full"]


def test_no_number_is_given_twice_even_after_a_crash(lab_dir: Path, opened: Open) -> None:
    first = opened()
    first.load()
    # If the daemon crashes now, job 3 has a number, but no file.
    assert json.loads((lab_dir / "numbers.json").read_text())["last"] == RESERVE
    _, last, _ = opened().load()
    assert last >= 3


def test_jobs_of_another_boot_are_gone(lab_dir: Path, opened: Open) -> None:
    first = opened()
    first.load()
    first.save(snapshot(1))
    first.close(1)
    for name in ("job-1.json", "numbers.json"):
        document = json.loads((lab_dir / name).read_text())
        (lab_dir / name).write_text(json.dumps(document | {"boot": "another"}))
    assert opened().load() == ([], 0, [])
    assert files(lab_dir) == ["numbers.json"]


def test_a_job_with_too_much_evidence_is_saved_without_it(
    lab_dir: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile guest may have thousands of connections. The next daemon would not load a longer
    file."""
    first = opened()
    first.load()
    sockets = tuple(Socket(inode, "unix", True, 0, 0) for inode in range(4096))
    long = replace(snapshot(1), assessment=assess(None, Sample(5, "S", sockets=sockets)))
    monkeypatch.setattr(state_dir, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(background, "FLUSH_TIMEOUT_S", 60)  # Making the text takes long.
    first.save(long)
    first.close(1)
    assert opened().load() == ([replace(long, assessment=None)], 1, [])


def _torn(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def _foreign(path: Path) -> None:
    needs.root("to give a file away")
    os.chown(path, OTHER_UID, OTHER_UID)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _twice(path: Path) -> None:
    path.with_name("elsewhere").hardlink_to(path)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _newer(path: Path) -> None:
    document = json.loads(path.read_text())
    document["job"]["version"] = VERSION + 1
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "spoil",
    [
        _torn,
        _foreign,
        _link,
        _twice,
        _directory,
        _fifo,
        lambda path: path.chmod(0o640),
        lambda path: path.write_text(""),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_bytes(b"\xff\x00"),
        lambda path: path.write_text("[]"),
        lambda path: os.truncate(path, 5 << 20),
        lambda path: path.rename(path.with_name("job-3.json")),
    ],
)
def test_damaged_files_are_set_aside(
    lab_dir: Path, opened: Open, spoil: Callable[[Path], None]
) -> None:
    first = opened()
    first.load()
    first.save(snapshot(1))
    first.save(snapshot(2))
    first.close(2)
    spoil(lab_dir / "job-1.json")
    found, _, ((name, why),) = opened().load()
    assert found == [snapshot(2)]
    assert why
    assert f"{name}.bad" in files(lab_dir)
    assert name not in files(lab_dir)
    # The next daemon does not report the file again.
    assert opened().load()[2] == []


def test_files_of_a_newer_version_are_not_changed(lab_dir: Path, opened: Open) -> None:
    first = opened()
    first.load()
    first.save(snapshot(40))
    first.close(1)
    _newer(lab_dir / "job-40.json")
    before = (lab_dir / "job-40.json").read_bytes()
    for _ in range(2):
        found, last, ((name, why),) = opened().load()
        assert (found, name) == ([], "job-40.json")
        assert "this program does not know its version" in why
        assert last >= 40
        assert (lab_dir / name).read_bytes() == before


def test_a_file_of_an_earlier_version_is_written_again(
    lab_dir: Path, opened: Open, world: World
) -> None:
    now = world.clock.now()
    first = opened()
    first.load()
    first.save(replace(snapshot(3), result=Result.EXITED, phase=Phase.DONE, ended=now))
    first.close(3)
    path = lab_dir / "job-3.json"
    document = json.loads(path.read_text())
    document["job"]["version"] = VERSION - 1
    path.write_text(json.dumps(document))
    with contextlib.closing(ServiceManager()) as manager:
        store = JobStore(opened(), manager, world.journal, {})
        store.restore(world.registry)
        store.close()
    assert [job.number for job in world.registry] == [3]
    assert json.loads(path.read_text())["job"]["version"] == VERSION


def _saved(opened: Open, *jobs: Snapshot) -> StateDirectory:
    """The directory of the next daemon, with these jobs."""
    first = opened()
    first.load()
    for job in jobs:
        first.save(job)
    first.close(len(jobs))
    return opened()


def _without_descriptors(step: Callable[..., PidfdProcess]) -> Callable[..., PidfdProcess]:
    def call(what: Any) -> PidfdProcess:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            return step(what)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    return call


def test_a_process_that_cannot_be_opened_at_first_keeps_its_job(
    lab_dir: Path, opened: Open, qemu: Callable[..., LabGuest]
) -> None:
    async def restore(manager: ServiceManager) -> None:
        started = qemu()
        guest = Guest(procfs.read_identity(started.pid), Label())
        world = World(Config(executables=(guest.identity.executable,)))
        directory = _saved(opened, replace(snapshot(1), guest=guest))
        without = _without_descriptors(process.open_process)
        store = JobStore(directory, manager, world.journal, {}, open_process=without)
        store.restore(world.registry)
        (job,) = world.registry
        assert (job.running, job.guest, job.process_exited) == (True, guest, False)
        ended = asyncio.Event()
        job.when_ended(ended.set)
        os.kill(started.pid, SIGKILL)
        await ended.wait()
        store.close()

    with contextlib.closing(ServiceManager()) as manager:
        asyncio.run(asyncio.wait_for(restore(manager), 30))
    assert "job-1.json.bad" not in files(lab_dir)


def test_without_descriptors_a_job_is_kept_for_the_next_start(
    lab_dir: Path, opened: Open, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = replace(snapshot(2), result=Result.EXITED, phase=Phase.DONE, ended=world.clock.now())
    identity = replace(GUEST.identity, pid=os.getpid())
    directory = _saved(opened, replace(snapshot(1), guest=Guest(identity, Label())), done)
    read, write = os.pipe()
    os.close(write)
    without = _without_descriptors(process.open_unidentified)
    monkeypatch.setattr(job_store, "open_unidentified", without)
    with contextlib.closing(ServiceManager()) as manager:
        store = JobStore(
            directory,
            manager,
            world.journal,
            {"monitor-1": read},
            open_process=_without_descriptors(process.open_process),
        )
        store.restore(world.registry)
        store.close()
    assert [job.number for job in world.registry] == [2]
    assert world.journal.ids == [MessageId.STATE_SET_ASIDE]
    assert "Too many open files" in world.journal.events[0].message
    os.close(read)  # Kept open for the next start.
    assert [job.number for job in opened().load()[0]] == [1, 2]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_file_that_cannot_be_read_now_is_kept(
    lab_dir: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    directory = _saved(opened, snapshot(40), snapshot(2))
    read = StateDirectory._read

    def fail(self: StateDirectory, name: str) -> dict[str, Any]:
        if name == "job-2.json":
            return read(self, name)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "_read", fail)
        found, last, bad = directory.load()
    assert ([job.number for job in found], last) == ([2], 40)
    assert {name for name, why in bad} == {"job-40.json", "numbers.json"}
    assert [job.number for job in opened().load()[0]] == [2, 40]


@pytest.mark.parametrize("step", ["resume", "check_process", "follow"])
def test_a_fault_of_one_job_does_not_end_the_start(
    lab_dir: Path, opened: Open, world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before: Callable[..., None] = getattr(Job, step)

    def fail(job: Job, *arguments: object) -> None:
        if job.number == 1:
            raise RuntimeError("a bug")
        before(job, *arguments)

    monkeypatch.setattr(Job, step, fail)
    done = replace(snapshot(1), result=Result.EXITED, phase=Phase.DONE, ended=world.clock.now())
    directory = _saved(opened, done, replace(done, number=2))
    with contextlib.closing(ServiceManager()) as manager:
        store = JobStore(directory, manager, world.journal, {})
        store.restore(world.registry)
        store.close()
    assert 2 in [job.number for job in world.registry]
    assert MessageId.INTERNAL_ERROR in world.journal.ids
    assert files(lab_dir) == ["job-1.json.bad", "job-2.json", "numbers.json"]


def test_a_fault_while_jobs_continue_does_not_end_the_start(
    opened: Open, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(world.registry, "follow_resumed", fail)
    with contextlib.closing(ServiceManager()) as manager:
        JobStore(_saved(opened), manager, world.journal, {}).restore(world.registry)
    assert world.journal.ids == [MessageId.INTERNAL_ERROR]


def test_files_set_aside_are_bounded(lab_dir: Path, opened: Open) -> None:
    for number in range(1, MAX_BAD + 10):
        path = lab_dir / f"job-{number}.json"
        path.touch(0o600)
    assert len(opened().load()[2]) == MAX_BAD + 9
    assert len([name for name in files(lab_dir) if name.endswith(".bad")]) == MAX_BAD


def test_a_directory_that_others_may_write_to_is_refused(lab_dir: Path) -> None:
    lab_dir.chmod(0o777)
    with pytest.raises(PermissionError):
        StateDirectory(lab_dir, print)
    lab_dir.chmod(0o700)


@pytest.mark.parametrize("name", [".x.tmp", ".numbers.json.tmp"])
def test_a_blocked_file_name_stops_no_job(
    lab_dir: Path, opened: Open, errors: list[str], name: str
) -> None:
    first = opened()
    first.load()
    first.save(snapshot(1))
    first.close(1)
    (lab_dir / name).mkdir()
    found, last, bad = opened().load()
    assert (found, last, bad) == ([snapshot(1)], 1, [])
    assert errors == ["Is a directory"] * (name == ".numbers.json.tmp")
    (lab_dir / name).rmdir()


def test_a_directory_that_cannot_be_read_is_told(opened: Open, world: World) -> None:
    directory = opened()
    read, write = os.pipe()
    os.close(write)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.closing(ServiceManager()) as manager:
        store = JobStore(directory, manager, world.journal, {"job-7": read})
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            store.restore(world.registry)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert world.journal.ids == [MessageId.STATE_FAILED]
    assert world.stop(FakeProcess()).number == 8
    os.close(read)  # Kept open, because the process may still be needed.


def test_a_failure_to_write_is_said_once(lab_dir: Path, opened: Open, errors: list[str]) -> None:
    directory = opened()
    directory.load()
    (lab_dir / ".job-1.json.tmp").mkdir()  # An obstacle.
    for at in range(50):
        directory.save(replace(snapshot(1), rungs=(Rung(Phase.TERMINATE, SIGTERM.name, at),)))
        time.sleep(0.002)
    directory.close(1)
    assert errors == ["Is a directory"]
    (lab_dir / ".job-1.json.tmp").rmdir()
