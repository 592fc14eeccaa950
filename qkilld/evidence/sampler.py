"""Take samples of many processes in threads. Implements engine.ports.Sampler."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from qkilld.debug_log import about, is_on, note_unknown
from qkilld.evidence.block_graph import BlockGraph, requested_exports
from qkilld.evidence.cgroup import CgroupReader, SharedGroups
from qkilld.evidence.command_line import GraphReader
from qkilld.evidence.faults import FaultGuard, OnFault
from qkilld.evidence.file_budget import FileBudget
from qkilld.evidence.files import PROC, read_descriptors
from qkilld.evidence.fuse import FuseFinder
from qkilld.evidence.handover import Handover
from qkilld.evidence.meminfo import read_memory
from qkilld.evidence.other_namespaces import OtherNamespaces
from qkilld.evidence.peer_finder import PeerFinder
from qkilld.evidence.peer_reader import names_by_mount
from qkilld.evidence.peers import ServerReader
from qkilld.evidence.process_reader import ProcessReader
from qkilld.evidence.sockdiag import CrowdedTables
from qkilld.evidence.sockets import SocketReader, SocketTable
from qkilld.evidence.storage import StorageReader, StorageTable
from qkilld.evidence.thread_places import place_threads
from qkilld.evidence.workers import Workers
from qkilld.model.sample import Memory, Mount, Node, Sample, Socket, Thread

if TYPE_CHECKING:
    from qkilld.engine.ports import Process

REFRESH_S: Final = 30.0
"""How long a list of open files and sockets is valid while the number of descriptors stays the
same."""
RECONNECT_S: Final = 2.0
"""While a connection is lost, the sockets are listed again at this interval."""
TABLES_AGE_S: Final = 0.05
"""How long all readers share one reading of the host's sockets and disks."""
MEMORY_AGE_S: Final = 5.0
"""How long all readers share one reading of the host's page cache, if no thread waits for
storage."""


class HostTables:
    def __init__(self) -> None:
        self._at = -1.0
        self._crowded = CrowdedTables()
        self._sockets = SocketTable(self._crowded)
        self._storage = StorageTable()
        self._memory: Memory | None = None
        self._memory_at = -MEMORY_AGE_S
        self.peers = PeerFinder()
        self.fuse = FuseFinder()
        self.namespaces = OtherNamespaces()
        self.groups = SharedGroups()

    def recent(self, waits: bool = True) -> tuple[SocketTable, StorageTable, Memory | None]:
        """Return recent tables. `waits`: a thread may wait for storage, so read the page cache more
        often."""
        now = time.monotonic()
        if now - self._at > TABLES_AGE_S:
            self._at = now
            self._sockets, self._storage = SocketTable(self._crowded), StorageTable()
        if now - self._memory_at > (TABLES_AGE_S if waits else MEMORY_AGE_S):
            self._memory_at = now
            self._memory = read_memory()
        return self._sockets, self._storage, self._memory


