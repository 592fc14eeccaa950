"""Who calls, as the engine wants to know it. Implements engine.ports.Caller."""

from __future__ import annotations

from collections.abc import Mapping

from qkilld.bus.server import Caller, Server
from qkilld.model.access import Action, Answer


class Requester:
    def __init__(self, server: Server, caller: Caller) -> None:
        self._server = server
        self._caller = caller

    async def uid(self) -> int:
        return await self._server.uid_of(self._caller)

    async def may(self, action: Action, details: Mapping[str, str], *, ask: bool) -> Answer:
        authority = self._server.authority
        if authority is None:
            return Answer.DENIED
        interactive = ask and self._caller.interactive
        if interactive:
            # Nobody is to type a password for a caller that has gone.
            await self._server.notice_disconnect(self._caller)
        answer = await authority.check(
            self._caller.sender, await self.uid(), action, details, interactive=interactive
        )
        if answer is Answer.CHALLENGE and self._caller.interactive:
            # It was allowed to ask, and that was of no avail: there is no agent, say.
            return Answer.DENIED
        return answer
