"""The rung before SIGKILL: cut off dead storage, so that QEMU can finish its other disks.

QEMU's command for this is `yank`. Its "instances" are connections; decision.yank decides which of
them to cut off. The command needs a monitor connection that was open before SIGTERM; QEMU then
answers in 1 to 3 ms. Data on storage that was cut off is at risk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qkilld.decision import yank
from qkilld.decision.waits import blind_to, tells_nothing
from qkilld.decision.yank import CutOff
from qkilld.engine import events
from qkilld.engine.flush_phase import FlushPhase
from qkilld.engine.monitor_link import MonitorLink
from qkilld.engine.snapshot import YANK, Snapshot
from qkilld.model.block_state import MAX_CONNECTIONS, YankInstance
from qkilld.model.constants import USEC_PER_SEC, Phase
from qkilld.model.job import Risk

if TYPE_CHECKING:
    from qkilld.engine.ladder_job import LadderJob
    from qkilld.engine.ports import Clock, Journal

TIMEOUT: Final = 5 * USEC_PER_SEC
"""Timeout (µs) for each of the commands `query-yank` and `yank`, and for opening the monitor, if
necessary. If one of them has no reply when its timeout expires, SIGKILL follows."""
RETRY: Final = USEC_PER_SEC
"""The time (µs) until the next sample, if a source of the last one was unreadable."""
MAX_ROUNDS: Final = 8
"""Storage is cut off at most this often. A hostile QEMU could name another connection each time,
and so delay SIGKILL by StorageStallSec= each time."""
_NOTHING: Final = frozenset[str]()


class YankRung:
    __slots__ = (
        "_allowed", "_attempt", "_clock", "_exhausted", "_flush_phase",
        "_instances", "_job", "_journal", "_link", "_unanswered", "_until", "at", "cut_off_names",
    )  # fmt: skip

    def __init__(
        self,
        job: LadderJob,
        clock: Clock,
        journal: Journal,
        link: MonitorLink,
        flush_phase: FlushPhase,
        *,
        allowed: bool,
    ) -> None:
        """`allowed` is the setting Yank=. `flush_phase` has the state of the disks before
        SIGTERM."""
        self._job, self._clock, self._journal, self._link = job, clock, journal, link
        self._allowed = allowed
        self._flush_phase = flush_phase
        self.at: int | None = None
        """When something was last yanked."""
        self.cut_off_names = _NOTHING
        """The names of the yanked instances."""
        self._unanswered: tuple[CutOff, ...] = ()
        """The connections for which `yank` has no reply yet. If QEMU exits before its reply is
        read, such connections count as cut off."""
        self._exhausted = False
        self._until: int | None = None
        """When the timeout of the current attempt expires; None if no attempt is in progress."""
        self._attempt = 0
        self._instances: tuple[YankInstance, ...] | None = None
        """The reply to `query-yank` of the current attempt, until it is used."""

    @property
    def possible(self) -> bool:
        """Whether there may be more storage to cut off."""
        link = self._link
        may_open = link.is_opening or link.is_kept or link.monitor is not None
        rounds = sum(rung.action == YANK for rung in self._job.rungs)
        return self._allowed and not self._exhausted and rounds < MAX_ROUNDS and may_open

    def resume(self, past: Snapshot) -> None:
        self.at, self.cut_off_names = past.rung_at(YANK), past.cut_off

    def step(self) -> bool:
        """Start an attempt to cut off storage, or continue the current one. Call this only with a
        fresh sample. After each reply, the attempt calls the job's `advance` instead of continuing:
        if the reply came late, the storage may have answered meanwhile, so the next step needs
        another sample.

        Return False if nothing more can be cut off: SIGKILL is then next.
        """
        now = self._clock.now()
        if self._instances is not None and self._may_see_more(now):
            self._job.wait_until(self._job.deadline, now + RETRY)
            return True
        if self._instances is not None:
            # Useless samples may have delayed this, so the deadline of `query-yank` may be over.
            self._until = now + TIMEOUT
            self._cut_off(self._instances)
        elif self._until is not None and now >= self._until:
            self._note_unanswered()
            self._give_up()
        elif self._until is None and not self._exhausted:
            self._begin()
        if self._exhausted:
            return False
        if self._until is not None:
            self._job.wait_until(self._job.deadline, self._until)
        return True

    def _may_see_more(self, now: int) -> bool:
        """Return whether a source of the last sample was unreadable, and the next sample may show
        it. Without it, healthy storage may look dead."""
        evidence = self._job.assessment
        in_time = self._until is not None and now < self._until
        return in_time and evidence is not None and bool(blind_to(evidence.last))

    def withdraw(self) -> None:
        """End the attempt, because progress or a caller delays SIGKILL. Do nothing while `yank`
        waits for its reply. Also do nothing after a sample that shows nothing, because such samples
        could make attempts start again without end."""
        evidence = self._job.assessment
        is_blind = evidence is not None and tells_nothing(evidence.last)
        if not self._unanswered and not is_blind:
            self._end_attempt()

    def note_exit(self) -> None:
        """Call this before the monitor reports that it was closed."""
        self._note_unanswered()
        self._attempt += 1

    def _begin(self) -> None:
        self._until = self._clock.now() + TIMEOUT
        if self._link.monitor is not None:
            self._query()
        else:
            self._link.open(lambda outcome: self._note_opened(), was_asked=True)

    def _note_opened(self) -> None:
        """Continue an attempt that had to wait for the monitor, for example after a restart of the
        daemon. First take a sample, because the storage may have answered meanwhile. If the monitor
        could not be opened, end the attempt."""
        if self._until is None or not self._job.running:
            return
        if self._link.monitor is None:
            self._give_up()
        self._end_attempt()
        self._job.advance()

    def _query(self) -> None:
        monitor = self._link.monitor
        assert monitor is not None
        self._attempt += 1
        attempt = self._attempt

        def handle_instances(instances: tuple[YankInstance, ...] | str | Exception) -> None:
            if attempt != self._attempt or not self._job.running:
                return
            if isinstance(instances, str | Exception):
                self._give_up(instances)
            else:
                self._instances = instances
            self._job.advance()

        monitor.query_yank(handle_instances)

    def _cut_off(self, instances: tuple[YankInstance, ...]) -> None:
        evidence, monitor, attempt = self._job.assessment, self._link.monitor, self._attempt
        self._instances = None
        chosen: tuple[CutOff, ...] = ()
        if evidence is not None:
            chosen = yank.choose(
                instances,
                evidence,
                known=self._flush_phase.storage,
                cut_off=self.cut_off_names,
                still_since=self._clock.now() - self._job.policy.stall,
            )[: max(0, MAX_CONNECTIONS - len(self.cut_off_names))]
        if not chosen or monitor is None:
            self._give_up()
            return

        def handle_reply(refused: str | Exception | None) -> None:
            if attempt != self._attempt or not self._job.running:
                return
            if refused:
                self._give_up(refused)
            else:
                self._exhausted = refused is None
                self.at = self._clock.now()
                self._note_unanswered()
                self._job.enter(Phase.TERMINATE)
            self._job.advance()

        self._unanswered = chosen
        monitor.yank([cutoff.instance for cutoff in chosen], handle_reply)

    def _note_unanswered(self) -> None:
        """Record `_unanswered` as cut off, even if `yank` has no reply yet."""
        chosen, self._unanswered = self._unanswered, ()
        if not chosen:
            return
        job = self._job
        self._until = None
        self.cut_off_names |= {cutoff.instance.name for cutoff in chosen}
        job.note_rung(YANK, self._clock.now())
        for cutoff in chosen:
            text = f"{', '.join(cutoff.disks)} was cut off: {cutoff.why}"
            job.risks = (*job.risks, Risk("yanked", text))
        self._journal.write(events.cut_off(job, chosen))

    def _end_attempt(self) -> None:
        self._until = self._instances = None
        self._attempt += 1

    def _give_up(self, why: str | Exception = "") -> None:
        self._end_attempt()
        self._unanswered = ()
        self._exhausted = True
        if isinstance(why, Exception):
            doing = f"cutting off storage of {self._job.guest.title}"
            self._journal.write(events.internal_error(doing, why))
