"""The helper when the system allows no more threads, as TasksMax= of its unit may."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import pytest

from qkilld.monitor.libvirt import Domain
from qkilld.stop.finder import OutsideGuest
from qkilld.stop.guest_stop import GuestStop
from qkilld.stop.helper_events import guest_of
from qkilld.stop.libvirt_guest import shut_down_by_libvirt
from qkilld.stop.log import Log
from qkilld.stop.mailbox import Mailbox
from qkilld.stop.notifier import Notifier
from qkilld.stop.options import Options
from qkilld.stop.passing import connect_monitor
from qkilld.stop.process import open_process
from qkilld.stop.run import StopRun
from qkilld.stop.targets import Targets
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


def test_a_guest_of_libvirt_is_stopped_without_asking_libvirt() -> None:
    mailbox, log, went_on = Mailbox(), Log(), list[GuestStop]()
    stop = stop_of(open_process(os.getpid()))
    shut_down_by_libvirt(
        stop,
        Domain("web", "qemu:///system"),
        guest=guest_of(stop, None),
        span=1,
        log=log,
        mailbox=mailbox,
        go_on=went_on.append,
    )
    mailbox.work()
    assert went_on == [stop]
    stop.close()
    log.close()
    os.close(mailbox._read)
    os.close(mailbox._write)


def test_guests_elsewhere_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = Targets(Options())
    guest = OutsideGuest(2, "web", ("qemu",), "db.service")
    monkeypatch.setattr(targets.finder, "outside", lambda globs: iter([guest]))
    assert targets._outside() == [guest]
