"""The request for a job, and what the job did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Final

from qkilld.model.constants import INFINITY, Flag, Phase, Verdict
from qkilld.model.dataclass import dataclass
from qkilld.model.guest_state import GuestOrder


@dataclass(frozen=True, slots=True)
class Request:
    flags: Flag
    spans: Mapping[str, int] = field(default_factory=dict)
    """Fields of Policy that override the configured ones (µs)."""
    reason: str = ""
    """Printable."""
    uid: int = 0
    """The requester: root, the owner of the process, or a user whom polkit authorized."""
    powerdown_only: bool = False
    """Only ask the guest: send no signal even if it does not shut down."""
    help: tuple[GuestOrder, ...] = ()
    """Those orders among RESUME, WAKE and THAW that the caller allows. They enable the guest to
    react when it is asked."""
    qmp_socket: str = ""
    """The path of the guest's QMP monitor, if the caller named it."""
    ask_at_most: int = INFINITY
    """If the guest is asked first: the longest time (µs) from the start of the job until qkilld
    stops asking."""

    @property
    def asks_alone(self) -> bool:
        """Whether the guest is only asked, and QEMU gets no signal."""
        return Flag.POWERDOWN in self.flags and (self.powerdown_only or Flag.NOWAIT in self.flags)


@dataclass(frozen=True, slots=True)
class Control:
    """How callers have steered a running job."""

    held: bool = False
    """Whether the job is held: the next rung waits until the job is released."""
    not_before: int = 0
    """The earliest time of SIGKILL (CLOCK_MONOTONIC, µs)."""
    held_until: int = INFINITY
    """When the hold expires (CLOCK_MONOTONIC, µs)."""
    hold_outranks: bool = False
    """Whether root or an authorized user, not the owner, holds the job."""
    outranking: int = 0
    """The latest `not_before` that root or an authorized user has requested; 0 for none."""


UNCONTROLLED: Final = Control()


@dataclass(frozen=True, slots=True)
class Rung:
    """A step of the ladder that was executed."""

    phase: Phase
    action: str
    """The name of a signal, or a word such as button, flush or yank."""
    at: int
    """CLOCK_MONOTONIC, µs."""


@dataclass(frozen=True, slots=True)
class VerdictChange:
    verdict: Verdict
    reasons: tuple[str, ...]
    at: int
    """CLOCK_MONOTONIC, µs."""


@dataclass(frozen=True, slots=True)
class Risk:
    """A reason why data may be lost."""

    code: str
    """The code in `at-risk` of the receipt: killed-io, unknown, qcow2-open, …"""
    text: str
    """Printable."""


@dataclass(frozen=True, slots=True)
class FlushReport:
    """The result of flushing a guest's disks before QEMU is told to exit."""

    outcome: str = "not-tried"
    """`complete`, `failed`, `partial`, `left-out`, `not-tried`."""
    reason: str = ""
    """The printable reason why the flush is not complete."""
    proven: bool = False
    """Whether it is proven that QEMU had no unwritten data after the flush, and that the guest
    could not write any more."""


NOT_FLUSHED: Final = FlushReport()
