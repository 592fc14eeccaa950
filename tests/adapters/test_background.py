"""A write in the background never delays the caller."""

from __future__ import annotations

import threading

import pytest

from qkilld.adapters import background
from qkilld.adapters.background import BackgroundWriter


def test_a_full_queue_takes_only_what_must_be_written() -> None:
    entered, resume = threading.Event(), threading.Event()
    written: list[int] = []

    def write(item: int) -> None:
        entered.set()
        resume.wait()
        written.append(item)

    writer = BackgroundWriter("test", write, limit=2)
    writer.put(0)
    entered.wait()
    assert [writer.put(number) for number in (1, 2, 3)] == [True, True, False]
    assert writer.put(4, always=True)
    resume.set()
    assert writer.close()
    assert writer.close()
    assert written == [0, 1, 2, 4]


def test_a_failure_ends_no_thread() -> None:
    written: list[str] = []

    def write(item: str) -> None:
        written.append(item)
        raise ValueError(item)

    writer = BackgroundWriter("test", write, limit=None)
    writer.put("a")
    writer.put("b")
    assert writer.close()
    assert written == ["a", "b"]


def test_the_end_does_not_wait_for_a_write_that_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FLUSH_TIMEOUT_S", 0.05)
    resume = threading.Event()

    def write(item: int) -> None:
        resume.wait()

    writer = BackgroundWriter("test", write, limit=1)
    writer.put(0)
    assert not writer.close()
    resume.set()
    monkeypatch.undo()
    assert writer.close()


def test_items_wait_until_the_system_allows_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    written: list[int] = []
    monkeypatch.setattr(threading.Thread, "start", start)
    writer = BackgroundWriter("test", written.append, limit=None)
    assert writer.close()
    assert writer.put(0)
    assert not writer.close()
    monkeypatch.undo()
    writer.put(1)
    assert writer.close()
    assert written == [0, 1]
