"""What a policy is to the rest, and what comes of it."""

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
    """exited (before any SIGKILL), killed, or survived: it is still there, and was given up."""
    seconds: float
    """From the request to the answer."""
    said: str = ""
    """What the policy told its caller, where it was no success."""
    ticks: list[tuple[float, str]] = field(default_factory=list)
    """(seconds, verdict) twice a second, of qkilld alone."""
    details: dict[str, Any] = field(default_factory=dict)


class Stopper(Protocol):
    """A policy that is ready to run."""

    def network(self) -> contextlib.AbstractContextManager[None]:
        """What listens for the guest on TCP is to be started in it."""

    def launch(self, machine: Machine) -> contextlib.AbstractContextManager[Target]:
        """A running guest. Afterwards it is gone, by SIGKILL if need be."""

    def stop(self, target: Target) -> Outcome:
        """Stops it and returns when the policy says that it is over."""


Policy = Callable[[Path | None], contextlib.AbstractContextManager[Stopper]]
"""Gets a directory for traces, where some are wanted."""
