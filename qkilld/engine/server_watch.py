"""Watch the servers of a guest's network disks while a job stops the guest.

decision.server_risks decides what the end of a server means. The servers must be known before the
guest gets SIGTERM, because QEMU exits in a few milliseconds if it has lost its disks. So SIGTERM
waits until the servers are found, but at most TIMEOUT. This is done only for guests whose command
line names storage on a network.

On a busy host or after a restart of the daemon, QEMU may have been told to exit before the first
usable sample. A node without a connection then proves nothing: QEMU may have closed the connection,
or lost the server.

If a server certainly ended while QEMU used it, the job gets this risk at once. So the risk remains
if the disks are flushed later, or if another daemon continues the job. For that daemon, the servers
that may still run are saved (SavedServer): if it cannot find one of them again, this one has ended.

The servers of FUSE file systems are watched, too, as soon as the job's own samples show them.

If servers cannot be watched, for example because no descriptor is free, the job reports a risk.
Whatever fails here, the job continues.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from signal import SIGKILL, SIGTERM
from typing import TYPE_CHECKING, Any, Final

from qkilld.debug_log import note_once
from qkilld.decision.server_risks import (
    ServerEnds,
    needs_settling,
    risks_of_servers,
    risks_so_far,
)
from qkilld.decision.servers import NO_SERVERS, SavedServer, StorageServers, follow_servers
from qkilld.engine import events
from qkilld.engine.collaborators import Collaborators
from qkilld.engine.sampling import JobSampler
from qkilld.model.constants import USEC_PER_SEC, GuestAsked, Result
from qkilld.model.guest_state import GuestOrder
from qkilld.model.job import Risk
from qkilld.model.sample import Node, Sample

if TYPE_CHECKING:
    from qkilld.engine.ladder_job import LadderJob
    from qkilld.engine.ports import ObservedJob, Process, ServerExits, Timer

TIMEOUT: Final = USEC_PER_SEC * 3
"""How long (µs) SIGTERM waits until the servers are found. Finding them usually takes 30 ms."""
LAST_LOOK: Final = USEC_PER_SEC // 2
"""After a flush, SIGTERM waits at most this time (µs) for a sample of the connections."""
RETRY: Final = USEC_PER_SEC // 10
"""The second sample, for servers that the first did not find, follows after this time (µs)."""
MAX_RETRY: Final = USEC_PER_SEC * 4 // 10
"""The time (µs) between samples doubles each time, up to this limit."""
MAX_SAMPLES: Final = 4
"""After this many samples, SIGTERM waits only if the search for the servers is still in progress,
as on a busy host or among thousands of processes."""
MAX_CLOSED_TIME: Final = USEC_PER_SEC // 50
"""The time limit (µs) for asking the kernel which end of each connection was closed first. Each
connection takes 20 µs, but up to 20 ms while other threads use the same interface of the kernel.
For connections that are not reached in this time, the answer is unknown."""
MAX_RISKS: Final = 16
"""If a running job has so many risks, no further ended servers are added: a server behind another
one may be replaced every second."""
_SLACK: Final = 20_000
"""A server that started less than this time (µs) before the job counts as started after it, because
the kernel gives start times in steps of 10 ms."""

_UNWATCHED: Final = Risk(
    "unknown", "qkilld could not watch whether all servers of its disks outlived the guest"
)
_UNSETTLED: Final = Risk(
    "unknown",
    "the job was cancelled before it was known whether the servers of its disks were being stopped",
)
_NONE: Final = frozenset[int]()
_ENDING: Final = (SIGTERM.name, SIGKILL.name, GuestOrder.QUIT.value)


def is_stopping(job: ObservedJob) -> bool:
    """Return whether the job's process may be closing its disks and exports. It may do so from the
    time when it is told to exit, or its guest powers off, until its exit is noticed."""
    if job.result in (Result.EXITED, Result.KILLED):
        return False
    was_told = any(rung.action in _ENDING for rung in job.rungs)
    return was_told or job.guest_asked is GuestAsked.SHUT_DOWN


class ServerWatch:
    __slots__ = (
        "_clock", "_closed_first", "_exits", "_has_failed", "_is_late", "_job", "_late_nodes",
        "_parts", "_process", "_retry", "_sampler", "_samples", "_saved", "_servers", "_stopping",
        "_timer", "_was_flushed", "_watched", "_young", "until",
    )  # fmt: skip

    def __init__(self, job: LadderJob, process: Process, parts: Collaborators[Any]) -> None:
        self._job, self._process, self._clock = job, process, parts.clock
        self._sampler = JobSampler(job, process, parts.sampler, parts.clock)
        self._parts = parts
        self._exits: ServerExits | None = None
        self._servers: StorageServers | None = None
        self._closed_first: dict[str, bool] = {}
        self._stopping = _NONE
        self._watched = _NONE
        """All processes that were added to `_exits`."""
        self._saved: tuple[SavedServer, ...] = ()
        """What an earlier daemon knew, until the first sample."""
        self._young: set[int] = set()
        """The servers that started after the job."""
        self._was_flushed = False
        """Whether a flush had already proven at the last sample that all data is safe."""
        self._samples, self._retry = 0, RETRY
        self._timer: Timer | None = None
        self._has_failed = False
        self._is_late = False
        """Whether QEMU may have begun to close its disks before its servers were watched."""
        self._late_nodes: tuple[Node, ...] = ()
        """If `_is_late`, the nodes that may lose data."""
        self.until = 0
        """SIGTERM waits until this time (µs, CLOCK_MONOTONIC); 0 if it does not wait."""

    @property
    def is_needed(self) -> bool:
        """Whether the guest may have storage on a network, and the job uses evidence."""
        can = self._parts.sampler is not None and self._parts.server_exits is not None
        return can and self._job.guest.label.remote and self._job.by_evidence

    @property
    def to_save(self) -> tuple[SavedServer, ...]:
        """The servers that the next daemon should watch."""
        servers, exits = self._servers, self._exits
        if servers is None or exits is None or not self._job.running:
            return self._saved
        known = [(pid, exits.started(pid), left) for pid, left in servers.to_save.items()]
        return tuple(SavedServer(p, at, left) for p, at, left in known if at is not None)

    def restore(self, saved: Sequence[SavedServer]) -> None:
        """Continue with the servers that an earlier daemon has saved. Call this before `begin`."""
        self._saved = tuple(saved)

    def begin(self) -> None:
        """If needed, search for the servers, and call the job's `advance` when they are found."""
        self._was_flushed = self._job.flush.proven  # An earlier daemon may have flushed the disks.
        if self.is_needed and self._parts.server_exits is not None:
            self._is_late = is_stopping(self._job)
            with self._failures():
                self._exits = self._parts.server_exits(self._process)
                self.until = self._clock.now() + TIMEOUT
                self._take_sample()
            if self._has_failed:
                self._end_search()

    def note_sample(self, sample: Sample) -> None:
        """Record the connections that a sample of the guest shows."""
        if self._servers is NO_SERVERS and not (sample.nodes or sample.mounts or self._saved):
            return
        with self._failures():
            before, servers = self._servers, follow_servers(self._servers, sample)
            self._servers = servers
            if servers is not None and (servers.mounts or self._saved):
                self._watch_mounts()
            if servers is None or self._exits is None:
                return
            if before is None and (self._is_late or is_stopping(self._job)):
                servers = replace(servers, disconnected=(), unchecked=())
                nodes = [node for node in sample.nodes or () if not node.read_only]
                self._late_nodes = tuple(n for n in nodes if n.protocol != "vhost-user")
            servers = self._servers = self._with_saved(self._exits, servers)
            self._watch(self._exits, before or NO_SERVERS, servers, sample)
            self._was_flushed = self._job.flush.proven

    def note_flush(self) -> None:
        """Call this when disks have been flushed, before the guest may exit."""
        servers, exits = self._servers, self._exits
        if servers is None or exits is None or not self._job.flush.proven:
            return
        self._end_search()
        with self._failures():
            self._note_ends(exits, servers, None)
            if servers.connected:
                # A connection may have been replaced before the flush.
                self.until = self._clock.now() + LAST_LOOK
                self._sampler.take_sample(self._seen, detail=False)

    def _with_saved(self, exits: ServerExits, servers: StorageServers) -> StorageServers:
        saved, self._saved = self._saved, ()
        for one in saved:
            exits.add(one.pid, one.started)
        self._watched |= {one.pid for one in saved}
        return servers.with_left({**{one.pid: one.left for one in saved}, **servers.left})

    def _watch_mounts(self) -> None:
        """If only mounts need the watch, begin it."""
        watch, job = self._parts.server_exits, self._job
        is_over = not job.running or self._has_failed
        if watch is not None and self._exits is None and job.by_evidence and not is_over:
            self._exits = watch(self._process)

    def _watch(
        self, exits: ServerExits, before: StorageServers, servers: StorageServers, sample: Sample
    ) -> None:
        wanted = servers.lasting | servers.serving
        for pid in wanted - self._watched:
            exits.add(pid, sample.at)
            started = exits.started(pid)
            # If the process started after the sample, it is not the server.
            if started is not None and self._job.started - _SLACK < started <= sample.at + _SLACK:
                self._young.add(pid)
        # If a process that may have been the server of a file system has ended, the sample may no
        # longer show it.
        self._note_ends(exits, before, sample)
        self._note_ends(exits, servers, sample)
        for pid in self._watched - wanted:
            exits.remove(pid)
        self._watched = wanted
        self._young &= wanted

    def _note_ends(
        self, exits: ServerExits, servers: StorageServers, sample: Sample | None
    ) -> None:
        """Add the risks of the servers that certainly ended while QEMU used them, unless QEMU had
        nothing to lose any more."""
        if self._was_flushed:
            return
        ended = frozenset(pid for pid in servers.lasting if exits.has_ended(pid))
        risks = risks_so_far(servers, frozenset(self._young), ended, sample)
        if servers.incomplete:
            risks += (_UNWATCHED,)
        known = self._job.risks
        new = tuple(risk for risk in risks if risk not in known)
        self._job.risks = (*known, *new[: max(MAX_RISKS - len(known), 0)])

    def note_exit(self) -> bool:
        """Call this when the guest has just exited. Return whether `risks` must wait for SETTLE."""
        servers, exits = self._servers, self._exits
        if servers is None or exits is None:
            return False
        with self._failures():
            latest = self._clock.now() + MAX_CLOSED_TIME
            for name, server in servers.connected.items():
                if server.node.protocol == "nbd" and self._clock.now() < latest:
                    closed_first = exits.closed_first(server.tcp_id)
                    if closed_first is not None:
                        self._closed_first[name] = closed_first
            self._stopping = self._parts.stopping(servers.serving)
        return not self._has_failed and needs_settling(servers, self._closed_first)

    def risks(self, ended: int, *, settled: bool) -> tuple[Risk, ...]:
        """Return the risks of the guest's exit at `ended`. Call this once, after `note_exit` and
        before `close`. `settled`: whether SETTLE has passed, or `note_exit` returned False."""
        if self._exits is not None and not self._has_failed:
            with self._failures():
                known = self._job.risks
                risks = tuple(r for r in self._risks(self._exits, ended) if r not in known)
                return risks if settled else (*risks, _UNSETTLED)
        if self._has_failed and not self.is_needed:
            return (_UNWATCHED,)
        if self._has_failed or self.is_needed:
            return risks_of_servers(None, ServerEnds(guest_started=0, guest_ended=ended))
        return ()

    def _risks(self, exits: ServerExits, ended: int) -> tuple[Risk, ...]:
        before, after = exits.ended()
        started = self._clock.started_at(self._process.guest.identity.start_time)
        ends = ServerEnds(
            before=before,
            after=after,
            stopping=self._stopping,
            young=frozenset(self._young),
            closed_first=self._closed_first,
            guest_started=started,
            guest_ended=ended,
        )
        risks = risks_of_servers(self._servers, ends)
        connected = {} if self._servers is None else self._servers.connected
        for node in self._late_nodes:
            # Until a node's reconnect-delay has passed, QEMU does not exit with unwritten data
            # (decision/risk.py).
            keeps = node.reconnect or 0
            if node.name not in connected and ended >= started + keeps * USEC_PER_SEC:
                title = f"{node.protocol} node {node.name}"
                text = f"it is not known whether {title} had its server until QEMU closed it"
                risks += (Risk("unknown", text),)
        if exits.unwatched and self._servers is not None:
            nodes, first = connected.items(), self._closed_first
            others = [one.lasting for one in self._servers.mounts.values()]
            others += [one.lasting for name, one in nodes if not one.outlived(first.get(name))]
            if exits.unwatched & frozenset(self._servers.left).union(*others):
                risks += (_UNWATCHED,)
        return risks

    def close(self) -> None:
        """May be called twice."""
        self._end_search()
        exits, self._exits = self._exits, None
        if exits is not None:
            with self._failures():
                exits.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Log exceptions, so that they do not reach the job."""
        try:
            yield
        except Exception as error:
            self._has_failed = True
            if isinstance(error, OSError):
                note_once("watching servers", error)
            else:
                doing = f"watching the servers of {self._job.guest.title}"
                self._parts.journal.write(events.internal_error(doing, error))

    def _take_sample(self) -> None:
        self._timer = None
        self._samples += 1
        with self._failures():
            self._sampler.take_sample(self._seen, detail=True)

    def _seen(self, sample: Sample) -> None:
        if not self._job.running:
            return
        self.note_sample(sample)
        if not self.until:
            return  # The search has already ended.
        servers = self._servers
        is_found = servers is not None and not servers.unfound
        if servers is not None and servers.lacks_connections:
            # The first sample may have missed a connection.
            is_found = is_found and self._samples > 1
        # An empty sample replaces a late one, so the search may still be in progress.
        searches = sample.searching or sample.state == "?"
        is_over = self._samples >= MAX_SAMPLES and not searches
        is_late = self._clock.now() >= self.until
        if is_found or is_over or is_late or self._has_failed or self._job.flush.proven:
            self._end_search()
            # The call is delayed because `begin` may be the caller.
            self._clock.call_at(self._clock.now(), self._job.advance)
        elif self._timer is None:
            self._timer = self._clock.call_at(self._clock.now() + self._retry, self._take_sample)
            self._retry = min(2 * self._retry, MAX_RETRY)

    def _end_search(self) -> None:
        """End the search for servers. From now on, the job's own samples show the connections."""
        self.until = 0
        self._sampler.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
