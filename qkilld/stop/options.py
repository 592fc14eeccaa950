"""What the command line asks for. Imports little: most calls have no arguments at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Options:
    pid: int | None = None
    pidfile: str | None = None
    unit: str | None = None
    everyone: bool = False
    """Every guest whose own unit does not take care of it."""
    force: bool | None = None
    """None: only where systemd would send SIGKILL too."""
    spans: Mapping[str, int] = field(default_factory=dict)
    """Options of TerminateWithOptions (`grace-usec`, …), µs."""
    reason: str | None = None
    dry_run: bool = False
    json: bool = False
