"""Predict what stops each guest at host shutdown if qkilld-guests.service is enabled. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from enum import StrEnum

from qkilld.model.dataclass import dataclass
from qkilld.unitcheck.keepers import GuestKeeper


class StoppedBy(StrEnum):
    OWN_UNIT = "own-unit"
    """The ExecStop= of the guest's unit."""
    KEEPER = "keeper"
    """A keeper, or qkilld-guests.service if the keeper leaves the guest running."""
    GUARD = "guard"
    """The guard of the guest's scope, qkilld-scope@.service."""
    GUESTS_SERVICE = "guests-service"
    """qkilld-guests.service."""
    SYSTEMD = "systemd"
    """systemd sends SIGTERM while qkilld-guests.service stops the guest, because the guest's unit
    is a service that has no ExecStop= and is not ordered before qkilld-guests.service."""
    UNCOVERED = "uncovered"
    """systemd alone stops the guest, because Executables= does not match it."""


_IN_WORDS = {
    StoppedBy.OWN_UNIT: "stopped by the ExecStop= of its own unit, as now",
    StoppedBy.KEEPER: "left to {keepers}, and stopped by qkilld-guests.service if still running",
    StoppedBy.GUARD: "stopped by qkilld-scope@.service, the guard of its scope",
    StoppedBy.GUESTS_SERVICE: "stopped by qkilld-guests.service",
    StoppedBy.SYSTEMD: "stopped by systemd and qkilld-guests.service at the same time: run"
    " `qkillctl adopt {unit}`",
    StoppedBy.UNCOVERED: "not covered by Executables=: {line}",
}


@dataclass(frozen=True, slots=True)
class HostGuest:
    pid: int
    name: str
    unit: str
    """"" for none."""
    stopped_by: StoppedBy
    keepers: tuple[str, ...] = ()
    line: str = ""
    """The Executables= line for qkilld.conf that would match the guest."""

    def __str__(self) -> str:
        words = _IN_WORDS[self.stopped_by].format(
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
    """Groups of units, in the order in which systemd stops the groups."""
    is_complete: bool = True
    """False if guests and keepers may be missing, because the caller cannot see all processes."""


def predict_stop(
    *,
    is_covered: bool,
    cares_for_guests: bool,
    is_guarded: bool,
    keepers: Iterable[str],
    is_before: bool,
    has_unit: bool,
) -> StoppedBy:
    """Predict what stops a guest. `is_before`: whether the guest's unit is ordered before
    qkilld-guests.service, as all scopes are."""
    if not is_covered:
        return StoppedBy.UNCOVERED
    if cares_for_guests:
        return StoppedBy.OWN_UNIT
    if tuple(keepers):
        return StoppedBy.KEEPER
    if is_guarded:
        return StoppedBy.GUARD
    return StoppedBy.GUESTS_SERVICE if is_before or not has_unit else StoppedBy.SYSTEMD


def shutdown_order(guests: Iterable[HostGuest]) -> tuple[tuple[str, ...], ...]:
    """Return up to three groups of units, in the order in which systemd stops them: keepers, and
    units that stop their guests themselves; qkilld-guests.service; units of all other guests."""
    guests = list(guests)
    keepers = sorted({name for guest in guests for name in guest.keepers})
    own_units = sorted({guest.unit for guest in guests if guest.stopped_by is StoppedBy.OWN_UNIT})
    last = sorted({guest.unit for guest in guests if guest.unit} - set(own_units))
    groups = ((*keepers, *own_units), ("qkilld-guests.service",), tuple(last))
    return tuple(group for group in groups if group)
