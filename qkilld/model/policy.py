"""The policy: the time spans of the ladder, and switches for rungs that are not signals. Spans are
in µs. INFINITY means never."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import field, fields
from pathlib import PurePosixPath
from typing import Final

from qkilld.model.constants import INFINITY, USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.named_tuple import NamedTuple

DEFAULT_EXECUTABLES: Final = (
    "/usr/bin/qemu-system-*",
    "/usr/local/bin/qemu-system-*",
    "/usr/bin/qemu-kvm",
    "/usr/bin/kvm",
    "/usr/libexec/qemu-kvm",
    "/nix/store/*/bin/*qemu-system-*",
    "/nix/store/*/bin/qemu-kvm",
    "/gnu/store/*/bin/*qemu-system-*",
    "/opt/*/bin/qemu-system-*",
    "/snap/*/*/bin/qemu-system-*",
    "/snap/*/*/usr/bin/qemu-system-*",
    "/var/lib/snapd/snap/*/*/bin/qemu-system-*",
    "/usr/lib/xen-*/bin/qemu-system-*",
)
"""Paths of distribution packages, of snaps (mounted read-only) and of package stores. Only root can
write to them. /home/linuxbrew, AppImages and the /app of flatpaks are left out, because users can
create files there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The time spans in `[Policy]` of qkilld.conf. Every field is in µs."""

    grace: int = 10 * USEC_PER_SEC
    """The shortest time between SIGTERM and SIGKILL."""
    stall: int = 10 * USEC_PER_SEC
    """SIGKILL follows after this time without progress and without outstanding I/O."""
    storage_stall: int = 60 * USEC_PER_SEC
    """SIGKILL follows after this time with outstanding I/O but without progress."""
    max: int = INFINITY
    """SIGKILL follows when the job has run for this time, whatever the evidence shows."""
    reap: int = 5 * USEC_PER_SEC
    """How long to wait for the process to exit after SIGKILL."""
    powerdown: int = 60 * USEC_PER_SEC
    """The next rung follows after this time without signs that the guest is shutting down."""


class Span(NamedTuple):
    """A time span of Policy: its names on the bus, in files and on command lines."""

    field: str
    help: str
    of_job: bool = True
    """Whether a request can override the configured value."""
    word: str = ""
    """The word for command lines, if it differs from `field`."""

    @property
    def words(self) -> str:
        return self.field.replace("_", " ")

    @property
    def key(self) -> str:
        """The key in qkilld.conf, such as StorageStallSec."""
        return f"{self._camel_case}Sec"

    @property
    def bus_property(self) -> str:
        """The property of the manager object, such as StorageStallUSec."""
        return f"{self._camel_case}USec"

    @property
    def bus_option(self) -> str:
        """The option of TerminateWithOptions, such as storage-stall-usec."""
        return f"{self.field.replace('_', '-')}-usec"

    @property
    def argument(self) -> str:
        """The option of qkillctl and qkilld-stop, such as --storage-stall. argparse stores its
        value as `field`."""
        return f"--{self.word or self.field.replace('_', '-')}"

    @property
    def _camel_case(self) -> str:
        return self.words.title().replace(" ", "")


SPANS: Final = (
    Span("grace", "least time between SIGTERM and SIGKILL"),
    Span("stall", "SIGKILL after this time without progress and without outstanding I/O"),
    Span("storage_stall", "SIGKILL after this time with outstanding I/O that does not move"),
    Span("max", "SIGKILL after this time whatever the evidence"),
    Span("reap", "how long to wait after SIGKILL", of_job=False),
    Span(
        "powerdown",
        "SIGTERM after this time without a sign that the guest is shutting down",
        word="powerdown-sec",
    ),
)
"""One Span for each field of Policy, in the same order."""
JOB_SPANS: Final = tuple(span for span in SPANS if span.of_job)


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """The keys of `[Policy]` whose value is yes or no."""

    powerdown: bool = True
    """qkilld-stop asks the guest to shut down before it sends a signal."""
    yank: bool = True
    """With FORCE, dead network storage is cut off before SIGKILL."""


@dataclass(frozen=True, slots=True)
class Config:
    """All of qkilld.conf."""

    policy: Policy = field(default_factory=Policy)
    executables: tuple[str, ...] = DEFAULT_EXECUTABLES
    """Globs in which `*` does not match `/`."""
    guests: dict[str, Policy] = field(default_factory=dict)
    """The complete policy of each guest with its own `[Guest NAME]` section."""
    switches: Switches = field(default_factory=Switches)
    guest_switches: dict[str, Switches] = field(default_factory=dict)
    """The complete switches of each guest with its own `[Guest NAME]` section."""

    def policy_for(self, name: str | None) -> Policy:
        """Return the policy for the guest with this name ("" for a guest without a name). If the
        name is unknown (None), each span is the longest that any section has.
        """
        if name is None:
            every = (self.policy, *self.guests.values())
            spans = {f.name: max(getattr(each, f.name) for each in every) for f in fields(Policy)}
            return Policy(**spans)
        return self.guests.get(name, self.policy) if name else self.policy

    def asks(self, name: str | None) -> bool:
        """Return Powerdown= for the guest with this name. If the name is unknown, return whether
        Powerdown= is yes in at least one section."""
        return any(switches.powerdown for switches in self._switches(name))

    def yanks(self, name: str | None) -> bool:
        """Return Yank= for the guest with this name. If the name is unknown, return whether Yank=
        is yes in all sections."""
        return all(switches.yank for switches in self._switches(name))

    def _switches(self, name: str | None) -> tuple[Switches, ...]:
        """Return the switches that may apply to the guest."""
        if name is None:
            return (self.switches, *self.guest_switches.values())
        return (self.guest_switches.get(name, self.switches) if name else self.switches,)


def is_qemu(executable: str, globs: Iterable[str]) -> bool:
    """Return whether the path matches one of the globs."""
    return _matches(executable, tuple(globs))


@functools.lru_cache(maxsize=1024)
def _matches(executable: str, globs: tuple[str, ...]) -> bool:
    # Results are cached: a scan calls this for all processes, and many of them have the same
    # executable.
    path = PurePosixPath(executable)
    return path.is_absolute() and any(path.match(glob) for glob in globs)