class Reader:
    """Takes samples of one process. Not thread-safe."""

    __slots__ = (
        "_cgroup", "_descriptors", "_fd_directory", "_graph", "_guard", "_known_graph", "_pid",
        "_process", "_refresh_time", "_servers", "_sockets", "_storage", "_tables",
    )  # fmt: skip

    def __init__(self, pid: int, tables: HostTables, guard: FaultGuard | None = None) -> None:
        """Without a guard, exceptions of readers are raised."""
        self._pid = pid
        self._guard = guard or FaultGuard()
        self._process = ProcessReader(pid, guard=self._guard)
        self._cgroup = CgroupReader(pid, shared=tables.groups, directory=self._process.directory)
        self._storage = StorageReader(pid)
        self._sockets = SocketReader(pid)
        self._graph = GraphReader(pid)
        self._servers: ServerReader | None = None
        """Created when there is a connection, or a file system without a block device: most guests
        have neither."""
        self._tables = tables
        self._refresh_time = -REFRESH_S
        self._descriptors = -1
        self._known_graph: BlockGraph | None = None
        """The block graph that was known when the sockets were last listed; None if there was
        none."""
        self._fd_directory = f"{PROC}/{pid}/fd"

    def read(self, *, detail: bool = False) -> Sample:
        """Take a sample now. May block. Raises no exception, whatever the process does.

        `detail`: include its AIO rings, and the servers of its connections. Both are expensive to
        read.
        """
        about(self._pid)
        values: dict[str, Any] = {"state": "?"}
        call = self._guard.call
        graph = call("reading the command line", self._graph.read)
        has_run = self._process.has_run()
        self._refresh(graph, has_run)
        self._process.read(values, opened=self._descriptors, has_run=has_run)
        waiting = values.get("threads")
        tables = call("reading the host's memory", self._tables.recent, waiting != ())
        sockets, storage, memory = tables or (SocketTable(), StorageTable(), None)
        values["threads"] = call("placing threads", self._placed, waiting) if waiting else waiting
        devices, mounts = call("reading storage", self._storage.read, storage) or (None, None)
        connections = call("reading sockets", self._sockets.read, sockets, has_run)
        nodes = None if graph is None else tuple(graph.nodes)
        if (connections or mounts) and self._servers is None:
            self._servers = ServerReader(self._pid, self._tables.peers, self._tables.fuse)
            if not detail:
                # Announce the servers now: the next sample needs them, and on a busy host the
                # search for them takes long.
                known = connections or ()
                ends = call("looking for servers", self._sockets.peers, known, sockets)
                self._servers.expect((ends or {}).values(), mounts or ())
        if detail and nodes:
            known = connections or ()
            elsewhere = self._tables.namespaces
            nodes = (
                call("looking for servers", self._sockets.served, nodes, known, sockets, elsewhere)
                or nodes
            )
        if detail:
            with_peers = call(
                "reading servers", self._with_peers, connections, mounts, nodes, sockets, storage
            )
            connections, mounts = with_peers or (connections, mounts)
            if values.get("direct"):
                values["completions"] = call("reading rings", self._process.read_completions)
        sample = Sample(
            at=time.monotonic_ns() // 1000,
            devices=devices,
            mounts=mounts,
            sockets=connections,
            cgroup=call("reading control groups", self._cgroup.read),
            host=memory,
            nodes=nodes,
            searching=detail and self._servers is not None and self._servers.searches,
            pluggable=None if graph is None else graph.pluggable,
            shared_memory=None if graph is None else graph.shared_memory,
            formatted=self._graph.formatted(self._storage.writable),
            images=self._graph.images(self._storage.writable_mounts) if mounts != () else (),
            ringless=()
            if values.get("rings") == 0
            else self._graph.ringless(self._storage.writable_places),
            **values,
        )
        if is_on():
            note_unknown(name for name in Sample.__slots__ if getattr(sample, name) is None)
        return sample

    def search(self) -> None:
        """Search for servers that the last sample lacks. Blocks. May run in any thread."""
        if self._servers is not None:
            self._servers.search()

    def close_files(self) -> None:
        """Close the files that stay open between samples; the next sample opens them again."""
        self._process.close_files()
        self._cgroup.close_files()
        if self._servers is not None:
            self._servers.close_files()

    def close(self) -> None:
        self._cgroup.close()
        self._process.close()
        self._storage.close()
        self._sockets.close()
        if self._servers is not None:
            self._servers.close()

    def _refresh(self, graph: BlockGraph | None, has_run: bool) -> None:
        """List the open files and sockets again, if they may have changed."""
        count = self._count() if has_run else self._descriptors
        age = time.monotonic() - self._refresh_time
        lost = self._sockets.lost and age >= RECONNECT_S
        same = count == self._descriptors and graph is self._known_graph
        if same and age < REFRESH_S and not lost:
            return
        self._refresh_time, self._descriptors = time.monotonic(), count
        self._known_graph = graph
        call = self._guard.call
        descriptors = call("listing open files", read_descriptors, self._pid)
        if graph is not None:
            self._storage.names = {os.path.basename(path) for path in graph.images}  # noqa: PTH119
        call("finding the storage of open files", self._storage.refresh, descriptors)
        call("finding sockets", self._sockets.refresh, descriptors, graph)

    def _count(self) -> int:
        """Return the number of the process's descriptors; 0 before Linux 6.2, -1 if unknown."""
        try:
            return os.stat(self._fd_directory).st_size  # noqa: PTH116 - half the cost
        except OSError:
            return -1

    def _placed(self, threads: tuple[Thread, ...]) -> tuple[Thread, ...] | None:
        return place_threads(self._pid, threads, self._storage, PROC)

    def _with_peers(
        self,
        connections: tuple[Socket, ...] | None,
        mounts: tuple[Mount, ...] | None,
        nodes: tuple[Node, ...] | None,
        sockets: SocketTable,
        storage: StorageTable,
    ) -> tuple[tuple[Socket, ...] | None, tuple[Mount, ...] | None]:
        """Return the connections and FUSE mounts with their servers."""
        if self._servers is None or not (connections or mounts):
            return connections, mounts
        exports = requested_exports(nodes or ())
        ends = self._sockets.peers(connections, sockets) if connections else {}
        wanted_ends = {
            ends[connection.inode]: exports.get(connection.node)
            for connection in connections or ()
            if connection.inode in ends
        }
        names = names_by_mount(self._storage.writable_places) if mounts else {}
        peers, served = self._servers.read_all(
            wanted_ends, mounts or (), names, storage=storage, sockets=sockets
        )
        if connections:
            connections = tuple(
                replace(connection, peer=peers.get(ends.get(connection.inode, 0)))
                for connection in connections
            )
        return connections, served if mounts else mounts


