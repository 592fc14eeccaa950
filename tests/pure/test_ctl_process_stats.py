"""A guest's resource usage, also if it is unreadable."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from qkilld.ctl.process_stats import (
    ProcessStats,
    binary_size,
    command_line,
    executable,
    process_stats,
    short_span,
)

ME, UID = os.getpid(), os.getuid()
NOBODY = 2**31 - 2
"""No process has this id: pid_max is at most 2^22."""


def test_of_a_process() -> None:
    stats = process_stats(ME, UID)
    assert stats.cpu is not None and stats.cpu >= 10_000
    assert stats.memory is not None and stats.memory > 1 << 20
    assert stats.uptime is not None and stats.uptime < 3600 * 1_000_000
    assert all(stats.cells())
    assert executable(ME) == os.readlink("/proc/self/exe")  # noqa: PTH115
    assert command_line(ME)[1:] == sys.orig_argv[1:]


def test_of_another_process_by_now() -> None:
    for pid, uid in ((NOBODY, UID), (ME, UID + 1)):
        stats = process_stats(pid, uid)
        assert stats == ProcessStats()
        assert stats.cells() == ("", "", "")
        assert set(stats.as_json().values()) == {None}
    assert (executable(NOBODY), command_line(NOBODY)) == ("", [])


def test_of_a_zombie() -> None:
    with subprocess.Popen(["true"]) as process:
        deadline = time.monotonic() + 30
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process_stats(process.pid, UID) == ProcessStats()
        assert command_line(process.pid) == []


@pytest.mark.parametrize(
    "error", [psutil.AccessDenied(1), psutil.NoSuchProcess(1), psutil.ZombieProcess(1), OSError()]
)
@pytest.mark.parametrize(
    "method",
    [
        "Process.create_time",
        # Replace these methods in _pslinux, because oneshot() needs the unchanged methods of
        # psutil.Process.
        "_pslinux.Process.cpu_times",
        "_pslinux.Process.memory_info",
        "_pslinux.Process.uids",
    ],
)
def test_every_call_may_fail(
    method: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"psutil.{method}", fail)
    assert process_stats(ME, UID) == ProcessStats()


@pytest.mark.parametrize(
    "usec, text",
    [
        (0, "0"),
        (12_340_000, "12.34s"),
        (65_000_000, "1min 5s"),
        (2 * 86_400_000_000 + 3 * 3_600_000_000 + 60_000_000, "2d 3h"),
    ],
)
def test_short_span(usec: int, text: str) -> None:
    assert short_span(usec) == text


@pytest.mark.parametrize(
    "count, text",
    [(0, "0B"), (1023, "1023B"), (1536, "1.5K"), (1000 << 20, "1.0G"), (2**70, "1024.0E")],
)
def test_binary_size(count: int, text: str) -> None:
    assert binary_size(count) == text


def test_psutil_is_not_loaded_before_it_is_needed() -> None:
    program = (
        "import sys; from qkilld.ctl import check_unit, main, listing, terminate, trace; "
        "print('psutil' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"False\n"
