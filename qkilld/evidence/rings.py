"""Find requests of io_uring and Linux AIO, for which no thread waits in a system call.

With aio=io_uring or aio=native, QEMU passes its requests to the kernel and waits for events. For
io_uring, /proc/PID/fdinfo of the ring shows the requests in flight: those submitted minus those
completed (kernel io_uring/fdinfo.c; unknown before Linux 5.18). QEMU also uses an io_uring to wait
for events. Requests that poll descriptors are on a separate list (PollList) and are not counted.
One of the counted requests may be a timer, and nothing distinguishes it from a request to a disk.
QEMU 11 uses one ring for events and disks. In all cases that were measured (NBD, iSCSI), a hanging
QEMU 11 had a timer on its ring.

The kernel does not show Linux AIO requests in flight. A process can have AIO requests only if it
has an AIO context (a mapping of "/[aio]") and a file open with O_DIRECT: without O_DIRECT,
io_submit(2) is synchronous. The tail of the ring in the mapping (kernel fs/aio.c) counts
completions, not requests in flight. Only samples with detail read the tail (sampler.py), because
this takes the process's memory lock.

Needs the ptrace right. Cost, measured on kernel 6.18: 11 µs for each ring at each read. The
descriptors and mappings are read again when the number of descriptors changes, and at the latest
after REFRESH_S (IDLE_REFRESH_S if the process has not run since the last reading). Reading them
costs 3 µs for each descriptor, 9 µs more for each file (0.6 ms for 100), and 40 to 400 µs for the
mappings. The mappings are read only if a file is open with O_DIRECT and some process on the host
has an AIO context. Reading the mappings takes the process's memory lock, and may block as long as
the process's storage hangs. So a separate thread reads the mappings, and after MAPPINGS_TIMEOUT_S
the result is unknown.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import read_links
from qkilld.debug_log import note_once
from qkilld.evidence.kept_file import EXITED, number_after, open_directory, read_once
from qkilld.model.dataclass import dataclass

REFRESH_S: Final = 10.0
IDLE_REFRESH_S: Final = 30.0
"""Replaces REFRESH_S while no thread of the process runs, because only other processes could then
change what its descriptors refer to."""
MAPPINGS_TIMEOUT_S: Final = 0.05
MAX_DESCRIPTORS: Final = 1024
"""A process with more descriptors than this is not examined."""
MAX_RINGS: Final = 64
_MAX_MAPPINGS: Final = 4 << 20
"""If /proc/PID/maps is longer than this (about 40,000 mappings), it is not examined."""
_MAX_IN_FLIGHT: Final = 1 << 17
"""If the number of requests in flight seems to be greater than this, it counts as unknown, because
it is computed from tails that the process can overwrite. The maximum is twice
IORING_MAX_CQ_ENTRIES, because completions may overflow."""

_AIO_RING: Final = struct.Struct("=5I")
"""struct aio_ring, fs/aio.c: id, nr, head, tail, magic."""
_AIO_MAGIC: Final = 0xA10A10A1
_RING: Final = "anon_inode:[io_uring]"
_POLL_ADD: Final = b"  op=6,"


@dataclass(frozen=True, slots=True)
class RingRequests:
    in_flight: int
    timers: int = 0
    """How many of the requests in flight may be timers: one for each ring that the process uses to
    wait for events."""

    def __add__(self, other: RingRequests) -> RingRequests:
        return RingRequests(self.in_flight + other.in_flight, self.timers + other.timers)


class RingReader:
    __slots__ = (
        "_clock", "_count", "_direct", "_directory", "_has_run", "_mappings", "_proc",
        "_refreshed_at", "_rings",
    )  # fmt: skip

    def __init__(
        self,
        directory: int,
        proc: Path = Path("/proc"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`directory`: a descriptor of /proc/PID, which the caller closes."""
        self._directory = directory
        self._proc = proc
        self._clock = clock
        self._mappings = _Mappings(directory)
        self._refreshed_at = -IDLE_REFRESH_S
        self._has_run = True
        """Whether the process may have run since its descriptors were last listed."""
        self._count = -1
        self._rings: list[str] | None = None
        self._direct: bool | None = None

    def read_completions(self) -> int | None:
        """Return the sum of the tails of all AIO rings; None if there is no ring, or if one is
        unreadable. A tail counts completions modulo the ring's size. This takes the process's
        memory lock."""
        return self._mappings.tails()

    def read(
        self, opened: int | None = None, has_run: bool = True
    ) -> tuple[RingRequests | None, bool | None]:
        """Return the requests in flight on all rings, and whether AIO requests may be in flight.

        `opened`: st_size of /proc/PID/fd, if the caller has just read it. This is the number of
        descriptors, or 0 before Linux 6.2. `has_run`: the process may have run since the last call.
        """
        self._has_run = self._has_run or has_run
        if self._descriptors_changed(self._opened() if opened is None else opened):
            self._refresh()
        in_flight = self._in_flight()
        if in_flight is None and self._rings is not None:
            # The ring was busy, or its descriptor was closed or reused: list the rings again.
            self._refresh()
            in_flight = self._in_flight()
        return in_flight, self._direct

    def _opened(self) -> int:
        try:
            return os.stat("fd", dir_fd=self._directory).st_size
        except OSError:
            return -1

    def _descriptors_changed(self, opened: int) -> bool:
        changed = opened != self._count
        self._count = opened
        is_known = self._rings is not None and self._direct is not None
        interval = IDLE_REFRESH_S if is_known and not self._has_run else REFRESH_S
        return changed or self._clock() - self._refreshed_at >= interval

    def _in_flight(self) -> RingRequests | None:
        if self._rings is None:
            return None
        total = RingRequests(0)
        for number in self._rings:
            try:
                text = read_once(f"fdinfo/{number}", self._directory)
            except OSError as error:
                note_once("reading an io_uring", error)
                return None
            if (requests := requests_in_flight(text)) is None:
                note_once("reading an io_uring", "the kernel shows no requests in flight")
                return None
            total += requests
        return total

    def _refresh(self) -> None:
        self._refreshed_at, self._has_run = self._clock(), False
        self._rings = self._direct = None
        try:
            links = self._links()
        except OSError as error:
            note_once("looking for io_urings", error)
            return
        if links is None:
            note_once("looking for io_urings", f"more than {MAX_DESCRIPTORS} descriptors")
            return
        rings = [number for number, link in links if link == _RING]
        if len(rings) <= MAX_RINGS:
            self._rings = rings
        else:
            note_once("looking for io_urings", f"there are more than {MAX_RINGS}")
        paths = [number for number, link in links if link.startswith("/")]
        direct = self._any_direct(paths)
        if direct:
            direct = self._may_have_context() and self._mappings.have_context()
        self._direct = direct

    def _links(self) -> list[tuple[str, str]] | None:
        """Return the number and link of each descriptor; None if there are too many. Raises
        OSError."""
        directory = open_directory("fd", self._directory)
        try:
            return read_links(directory, MAX_DESCRIPTORS)
        finally:
            os.close(directory)

    def _any_direct(self, numbers: list[str]) -> bool | None:
        for number in numbers:
            try:
                text = read_once(f"fdinfo/{number}", self._directory)
            except EXITED:
                continue
            except OSError as error:
                note_once("looking for O_DIRECT", error)
                return None
            flags = number_after(text, b"flags:\t", 8)
            if flags is None:
                return None
            if flags & os.O_DIRECT:
                return True
        return False

    def _may_have_context(self) -> bool:
        """Return True if any process of the host has an AIO context, or if this is unknown."""
        try:
            return int(read_once(self._proc / "sys/fs/aio-nr")) != 0
        except (OSError, ValueError) as error:
            note_once("reading aio-nr", error)
            return True


