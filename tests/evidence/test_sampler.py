"""Samples are complete, and a sample that blocks does not delay the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from qkilld.adapters.process import open_process
from qkilld.decision.verdict import assess
from qkilld.decision.waits import blind_to
from qkilld.evidence import other_namespaces
from qkilld.evidence import workers as workers_module
from qkilld.evidence.faults import FaultGuard
from qkilld.evidence.file_budget import FileBudget
from qkilld.evidence.handover import MAX_DELAY_S, Handover
from qkilld.evidence.sampler import (
    TABLES_AGE_S,
    EvidenceSampler,
    HostTables,
    Reader,
    TargetWatch,
)
from qkilld.evidence.workers import MAX_SHARED, Workers
from qkilld.model.constants import Verdict
from qkilld.model.sample import Sample
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bare import bare_guest
from tests.lab.guest import QEMU, Guest
from tests.lab.nbd import nbd_store
from tests.lab.netns import NetworkNamespace
from tests.lab.process import run, spawn

Make = Callable[..., Guest]


def test_a_real_qemu_is_seen_whole(qemu: Make) -> None:
    guest = qemu()
    reader = Reader(guest.pid, HostTables())

    def is_seen_idle(samples: tuple[Sample, Sample]) -> bool:
        before, after = (replace(sample, pluggable=False) for sample in samples)
        return assess(assess(None, before), after).verdict is Verdict.IDLE

    # The guest may still run for a moment after its start.
    first, second = until(lambda: (reader.read(), reader.read()), is_seen_idle)
    reader.close()
    assert blind_to(first) == blind_to(second) == []
    assert first.state in "RS"
    assert (first.term_pending, first.tracer) == (False, 0)
    assert first.at < second.at
    # A disk may have been added through the guest's monitor.
    assert assess(assess(None, first), second).verdict is Verdict.UNKNOWN
    assert assess(None, replace(first, pluggable=False)).verdict is Verdict.UNKNOWN


def test_a_process_that_is_gone_is_unknown_and_raises_nothing(fake_qemu: Make) -> None:
    guest = fake_qemu()
    reader = Reader(guest.pid, HostTables())
    reader.read()
    guest.close()
    sample = reader.read()
    reader.close()
    assert blind_to(sample)
    assert assess(assess(None, sample), sample).verdict is Verdict.UNKNOWN


def test_readers_leave_no_descriptor_open(fake_qemu: Make) -> None:
    before = psutil.Process().num_fds()
    for _ in range(3):
        guest = fake_qemu()
        reader = Reader(guest.pid, HostTables())
        reader.read()
        reader.close()
    assert psutil.Process().num_fds() == before + 3  # the guests' own pidfds


def fail() -> None:
    raise AssertionError("not to be called")


def test_the_processes_of_one_user_leave_threads_for_others() -> None:
    workers = Workers(FaultGuard())
    release, done = threading.Event(), threading.Semaphore(0)
    blocked, refused = threading.Semaphore(0), threading.Semaphore(0)

    def block() -> None:
        blocked.release()
        release.wait()

    count = 0
    while not refused.acquire(timeout=0.01):
        # A thread is added only when all others are blocked.
        workers.submit(block, uid=1000, instead=refused.release)
        count += 1
        assert count < 100_000
    for _ in range(MAX_SHARED + 1):
        assert blocked.acquire(timeout=10)
    assert not blocked.acquire(blocking=False)
    for uid in (0, 1001):
        workers.submit(done.release, uid=uid, instead=fail)
        assert done.acquire(timeout=10)
    release.set()
    workers.close()
    for thread in threading.enumerate():
        if thread.name.startswith("sampler-"):
            thread.join(10)


def join_workers(workers: Workers) -> None:
    workers.close()
    for thread in threading.enumerate():
        if thread.name.startswith("sampler-"):
            thread.join(10)


def test_many_users_leave_threads_for_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "STUCK_S", 0.01)
    monkeypatch.setattr(workers_module, "MAX_BLOCKED", 12)
    monkeypatch.setattr(workers_module, "MAX_WORKERS", 13)
    monkeypatch.setattr(workers_module, "RESERVED_FOR_ROOT", 2)
    monkeypatch.setattr(workers_module, "MAX_SHARED", 4)
    workers = Workers(FaultGuard())
    release, began, refused = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def block() -> None:
        began.release()
        release.wait()

    def is_served(uid: int) -> bool:
        """Return whether a call of this user gets a thread. The call then blocks this thread."""
        workers.submit(block, uid=uid, instead=refused.release)
        for _ in range(1000):
            if began.acquire(timeout=0.02):
                time.sleep(0.02)  # From now on, the thread counts as blocked.
                return True
            if refused.acquire(blocking=False):
                return False
            workers.grow()
        raise AssertionError("the call was forgotten")

    assert [is_served(1000) for _ in range(6)] == [True] * 5 + [False]
    assert [is_served(uid) for uid in range(1001, 1008)] == [True] * 5 + [False] * 2
    assert workers.blocked_by(1000) and not workers.blocked_by(1007)
    assert [is_served(0) for _ in range(3)] == [True, True, False]
    release.set()
    join_workers(workers)


def test_who_pays_for_a_sample_without_a_thread(
    fake_qemu: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the user who blocks the threads is affected."""
    monkeypatch.setattr(workers_module, "STUCK_S", 0.01)
    monkeypatch.setattr(workers_module, "MAX_BLOCKED", 1)
    monkeypatch.setattr(workers_module, "MAX_WORKERS", 2)
    monkeypatch.setattr(workers_module, "RESERVED_FOR_ROOT", 0)
    guest = fake_qemu()

    async def samples() -> list[Sample]:
        sampler = EvidenceSampler(lambda doing, error: None)
        release, entered = threading.Event(), threading.Event()

        def block() -> None:
            entered.set()
            release.wait()

        sampler._workers.submit(block, uid=1000, instead=fail)
        assert entered.wait(10)
        time.sleep(0.1)  # noqa: ASYNC251  # Now it counts as blocked.
        taken = []
        for uid in (1000, 1001):
            process = open_process(guest.pid)
            process.guest = replace(process.guest, identity=replace(process.identity, uid=uid))
            watch = sampler.watch(process)
            future = asyncio.get_running_loop().create_future()
            watch.take_sample(future.set_result)
            taken.append(await asyncio.wait_for(future, 10))
            watch.close()
            process.close()
        release.set()
        sampler.close()
        join_workers(sampler._workers)
        return taken

    own, others = asyncio.run(samples())
    assert (own.state, own.missed) == ("?", False)
    assert (others.state, others.missed) == ("?", True)


