"""What is to be known beside a unit itself to judge it."""

from __future__ import annotations

from dataclasses import dataclass, field

from qkilld.judgement.stopcommand import HELPER
from qkilld.judgement.target import is_qemu
from qkilld.judgement.unitstorage import Storage
from qkilld.model.policy import DEFAULT_EXECUTABLES, Policy
from qkilld.model.unit import UnitFacts
from qkilld.model.words import INFINITY


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is to be known beside the unit itself."""

    policy: Policy = field(default_factory=Policy)
    executables: tuple[str, ...] = DEFAULT_EXECUTABLES
    """Globs of what is a QEMU."""
    helper: str = f"/usr/bin/{HELPER}"
    """Where it is installed."""
    main_executable: str = ""
    """Of the main process that runs, "" where there is none or it cannot be read."""
    storage: tuple[Storage, ...] = ()
    """What the disks of the guest lie on."""
    guard: str = ""
    """Of a scope: the unit that would guard it."""
    is_guarded: bool = False
    """That unit is active."""
    manager: str = ""
    """The unit of the user's manager that it is a unit of; "" for one of the system's."""
    manager_timeout: int = INFINITY
    """What that manager has for all of its units when it ends, in µs."""


def main_is_qemu(facts: UnitFacts, around: Surroundings) -> bool:
    """False also where that cannot be told."""
    if around.main_executable:
        return is_qemu(around.main_executable, around.executables)
    starts = facts.exec_start
    return len(starts) == 1 and is_qemu(starts[0].path, around.executables)
