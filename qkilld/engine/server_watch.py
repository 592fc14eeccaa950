"""Watch the servers of a guest's network disks while the guest is stopped.

decision.servers decides what their end means. The servers must be known before the guest gets
SIGTERM, because a guest that has lost its disks exits in a few milliseconds. So SIGTERM waits until
they are found, for at most TIMEOUT. Only guests whose command line names storage on a network are
watched.
"""

from __future__ import annotations

from signal import SIGKILL, SIGTERM
from typing import Any, Final

from qkilld.decision.servers import (
    ServerEnds,
    StorageServers,
    follow_servers,
    needs_settling,
    risks_of_servers,
)
from qkilld.engine.collaborators import Collaborators
from qkilld.engine.ladder_job import LadderJob
from qkilld.engine.ports import ObservedJob, Process, ServerExits, Timer
from qkilld.engine.sampling import JobSampler
from qkilld.model.constants import USEC_PER_SEC, GuestAsked, Result
from qkilld.model.guest_state import GuestOrder
from qkilld.model.job import Risk
from qkilld.model.sample import Sample

TIMEOUT: Final = USEC_PER_SEC * 3 // 2
"""The longest time (µs) that SIGTERM waits for the servers to be found. It usually takes 30 ms."""
RETRY: Final = USEC_PER_SEC // 10
"""After this time (µs), the next sample looks for servers that were not found."""
MAX_SAMPLES: Final = 4

_ENDING: Final = (SIGTERM.name, SIGKILL.name, GuestOrder.QUIT.value)


def is_stopping(job: ObservedJob) -> bool:
    """Return whether the job's process may be closing its disks and exports: it was told to exit,
    or its guest has powered off, and it has not exited, as far as known."""
    if job.result in (Result.EXITED, Result.KILLED):
        return False
    was_told = any(rung.action in _ENDING for rung in job.rungs)
    return was_told or job.guest_asked is GuestAsked.SHUT_DOWN


class ServerWatch:
    def __init__(self, job: LadderJob, process: Process, parts: Collaborators[Any]) -> None:
        self._job, self._process, self._clock = job, process, parts.clock
        self._sampler = JobSampler(process, parts.sampler, parts.clock)
        self._parts = parts
        self._exits: ServerExits | None = None
        self._servers: StorageServers | None = None
        self._closed_first: dict[str, bool] = {}
        self._stopping = frozenset[int]()
        self._samples = 0
        self._timer: Timer | None = None
        self.until = 0
        """SIGTERM waits until this time; 0 if it does not wait."""

    @property
    def is_needed(self) -> bool:
        """Whether the guest may have storage on a network, and the job goes by evidence."""
        can = self._parts.sampler is not None and self._parts.server_exits is not None
        return can and self._job.guest.label.remote and self._job.by_evidence

    def begin(self) -> None:
        """If needed, look for the servers, and call the job's `advance` when they are found."""
        if self.is_needed and self._parts.server_exits is not None:
            self.until = self._clock.now() + TIMEOUT
            self._exits = self._parts.server_exits(self._process)
            self._take_sample()

    def note_sample(self, sample: Sample) -> None:
        """Follow the connections in any sample of the guest."""
        before, self._servers = self._servers, follow_servers(self._servers, sample)
        if self._servers is None or self._exits is None:
            return
        known = frozenset[int]() if before is None else before.lasting
        for pid in self._servers.lasting - known:
            self._exits.add(pid, sample.at)

    def note_exit(self) -> bool:
        """Note that the guest has just exited. Return whether `risks` must wait for SETTLE."""
        servers, exits = self._servers, self._exits
        if servers is None or exits is None:
            return False
        for name, server in servers.connected.items():
            if server.node.protocol == "nbd":
                closed_first = exits.closed_first(server.tcp_id)
                if closed_first is not None:
                    self._closed_first[name] = closed_first
        self._stopping = self._parts.stopping(servers.serving)
        return needs_settling(servers, self._closed_first)

    def risks(self, ended: int) -> tuple[Risk, ...]:
        """Return the risks after the guest has exited at `ended`. Call it once, after `note_exit`
        and before `close`."""
        if self._exits is None:
            return ()
        before, after = self._exits.ended()
        ends = ServerEnds(
            before=before,
            after=after,
            stopping=self._stopping,
            closed_first=self._closed_first,
            guest_started=self._clock.started_at(self._process.guest.identity.start_time),
            guest_ended=ended,
        )
        return risks_of_servers(self._servers, ends)

    def close(self) -> None:
        """May be called twice."""
        self._end_search()
        self._sampler.close()
        if self._exits is not None:
            self._exits.close()
            self._exits = None

    def _take_sample(self) -> None:
        self._timer = None
        self._samples += 1
        self._sampler.take_sample(self._seen, detail=True)

    def _seen(self, sample: Sample) -> None:
        if not self._job.running:
            return
        self.note_sample(sample)
        if not self.until:
            return  # The sample is late.
        is_found = self._servers is not None and not self._servers.unfound
        if is_found or self._samples >= MAX_SAMPLES:
            self._end_search()
            # The call is delayed because `begin` may be the caller.
            self._clock.call_at(self._clock.now(), self._job.advance)
        elif self._timer is None:
            self._timer = self._clock.call_at(self._clock.now() + RETRY, self._take_sample)

    def _end_search(self) -> None:
        self.until = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