def test_a_call_that_waits_behind_a_blocked_one_gets_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers_module, "STUCK_S", 0.2)
    workers = Workers(FaultGuard())
    entered, release, done = threading.Event(), threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        release.wait()

    workers.submit(block, uid=1000, instead=fail)
    assert entered.wait(10)
    workers.submit(done.set, uid=0, instead=fail)
    assert not done.wait(0.3)
    workers.grow()
    assert done.wait(10)
    release.set()
    join_workers(workers)


def test_a_sample_arrives_although_the_next_one_blocks() -> None:
    """The sample comes after the loop has looked for samples. The next sample is expected soon."""

    class BusyWorkers(Workers):
        waiting = True

        def submit(self, call: Callable[[], None], **options: Any) -> None:
            submitted.append(call)

        def grow(self) -> None:
            pass

    submitted: list[Callable[[], None]] = []

    async def main() -> Sample:
        handover, guard = Handover(), FaultGuard()
        target = TargetWatch(
            os.getpid(), 0, workers=BusyWorkers(guard), handover=handover, tables=HostTables(),
            guard=guard, budget=FileBudget(),
        )  # fmt: skip
        taken: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        target.take_sample(taken.set_result)
        await asyncio.sleep(2 * MAX_DELAY_S)
        (work,) = submitted
        await asyncio.to_thread(work)
        sample = await asyncio.wait_for(taken, 10)
        target.close()
        handover.close()
        return sample

    assert asyncio.run(main()).state in "RS"


def test_one_thread_does_it_all_until_a_call_blocks() -> None:
    workers = Workers(FaultGuard())
    before = threading.active_count()
    release, done = threading.Event(), threading.Semaphore(0)
    for _ in range(100):
        workers.submit(done.release, uid=0, instead=fail)
        assert done.acquire(timeout=10)
    assert threading.active_count() == before + 1
    entered = threading.Event()

    def block() -> None:
        entered.set()
        release.wait()

    workers.submit(block, uid=0, instead=fail)
    assert entered.wait(10)
    # Calls after that, and all waiting ones, get another thread.
    while not done.acquire(timeout=0.05):
        workers.submit(done.release, uid=0, instead=fail)
    assert threading.active_count() == before + 2
    release.set()
    workers.close()
    for thread in threading.enumerate():
        if thread.name.startswith("sampler-"):
            thread.join(10)


def test_an_urgent_call_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkilld.evidence.workers.STUCK_S", 60)
    workers = Workers(FaultGuard())
    entered, release, done = threading.Event(), threading.Event(), threading.Event()
    order: list[str] = []

    def block() -> None:
        entered.set()
        release.wait()

    workers.submit(block, uid=0, instead=fail)
    assert entered.wait(10)
    for name in ("first", "second"):
        workers.submit(partial(order.append, name), uid=0, instead=fail)
    workers.submit(partial(order.append, "urgent"), uid=0, instead=fail, urgent=True)
    assert workers.waiting
    workers.submit(done.set, uid=0, instead=fail)
    release.set()
    assert done.wait(10)
    assert order == ["urgent", "first", "second"]
    workers.close()


