"""The words of the interface: flags, phases, verdicts, results, exit codes, bus names.

Every value here is part of the public interface, and its meaning never changes.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag, StrEnum
from typing import Final

BUS_NAME: Final = "org.qkilld1"
MANAGER_PATH: Final = "/org/qkilld1"
MANAGER_INTERFACE: Final = "org.qkilld1.Manager"
JOB_INTERFACE: Final = "org.qkilld1.Job"
JOB_PATH_PREFIX: Final = "/org/qkilld1/job/"
GUEST_INTERFACE: Final = "org.qkilld1.Guest"
GUEST_PATH_PREFIX: Final = "/org/qkilld1/guest/"

UINT64_MAX: Final = 2**64 - 1
INFINITY: Final = UINT64_MAX
"""A time span (µs) that never ends, or a time that never comes. The bus uses the same value."""
UNKNOWN: Final = UINT64_MAX
"""An unknown number of bytes. The bus uses the same value."""

USEC_PER_SEC: Final = 1_000_000


class Flag(IntFlag):
    """The `flags` of Terminate.

    FORCE and NOWAIT keep the values and the meaning of libvirt's VIR_QEMU_PROCESS_KILL_FORCE and
    VIR_QEMU_PROCESS_KILL_NOWAIT (libvirt, src/qemu/qemu_process.h).
    """

    FORCE = 1
    """The ladder may end in SIGKILL. Without FORCE, SIGKILL is never sent."""
    NOWAIT = 2
    """Only send SIGTERM (with FORCE, only SIGKILL; with POWERDOWN, only ask the guest), and do not
    watch the process after that."""
    POWERDOWN = 4
    """First ask the guest's own operating system to shut down."""
    FIXED = 8
    """Use libvirt's fixed timeouts of 2012 instead of evidence."""


KNOWN_FLAGS: Final = Flag.FORCE | Flag.NOWAIT | Flag.POWERDOWN | Flag.FIXED


class Phase(StrEnum):
    """The rung of the ladder that a job is on."""

    POWERDOWN = "powerdown"
    QUIT = "quit"
    TERMINATE = "terminate"
    KILL = "kill"
    REAP = "reap"
    DONE = "done"


class Verdict(StrEnum):
    """The meaning of the evidence, in one word."""

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
    """The process exited before any SIGKILL."""
    KILLED = "killed"
    """The process exited after SIGKILL."""
    SURVIVED = "survived"
    """The process still ran when the job gave up. qkilld logs its exit later."""
    SIGNALLED = "signalled"
    """With NOWAIT: one signal was sent, or the guest was asked. The effect is unknown."""
    CANCELLED = "cancelled"
    FAILED = "failed"


class GuestAsked(StrEnum):
    """The result of asking the guest's own operating system to shut down."""

    SHUT_DOWN = "shut-down"
    IGNORED = "ignored"
    """The guest was asked and did not shut down in time."""
    DEAF = "deaf"
    """No operating system listened."""
    UNREACHABLE = "unreachable"
    """The guest could not be asked."""
    NOT_ASKED = "not-asked"
    ASKED = "asked"
    """The guest was asked, but not observed, so it is unknown whether it shut down."""
    NOT_RUNNING = "not-running"
    """The guest was paused, suspended or crashed."""


class MonitorKind(StrEnum):
    """The kind of monitor through which qkilld can reach a guest."""

    QMP = "qmp"
    HMP = "hmp"
    LIBVIRT = "libvirt"
    """libvirt uses the monitor."""
    NONE = "none"
    UNKNOWN = "unknown"


class AgentKind(StrEnum):
    """Whether qkilld can reach the port of a guest's agent without the monitor."""

    PORT = "port"
    """The port is a unix socket on which QEMU listens."""
    NONE = "none"
    UNKNOWN = "unknown"


class NextRung(StrEnum):
    """What a running job does next if nothing changes."""

    ASK = "ask"
    """Ask the guest's own operating system to shut down."""
    TERMINATE = "SIGTERM"
    YANK = "yank"
    """Cut off network storage that makes no progress."""
    KILL = "SIGKILL"
    GIVE_UP = "give-up"
    NONE = ""
    """The job has ended."""


class ExitCode(IntEnum):
    """Exit codes of `qkilld-stop` and `qkillctl`."""

    OK = 0
    """The guest exited without SIGKILL."""
    FAILURE = 1
    USAGE = 2
    KILLED = 3
    """The guest exited only after SIGKILL: data may be lost."""
    SURVIVED = 4
    """The guest still runs: the job gave up or was cancelled."""
    NOT_QEMU = 5
    """The process is not QEMU, or its pid was reused."""
    NOT_PERMITTED = 6
    NOT_FOUND = 7
    """There is no such process, guest, unit or job."""
    UNSAFE = 8
    """From qkillctl check-unit and adopt: stopping a unit loses data, or may lose data."""
