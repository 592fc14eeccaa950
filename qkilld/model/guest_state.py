"""The state of a guest's operating system, as the monitor and QEMU's threads show it.

None and UNKNOWN mean unreadable, never "nothing".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum
from typing import Any, Final

from qkilld.model.dataclass import dataclass

RUNNING: Final = "running"
"""The only runstate in which a guest can shut itself down."""
POWERED_OFF: Final = "shutdown"
"""The runstate after the guest has powered off, if QEMU was started with -no-shutdown or -action
shutdown=pause."""
PAUSED: Final = frozenset({"paused", "io-error", "save-vm", "restore-vm", "finish-migrate"})
"""The runstates of a paused guest that may soon run again. A guest is paused, for example, for a
snapshot or because of a full disk."""


class Button(StrEnum):
    """Whether an operating system listens to the power button."""

    LISTENED = "listened"
    NOT_LISTENED = "not-listened"
    """No operating system listens, so QEMU would ignore the button."""
    NO_REGISTER = "no-register"
    """The machine (arm64 virt, microvm) has no register that shows whether an operating system
    listens."""
    UNKNOWN = "unknown"


class GuestOrder(StrEnum):
    """An order to a monitor or an agent."""

    AGENT = "agent"
    """Ask the agent to shut the guest down."""
    BUTTON = "button"
    """Press the power button."""
    WATCH = "watch"
    """Watch for signs of a shutdown that somebody else has requested."""
    RESUME = "resume"
    WAKE = "wake"
    THAW = "thaw"
    QUIT = "quit"
    """Exit QEMU."""


class ShutdownSign(StrEnum):
    """A sign that a guest gives only while it is shutting down."""

    AGENT_CLOSED = "agent-closed"
    """The agent was stopped: its port was open when the guest was asked, and is closed now."""
    PVSHUTDOWN = "pvshutdown"
    """The guest reported its shutdown (pvpanic device, QEMU 9.1)."""
    RESTARTED = "restarted"
    """The guest has reset itself since the last observation: it has shut down and is booting
    again."""
    POWERED_OFF = "powered-off"


class EventKind(StrEnum):
    """The names of the QMP events that concern a shutdown."""

    POWERDOWN = "POWERDOWN"
    SHUTDOWN = "SHUTDOWN"
    RESET = "RESET"
    VSERPORT_CHANGE = "VSERPORT_CHANGE"
    GUEST_PVSHUTDOWN = "GUEST_PVSHUTDOWN"
    GUEST_PANICKED = "GUEST_PANICKED"
    STOP = "STOP"
    RESUME = "RESUME"
    SUSPEND = "SUSPEND"
    WAKEUP = "WAKEUP"
    BLOCK_IO_ERROR = "BLOCK_IO_ERROR"


@dataclass(frozen=True, slots=True)
class GuestEvent:
    kind: EventKind
    at: int
    """µs, CLOCK_MONOTONIC."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Untrusted data. Callers must check all types and contents."""


@dataclass(frozen=True, slots=True)
class KeptMonitor:
    """A QMP connection, with out-of-band commands, that an earlier daemon opened."""

    fd: int
    own_chardevs: tuple[str, ...]
    """The labels of this monitor's character devices, which must not be cut off (yank)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestObservation:
    """What was observed of a guest at one instant. While the same QEMU runs, counters only grow."""

    at: int
    """µs, CLOCK_MONOTONIC."""
    runstate: str | None = None
    """QEMU's runstate; None if the monitor did not reply."""
    button: Button = Button.UNKNOWN
    press_pending: bool | None = None
    """True if the button was pressed and the guest has not noticed it yet; None if unknown. Before
    the guest is asked, also True if somebody else pressed the button in the last 10 s."""
    requests: int | None = None
    """Requests of all disks since QEMU started: reads, writes, flushes, discards."""
    request_time: int | None = None
    """The total time of these requests, µs."""
    disks_idle: int | None = None
    """µs since the last request of any disk."""
    vcpu_time: int | None = None
    """The total time that the virtual processors ran, µs."""
    vcpu_wait: int | None = None
    """The total time that the virtual processors waited for a processor of the host, µs."""
    vcpus: int | None = None
    """The number of virtual processors; None if unknown."""
    vcpu_load: float | None = None
    """How many host processors the virtual processors could have used in the last tenth of a
    second. Measured only before the guest is asked."""
    agent_open: bool | None = None
    """Whether the guest's agent has its port open; None if unknown."""
    signs: frozenset[ShutdownSign] = frozenset()
    """The signs seen since the guest was first asked, except those disproved later. POWERED_OFF is
    included even if it was seen before the guest was asked."""
