"""From a pid to a process that is held, is a QEMU, and that this caller may do this with.

The order, which keeps what the caller may not know from showing in the answer:

1. The process is held; who calls is asked only then.
2. For root and the process's own user: what the process is, and that is all.
3. For everyone else polkit is asked, whatever the process is, and a denial reads the same for a
   QEMU and for anything else. Nobody is asked for a password, though, for what is no QEMU (or is
   another process than was meant): the question then goes to polkit without interaction. That no
   dialog appears tells the caller no more than ListGuests does, which is open to all.
4. As time has passed, the process is identified again, right before it is handed out: the same
   user, still a QEMU, still in the unit that was named.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from qkilld.engine.ports import Caller, Host, Process
from qkilld.judgement.target import (
    action_for,
    check_answer,
    check_free,
    check_qemu,
    check_same,
    details_of,
    is_free,
)
from qkilld.model.access import Action, Answer
from qkilld.model.errors import InvalidArgs, ProcessChanged, QkilldError
from qkilld.model.guest import Guest, Identity, Unit
from qkilld.model.policy import Config
from qkilld.model.words import Flag


class Held(NamedTuple):
    process: Process
    uid: int
    """The caller's."""


class Access:
    def __init__(self, config: Config, host: Host) -> None:
        self._config = config
        self._host = host

    async def hold(
        self,
        pid: int,
        caller: Caller,
        flags: Flag,
        *,
        action: Action | None = None,
        start_time: int | None = None,
        unit: Unit | None = None,
        answer: Answer | None = None,
    ) -> Held:
        """The process, labelled; to be used at once, before the loop runs on, and closed.

        action      what to be authorized for; by default what `flags` ask for
        start_time  clock ticks since boot: refuse another process
        unit        refuse a process that is not in it
        answer      what polkit has said already, in place of asking it

        Raises InvalidArgs, NoSuchProcess, NotQemu, ProcessChanged, AccessDenied,
        InteractiveAuthorizationRequired, Busy, Failed.
        """
        if pid == 0:
            raise InvalidArgs("0 is not the id of a process")
        process = self._host.open(pid)
        try:
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
                    wanted = action or action_for(flags)
                    answer = await caller.may(wanted, details, ask=unfit is None)
                check_answer(answer, f"Process {pid} is")
            if unfit is not None:
                raise unfit
            if unit is not None:
                process.set_label(await self._host.label(process.guest.identity))
                _check_unit(process.guest, unit)
            # It may have executed another program by now.
            after = process.identify()
            self._check(after, start_time)
            check_free(uid, before, after)
        except BaseException:
            process.close()
            raise
        return Held(process, uid)

    async def permit(self, caller: Caller, guest: Guest, action: Action) -> int:
        """For what has no process to be held. The caller's uid; raises as `hold` does for it."""
        uid = await caller.uid()
        if not is_free(uid, guest.identity):
            flags = Flag.FORCE if action is Action.FORCE else Flag(0)
            answer = await caller.may(action, details_of(guest, flags), ask=True)
            check_answer(answer, f"Process {guest.identity.pid} is")
        return uid

    def _check(self, identity: Identity, start_time: int | None) -> None:
        check_qemu(identity, self._config.executables, os.getpid())
        if start_time is not None:
            check_same(identity, start_time)


def _check_unit(guest: Guest, unit: Unit | None) -> None:
    if unit is not None and guest.label.unit != unit:
        raise ProcessChanged(
            f"Process {guest.identity.pid} is no longer in {unit.name}: nothing was done"
        )


def _error_of(check: Callable[[], None]) -> QkilldError | None:
    try:
        check()
    except QkilldError as error:
        return error
    return None
