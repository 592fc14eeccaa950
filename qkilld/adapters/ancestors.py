"""Find the ancestors of a guest's process, and the system services that run given programs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Final

from qkilld.adapters import procfs
from qkilld.debug_log import ignore
from qkilld.model.guest import Ancestor

_MAX_ANCESTORS: Final = 64


def ancestors(pid: int) -> list[Ancestor]:
    """List the parent of a process, the parent's parent, and so on, without process 1.

    Only processes of root are listed, because other users can give their processes any name. May
    block, because it reads command lines.
    """
    found = []
    with ignore(f"reading the ancestors of process {pid}", OSError):
        for _ in range(_MAX_ANCESTORS):
            pid = procfs.read_stat(pid).parent
            if pid <= 1:
                break
            if procfs.read_uid(pid) == 0:
                words = tuple(procfs.read_command_line(pid))
                found.append(Ancestor(_program(pid), words, service_of(pid)))
    return found


def services_that_run(programs: Collection[str]) -> dict[str, str]:
    """Find the system services in which root runs these programs. Return {service: program}."""
    services = {}
    for pid in procfs.pids():
        with ignore(f"looking at process {pid}", OSError):
            program = _program(pid)
            if program in programs and procfs.read_uid(pid) == 0 and (service := service_of(pid)):
                services[service] = program
    return services


def service_of(pid: int) -> str:
    """Return the system service in which a process runs; "" if there is none or it is unknown."""
    unit = procfs.read_unit(pid)
    if unit is None or unit.user or not unit.system.endswith(".service"):
        return ""
    return unit.system


def _program(pid: int) -> str:
    return PurePosixPath(procfs.read_executable(pid)[0]).name