def requests_in_flight(text: bytes) -> RingRequests | None:
    """Return the requests in flight on one ring, from its fdinfo; None if not shown.

    Older kernels never show them. Newer kernels do not show them while another thread holds the
    ring's lock.
    """
    sq_tail = number_after(text, b"\nSqTail:\t")
    answered = number_after(text, b"\nCqTail:\t")
    _, separator, polls = text.partition(b"\nPollList:\n")
    if sq_tail is None or answered is None or not separator:
        return None
    polls, _, overflowed = polls.partition(b"CqOverflowList:\n")
    polling = sum(line.startswith(_POLL_ADD) for line in polls.splitlines())
    # Subtract requests whose completion had no room on the ring: they are not in flight, but the
    # tail does not include them.
    waiting = sum(line.startswith(b"  user_data=") for line in overflowed.splitlines())
    in_flight = (sq_tail - answered) % (1 << 32) - polling - waiting
    if in_flight > _MAX_IN_FLIGHT:
        return None
    in_flight = max(in_flight, 0)
    return RingRequests(in_flight, min(in_flight, 1) if polling else 0)


class _Mappings:
    """Finds AIO contexts among the mappings, and reads their tails, without blocking for long."""

    __slots__ = ("_addresses", "_directory", "_tails", "_thread")

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._thread: threading.Thread | None = None
        self._addresses: list[int] | None = None
        self._tails: int | None = None

    def have_context(self) -> bool | None:
        self._addresses = None
        self._run(self._find)
        return None if self._addresses is None else bool(self._addresses)

    def tails(self) -> int | None:
        self._tails = None
        if self._addresses:
            self._run(self._read)
        return self._tails

    def _run(self, work: Callable[[int], None]) -> None:
        """Run `work` in a thread, unless the previous thread is still blocked. Return after
        MAPPINGS_TIMEOUT_S at the latest. The thread may outlive this reader, so it has its own
        descriptor."""
        if self._thread is None or not self._thread.is_alive():
            directory = os.dup(self._directory)
            thread = threading.Thread(
                target=self._guarded, args=(work, directory), name="mappings", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # The system allows no more threads.
                os.close(directory)
                note_once("reading mappings", error)
                return
            self._thread = thread
        self._thread.join(MAPPINGS_TIMEOUT_S)

    @staticmethod
    def _guarded(work: Callable[[int], None], directory: int) -> None:
        try:
            work(directory)
        except (OSError, ValueError, struct.error) as error:
            note_once("reading mappings", error)  # The results stay unknown.
        finally:
            os.close(directory)

    def _find(self, directory: int) -> None:
        descriptor = os.open("maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        with os.fdopen(descriptor, "rb") as file:
            text = file.read(_MAX_MAPPINGS + 1)
        if len(text) <= _MAX_MAPPINGS:
            # Do not use splitlines(): a path may contain any line separator except a line feed.
            lines = (line for line in text.split(b"\n") if b" /[aio]" in line)
            addresses = [int(line.partition(b"-")[0], 16) for line in lines]
            self._addresses = addresses[:MAX_RINGS]

    def _read(self, directory: int) -> None:
        memory = os.open("mem", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            total = 0
            for address in self._addresses or ():
                head = _AIO_RING.unpack(os.pread(memory, _AIO_RING.size, address))
                if head[4] != _AIO_MAGIC:
                    return
                total += head[3]
            self._tails = total
        finally:
            os.close(memory)
