"""Fixtures for every layer, the check for leaks, and hooks that turn skips into failures in CI."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest

from tests.lab import bus, container, guest, leaks, library, process, scratch
from tests.lab.needs import Missing

IN_CI = os.environ.get("CI", "").lower() == "true"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--dbus-library",
        choices=library.NAMES,
        default=library.NAMES[0],
        help="the D-Bus library that qkilld is to use",
    )
    parser.addoption(
        "--message-bus",
        choices=container.BUSES,
        default=container.BUSES[0],
        help="the message bus of the containers",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make SIGTERM and SIGHUP act like Ctrl-C, so that everything that was started is ended in an
    orderly way.

    Install a handler for SIGINT, too: Python installs none if the parent ignores SIGINT (`pytest &`
    in a script).
    """
    process.become_subreaper()
    scratch.run_directory()
    library.use(config.getoption("--dbus-library"))
    container.use(config.getoption("--message-bus"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if hasattr(config, "workerinput"):
        process.end_with_parent()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests that only compute to the end: they fill the time while the last of the long
    tests wait."""
    quick = [Path(__file__).parent / name for name in ("pure", "engine")]
    items.sort(key=lambda item: item.path.parent in quick)


def pytest_unconfigure() -> None:
    scratch.remove_run_directory()
    scratch.sweep()  # Remove what killed processes have left.


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(f"by {signal.Signals(number).name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip a test whose requirements are missing. With CI=true, fail it."""
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
    """Do the same for a whole file."""
    report = yield
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true does not allow: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: object) -> str:
    return longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaves processes, descriptors, threads or asyncio tasks behind."""
    before = leaks.Snapshot.take()
    with leaks.unfinished_tasks() as tasks:
        yield
    left = leaks.lasting_leaks(before) + [f"a task: {task}" for task in tasks]
    leaks.end_processes(before)
    assert not left, "the test left behind\n" + "\n".join(left)


@pytest.fixture
def lab_dir() -> Iterator[Path]:
    """An empty directory with a path short enough for a socket, removed afterwards."""
    with scratch.scratch("t") as path:
        yield path


@pytest.fixture
def private_bus() -> Iterator[bus.Bus]:
    """A bus for this test."""
    with bus.private_bus() as running:
        yield running


@pytest.fixture
def start_daemon(private_bus: bus.Bus) -> Iterator[Callable[..., bus.Daemon]]:
    """A function that starts the daemon on this test's bus. Its arguments are those of
    bus.daemon()."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **options: Any) -> bus.Daemon:
            return stack.enter_context(bus.daemon(private_bus, *arguments, **options))

        yield start


@pytest.fixture
def daemon(start_daemon: Callable[..., bus.Daemon]) -> bus.Daemon:
    """A daemon on this test's bus. Its targets are QEMU and every fake_qemu."""
    return start_daemon()


@pytest.fixture
def client(daemon: bus.Daemon) -> Iterator[bus.Client]:
    """A connection to the daemon's bus, as this process's own user."""
    with daemon.bus.client() as connection:
        yield connection


@pytest.fixture
def qemu() -> Iterator[Callable[..., guest.Guest]]:
    """A function that starts a real QEMU without a machine. Its arguments are those of
    guest.start_qemu()."""
    yield from _factory(guest.start_qemu)


@pytest.fixture
def linux_guest() -> Iterator[Callable[..., guest.Guest]]:
    """A function that boots a Linux guest. Its arguments are those of guest.boot_guest()."""
    yield from _factory(guest.boot_guest)


@pytest.fixture
def fake_qemu() -> Iterator[Callable[..., guest.Guest]]:
    """A function that starts a fake QEMU. Its arguments are those of guest.fake_qemu()."""
    yield from _factory(guest.fake_qemu)


@pytest.fixture
def scripted_qemu() -> Iterator[Callable[..., guest.Guest]]:
    """A function that starts a scripted QEMU. Its arguments are those of guest.scripted_qemu()."""
    with contextlib.ExitStack() as stack:
        yield lambda script, **options: stack.enter_context(guest.scripted_qemu(script, **options))


def _factory(start: Callable[..., guest.Guest]) -> Iterator[Callable[..., guest.Guest]]:
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> guest.Guest:
            return stack.enter_context(start(**options))

        yield make
