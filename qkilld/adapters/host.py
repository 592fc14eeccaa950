"""The processes of this system. Implements engine.ports.Host."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from qkilld.adapters import procfs
from qkilld.adapters.detached import detached
from qkilld.adapters.process import PidfdProcess, open_process
from qkilld.model.guest import Identity, Label

LABEL_TIMEOUT_S: Final = 0.5
"""A command line that takes longer to read is one that blocks, see adapters.procfs."""

_Key = tuple[int, int, str]
"""pid, start time, executable: another program of the same process has another command line."""


class LocalHost:
    def __init__(self, proc: Path = procfs.PROC) -> None:
        self._proc = proc
        self._names: dict[_Key, tuple[str, str]] = {}
        self._reading: dict[_Key, asyncio.Future[tuple[str, str]]] = {}

    def open(self, pid: int) -> PidfdProcess:
        return open_process(pid, self._proc)

    async def label(self, identity: Identity) -> Label:
        name, uuid = await self._name_and_uuid(identity)
        # Read afresh each time: machine managers move a QEMU to its scope after its start.
        return Label(name, uuid, procfs.read_unit(identity.pid, self._proc))

    async def identities(self) -> list[Identity]:
        found = await detached(lambda: _identities(self._proc))
        alive = {_key(identity) for identity in found}
        self._names = {key: names for key, names in self._names.items() if key in alive}
        return found

    async def _name_and_uuid(self, identity: Identity) -> tuple[str, str]:
        key = _key(identity)
        if (names := self._names.get(key)) is not None:
            return names
        # At most one thread for a process, however often it is asked for while it blocks.
        if (reading := self._reading.get(key)) is None:
            reading = detached(lambda: procfs.read_name_and_uuid(identity.pid, self._proc))
            self._reading[key] = reading
            reading.add_done_callback(lambda _: self._reading.pop(key, None))
        try:
            async with asyncio.timeout(LABEL_TIMEOUT_S):
                names = await asyncio.shield(reading)
        except TimeoutError:
            return "", ""
        self._names[key] = names
        return names


def _key(identity: Identity) -> _Key:
    return (*identity.key, identity.executable)


def _identities(proc: Path) -> list[Identity]:
    found = []
    for pid in procfs.pids(proc):
        try:
            identity = procfs.read_identity(pid, proc)
        except OSError:
            continue
        if identity.executable:
            found.append(identity)
    return found
