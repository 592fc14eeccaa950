"""The end of a guest's process.

decision.risk and decision.server_risks decide which data this end puts at risk. If the guest has
storage on a network, the job ends a little after the process (decision.server_risks.SETTLE), to
find out whether the servers were also being stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkilld.decision.risk import risks_of_death, risks_of_exit
from qkilld.decision.server_risks import SETTLE
from qkilld.engine.server_watch import ServerWatch
from qkilld.engine.signal_phase import SignalPhase
from qkilld.model.job import Risk

if TYPE_CHECKING:
    from qkilld.engine.ladder_job import LadderJob
    from qkilld.engine.ports import Clock, Process


class GuestEnd:
    __slots__ = (
        "_clock", "_is_settled", "_job", "_process", "_servers", "_settled_at", "_status",
        "at",
    )  # fmt: skip

    def __init__(
        self, job: LadderJob, process: Process, clock: Clock, servers: ServerWatch
    ) -> None:
        self._job, self._process = job, process
        self._clock, self._servers = clock, servers
        self.at: int | None = None
        """When the exit was noticed; CLOCK_MONOTONIC, µs."""
        self._settled_at = 0
        self._is_settled = True
        self._status = 0

    def note(self, signals: SignalPhase, *, wait: bool) -> bool:
        """Call this when the process has exited. Return whether the job can end now. If not,
        `job.note_gone` is called again later. Without `wait`, the job can always end now, even if
        its risks are not known yet."""
        now = self._clock.now()
        if self.at is None:
            self.at = now
            # Read now how the process has ended: this is unknown after its parent has reaped it.
            self._status = self._process.exit_status()
            is_known = self._job.flush.proven or signals.killed or self._status
            if not is_known and self._servers.note_exit():
                self._settled_at = now + SETTLE
                self._clock.call_at(self._settled_at, self._note_later)
        if not wait and now < self._settled_at:
            self._settled_at, self._is_settled = 0, False
        return now >= self._settled_at

    def risks(self, signals: SignalPhase) -> tuple[Risk, ...]:
        """Return the risks of an exit that was not caused by SIGKILL from qkilld."""
        job, ended = self._job, self.at if self.at is not None else self._clock.now()
        evidence, flushed = job.assessment if job.by_evidence else None, job.flush.proven
        terminated = signals.sent
        status = self._status
        if death := risks_of_death(status, evidence, terminated=terminated, flushed=flushed):
            return death
        started = self._clock.started_at(self._process.guest.identity.start_time)
        if risks := risks_of_exit(evidence, flushed=flushed, started=started, ended=ended):
            return risks
        return () if flushed else self._servers.risks(ended, settled=self._is_settled)

    def _note_later(self) -> None:
        if self._job.running:
            self._job.note_gone()
