"""What we ask of polkit: org.freedesktop.PolicyKit1.Authority on the system bus.

Source: the polkit reference manual, "org.freedesktop.PolicyKit1.Authority". A call that does not
come to an end in time, and every answer that is no clear yes, is a no. Nothing is remembered here;
what `auth_admin_keep` keeps, polkit keeps.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Final

from dbus_next.signature import Variant

from qkilld.bus.connection import Connection
from qkilld.model.access import Action, Answer
from qkilld.model.errors import Busy, QkilldError

TIMEOUT_S: Final = 5.0
"""Where nobody is asked polkit answers in milliseconds."""
INTERACTIVE_TIMEOUT_S: Final = 120.0
"""For a person to find and type a password."""
MAX_PER_UID: Final = 8
"""Questions of one user, through however many connections, that may be open at a time, and …"""
MAX_IN_ALL: Final = 64
"""… those of all: the system bus lets a connection wait for 128 answers."""

_NAME: Final = "org.freedesktop.PolicyKit1"
_PATH: Final = "/org/freedesktop/PolicyKit1/Authority"
_INTERFACE: Final = "org.freedesktop.PolicyKit1.Authority"
_ALLOW_INTERACTION: Final = 1


class Polkit:
    """Implements bus.server.Authority.

    For a connection to the system bus alone: on any other one the name of polkit belongs to whoever
    takes it.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        timeout_s: float = TIMEOUT_S,
        interactive_timeout_s: float = INTERACTIVE_TIMEOUT_S,
    ) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._interactive_timeout_s = interactive_timeout_s
        self._open: Counter[int] = Counter()
        self._numbers = itertools.count(1)

    async def check(
        self,
        sender: str,
        uid: int,
        action: Action,
        details: Mapping[str, str],
        *,
        interactive: bool,
    ) -> Answer:
        """Whether polkit lets the owner of that bus name do that. Raises Busy."""
        if self._open[uid] >= MAX_PER_UID or self._open.total() >= MAX_IN_ALL:
            raise Busy("Too many requests wait for an authorization here: answer those first")
        self._open[uid] += 1
        try:
            return await self._ask(sender, action, details, interactive)
        finally:
            self._open -= Counter((uid,))

    async def _ask(
        self, sender: str, action: Action, details: Mapping[str, str], interactive: bool
    ) -> Answer:
        subject = ["system-bus-name", {"name": Variant("s", sender)}]
        flags = _ALLOW_INTERACTION if interactive else 0
        ticket = f"qkilld-{next(self._numbers)}"
        answered = False
        try:
            ((authorized, challenge, _),) = await self._connection.request(
                _NAME,
                _PATH,
                _INTERFACE,
                "CheckAuthorization",
                "(sa{sv})sa{ss}us",
                [subject, action.value, dict(details), flags, ticket],
                timeout_s=self._interactive_timeout_s if interactive else self._timeout_s,
            )
            answered = True
        except (QkilldError, ValueError, TypeError):
            # Not there, masked, too late, or not of the shape that the manual tells.
            return Answer.DENIED
        finally:
            if not answered:
                # Too late, or the caller has gone: a dialog that is open closes.
                self._connection.tell(
                    _NAME, _PATH, _INTERFACE, "CancelCheckAuthorization", "s", ticket
                )
        if authorized is True:
            return Answer.GRANTED
        return Answer.CHALLENGE if challenge is True else Answer.DENIED
