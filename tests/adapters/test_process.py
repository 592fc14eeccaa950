"""Processes by pidfd, on the real thing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM

import pytest

from qkilld.adapters.process import open_process
from qkilld.model.errors import Exiting, Failed, NoSuchProcess, NotQemu
from tests.lab import needs
from tests.lab.guest import Guest
from tests.lab.process import OTHER_UID, wait_gone

Make = Callable[..., Guest]


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
        guest.wait_gone()
        assert process.collected()
        with pytest.raises(ProcessLookupError):
            process.signal(SIGKILL)
        with pytest.raises(NoSuchProcess):
            process.identify()
    finally:
        process.close()
        process.close()


def test_a_qemu_that_exits_is_never_taken_for_something_else(qemu: Make) -> None:
    """The kernel takes its memory apart, and what tells it for a QEMU, before it is gone."""
    for _ in range(20):
        guest = qemu()
        guest.signal(SIGTERM)
        with pytest.raises(NoSuchProcess) as caught:
            while True:
                process = open_process(guest.pid)
                assert process.identity.executable == str(guest.executable)
                process.close()
        if isinstance(caught.value, Exiting):
            assert caught.value.key == (guest.pid, guest.start_time)
            return
    pytest.fail("none was looked at while it exited")


def test_out_of_descriptors(fake_qemu: Make) -> None:
    import resource

    guest = fake_qemu()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        with pytest.raises(Failed, match="Too many open files"):
            open_process(guest.pid)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_the_kernel_does_not_show_is_no_qemu(fake_qemu: Make) -> None:
    """As another user: exe of a process of root's is not to be read."""
    needs.root("to be another user")
    guest = fake_qemu()
    os.seteuid(OTHER_UID)
    try:
        with pytest.raises(NotQemu, match="does not show"):
            open_process(guest.pid)
    finally:
        os.seteuid(0)
    assert Path(f"/proc/{guest.pid}").exists()
