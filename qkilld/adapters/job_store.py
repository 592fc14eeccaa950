"""Store jobs so that they survive the daemon: states in files, processes in the descriptor store.

For each job, the service manager keeps a pidfd, which identifies the job's process. If the pidfd is
missing, the process is found by its id and start time. In both cases, no other process can get a
signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qkilld.adapters.process import (
    PidfdProcess,
    adopt_process,
    open_process,
    open_unidentified,
)
from qkilld.adapters.service_manager import ServiceManager
from qkilld.adapters.state_dir import StateDirectory
from qkilld.engine import events
from qkilld.engine.registry import Registry
from qkilld.engine.snapshot import Snapshot, SnapshotError
from qkilld.model.constants import Result
from qkilld.model.errors import Failed, NoSuchProcess, NotQemu, ProcessChanged
from qkilld.model.guest import Guest
from qkilld.model.guest_state import KeptMonitor

if TYPE_CHECKING:
    from qkilld.engine.ports import JobState, Journal, Process

_NAME: Final = re.compile(r"(?:job|monitor)-([1-9][0-9]{0,8})")


class JobStore:
    """Implements engine.ports.Store."""

    def __init__(
        self,
        directory: StateDirectory,
        manager: ServiceManager,
        journal: Journal,
        stored: dict[str, int],
        open_process: Callable[[int], PidfdProcess] = open_process,
    ) -> None:
        """`stored`: the manager's descriptors, by name. This object takes ownership of them."""
        self._directory = directory
        self._manager = manager
        self._journal = journal
        self._stored = stored
        self._open = open_process
        self._in_store: set[str] = set()
        """Names of the descriptors in the manager's store."""
        self._registry: Registry | None = None

    def restore(self, registry: Registry) -> None:
        """Resume every job that can be resumed.

        If the directory cannot be read, report this, and keep its files and the manager's
        descriptors for the next start.
        """
        self._registry = registry
        # Do not reuse the job numbers of stored descriptors. A crash may have left a descriptor in
        # the store, but no file with the state of its job.
        numbers = [int(match[1]) for name in self._stored if (match := _NAME.fullmatch(name))]
        registry.count_from(max(numbers, default=0))
        try:
            snapshots, last, bad = self._directory.load()
        except OSError as error:
            self._journal.write(events.state_failed(error.strerror or str(error)))
            return
        for name, why in bad:
            self._journal.write(events.state_set_aside(name, why))
        registry.count_from(last)
        kept: set[str] = set()
        for snapshot in snapshots:
            monitor = self._stored_monitor(snapshot)
            try:
                process = self._process(snapshot)
                job = registry.resume(process, snapshot, monitor, among_many=True)
                if snapshot.number in self._directory.outdated:
                    # Write the state in the present format, because a later release may not be able
                    # to read the old one.
                    self.save(job.snapshot())
                if monitor is not None:
                    self._stored.pop(_monitor_name(snapshot.number))
            except SnapshotError as error:
                self._journal.write(events.state_set_aside(_name(snapshot.number), str(error)))
                self._set_aside(snapshot.number)
            except Failed as error:
                # A later start may succeed in resuming the job.
                self._journal.write(events.state_set_aside(_name(snapshot.number), str(error)))
                kept |= {_name(snapshot.number), _monitor_name(snapshot.number)}
            except Exception as error:
                # Go on: otherwise the daemon could never start again, and no job would continue.
                self._report(f"resuming job {snapshot.number}", error)
                # Do not close this descriptor, because the job may own it.
                self._stored.pop(_monitor_name(snapshot.number), None)
                self._set_aside(snapshot.number)
        try:
            registry.follow_resumed()
        except Exception as error:
            self._report("continuing a job of an earlier daemon", error)
        for name in self._stored.keys() - kept:
            self._reject(name, "no job needs it")

    def _set_aside(self, number: int) -> None:
        self._directory.set_aside(f"{_name(number)}.json")
        self.drop_fd(number)
        self.drop_monitor(number)

    def _report(self, doing: str, error: Exception) -> None:
        self._journal.write(events.internal_error(doing, error))

    def store_fd(self, number: int, process: Process) -> None:
        name, fd = _name(number), process.fileno()
        if fd is not None and name not in self._in_store:
            self._in_store.add(name)
            self._manager.store_fd(name, fd)

    def save(self, state: JobState) -> None:
        self._directory.save(state)

    def when_written(self, callback: Callable[[], None]) -> None:
        self._directory.when_written(_in_loop(callback))

    def write_first(self, number: int, callback: Callable[[], None]) -> None:
        self._directory.write_first(number, _in_loop(callback))

    def store_monitor(self, number: int, fd: int) -> None:
        name = _monitor_name(number)
        # Drop the descriptor of an earlier connection, because that connection is lost.
        self._drop(name)
        self._in_store.add(name)
        self._manager.store_fd(name, fd)

    def drop_fd(self, number: int) -> None:
        self._drop(_name(number))

    def drop_monitor(self, number: int) -> None:
        self._drop(_monitor_name(number))

    def _drop(self, name: str) -> None:
        if name in self._in_store:
            self._in_store.remove(name)
            self._manager.drop_fd(name)

    def forget(self, number: int) -> None:
        self._directory.forget(number)

    def close(self) -> None:
        """Write the queued states, for at most background.FLUSH_TIMEOUT_S."""
        if self._registry is not None:
            self._directory.close(self._registry.last)

    def _process(self, snapshot: Snapshot) -> Process | None:
        """Return the job's process; None if it is gone or not needed. Raises SnapshotError. Raises
        Failed if the process cannot be opened now."""
        ended = snapshot.result not in (None, Result.SURVIVED)
        if ended and not snapshot.processors_stopped:
            return None
        name = _name(snapshot.number)
        if name in self._stored:
            try:
                process = adopt_process(self._stored[name], snapshot.guest)
            except ProcessChanged as error:
                self._reject(name, str(error))
            else:
                del self._stored[name]
                self._in_store.add(name)
                return process
        return self._open_same(snapshot.guest)

    def _stored_monitor(self, snapshot: Snapshot) -> KeptMonitor | None:
        """Return the monitor connection that the manager has kept for a running job."""
        name = _monitor_name(snapshot.number)
        if snapshot.result is not None or name not in self._stored:
            return None
        self._in_store.add(name)
        return KeptMonitor(self._stored[name], snapshot.own_chardevs)

    def _open_same(self, guest: Guest) -> Process | None:
        try:
            try:
                process = self._open(guest.identity.pid)
            except Failed:
                # The job checks the identity before it sends a signal.
                return open_unidentified(guest)
        except NoSuchProcess:
            return None
        except NotQemu as error:
            raise SnapshotError(str(error)) from None
        if process.identity.key != guest.identity.key:
            process.close()
            return None
        return process

    def _reject(self, name: str, why: str) -> None:
        os.close(self._stored.pop(name))
        self._manager.drop_fd(name)
        self._journal.write(events.descriptor_rejected(name, why))


def _in_loop(callback: Callable[[], None]) -> Callable[[], None]:
    """Return a function that any thread can call. It calls `callback` in the running loop."""
    loop = asyncio.get_running_loop()

    def call() -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(callback)

    return call


def _name(number: int) -> str:
    return f"job-{number}"


def _monitor_name(number: int) -> str:
    return f"monitor-{number}"
