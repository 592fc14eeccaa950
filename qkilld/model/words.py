"""The words of the interface: flags, phases, verdicts, results, exit codes, bus names.

Every value here is part of the public contract and never changes its meaning.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag, StrEnum
from typing import Final

BUS_NAME: Final = "org.qkilld1"
MANAGER_PATH: Final = "/org/qkilld1"
MANAGER_INTERFACE: Final = "org.qkilld1.Manager"
JOB_INTERFACE: Final = "org.qkilld1.Job"
JOB_PATH_PREFIX: Final = "/org/qkilld1/job/"

UINT64_MAX: Final = 2**64 - 1
INFINITY: Final = UINT64_MAX
"""A time span or deadline that never comes, as on the bus (µs)."""
UNKNOWN: Final = UINT64_MAX
"""A number of bytes that is not known, as on the bus."""

USEC_PER_SEC: Final = 1_000_000


class Flag(IntFlag):
    """The `flags` of Terminate.

    FORCE and NOWAIT keep the values and the meaning of libvirt's VIR_QEMU_PROCESS_KILL_FORCE and
    VIR_QEMU_PROCESS_KILL_NOWAIT (libvirt, src/qemu/qemu_process.h).
    """

    FORCE = 1
    """The ladder may end in SIGKILL. Without it no SIGKILL is ever sent."""
    NOWAIT = 2
    """One signal and no supervision: SIGTERM, or with FORCE SIGKILL at once."""
    POWERDOWN = 4
    """First ask the guest's own operating system to shut down."""
    FIXED = 8
    """The fixed clock of the 2012 algorithm instead of evidence."""


KNOWN_FLAGS: Final = Flag.FORCE | Flag.NOWAIT | Flag.POWERDOWN | Flag.FIXED


class Phase(StrEnum):
    """Where on the ladder a job stands."""

    POWERDOWN = "powerdown"
    QUIT = "quit"
    TERMINATE = "terminate"
    KILL = "kill"
    REAP = "reap"
    DONE = "done"


class Verdict(StrEnum):
    """What the evidence says of a process."""

    UNKNOWN = "unknown"
    GUEST_SHUTDOWN = "guest-shutdown"
    FLUSHING = "flushing"
    STORAGE_WAIT = "storage-wait"
    BLOCKED = "blocked"
    STOPPED = "stopped"
    IDLE = "idle"
    ZOMBIE = "zombie"
    GONE = "gone"


class Result(StrEnum):
    """How a job ended."""

    EXITED = "exited"
    """Gone before any SIGKILL."""
    KILLED = "killed"
    """Gone after a SIGKILL."""
    SURVIVED = "survived"
    """Still there when the job gave up; it stays watched and its real end is logged."""
    SIGNALLED = "signalled"
    """NOWAIT: the one signal was sent, nothing is known beyond that."""
    CANCELLED = "cancelled"
    FAILED = "failed"


class ExitCode(IntEnum):
    """Exit codes of `qkilld-stop` and of `qkillctl terminate --wait`."""

    OK = 0
    """Gone without SIGKILL."""
    FAILURE = 1
    USAGE = 2
    KILLED = 3
    """Gone only after SIGKILL: data may be lost."""
    SURVIVED = 4
    """Still there: survived, or not forced and past its time."""
    NOT_QEMU = 5
    """Not a QEMU process, or another process by now."""
    NOT_PERMITTED = 6
    NOT_FOUND = 7
    """No such process, guest, unit or job."""
    UNSAFE = 8
    """qkillctl check-unit and adopt: a unit loses data, or may."""
