"""What systemd says of the unit that the helper runs in."""

from __future__ import annotations

from qkilld.bus.connection import Connection
from qkilld.bus.systemd import Systemd
from qkilld.model.errors import QkilldError
from qkilld.model.unit import UnitFacts
from qkilld.stop.limits import being_stopped

TIMEOUT_S = 2.0


async def own_facts(connection: Connection) -> UnitFacts | None:
    """None where the manager cannot be asked, or is not stopping our unit: then nothing of it
    concerns the helper."""
    try:
        facts = await Systemd(connection, timeout_s=TIMEOUT_S).unit_of(0)
    except QkilldError:
        return None
    return facts if being_stopped(facts) else None
