"""Open a process by pid, and check that it is QEMU and that the caller has the needed rights.

The checks come in an order that reveals nothing that the caller must not learn:

1. The process is opened first, and then the caller is identified.
2. If the caller is root or the process's own user, only the process is checked.
3. For all other callers, polkit is asked, whatever the process is. A denial has the same text for
   QEMU and for any other program. If the process is not QEMU, or not the requested one, polkit is
   asked without a dialog, so that nobody types a password in vain. A missing dialog reveals only
   what anybody can learn from ListGuests.
4. The checks are then repeated, because polkit may take minutes. The process must still be QEMU and
   in the named unit. Unless the caller is root, the process must still belong to the same
   user.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from qkilld.engine.checks import (
    action_for,
    check_answer,
    check_free,
    check_qemu,
    check_same,
    details_of,
    is_free,
)
from qkilld.model.access import Answer, PolkitAction, Rank, Steerer
from qkilld.model.constants import Flag
from qkilld.model.errors import (
    Failed,
    InvalidArgs,
    ProcessChanged,
    QkilldError,
    UnknownIdentity,
)
from qkilld.model.guest import Guest, Identity, Unit
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.policy import Config

if TYPE_CHECKING:
    from qkilld.engine.ports import Caller, Host, ObservedJob, Process

T = TypeVar("T")

IDENTITY_TIMEOUT_S: Final = 3.0
"""How long to retry if a process cannot be identified. On a busy host, identifying it may fail for
a moment during execve(2)."""
_FIRST_PAUSE_S: Final = 0.05


class CheckedProcess(NamedTuple):
    """An open process, and the uid of the caller, who is allowed to do what was requested."""

    process: Process
    uid: int


class Access:
    def __init__(
        self,
        config: Config,
        host: Host,
        known: Callable[[tuple[int, int]], bool] = lambda key: False,
    ) -> None:
        """`known` returns whether the process with that pid and start time has already been
        identified as QEMU. It is called for an exiting process, whose executable can no longer be
        read."""
        self._config = config
        self._host = host
        self._is_known = known
        self._turn = asyncio.Lock()

    async def open_checked(
        self,
        pid: int,
        caller: Caller,
        flags: Flag,
        *,
        action: PolkitAction | None = None,
        start_time: int | None = None,
        unit: Unit | None = None,
        answer: Answer | None = None,
        until: float | None = None,
    ) -> CheckedProcess:
        """Return the process with its label set. The caller must close it.

        action      the polkit action; if None, `flags` determine it
        start_time  refuse a process that started at another time (clock ticks since boot)
        unit        refuse a process that is not in this unit
        answer      polkit's answer, if it was asked before
        until       when to stop retrying to identify the process (the loop's time); if None,
                    IDENTITY_TIMEOUT_S after each first attempt

        Raises InvalidArgs, NoSuchProcess, NotQemu, ProcessChanged, AccessDenied,
        InteractiveAuthorizationRequired, Busy, Failed.
        """
        if pid == 0:
            raise InvalidArgs("0 is not the id of a process")
        # If the process cannot be identified at once, keep it open during the retries, so that a
        # new process with the same pid is not mistaken for it.
        process = self._host.open_unidentified(pid)
        try:
            await self.identified(process.identify, until)
            uid = await caller.uid()
            before = process.guest.identity
            free = is_free(uid, before)
            unfit = _error_of(lambda: self._check(before, start_time))
            if unfit is None:
                process.set_label(await self._host.label(before))
                unfit = _error_of(lambda: _check_unit(process.guest, unit))
            if not free:
                if answer is None:
                    details = details_of(process.guest, flags)
                    needed_action = action or action_for(flags)
                    answer = await caller.may(needed_action, details, ask=unfit is None)
                check_answer(answer, f"Process {pid} is")
            if unfit is not None:
                raise unfit
            if unit is not None:
                process.set_label(await self._host.label(process.guest.identity))
                _check_unit(process.guest, unit)
            # Check again, because the process may have executed another program meanwhile.
            after = await self.identified(process.identify, until)
            self._check(after, start_time)
            check_free(uid, before, after)
        except BaseException:
            process.close()
            raise
        return CheckedProcess(process, uid)

    async def permit(
        self, caller: Caller, job: ObservedJob, action: PolkitAction, *, owner: bool = False
    ) -> Steerer:
        """Authorize steering a job. Raises AccessDenied, InteractiveAuthorizationRequired, Busy.

        The owner of the process may steer a job that the owner requested (see steering.py) and, if
        `owner` is set, every other job for the process.
        """
        uid = await caller.uid()
        identity = job.guest.identity
        if uid == 0:
            return Steerer(0, Rank.ROOT)
        if uid == identity.uid and (owner or job.rank is Rank.OWNER):
            return Steerer(uid, Rank.OWNER)
        flags = Flag.FORCE if action is PolkitAction.FORCE else Flag(0)
        answer = await caller.may(action, details_of(job.guest, flags), ask=True)
        subject = "The stop of process" if uid == identity.uid else "Process"
        check_answer(answer, f"{subject} {identity.pid} is")
        return Steerer(uid, Rank.AUTHORIZED)

    async def identified(self, read: Callable[[], T], until: float | None) -> T:
        """Return what `read` returns. If it raises UnknownIdentity, retry with growing pauses,
        because each attempt may delay the event loop."""
        until = retry_until() if until is None else until
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return read()
            except UnknownIdentity:
                left = until - asyncio.get_running_loop().time()
                if left <= 0:
                    raise
            await asyncio.sleep(min(pause, left))
            pause *= 2
            # Thousands of calls can wait here: let the loop do other work between two reads.
            async with self._turn:
                await asyncio.sleep(0)

    def _check(self, identity: Identity, start_time: int | None) -> None:
        if not (identity.exiting and self._is_known(identity.key)):
            check_qemu(identity, self._config.executables, os.getpid())
        if start_time is not None:
            check_same(identity, start_time)


def retry_until() -> float:
    """Return the default for `until` of Access.open_checked. A call for many processes uses one
    value for all of them, so that unreadable processes do not each delay it by
    IDENTITY_TIMEOUT_S."""
    return asyncio.get_running_loop().time() + IDENTITY_TIMEOUT_S


def _check_unit(guest: Guest, unit: Unit | None) -> None:
    if unit is None or guest.label.unit == unit:
        return
    if guest.label.unit is None:
        raise Failed(
            f"Cannot read whether process {guest.identity.pid} is still in {unit.name}: "
            "nothing was done"
        )
    raise ProcessChanged(
        f"Process {guest.identity.pid} is no longer in {unit.name}: nothing was done"
    )


def _error_of(check: Callable[[], None]) -> QkilldError | None:
    try:
        check()
    except QkilldError as error:
        return error
    return None
