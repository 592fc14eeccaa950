"""Interfaces between a run and its stoppers: the daemon and the local engine.

Only for type checkers: nothing here is imported at run time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from qkilld.stop.guest_stop import GuestStop


class StopListener(Protocol):
    """Receives events about the stops of a Stopper. The last event of each stop is `ended`,
    `refused` or `lost`."""

    def heard(self, stop: GuestStop, state: dict[str, Any]) -> None:
        """The State (org.qkilld1.varlink) of the stop's job has changed."""

    def ended(self, stop: GuestStop, result: str) -> None:
        """The stop's job has ended with `result`."""

    def refused(self, stop: GuestStop, name: str, message: str) -> None:
        """The stop was refused with an error of org.qkilld1."""

    def lost(self, stop: GuestStop, why: str) -> None:
        """Another stopper must take over the stop; `stop.state` is the last known state."""

    def unit_known(self, unit: dict[str, Any], stops: Sequence[GuestStop]) -> None:
        """The unit's limits (UnitLimits of org.qkilld1.varlink) for these stops are known. The
        stopper's jobs already obey them."""

    def unit_unknown(self, why: str) -> None:
        """The stopper cannot read the unit's limits."""


class Stopper(Protocol):
    """Methods never block for long, and never raise because of the daemon or the guest."""

    def start(self, stops: Sequence[GuestStop]) -> None:
        """Stop these processes."""

    def descriptors(self) -> Collection[int]:
        """Descriptors to poll for POLLIN."""

    def deadline(self) -> float:
        """When to call `work` at the latest: time.monotonic(), infinity for never."""

    def work(self) -> None:
        """Handle everything that has been received or is due."""

    def note_exit(self, stop: GuestStop) -> None:
        """The process has exited, according to its pidfd."""

    def amend(self, stop: GuestStop) -> None:
        """`forced` or `ask_at_most` of the stop has changed."""

    def release(self, stop: GuestStop) -> None:
        """Release the job if it is held and nobody else can release it any more."""

    def close(self) -> None:
        """Free all resources."""