class EvidenceSampler:
    """Takes the samples of all processes. Create and use it in a running loop."""

    def __init__(self, on_fault: OnFault) -> None:
        """`on_fault` is called in the loop, once for each cause."""
        self._handover = Handover()

        def report(doing: str, error: Exception) -> None:
            self._handover.put(partial(on_fault, doing, error), more=False)

        self._guard = FaultGuard(report)
        self._workers = Workers(self._guard)
        self._tables = HostTables()
        self._budget = FileBudget()

    def count_jobs(self, running: Callable[[], int]) -> None:
        """Reserve descriptors for jobs. `running` returns the number of jobs."""
        self._budget.jobs = running

    def watch(self, process: Process) -> TargetWatch:
        identity = process.guest.identity
        return TargetWatch(
            identity.pid,
            identity.uid,
            workers=self._workers,
            handover=self._handover,
            tables=self._tables,
            guard=self._guard,
            budget=self._budget,
        )

    def close(self) -> None:
        self._workers.close()
        self._handover.close()


class TargetWatch:
    """Implements engine.ports.Watch.

    A sample that blocks occupies its thread. A second request then does not start another sample,
    but gets the result of the first.
    """

    __slots__ = (
        "_begun", "_budget", "_busy", "_callback", "_closed", "_detail", "_guard", "_handover",
        "_keeps", "_pid", "_reader", "_tables", "_uid", "_urgent", "_workers",
    )  # fmt: skip

    def __init__(
        self,
        pid: int,
        uid: int,
        *,
        workers: Workers,
        handover: Handover,
        tables: HostTables,
        guard: FaultGuard,
        budget: FileBudget,
    ) -> None:
        self._reader: Reader | None = None
        self._budget = budget
        self._keeps = False
        """Whether files may stay open after a sample."""
        self._pid, self._uid, self._tables = pid, uid, tables
        self._workers, self._handover, self._guard = workers, handover, guard
        self._callback: Callable[[Sample], None] | None = None
        self._detail = self._urgent = False
        self._busy = self._begun = False
        """Whether a sample was requested, and whether a thread has begun to take it."""
        self._closed = False

    def take_sample(
        self, callback: Callable[[Sample], None], *, detail: bool = False, urgent: bool = False
    ) -> None:
        self._callback, self._detail, self._urgent = callback, detail, urgent
        if self._busy:
            self._workers.grow()
        else:
            self._busy, self._begun = True, False
            self._keeps = self._budget.admit(self)
            self._workers.submit(self._work, uid=self._uid, instead=self._give_up, urgent=urgent)
        # Do this even if a sample was already requested: that sample may be complete, but wait to
        # be handed over together with a sample that blocks.
        self._handover.expect()

    @property
    def lacks_thread(self) -> bool:
        blocks = self._workers.blocked_by(self._uid)
        return self._busy and not self._begun and not blocks

    def close(self) -> None:
        self._closed = True
        self._callback = None
        self._budget.forget(self)
        if not self._busy:
            self._close_reader()

    def stop_keeping(self) -> None:
        """Implements file_budget.Keeper."""
        self._keeps = False
        if not self._busy:
            self._close_files()

    def _work(self) -> None:
        self._begun = True
        # After a fault, report an empty sample, which counts as unknown and never as idle.
        sample = self._guard.call("taking a sample", self._read)
        if not self._keeps:
            self._guard.call("closing files", self._close_files)
        if sample is None:
            self._give_up()
        else:
            self._hand_over(sample)
        if (reader := self._reader) is not None:
            self._guard.call("looking for servers", reader.search)

    def _give_up(self) -> None:
        self._hand_over(Sample(time.monotonic_ns() // 1000, "?", missed=self.lacks_thread))

    def _hand_over(self, sample: Sample) -> None:
        more = self._workers.waiting
        call = partial(self._deliver, sample)
        if not self._handover.put(call, more=more, urgent=self._urgent) and self._closed:
            self._close_reader()

    def _read(self) -> Sample:
        if self._reader is None:
            self._reader = Reader(self._pid, self._tables, self._guard)
        return self._reader.read(detail=self._detail)

    def _deliver(self, sample: Sample) -> None:
        self._busy = False
        if self._closed:
            self._close_reader()
            return
        if not self._keeps:
            self._close_files()  # `stop_keeping` may have been called during the sample.
        callback, self._callback = self._callback, None
        if callback is not None:
            callback(sample)

    def _close_files(self) -> None:
        if self._reader is not None:
            self._reader.close_files()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
