"""Find the processes of units.

systemd could list these processes, but process 1 would then read their command lines, and a stuck
guest can block this read. Reading the control group of a process does not block.
"""

from __future__ import annotations

import os

from qkilld.adapters import procfs
from qkilld.debug_log import ignore


def unit_name_of(pid: int, *, user: bool) -> str:
    """Return the unit in which a process runs; "" for none, or if it cannot be read. `user`:
    return the unit of our user manager, not that of the system manager."""
    if user:
        return _unit_of_user(pid)
    unit = procfs.read_unit(pid)
    return "" if unit is None else unit.system


def _unit_of_user(pid: int) -> str:
    """Unlike procfs.read_unit(), this works if /proc hides process 1 (hidepid=)."""
    with ignore(f"reading the control group of process {pid}", OSError):
        text = os.fsdecode((procfs.PROC / str(pid) / "cgroup").read_bytes())
        for line in text.split("\n"):
            parts = line.partition(f"/user@{os.getuid()}.service/")[2].split("/")
            name = next((part for part in parts if part and not part.endswith(".slice")), "")
            if name:
                return name.removeprefix("_")
    return ""


def processes_of(name: str, *, user: bool) -> list[int]:
    """Return the visible processes of a unit."""
    return [pid for pid in procfs.pids() if unit_name_of(pid, user=user) == name]


def others_are_hidden() -> bool:
    """Return whether /proc hides the processes of other users from us (hidepid=)."""
    return 1 not in procfs.pids()
