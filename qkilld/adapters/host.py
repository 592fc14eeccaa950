"""The processes of this host. Implements engine.ports.Host."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Sequence, Set
from pathlib import Path
from typing import Final

from qkilld.adapters import procfs
from qkilld.adapters.blockable import Unanswered
from qkilld.adapters.loop_thread import run_in_thread
from qkilld.adapters.names import Key, NameReader, keys_of
from qkilld.adapters.process import PidfdProcess, open_process, open_unidentified
from qkilld.debug_log import note_once
from qkilld.model.errors import Failed
from qkilld.model.guest import Guest, Identity, Label, Unidentified

_OWN_LIMITS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_TIMEOUT_S: Final = 2.0
"""How long to retry if processes cannot be read, for example because the host thrashes."""
_RETRY_S: Final = 0.1


class LocalHost:
    """Create it in the running loop."""

    def __init__(self, proc: Path = procfs.PROC) -> None:
        self._proc = proc
        self._names = NameReader(lambda pid: procfs.read_names(pid, proc))
        self._blocked: frozenset[int] = frozenset()
        """The processes that the last search could not identify. The next search does not wait for
        them, so that they do not delay every search."""

    def open(self, pid: int) -> PidfdProcess:
        return open_process(pid, self._proc)

    def open_unidentified(self, pid: int) -> PidfdProcess:
        return open_unidentified(Guest(Identity.unread(pid), Label()), self._proc)

    async def label(self, identity: Identity) -> Label:
        ((name, uuid, qmp, remote),) = await self._names.names([identity])
        # Read the unit each time, because a manager of guests may move a QEMU process to a scope
        # after its start.
        return Label(name, uuid, procfs.read_unit(identity.pid, self._proc), qmp, remote)

    async def labels(self, identities: Sequence[Identity]) -> list[Label]:
        names = await self._names.names(identities)
        # Use a thread, because reading the units takes long, and a user may have tens of thousands
        # of processes.
        return await run_in_thread(
            lambda: [
                Label(name, uuid, procfs.read_unit(identity.pid, self._proc), qmp, remote)
                for identity, (name, uuid, qmp, remote) in zip(identities, names, strict=True)
            ]
        )

    async def identities(self) -> tuple[list[Identity], list[Unidentified]]:
        blocked = self._blocked

        def identify() -> tuple[list[Identity], list[Unidentified], Set[Key]]:
            identities, unidentified = _identities(self._proc, blocked)
            return identities, unidentified, keys_of(identities)

        identities, unidentified, alive = await run_in_thread(identify)
        self._names.keep(alive)
        self._blocked = frozenset(each.pid for each in unidentified)
        return identities, unidentified


def _identities(
    proc: Path, blocked: Collection[int] = ()
) -> tuple[list[Identity], list[Unidentified]]:
    """Identify all processes. Retry for _TIMEOUT_S while reads time out for processes that are not
    in `blocked`."""
    identities: list[Identity] = []
    pids, until = procfs.pids(proc), time.monotonic() + _TIMEOUT_S
    while True:
        unanswered = _identify(pids, proc, identities)
        if set(unanswered) <= set(blocked) or time.monotonic() > until:
            return identities, [_unidentified(pid, proc) for pid in unanswered]
        pids = unanswered
        time.sleep(_RETRY_S)


def _unidentified(pid: int, proc: Path) -> Unidentified:
    try:
        uid = procfs.read_uid(pid, proc)
    except OSError as error:
        note_once(f"reading the user of process {pid}", error)
        uid = -1
    return Unidentified(pid, uid, procfs.read_unit(pid, proc))


def _identify(pids: Sequence[int], proc: Path, identities: list[Identity]) -> list[int]:
    """Append the identities that can be read to `identities`; return the ids of the processes that
    could not be read in time."""
    unanswered = []
    for pid, identity in procfs.read_identities(pids, proc):
        match identity:
            case FileNotFoundError() | ProcessLookupError():
                pass  # The process has exited.
            case Unanswered():
                note_once(f"identifying process {pid}", identity)
                unanswered.append(pid)
            case OSError() if identity.errno in _OWN_LIMITS:
                reason = os.strerror(identity.errno or 0)
                raise Failed(f"Cannot list processes: {reason}") from None
            case OSError():  # One process must not keep the others from being listed.
                note_once(f"identifying process {pid}", identity)
            case Exception():
                raise identity
            case _ if identity.executable:
                identities.append(identity)
    return unanswered
