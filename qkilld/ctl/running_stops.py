"""Wait for the stops that qkilld-stop is carrying out in units, before systemd is reloaded."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

from qkilld.adapters import procfs
from qkilld.bus.systemd import Systemd
from qkilld.debug_log import ignore
from qkilld.model.constants import ExitCode
from qkilld.model.errors import QkilldError
from qkilld.model.text import printable

TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.1


class StopsRunning(QkilldError):
    """Guests are being stopped, and `daemon-reload` would shorten their timeouts."""

    exit_code = ExitCode.SURVIVED


async def wait_for_stops(systemd: Systemd, advice: str) -> None:
    """Wait until no unit runs qkilld-stop, because `daemon-reload` makes systemd 252 forget the
    timeout extensions of running stops. Raises BusError and Failed, and StopsRunning after
    TIMEOUT_S."""
    deadline = time.monotonic() + TIMEOUT_S
    while units := await stopping_units(systemd):
        if time.monotonic() > deadline:
            raise StopsRunning(
                f"Guests are being stopped in {', '.join(map(printable, units))}, and"
                f" `daemon-reload` would make systemd forget their extended timeouts. {advice}"
            )
        await asyncio.sleep(_POLL_S)


async def stopping_units(systemd: Systemd) -> list[str]:
    """List the units in which qkilld-stop runs. A unit whose stop has reached another command, such
    as one that copies the image, is not listed."""
    units = await systemd.list_units("*.service", states=["deactivating"])
    return sorted(set(units) & _units_of_helpers()) if units else []


def _units_of_helpers(proc: Path = procfs.PROC) -> set[str]:
    """Return the units of the processes named qkilld-stop. qkilld-stop itself sets this name.

    systemd is not asked for the processes of a unit, because process 1 would then read their
    command lines, and a stuck guest can block this read. Reading comm and cgroup does not block.
    """
    units = set()
    for pid in procfs.pids(proc):
        with ignore(f"looking at process {pid}", OSError):
            if (proc / str(pid) / "comm").read_bytes() == b"qkilld-stop\n":
                unit = procfs.read_unit(pid, proc)
                # A unit of a user manager is listed by its own name, not as user@UID.service.
                units.add((unit.user or unit.system) if unit is not None else "")
    return units
