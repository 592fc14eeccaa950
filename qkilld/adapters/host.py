"""The processes of this host. Implements engine.ports.Host."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qkilld.adapters import procfs
from qkilld.adapters.loop_thread import run_in_thread
from qkilld.adapters.names import NameReader
from qkilld.adapters.process import PidfdProcess, open_process
from qkilld.debug_log import note_once
from qkilld.model.errors import Failed
from qkilld.model.guest import Identity, Label

_OWN_LIMITS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class LocalHost:
    """Create it in the running loop."""

    def __init__(self, proc: Path = procfs.PROC) -> None:
        self._proc = proc
        self._names = NameReader(lambda pid: procfs.read_names(pid, proc))

    def open(self, pid: int) -> PidfdProcess:
        return open_process(pid, self._proc)

    async def label(self, identity: Identity) -> Label:
        ((name, uuid, qmp, remote),) = await self._names.names([identity])
        # Read the unit each time, because machine managers move a QEMU process to a scope after it
        # has started.
        return Label(name, uuid, procfs.read_unit(identity.pid, self._proc), qmp, remote)

    async def labels(self, identities: Sequence[Identity]) -> list[Label]:
        names = await self._names.names(identities)
        units = await run_in_thread(
            lambda: [procfs.read_unit(identity.pid, self._proc) for identity in identities]
        )
        return [
            Label(name, uuid, unit, qmp, remote)
            for (name, uuid, qmp, remote), unit in zip(names, units, strict=True)
        ]

    async def identities(self) -> list[Identity]:
        identities = await run_in_thread(lambda: _identities(self._proc))
        self._names.keep(identities)
        return identities


def _identities(proc: Path) -> list[Identity]:
    identities = []
    for pid, identity in procfs.read_identities(procfs.pids(proc), proc):
        match identity:
            case FileNotFoundError() | ProcessLookupError():
                pass  # It has exited.
            case OSError() if identity.errno in _OWN_LIMITS:
                reason = os.strerror(identity.errno or 0)
                raise Failed(f"Cannot list processes: {reason}") from None
            case OSError():  # No process may keep the others from being listed.
                note_once(f"identifying process {pid}", identity)
            case Exception():
                raise identity
            case _ if identity.executable:
                identities.append(identity)
    return identities
