"""Predict who stops each guest at shutdown if qkilld-guests.service is enabled. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from enum import StrEnum

from qkilld.model.dataclass import dataclass
from qkilld.unitcheck.keepers import GuestKeeper


class Care(StrEnum):
    """Who stops a guest at shutdown, if qkilld-guests.service is enabled."""

    OWN_UNIT = "own-unit"
    """The ExecStop= of its unit."""
    KEEPER = "keeper"
    """A keeper; then qkilld-guests.service, if the keeper leaves the guest running."""
    GUARD = "guard"
    """The guard of its scope."""
    GUESTS_SERVICE = "guests-service"
    """qkilld-guests.service."""
    SYSTEMD = "systemd"
    """qkilld-guests.service and systemd's SIGTERM at the same time, because its unit is a service
    without ExecStop= and not ordered before qkilld-guests.service."""
    UNCOVERED = "uncovered"
    """Only systemd, because Executables= does not match the guest."""


_IN_WORDS = {
    Care.OWN_UNIT: "stopped by the ExecStop= of its own unit, as it is now",
    Care.KEEPER: "left to {keepers}, and stopped by qkilld-guests.service if still there",
    Care.GUARD: "stopped by the guard of its scope",
    Care.GUESTS_SERVICE: "stopped by qkilld-guests.service",
    Care.SYSTEMD: "stopped by systemd at the same time: `qkillctl adopt {unit}`",
    Care.UNCOVERED: "not covered by Executables=: {line}",
}


@dataclass(frozen=True, slots=True)
class HostGuest:
    pid: int
    name: str
    unit: str
    """"" for none."""
    care: Care
    keepers: tuple[str, ...] = ()
    line: str = ""
    """The line of qkilld.conf that would match it."""

    def __str__(self) -> str:
        words = _IN_WORDS[self.care].format(
            keepers=", ".join(self.keepers), unit=self.unit, line=self.line
        )
        name = f" ({self.name})" if self.name else ""
        return f"{self.pid}{name} in {self.unit or 'no unit'}: {words}"


@dataclass(frozen=True, slots=True)
class HostReport:
    is_active: bool
    """Whether qkilld-guests.service is active."""
    keepers: tuple[GuestKeeper, ...]
    guests: tuple[HostGuest, ...]
    order: tuple[tuple[str, ...], ...] = field(default_factory=tuple)
    """Groups of units in the order in which they are stopped; a group is stopped together."""


def care_of(
    *,
    is_covered: bool,
    cares_for_guests: bool,
    is_guarded: bool,
    keepers: Iterable[str],
    is_before: bool,
    has_unit: bool,
) -> Care:
    """`is_before`: its unit is ordered before qkilld-guests.service, as all scopes are."""
    if not is_covered:
        return Care.UNCOVERED
    if cares_for_guests:
        return Care.OWN_UNIT
    if tuple(keepers):
        return Care.KEEPER
    if is_guarded:
        return Care.GUARD
    return Care.GUESTS_SERVICE if is_before or not has_unit else Care.SYSTEMD


def shutdown_order(guests: Iterable[HostGuest]) -> tuple[tuple[str, ...], ...]:
    """Return keepers first, then qkilld-guests.service, then the units of the guests."""
    guests = list(guests)
    keepers = sorted({name for guest in guests for name in guest.keepers})
    own_units = sorted({guest.unit for guest in guests if guest.care is Care.OWN_UNIT})
    last = sorted({guest.unit for guest in guests if guest.unit} - set(own_units))
    groups = ((*keepers, *own_units), ("qkilld-guests.service",), tuple(last))
    return tuple(group for group in groups if group)
