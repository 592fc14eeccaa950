"""The interface of a policy, and the outcome of a stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.safety.machine import Machine, Target


@dataclass
class Outcome:
    result: str
    """exited (before any SIGKILL), killed, or survived (the policy gave up, and the process still
    exists)."""
    seconds: float
    """Seconds from the request to the result."""
    said: str = ""
    """The policy's message to its caller; "" if it succeeded."""
    ticks: list[tuple[float, str]] = field(default_factory=list)
    """(seconds, verdict), twice a second; only for qkilld."""
    details: dict[str, Any] = field(default_factory=dict)


class Stopper(Protocol):
    """A policy that is ready to run."""

    def network(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for starting servers to which the guest connects over TCP."""

    def launch(self, machine: Machine) -> contextlib.AbstractContextManager[Target]:
        """Return a context with a running guest. If the guest still exists at the end of the
        context, it is killed."""

    def stop(self, target: Target) -> Outcome:
        """Stop the guest. Wait until the policy reports the result, and return the outcome."""


Policy = Callable[[Path | None], contextlib.AbstractContextManager[Stopper]]
"""A function that takes a directory for traces, or None for no traces."""
