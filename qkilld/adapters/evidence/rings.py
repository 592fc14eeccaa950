"""Requests that no thread stands in: those of io_uring and of Linux AIO.

A QEMU with aio=io_uring or aio=native hands its requests to the kernel and waits for events. What
is in flight shows for io_uring in /proc/PID/fdinfo of the ring: requests taken less answers given
(kernel io_uring/fdinfo.c; the heads and tails are there since 5.18, before it is not known). For
AIO the kernel tells nobody; that the process can have such requests shows by an AIO context (a
mapping of "/[aio]") together with a file opened with O_DIRECT, without which io_submit(2) is
synchronous.

The ring in that mapping is not read: its head and tail (kernel fs/aio.c) tell what was completed,
which shows as switches of the thread that is woken, and not what is in flight; the process can
write to it; and to read it takes the memory lock of the target.

Rights: the ptrace right. Cost, measured on kernel 6.18: 11 µs a ring at each read; every REFRESH_S,
or when the number of descriptors changes, 3 µs a descriptor and 9 µs more a file (0.6 ms for 100),
and 40 to 400 µs for the mappings, which are read only where there is a file with O_DIRECT and some
process of the host has an AIO context at all. Reading the mappings takes the memory lock of the
target, which may block for as long as its storage does: a thread of its own does that, and what
it has not found in MAPPINGS_TIMEOUT_S is not known.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qkilld.adapters.evidence.keptfile import GONE, number_after, open_directory, read_once

REFRESH_S: Final = 10.0
MAPPINGS_TIMEOUT_S: Final = 0.05
MAX_DESCRIPTORS: Final = 1024
"""A process with more is not looked into."""
MAX_RINGS: Final = 64
_MAX_MAPPINGS: Final = 4 << 20
"""Bytes of /proc/PID/maps: some 40,000 mappings."""
_MAX_IN_FLIGHT: Final = 1 << 17
"""More than the kernel allows (IORING_MAX_CQ_ENTRIES, and what overflows): tails in memory that the
process shares say whatever it likes."""

_RING: Final = "anon_inode:[io_uring]"
_POLL_ADD: Final = b"  op=6,"


class RingReader:
    def __init__(
        self,
        directory: int,
        proc: Path = Path("/proc"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`directory`: a descriptor of /proc/PID, which stays the caller's."""
        self._directory = directory
        self._proc = proc
        self._clock = clock
        self._mappings = _Mappings(directory)
        self._refresh_at = 0.0
        self._count = -1
        self._rings: list[str] | None = None
        self._direct: bool | None = None

    def read(self) -> tuple[int | None, bool | None]:
        """Requests in flight on all rings; whether it may have AIO requests in flight.

        On a ring an open request to poll a descriptor, with which some versions of QEMU wait for
        events, is none; a timer on it, which cannot be told, counts as one.
        """
        if self._descriptors_changed():
            self._refresh()
        in_flight = self._in_flight()
        if in_flight is None and self._rings is not None:
            # The ring was busy, or its descriptor was closed or is another file by now.
            self._refresh()
            in_flight = self._in_flight()
        return in_flight, self._direct

    def _descriptors_changed(self) -> bool:
        try:
            # Since 6.2 the size of the directory is the number of descriptors, before it is 0.
            count = os.stat("fd", dir_fd=self._directory).st_size
        except OSError:
            count = -1
        changed = count != self._count
        self._count = count
        return changed or self._clock() >= self._refresh_at

    def _in_flight(self) -> int | None:
        if self._rings is None:
            return None
        total = 0
        for number in self._rings:
            try:
                text = read_once(f"fdinfo/{number}", self._directory)
            except OSError:
                return None
            if (requests := requests_in_flight(text)) is None:
                return None
            total += requests
        return total

    def _refresh(self) -> None:
        self._refresh_at = self._clock() + REFRESH_S
        self._rings = self._direct = None
        try:
            links = self._links()
        except OSError:
            return
        if links is None:
            return
        rings = [number for number, link in links if link == _RING]
        if len(rings) <= MAX_RINGS:
            self._rings = rings
        paths = [number for number, link in links if link.startswith("/")]
        direct = self._any_direct(paths)
        if direct:
            direct = self._may_have_context() and self._mappings.have_context()
        self._direct = direct

    def _links(self) -> list[tuple[str, str]] | None:
        """(number, what it is) of each descriptor. Raises OSError; None where they are too many."""
        directory = open_directory("fd", self._directory)
        try:
            numbers = os.listdir(directory)  # noqa: PTH208 - of a descriptor
            if len(numbers) > MAX_DESCRIPTORS:
                return None
            links = []
            for number in numbers:
                try:
                    links.append((number, os.readlink(number, dir_fd=directory)))
                except GONE:  # closed in between
                    continue
            return links
        finally:
            os.close(directory)

    def _any_direct(self, numbers: list[str]) -> bool | None:
        for number in numbers:
            try:
                text = read_once(f"fdinfo/{number}", self._directory)
            except GONE:
                continue
            except OSError:
                return None
            flags = number_after(text, b"flags:\t", 8)
            if flags is None:
                return None
            if flags & os.O_DIRECT:
                return True
        return False

    def _may_have_context(self) -> bool:
        """False only where no process of the host has one."""
        try:
            return int(read_once(self._proc / "sys/fs/aio-nr")) != 0
        except (OSError, ValueError):
            return True


def requests_in_flight(text: bytes) -> int | None:
    """Of one ring, from its fdinfo; None where that does not say it.

    Two things are not fixed: older kernels tell nothing of the ring at all, newer ones nothing
    while another thread holds its lock; and what is polled stands in a list of its own.
    """
    taken = number_after(text, b"\nSqTail:\t")
    answered = number_after(text, b"\nCqTail:\t")
    _, listed, polls = text.partition(b"\nPollList:\n")
    if taken is None or answered is None or not listed:
        return None
    polls, _, overflowed = polls.partition(b"CqOverflowList:\n")
    polling = sum(line.startswith(_POLL_ADD) for line in polls.splitlines())
    # Answers for which the ring had no room: given, but not counted by its tail.
    waiting = sum(line.startswith(b"  user_data=") for line in overflowed.splitlines())
    in_flight = (taken - answered) % (1 << 32) - polling - waiting
    return max(in_flight, 0) if in_flight <= _MAX_IN_FLIGHT else None


class _Mappings:
    """Looks for an AIO context among the mappings, without ever waiting for long."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._looking: threading.Thread | None = None
        self._found: bool | None = None

    def have_context(self) -> bool | None:
        if self._looking is None or not self._looking.is_alive():
            self._found = None
            # Its own, to be closed when it is done: that may be after everybody else is.
            directory = os.dup(self._directory)
            self._looking = threading.Thread(
                target=self._look, args=(directory,), name="mappings", daemon=True
            )
            self._looking.start()
        self._looking.join(MAPPINGS_TIMEOUT_S)
        return self._found

    def _look(self, directory: int) -> None:
        try:
            descriptor = os.open("maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
            with os.fdopen(descriptor, "rb") as file:
                text = file.read(_MAX_MAPPINGS + 1)
        except OSError:
            return
        finally:
            os.close(directory)
        if len(text) <= _MAX_MAPPINGS:
            self._found = b" /[aio] (deleted)\n" in text or b" /[aio]\n" in text
