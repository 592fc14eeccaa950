"""The helper when the system allows no more threads, as TasksMax= of its unit may."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import pytest

from qkilld.stop.guest_stop import GuestStop
from qkilld.stop.log import Log
from qkilld.stop.notifier import Notifier
from qkilld.stop.options import Options
from qkilld.stop.passing import connect_monitor
from qkilld.stop.process import open_process
from qkilld.stop.run import StopRun
from tests.stop.fakes import FakeHandle, stop_of


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize("options", [Options(all_guests=True), Options(unit="web.service")])
def test_guests_are_not_left_to_keepers_for_ever(
    monkeypatch: pytest.MonkeyPatch, options: Options
) -> None:
    run = StopRun(options, Notifier(""), Log())
    started: list[GuestStop] = []

    def start(stops: Sequence[GuestStop]) -> None:
        started.extend(stops)

    monkeypatch.setattr(run, "_start", start)
    processes = [FakeHandle(1), FakeHandle(2)]
    run.begin(processes)
    run._mail.work()
    assert [stop.process for stop in started] == processes
    run.close()
    os.close(run._mail._read)
    os.close(run._mail._write)


def test_a_guest_is_stopped_without_its_monitor() -> None:
    stop = stop_of(open_process(os.getpid()))
    connect_monitor(stop)
    assert stop.monitor == -1
    stop.close()
