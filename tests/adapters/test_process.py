"""Real processes by pidfd."""

from __future__ import annotations

import asyncio
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM

import pytest

from qkilld.adapters.process import open_process
from qkilld.adapters.procfs import read_stat
from qkilld.model.errors import Failed, NoSuchProcess, NotQemu
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.guest import FIRST_THREAD_EXITS, LARGE, Guest
from tests.lab.process import OTHER_UID, wait_gone

Make = Callable[..., Guest]
_TELLS_ENDS = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2]) >= (6, 15)
"""Whether a pidfd shows the exit status of a process that its parent has reaped."""


def test_identity_of_a_real_qemu(qemu: Make) -> None:
    guest = qemu()
    process = open_process(guest.pid)
    try:
        identity = process.identity
        assert identity.key == (guest.pid, guest.start_time)
        assert identity.uid == os.getuid()
        assert identity.command == "qemu-system-x86"
        assert identity.executable == str(guest.executable)
        assert not process.exited()
        process.signal(SIGSTOP)
        process.signal(SIGKILL)
        assert wait_gone(guest.pidfd, 30)
        assert process.exited()
        assert not process.collected()
        assert process.exit_status() == SIGKILL
        guest.wait_gone()
        assert process.collected()
        assert process.exit_status() == (SIGKILL if _TELLS_ENDS else 0)
        with pytest.raises(ProcessLookupError):
            process.signal(SIGKILL)
        with pytest.raises(NoSuchProcess):
            process.identify()
    finally:
        process.close()
        process.close()


def test_an_exit_is_no_death_by_a_signal(qemu: Make) -> None:
    guest = qemu()
    process = open_process(guest.pid)
    try:
        assert process.exit_status() == 0
        process.signal(SIGTERM)
        assert wait_gone(guest.pidfd, 30)
        assert process.exit_status() == 0
        guest.wait_gone()
        assert process.exit_status() == 0
    finally:
        process.close()


def test_the_code_of_an_exit_after_an_error(scripted_qemu: Make) -> None:
    handle = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))"
    guest = scripted_qemu(f"{handle}; print('ready', flush=True); signal.pause()")
    process = open_process(guest.pid)
    try:
        process.signal(SIGTERM)
        assert wait_gone(guest.pidfd, 30)
        assert process.exit_status() == 3 << 8
    finally:
        process.close()


def test_a_qemu_that_exits_is_never_taken_for_something_else(qemu: Make) -> None:
    """While QEMU exits, the kernel frees its memory; after that, its executable is unreadable."""
    exiting = False
    for _ in range(20):
        guest = qemu(arguments=LARGE)
        guest.signal(SIGTERM)
        with pytest.raises(NoSuchProcess):
            while True:
                process = open_process(guest.pid)
                identity = process.identity
                process.close()
                if not identity.exiting:
                    assert identity.executable == str(guest.executable)
                else:
                    assert identity.executable == ""
                    assert identity.key == (guest.pid, guest.start_time)
                    exiting = True
        if exiting:
            return
    pytest.fail("none was looked at while it exited")


def test_a_process_whose_first_thread_has_exited(scripted_qemu: Make) -> None:
    guest = scripted_qemu(FIRST_THREAD_EXITS)
    until(lambda: read_stat(guest.pid), lambda stat: stat.state == "Z")
    process = open_process(guest.pid)
    try:
        assert process.identity.executable == str(guest.executable)
        assert not process.identity.exiting
        assert not process.exited()
    finally:
        process.close()


def test_out_of_descriptors(fake_qemu: Make) -> None:
    guest = fake_qemu()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = open_process(guest.pid)
    lowest = os.dup(0)
    os.close(lowest)
    try:
        # The first limit leaves no descriptor for the pidfd, the second none for reading /proc.
        for most in (lowest, lowest + 1):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
            with pytest.raises(Failed, match="Too many open files"):
                open_process(guest.pid)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        with pytest.raises(Failed, match="Too many open files"):
            process.identify()
        assert not process.collected()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        process.close()


def test_a_process_with_an_unreadable_executable_is_not_qemu(fake_qemu: Make) -> None:
    """Another user cannot read exe of a root process."""
    needs.root("to be another user")
    guest = fake_qemu()
    os.seteuid(OTHER_UID)
    try:
        with pytest.raises(NotQemu, match="does not show"):
            open_process(guest.pid)
    finally:
        os.seteuid(0)
    assert Path(f"/proc/{guest.pid}").exists()


def test_a_process_that_cannot_be_watched_is_closed(fake_qemu: Make) -> None:
    """For example, all descriptors may be in use."""
    process = open_process(fake_qemu().pid)
    pidfd, limits = process.fileno(), resource.getrlimit(resource.RLIMIT_NOFILE)

    async def watch() -> None:
        process.watch(lambda: None)
        resource.setrlimit(resource.RLIMIT_NOFILE, (pidfd, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                process.watch(lambda: None)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    asyncio.run(watch())
    process.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)
