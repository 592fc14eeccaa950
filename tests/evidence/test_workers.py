"""Samples are taken although the system allows no threads."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from qkilld.adapters import blockable
from qkilld.evidence.faults import FaultGuard
from qkilld.evidence.workers import Workers


@pytest.mark.parametrize("may_block", [False, True])
def test_calls_without_threads(monkeypatch: pytest.MonkeyPatch, may_block: bool) -> None:
    """If blocking harms only the program itself, the submitting thread makes the calls. In other
    programs, the calls wait for a thread."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(blockable.shared, "may_block_caller", may_block)
    workers, made, done = Workers(FaultGuard(lambda what, error: None)), [0], threading.Event()
    for number in range(1, 4):
        workers.submit(partial(made.append, number), uid=0, instead=lambda: None)
    assert made == ([0, 1, 2, 3] if may_block else [0])
    assert workers.waiting is not may_block
    monkeypatch.undo()
    workers.submit(done.set, uid=0, instead=lambda: None)
    assert done.wait(30)
    assert made == [0, 1, 2, 3]
    workers.close()
