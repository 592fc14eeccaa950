"""Interfaces between a run and what stops its processes: the daemon or the local engine.

Only types: nothing here is imported at run time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from qkilld.stop.guest_stop import GuestStop


class StopListener(Protocol):
    """Receives events about the stops of a Stopper. `ended`, `refused` or `lost` is the last event
    of each stop."""

    def heard(self, stop: GuestStop, state: dict[str, Any]) -> None:
        """The State of its job (org.qkilld1.varlink) has changed."""

    def ended(self, stop: GuestStop, result: str) -> None:
        """Its job has ended with `result`."""

    def refused(self, stop: GuestStop, name: str, message: str) -> None:
        """It was refused with an error of org.qkilld1."""

    def lost(self, stop: GuestStop, why: str) -> None:
        """It must be continued elsewhere; `stop.state` is the last known state."""

    def unit_known(self, unit: dict[str, Any]) -> None:
        """The unit's limits (UnitLimits of org.qkilld1.varlink) are known, and its jobs obey
        them."""

    def unit_unknown(self, why: str) -> None:
        """The stopper cannot read the unit's limits."""


class Stopper(Protocol):
    """Methods never block for long, nor raise because of what the other side does."""

    def start(self, stops: Sequence[GuestStop]) -> None:
        """Stop these processes."""

    def descriptors(self) -> Collection[int]:
        """Descriptors to poll for POLLIN."""

    def deadline(self) -> float:
        """When to call `work` at the latest: time.monotonic(), infinity for never."""

    def work(self) -> None:
        """Handle everything received and everything due."""

    def exit_seen(self, stop: GuestStop) -> None:
        """Its pidfd has reported the exit of the process."""

    def amend(self, stop: GuestStop) -> None:
        """Its `forced` or `ask_at_most` has changed."""

    def release(self, stop: GuestStop) -> None:
        """Release it if it is held and nobody else could release it any more."""

    def close(self) -> None:
        """Stop working."""
