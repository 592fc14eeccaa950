"""What a policy has to offer, and what comes of it."""

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
    """exited (before any SIGKILL), killed, or survived: it was given up and is still there."""
    seconds: float
    """From the request to the answer."""
    said: str = ""
    """What the policy told its caller, unless it succeeded."""
    ticks: list[tuple[float, str]] = field(default_factory=list)
    """(seconds, verdict) twice a second; qkilld only."""
    details: dict[str, Any] = field(default_factory=dict)


class Stopper(Protocol):
    """A policy that is ready to run."""

    def network(self) -> contextlib.AbstractContextManager[None]:
        """In it, the servers that the guest connects to over TCP are started."""

    def launch(self, machine: Machine) -> contextlib.AbstractContextManager[Target]:
        """A running guest. On exit it is gone, by SIGKILL if need be."""

    def stop(self, target: Target) -> Outcome:
        """Stops it and returns when the policy says so."""


Policy = Callable[[Path | None], contextlib.AbstractContextManager[Stopper]]
"""Gets a directory for traces, or None for no traces."""
