"""The policy: the time spans that the ladder keeps to, all in µs, INFINITY for never."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from qkilld.model.words import INFINITY, USEC_PER_SEC

DEFAULT_EXECUTABLES: Final = (
    "/usr/bin/qemu-system-*",
    "/usr/local/bin/qemu-system-*",
    "/usr/bin/qemu-kvm",
    "/usr/bin/kvm",
    "/usr/libexec/qemu-kvm",
    "/nix/store/*/bin/*qemu-system-*",
)


@dataclass(frozen=True, slots=True)
class Policy:
    """`[Policy]` of qkilld.conf. Every field is a time span in µs."""

    grace: int = 10 * USEC_PER_SEC
    """Least time between SIGTERM and SIGKILL."""
    stall: int = 10 * USEC_PER_SEC
    """No sign of progress and nothing outstanding for so long before SIGKILL."""
    storage_stall: int = 60 * USEC_PER_SEC
    """I/O outstanding but not moving for so long before SIGKILL."""
    max: int = INFINITY
    """SIGKILL after so long whatever the evidence."""
    reap: int = 5 * USEC_PER_SEC
    """Wait for the process to go after SIGKILL."""
    powerdown: int = 60 * USEC_PER_SEC
    """No sign of the guest shutting down for so long before the next rung."""


@dataclass(frozen=True, slots=True)
class Config:
    """All of qkilld.conf."""

    policy: Policy = field(default_factory=Policy)
    executables: tuple[str, ...] = DEFAULT_EXECUTABLES
    """Globs; `*` does not cross a `/`."""
    guests: dict[str, Policy] = field(default_factory=dict)
    """The whole policy of each guest that has a `[Guest NAME]` section of its own."""

    def policy_for(self, name: str) -> Policy:
        """The policy for the guest of that name; "" is a guest without one."""
        return self.guests.get(name, self.policy) if name else self.policy
