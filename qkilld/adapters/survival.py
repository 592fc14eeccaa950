"""Jobs that outlive the daemon: their state in files, their processes in the descriptor store.

The pidfd that the manager has kept decides who the process is. Where there is none, the process is
looked up by its id, start time and executable; a signal goes to no other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Final

from qkilld.adapters.manager import ServiceManager
from qkilld.adapters.process import PidfdProcess, adopt_process, open_process
from qkilld.adapters.statedir import StateDirectory
from qkilld.engine import events
from qkilld.engine.ports import Journal, Process
from qkilld.engine.registry import Registry
from qkilld.engine.snapshot import Snapshot, SnapshotError
from qkilld.model.errors import NoSuchProcess, NotQemu, ProcessChanged, QkilldError
from qkilld.model.guest import Guest
from qkilld.model.words import Result

_NAME: Final = re.compile(r"job-([1-9][0-9]{0,8})")


class Survival:
    """Implements engine.ports.Store."""

    def __init__(
        self,
        directory: StateDirectory,
        manager: ServiceManager,
        journal: Journal,
        stored: dict[str, int],
        open_process: Callable[[int], PidfdProcess] = open_process,
    ) -> None:
        """`stored` are the descriptors that the manager has kept, by name; they are taken over."""
        self._directory = directory
        self._manager = manager
        self._journal = journal
        self._stored = stored
        self._open = open_process
        self._held: set[str] = set()
        """Names of what is in the manager's store."""
        self._registry: Registry | None = None

    def restore(self, registry: Registry) -> None:
        """Resume every job that can be.

        Where the directory cannot be read that is told, and its files and what the manager has kept
        are left to the next life.
        """
        self._registry = registry
        # A job may have had its process stored and not yet its state.
        named = [int(found[1]) for name in self._stored if (found := _NAME.fullmatch(name))]
        registry.count_from(max(named, default=0))
        try:
            snapshots, last, bad = self._directory.load()
        except OSError as error:
            self._journal.write(events.state_failed(error.strerror or str(error)))
            return
        for name, why in bad:
            self._journal.write(events.state_set_aside(name, why))
        registry.count_from(last)
        for snapshot in snapshots:
            try:
                registry.resume(self._process(snapshot), snapshot)
            except SnapshotError as error:
                self._journal.write(events.state_set_aside(_name(snapshot.number), str(error)))
                self._directory.set_aside(f"{_name(snapshot.number)}.json")
                self.release(snapshot.number)
        for name in list(self._stored):
            self._reject(name, "no job here needs it")

    def hold(self, number: int, process: Process) -> None:
        name, fd = _name(number), process.fileno()
        if fd is not None and name not in self._held:
            self._held.add(name)
            self._manager.keep(name, fd)

    def save(self, snapshot: Snapshot) -> None:
        self._directory.save(snapshot)

    def release(self, number: int) -> None:
        name = _name(number)
        if name in self._held:
            self._held.remove(name)
            self._manager.drop(name)

    def forget(self, number: int) -> None:
        self._directory.forget(number)

    def close(self) -> None:
        """Write what is still to be written, for a short time at most."""
        if self._registry is not None:
            self._directory.close(self._registry.last)

    def _process(self, snapshot: Snapshot) -> Process | None:
        """Its process; None where that is gone, or nobody wants to know. Raises SnapshotError."""
        if snapshot.result not in (None, Result.SURVIVED):
            return None
        name = _name(snapshot.number)
        if name in self._stored:
            try:
                process = adopt_process(self._stored[name], snapshot.guest)
            except ProcessChanged as error:
                self._reject(name, str(error))
            else:
                del self._stored[name]
                self._held.add(name)
                return process
        return self._look_up(snapshot.guest)

    def _look_up(self, guest: Guest) -> Process | None:
        try:
            process = self._open(guest.identity.pid)
        except NoSuchProcess:
            return None
        except NotQemu as error:
            raise SnapshotError(str(error)) from None
        except QkilldError as error:
            raise SnapshotError(f"its process cannot be held: {error}") from None
        if process.identity.key != guest.identity.key:
            process.close()
            return None
        if process.identity.executable != guest.identity.executable:
            process.close()
            raise SnapshotError("its process runs another program by now")
        return process

    def _reject(self, name: str, why: str) -> None:
        os.close(self._stored.pop(name))
        self._manager.drop(name)
        self._journal.write(events.descriptor_rejected(name, why))


def _name(number: int) -> str:
    return f"job-{number}"