def is_served(reader: Reader) -> bool | None:
    """Return Node.served of the only node."""
    (found,) = reader.read(detail=True).nodes or ()
    return found.served


def test_a_server_in_another_network_namespace(
    lab_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sockets of our namespace do not show whether it listens."""
    monkeypatch.setattr(other_namespaces, "AGE_S", 0.0)
    image = lab_dir / "disk"
    image.touch()
    os.truncate(image, 1 << 20)
    with nbd_store(image) as store:
        path = str(store.directory / "socket")
        server = {"type": "unix", "path": path}
        node = {"driver": "nbd", "node-name": "d0", "server": server, "reconnect-delay": 300}
        with (
            bare_guest(lab_dir, ["-blockdev", json.dumps(node)]) as guest,
            contextlib.closing(Reader(guest.pid, HostTables())) as reader,
        ):
            served = partial(is_served, reader)
            store.leave()
            until(served, lambda found: found is False)
            with listening_elsewhere(path):
                until(served, lambda found: found is None)
            until(served, lambda found: found is False)


@contextlib.contextmanager
def listening_elsewhere(path: str) -> Iterator[None]:
    """Listen in another network namespace, without accepting connections."""
    # QEMU would connect to a socket that has this path in the file system.
    code = (
        "import os, socket, sys\n"
        "server = socket.socket(socket.AF_UNIX)\n"
        f"server.bind({path!r}); os.rename({path!r}, {path + '-moved'!r})\n"
        "server.listen(); print(flush=True); sys.stdin.read()"
    )
    Path(path).unlink(missing_ok=True)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    with (
        NetworkNamespace() as namespace,
        namespace.run(lambda: spawn(command, stdin=pipe, stdout=pipe)) as process,
    ):
        try:
            assert process.stdout is not None and process.stdout.readline()
            yield
        finally:
            process.kill()


def test_very_many_connections_of_very_many_uses(lab_dir: Path) -> None:
    """Comparing each connection with each use took 25 s for one sample."""
    code = (
        "import socket, sys\n"
        "server = socket.socket(socket.AF_UNIX); server.bind('m7'); server.listen(4096)\n"
        "kept = []\n"
        "for _ in range(200):\n"
        "    kept.append(socket.socket(socket.AF_UNIX)); kept[-1].connect('m7')\n"
        "    kept.append(server.accept()[0])\n"
        "print(flush=True); sys.stdin.read()"
    )
    uses = [word for n in range(2000) for word in ("-chardev", f"socket,id=c{n},path=/x/m{n}")]
    command, pipe = [sys.executable, "-c", code, *uses], subprocess.PIPE
    with subprocess.Popen(command, cwd=lab_dir, stdin=pipe, stdout=pipe) as target:
        reader = Reader(target.pid, HostTables())
        try:
            assert target.stdout is not None and target.stdout.readline()
            # Reading the command line may take a while. A later sample then has the purposes of the
            # sockets.
            until(reader.read, lambda sample: sample.nodes is not None)
            began = time.monotonic()
            sockets = reader.read().sockets
            assert time.monotonic() - began < 10
            assert sockets is not None and {socket.role for socket in sockets} == {"other"}
        finally:
            reader.close()
            target.kill()


def test_a_server_that_a_chroot_hides(lab_dir: Path) -> None:
    """After -chroot or -run-with chroot=, QEMU looks for a lost server below its new root."""
    image, root = lab_dir / "disk", lab_dir / "root"
    root.mkdir()
    image.touch()
    os.truncate(image, 1 << 20)
    with nbd_store(image) as store:
        path = str(store.directory / "socket")
        server = {"type": "unix", "path": path}
        node = {"driver": "nbd", "node-name": "d0", "server": server, "reconnect-delay": 300}
        help_text = run([needs.program(QEMU, "qemu-system-x86"), "--help"], check=True).stdout
        # QEMU 11 has removed -chroot.
        chroot = ["-chroot", str(root)]
        if "-chroot dir" not in help_text:
            chroot = ["-run-with", f"chroot={root}"]
        arguments = ["-blockdev", json.dumps(node), *chroot]
        with (
            bare_guest(lab_dir, arguments) as guest,
            contextlib.closing(Reader(guest.pid, HostTables())) as reader,
        ):
            served = partial(is_served, reader)
            store.leave()
            until(served, lambda found: found is False)
            store.start()
            time.sleep(2 * TABLES_AGE_S)
            assert served() is False
            inside = Path(f"{root}{path}")
            inside.parent.mkdir(parents=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(inside))
                listener.listen()
                time.sleep(2 * TABLES_AGE_S)
                assert served() is True
