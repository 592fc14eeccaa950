"""The acts of a stop line: what it does to a guest, in order.

An unknown program may do anything, so its act is UNKNOWN, not NOTHING.
"""

from __future__ import annotations

from enum import StrEnum

from qkilld.model.constants import INFINITY
from qkilld.model.dataclass import dataclass


class ActKind(StrEnum):
    """The values appear in --json."""

    HELPER = "helper"
    """qkilld-stop: asks the guest to shut down, then QEMU to exit, and returns when QEMU has
    exited."""
    ASKS = "asks-guest"
    """Asks the guest's operating system to shut down, and returns."""
    WAITS = "waits"
    """Returns when the guest has exited, or at a timeout."""
    SLEEPS = "sleeps"
    """Returns after a fixed time."""
    TERMINATES = "asks-qemu"
    """Asks QEMU to write out its data and exit (SIGTERM, `quit`), and returns."""
    KILLS = "kills"
    NOTHING = "nothing"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Act:
    kind: ActKind
    usec: int = INFINITY
    """For WAITS and SLEEPS: the longest time, µs."""
    by_name: bool = False
    """The signal goes to every process with a certain name, including guests of other units."""
    reads: bool = False
    """The program reads its standard input, which is /dev/null, and so returns at once."""
    if_failed: bool = False
    """The act runs only if the previous one has failed (`||`)."""
    changes: bool = False
    """For NOTHING: the program changes something besides the guest, such as a file or the
    network."""


def act(kind: ActKind, usec: int = INFINITY, *, by_name: bool = False) -> tuple[Act, ...]:
    return (Act(kind, usec, by_name),)
