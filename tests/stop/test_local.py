"""When qkilld-stop works without the daemon, later requests reach the engine's thread."""

from __future__ import annotations

import _thread
import asyncio
import errno
import os
import select
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from qkilld.engine import access
from qkilld.model.constants import INFINITY, Flag
from qkilld.model.errors import UnknownIdentity
from qkilld.model.event import Event
from qkilld.model.policy import Config, Policy
from qkilld.stop import fallback, local
from qkilld.stop.fallback import Fallback, LocalStop
from qkilld.stop.local import LocalStopper
from qkilld.stop.log import Log
from qkilld.stop.options import Options
from qkilld.stop.process import may_pass_monitor, open_process
from tests.lab.guest import Guest, own_qemus
from tests.lab.process import OTHER_UID
from tests.lab.stuck import stuck_guests
from tests.stop.fakes import Notes, stop_of

SECOND = 1_000_000
QUICK = Policy(grace=SECOND // 10, stall=SECOND // 10, storage_stall=SECOND // 10, max=SECOND)


class SilentLog(Log):
    def write(self, event: Event) -> None:
        pass


def local_stop(pid: int) -> LocalStop:
    return LocalStop(
        pid=pid,
        start_time=None,
        flags=Flag.FORCE,
        powerdown=False,
        ask_at_most=INFINITY,
        spans={},
        reason="a test",
        status=None,
    )


def test_a_process_that_is_stuck_for_a_moment_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(QUICK, executables=(own_qemus(),))
    monkeypatch.setattr(fallback, "configuration", lambda: config)

    async def stop(pid: int) -> str:
        engine = Fallback(SilentLog())
        try:
            return await engine.stop(local_stop(pid), "a test")
        finally:
            await engine.close()

    with stuck_guests() as stuck:
        guest = stuck.make_stuck(OTHER_UID)
        with monkeypatch.context() as patch:
            patch.setattr(access, "IDENTITY_TIMEOUT_S", 0.3)
            with pytest.raises(UnknownIdentity, match="Try again"):
                asyncio.run(stop(guest.pid))
        threading.Timer(0.5, stuck.free).start()
        monkeypatch.setattr(access, "IDENTITY_TIMEOUT_S", 30.0)
        assert asyncio.run(stop(guest.pid)) == "killed"


class RecordingStop(LocalStop):
    """Records which threads set each attribute."""

    setters: ClassVar[defaultdict[str, list[str]]] = defaultdict(list)

    def __setattr__(self, name: str, value: Any) -> None:
        self.setters[name].append(threading.current_thread().name)
        super().__setattr__(name, value)


def test_force_that_comes_later(
    fake_qemu: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(QUICK, executables=(own_qemus(),))
    monkeypatch.setattr(fallback, "configuration", lambda: config)
    monkeypatch.setattr(local, "LocalStop", RecordingStop)
    guest, notes = fake_qemu(stubborn=True), Notes()
    stop = stop_of(open_process(guest.pid))
    stopper = LocalStopper(Options(), notes, SilentLog(), reason="a test")
    try:
        stopper.start([stop])
        stop.forced, stop.ask_at_most = True, 5 * SECOND
        stopper.amend(stop)
        poll = select.poll()
        (descriptor,) = stopper.descriptors()
        poll.register(descriptor, select.POLLIN)
        while notes.said[-1:] != [("ended", "killed")]:
            assert poll.poll(30_000), notes.said
            stopper.work()
    finally:
        stopper.close()
        stop.close()
        # The program does not close these, because it exits.
        assert stopper._loop is not None
        stopper._loop.close()
        os.close(stopper._mailbox._read)
        os.close(stopper._mailbox._write)
    assert RecordingStop.setters["flags"] == ["MainThread", "engine"]
    # After its construction, the stop belongs to the thread of the engine.
    assert {each for names in RecordingStop.setters.values() for each in names[1:]} == {"engine"}


def test_an_engine_that_cannot_start_ends_the_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the stops did not end, the helper would wait for the engine and extend the timeout for
    ever."""

    def no_loop() -> asyncio.AbstractEventLoop:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(asyncio, "new_event_loop", no_loop)
    notes = Notes()
    stop = stop_of(open_process(os.getpid()))
    stopper = LocalStopper(Options(), notes, SilentLog(), reason="a test")
    try:
        stopper.start([stop])
        stopper.work()
        assert notes.said == [("ended", "failed")]
    finally:
        stopper.close()
        stop.close()
        os.close(stopper._mailbox._read)
        os.close(stopper._mailbox._write)


def test_no_monitor_is_passed_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*arguments: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", no_thread)
    assert not may_pass_monitor(os.getpid())
