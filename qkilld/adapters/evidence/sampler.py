"""Samples of many processes, taken in threads. Implements engine.ports.Sampler."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from qkilld.adapters.evidence.cgroup import CgroupReader
from qkilld.adapters.evidence.files import read_descriptors
from qkilld.adapters.evidence.handover import Handover
from qkilld.adapters.evidence.host import read_memory
from qkilld.adapters.evidence.process import ProcessReader
from qkilld.adapters.evidence.sockets import SocketReader, SocketTable
from qkilld.adapters.evidence.storage import StorageReader, StorageTable
from qkilld.adapters.evidence.workers import Workers
from qkilld.engine.ports import Process
from qkilld.model.evidence import Memory, Sample

REFRESH_S: Final = 30.0
"""How long it is believed which files and sockets a process has open."""
TABLES_AGE_S: Final = 0.05
"""How long one look at the whole host serves everybody."""


class Tables:
    """What one look at the whole host tells of everybody, shared by all readers."""

    def __init__(self) -> None:
        self._at = -1.0
        self._sockets = SocketTable()
        self._storage = StorageTable()
        self._memory: Memory | None = None

    def recent(self) -> tuple[SocketTable, StorageTable, Memory | None]:
        now = time.monotonic()
        if now - self._at > TABLES_AGE_S:
            self._at = now
            self._sockets, self._storage = SocketTable(), StorageTable()
            self._memory = read_memory()
        return self._sockets, self._storage, self._memory


class Reader:
    """Everything that is read of one process. For one thread at a time."""

    def __init__(self, pid: int, tables: Tables) -> None:
        self._pid = pid
        self._process = ProcessReader(pid)
        self._cgroup = CgroupReader(pid)
        self._storage = StorageReader(pid)
        self._sockets = SocketReader(pid)
        self._tables = tables
        self._refreshed = -REFRESH_S

    def read(self) -> Sample:
        """A sample of now. Raises nothing that the process could cause; may block."""
        found: dict[str, Any] = {"state": "?"}
        now = time.monotonic()
        if now - self._refreshed >= REFRESH_S:
            self._refreshed = now
            descriptors = read_descriptors(self._pid)
            self._storage.refresh(descriptors)
            self._sockets.refresh(descriptors)
        sockets, storage, memory = self._tables.recent()
        self._process.read(found)
        devices, mounts = self._storage.read(storage)
        return Sample(
            at=time.monotonic_ns() // 1000,
            devices=devices,
            mounts=mounts,
            sockets=self._sockets.read(sockets),
            cgroup=self._cgroup.read(),
            host=memory,
            **found,
        )

    def close(self) -> None:
        self._process.close()
        self._cgroup.close()
        self._storage.close()
        self._sockets.close()


class EvidenceSampler:
    """Use in a running loop."""

    def __init__(self) -> None:
        self._workers = Workers()
        self._handover = Handover()
        self._tables = Tables()

    def watch(self, process: Process) -> TargetWatch:
        pid = process.guest.identity.pid
        return TargetWatch(pid, self._workers, self._handover, self._tables)

    def close(self) -> None:
        self._workers.close()
        self._handover.close()


class TargetWatch:
    """Implements engine.ports.Watch.

    A look that blocks holds its thread, and this watch: further looks wait for the same answer.
    """

    def __init__(self, pid: int, workers: Workers, handover: Handover, tables: Tables) -> None:
        self._reader: Reader | None = None
        self._pid, self._tables = pid, tables
        self._workers, self._handover = workers, handover
        self._callback: Callable[[Sample], None] | None = None
        self._busy = False
        self._closed = False

    def look(self, callback: Callable[[Sample], None]) -> None:
        self._callback = callback
        if not self._busy:
            self._busy = True
            self._workers.submit(self._work)
            self._handover.expect()

    def close(self) -> None:
        self._closed = True
        self._callback = None
        if not self._busy:
            self._close_reader()

    def _work(self) -> None:
        sample: Sample | None = None
        try:
            if self._reader is None:
                self._reader = Reader(self._pid, self._tables)
            sample = self._reader.read()
        finally:
            self._handover.put(partial(self._done, sample), more=self._workers.waiting)

    def _done(self, sample: Sample | None) -> None:
        self._busy = False
        if self._closed:
            self._close_reader()
            return
        callback, self._callback = self._callback, None
        # Without a sample there was a fault; the time limit of whoever waits takes care of it.
        if callback is not None and sample is not None:
            callback(sample)

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
