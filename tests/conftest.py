"""Fixtures for every layer, the leak check, and what makes a skipped layer a failure in CI."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest

from tests.lab import bus, guest, leaks, process, scratch
from tests.lab.needs import Missing

IN_CI = os.environ.get("CI", "").lower() == "true"


def pytest_configure() -> None:
    """Ends like Ctrl-C on SIGTERM and SIGHUP, so that what was started is taken down in order."""
    process.become_subreaper()
    scratch.run_directory()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


def pytest_unconfigure() -> None:
    scratch.remove_run_directory()
    scratch.sweep()  # of what the tests themselves have killed


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(f"by {signal.Signals(number).name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Without what it needs a test is skipped; with CI=true no test may be."""
    report = yield
    if call.excinfo is not None and call.excinfo.errisinstance(Missing):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {call.excinfo.value}")
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true does not allow: {_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole file."""
    report = yield
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true does not allow: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: object) -> str:
    return longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test that leaves processes, descriptors, threads or asyncio tasks behind."""
    before = leaks.Snapshot.take()
    with leaks.unfinished_tasks() as tasks:
        yield
    left = leaks.Snapshot.take().leaks_since(before) + [f"a task: {task}" for task in tasks]
    leaks.end_processes(before)
    assert not left, "the test left behind\n" + "\n".join(left)


@pytest.fixture
def lab_dir() -> Iterator[Path]:
    """An empty directory whose path is short enough for a socket, and that is gone afterwards."""
    with scratch.scratch("t") as path:
        yield path


@pytest.fixture
def private_bus() -> Iterator[bus.Bus]:
    """A bus of this test's own."""
    with bus.private_bus() as running:
        yield running


@pytest.fixture
def start_daemon(private_bus: bus.Bus) -> Iterator[Callable[..., bus.Daemon]]:
    """A function: starts the daemon on this test's bus; takes what bus.daemon() takes."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **options: Any) -> bus.Daemon:
            return stack.enter_context(bus.daemon(private_bus, *arguments, **options))

        yield start


@pytest.fixture
def daemon(start_daemon: Callable[..., bus.Daemon]) -> bus.Daemon:
    """The daemon, up on this test's bus, to whom QEMU and every fake_qemu is a target."""
    return start_daemon()


@pytest.fixture
def client(daemon: bus.Daemon) -> Iterator[bus.Client]:
    """A connection to that daemon's bus, as this process's own user."""
    with daemon.bus.client() as connection:
        yield connection


@pytest.fixture
def qemu() -> Iterator[Callable[..., guest.Guest]]:
    """A function: a real QEMU with nothing in it; takes what guest.start_qemu() takes."""
    yield from _factory(guest.start_qemu)


@pytest.fixture
def linux_guest() -> Iterator[Callable[..., guest.Guest]]:
    """A function: a guest that runs Linux; takes what guest.boot_guest() takes."""
    yield from _factory(guest.boot_guest)


@pytest.fixture
def fake_qemu() -> Iterator[Callable[..., guest.Guest]]:
    """A function: the cheap stand-in; takes what guest.fake_qemu() takes."""
    yield from _factory(guest.fake_qemu)


def _factory(start: Callable[..., guest.Guest]) -> Iterator[Callable[..., guest.Guest]]:
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> guest.Guest:
            return stack.enter_context(start(**options))

        yield make
