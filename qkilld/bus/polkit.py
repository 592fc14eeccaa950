"""Client of polkit: org.freedesktop.PolicyKit1.Authority on the system bus.

Source: the polkit reference manual, "org.freedesktop.PolicyKit1.Authority". The request is denied
unless a clear yes comes in time. Answers are not cached here, because polkit itself implements
`auth_admin_keep`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final

from qkilld.bus.connection import Connection
from qkilld.bus.library import Variant
from qkilld.engine.fair_shares import user_of
from qkilld.model.access import Answer, PolkitAction
from qkilld.model.errors import BusError, Busy, QkilldError

TIMEOUT_S: Final = 5.0
"""Long enough even for a busy host. If polkit asks nobody for a password, it usually answers in
milliseconds."""
INTERACTIVE_TIMEOUT_S: Final = 120.0
"""Time for a person to find and type a password."""
MAX_PER_UID: Final = 8
"""The maximum number of open authorization requests for one user, over all connections."""
MAX_IN_ALL: Final = 64
"""The maximum number of open authorization requests for all users. The system bus allows a
connection 128 pending replies."""

_NAME: Final = "org.freedesktop.PolicyKit1"
_PATH: Final = "/org/freedesktop/PolicyKit1/Authority"
_INTERFACE: Final = "org.freedesktop.PolicyKit1.Authority"
_ALLOW_INTERACTION: Final = 1
_MAX_UID: Final = 2**31 - 1
"""polkit accepts no higher uid in a subject with a pidfd."""


class Polkit:
    """Implements bus.server.Authority and varlink.server.ProcessAuthority.

    Use this only on the system bus, because on any other bus anyone can own polkit's name.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        timeout_s: float = TIMEOUT_S,
        interactive_timeout_s: float = INTERACTIVE_TIMEOUT_S,
        connect_again: Callable[[], Awaitable[Connection]] | None = None,
    ) -> None:
        """`connect_again` makes another connection to the same bus, for messages with descriptors.
        `connection` must not accept descriptors, because any user could send a descriptor whose
        close(2) blocks."""
        self._connection = connection
        self._connect_again = connect_again
        self._timeout_s = timeout_s
        self._interactive_timeout_s = interactive_timeout_s
        self._open: Counter[int] = Counter()
        self._numbers = itertools.count(1)

    async def check(
        self,
        sender: str,
        uid: int,
        action: PolkitAction,
        details: Mapping[str, str],
        *,
        interactive: bool,
    ) -> Answer:
        """Ask polkit whether the owner of the bus name `sender` may do `action`. Raises Busy."""
        with self._place(uid):
            return await self._ask(sender, action, details, interactive)

    async def check_process(
        self, pidfd: int, uid: int, action: PolkitAction, details: Mapping[str, str]
    ) -> Answer:
        """Ask polkit whether a process that connected as `uid` may do `action`. Nobody is asked for
        a password. polkit before 124 does not know pidfds, and denies the request. Raises Busy."""
        if self._connect_again is None or uid > _MAX_UID:
            return Answer.DENIED
        subject = ["unix-process", {"pidfd": Variant("h", 0), "uid": Variant("i", uid)}]
        body = [subject, action.value, dict(details), 0, ""]
        with self._place(uid):
            try:
                connection = await self._connect_again()
            except BusError:
                return Answer.DENIED
            with contextlib.closing(connection):
                answer = await self._call(connection, body, self._timeout_s, pidfd)
            return answer or Answer.DENIED

    @contextlib.contextmanager
    def _place(self, uid: int) -> Iterator[None]:
        """Count a request to polkit while it is open. Raises Busy."""
        uid = user_of(uid)
        if self._open[uid] >= MAX_PER_UID or self._open.total() >= MAX_IN_ALL:
            raise Busy("Too many requests wait for an authorization here: answer those first")
        self._open[uid] += 1
        try:
            yield
        finally:
            self._open -= Counter((uid,))

    async def _ask(
        self, sender: str, action: PolkitAction, details: Mapping[str, str], interactive: bool
    ) -> Answer:
        subject = ["system-bus-name", {"name": Variant("s", sender)}]
        flags = _ALLOW_INTERACTION if interactive else 0
        ticket = f"qkilld-{next(self._numbers)}"
        body = [subject, action.value, dict(details), flags, ticket]
        timeout_s = self._interactive_timeout_s if interactive else self._timeout_s
        answer = None
        try:
            answer = await self._call(self._connection, body, timeout_s)
            return answer or Answer.DENIED
        finally:
            if answer is None:
                # Timed out, or the caller has left: close an open password dialog.
                self._connection.tell(
                    _NAME, _PATH, _INTERFACE, "CancelCheckAuthorization", "s", ticket
                )

    async def _call(
        self,
        connection: Connection,
        body: list[Any],
        timeout_s: float,
        descriptor: int | None = None,
    ) -> Answer | None:
        """Call CheckAuthorization. Return None if there is no answer."""
        try:
            ((authorized, challenge, _),) = await connection.request(
                _NAME,
                _PATH,
                _INTERFACE,
                "CheckAuthorization",
                "(sa{sv})sa{ss}us",
                body,
                timeout_s=timeout_s,
                gives="(bba{ss})",
                descriptor=descriptor,
            )
        except (QkilldError, ValueError, TypeError):
            # Polkit is missing, masked or too slow, or its reply has an unexpected type. The
            # request is denied.
            return None
        if authorized is True:
            return Answer.GRANTED
        return Answer.CHALLENGE if challenge is True else Answer.DENIED
