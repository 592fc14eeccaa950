"""Samples as a whole, and that one which blocks holds up nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psutil

from qkilld.adapters.evidence.sampler import Reader, Tables
from qkilld.adapters.evidence.workers import Workers
from qkilld.judgement.verdict import assess, blind_to
from qkilld.model.words import Verdict
from tests.lab.guest import Guest

Make = Callable[..., Guest]


def test_a_real_qemu_is_seen_whole(qemu: Make) -> None:
    guest = qemu()
    reader = Reader(guest.pid, Tables())
    first, second = reader.read(), reader.read()
    reader.close()
    assert blind_to(first) == blind_to(second) == []
    assert first.state in "RS"
    assert (first.term_pending, first.tracer) == (False, 0)
    assert first.at < second.at
    assert assess(assess(None, first), second).verdict is Verdict.IDLE


def test_a_process_that_is_gone_is_unknown_and_raises_nothing(fake_qemu: Make) -> None:
    guest = fake_qemu()
    reader = Reader(guest.pid, Tables())
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
        reader = Reader(guest.pid, Tables())
        reader.read()
        reader.close()
    assert psutil.Process().num_fds() == before + 3  # the guests' own pidfds


def test_one_thread_does_it_all_until_a_call_blocks() -> None:
    workers = Workers()
    before = threading.active_count()
    release, done = threading.Event(), threading.Semaphore(0)
    for _ in range(100):
        workers.submit(done.release)
        assert done.acquire(timeout=10)
    assert threading.active_count() == before + 1
    entered = threading.Event()

    def block() -> None:
        entered.set()
        release.wait()

    workers.submit(block)
    assert entered.wait(10)
    # Whoever comes once it is seen to block gets another thread, and so does all that waits.
    while not done.acquire(timeout=0.05):
        workers.submit(done.release)
    assert threading.active_count() == before + 2
    release.set()
    workers.close()
    for thread in threading.enumerate():
        if thread.name.startswith("sampler-"):
            thread.join(10)
