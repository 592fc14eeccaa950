"""Find the processes of units.

systemd could list them, but process 1 would read their command lines for that, and a stuck guest
can block this read. Reading the control group of a process does not block.
"""

from __future__ import annotations

import os

from qkilld.adapters import procfs


def unit_name_of(pid: int, *, user: bool) -> str:
    """Return the unit in which a process runs; "" for none, or if it may not be read. `user`: the
    unit of our own user manager, not of the system's."""
    unit = procfs.read_unit(pid)
    if unit is None or not user:
        return "" if unit is None else unit.system
    return unit.user if unit.system == f"user@{os.getuid()}.service" else ""


def processes_of(name: str, *, user: bool) -> list[int]:
    """Return the visible processes of a unit."""
    return [pid for pid in procfs.pids() if unit_name_of(pid, user=user) == name]


def others_are_hidden() -> bool:
    """Return whether /proc hides the processes of other users from us (hidepid=)."""
    return 1 not in procfs.pids()
