"""--all: which guests no unit of their own takes care of."""

from __future__ import annotations

from collections.abc import Iterable

from qkilld.bus.connection import Connection
from qkilld.bus.systemd import Systemd
from qkilld.model.errors import QkilldError
from qkilld.model.unit import is_user_manager
from qkilld.stop.log import say
from qkilld.stop.target import Target

TIMEOUT_S = 2.0


async def without_care(
    found: Iterable[tuple[Target, str]], connection: Connection | str
) -> list[Target]:
    """Of these guests, each with its unit ("" for none); the others are let go.

    `connection`: to the bus of the manager of these units, or why there is none.
    """
    cares: dict[str, bool] = {}
    targets = []
    for target, unit in found:
        if unit not in cares:
            cares[unit] = await _cares(unit, connection)
        if cares[unit]:
            target.close()
        else:
            targets.append(target)
    return targets


async def _cares(unit: str, connection: Connection | str) -> bool:
    """Whether that unit stops its guests by itself."""
    # Nobody asks what is in these, and so it need not be asked after either.
    if not unit.endswith(".service") or is_user_manager(unit):
        return False
    why = connection
    if not isinstance(connection, str):
        try:
            return (await Systemd(connection, timeout_s=TIMEOUT_S).unit(unit)).cares_for_guests
        except QkilldError as error:
            why = str(error)
    # A signal could keep its ExecStop= from shutting the guest down in good order.
    say(f"the guests in {unit} are left to it, for its settings are not known: {why}")
    return True
