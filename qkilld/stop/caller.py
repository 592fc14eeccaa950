"""Who asks when there is no bus in between. Implements engine.ports.Caller."""

from __future__ import annotations

import os
from collections.abc import Mapping

from qkilld.model.access import Action, Answer


class OwnUser:
    """The user that this process runs as, whom nobody lets do more than is theirs by right."""

    async def uid(self) -> int:
        return os.geteuid()

    async def may(self, action: Action, details: Mapping[str, str], *, ask: bool) -> Answer:
        return Answer.DENIED
