"""Wait for the stops that qkilld-stop is carrying out in units, before systemd is reloaded."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from qkilld.bus.systemd import Systemd
from qkilld.debug_log import ignore
from qkilld.model.constants import ExitCode
from qkilld.model.errors import NoSuchUnit, QkilldError
from qkilld.model.text import printable
from qkilld.unitcheck.command import runs_helper

TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.1


class StopsRunning(QkilldError):
    """Guests are being stopped, and `daemon-reload` would shorten their timeouts."""

    exit_code = ExitCode.SURVIVED


async def wait_for_stops(systemd: Systemd, advice: str) -> None:
    """Wait until no unit runs qkilld-stop, because `daemon-reload` makes systemd 252 forget the
    timeout extensions of running stops. Raises StopsRunning after TIMEOUT_S; BusError, Failed."""
    deadline = time.monotonic() + TIMEOUT_S
    while units := await stopping_units(systemd):
        if time.monotonic() > deadline:
            raise StopsRunning(
                f"Guests are being stopped in {', '.join(map(printable, units))}, and"
                f" `daemon-reload` would make systemd forget their extended timeouts. {advice}"
            )
        await asyncio.sleep(_POLL_S)


async def stopping_units(systemd: Systemd) -> list[str]:
    """List the units in which qkilld-stop runs. Other commands of a stop, such as a copy of the
    image, may take longer than the stop of the guest, and do not count."""
    units = []
    for name in await systemd.list_units("*.service", states=["deactivating"]):
        with ignore(f"asking systemd for the processes of {name}", NoSuchUnit):
            if any(runs_helper(each.command) for each in await systemd.processes(name)):
                units.append(name)
    return units
