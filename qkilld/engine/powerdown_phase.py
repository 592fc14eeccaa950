"""The phase in which the guest is asked to shut down.

The phase uses the job only through LadderJob. It ends when asking has ended and the job is not
held. MaxSec= and the caller's limit (Request.ask_at_most) end the asking.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from qkilld.decision import powerdown
from qkilld.decision.powerdown import AskMethod, AskRecord, Attempt, Conclusion, Judgement
from qkilld.engine import events
from qkilld.engine.collaborators import Collaborators
from qkilld.engine.guest_asker import AskOutcome, GuestAsker
from qkilld.engine.monitor_link import MonitorLink
from qkilld.engine.standstill_check import StandstillCallback, StandstillCheck
from qkilld.model.block_state import BackgroundJob
from qkilld.model.constants import (
    INFINITY,
    Flag,
    GuestAsked,
    Phase,
    Result,
    Verdict,
)
from qkilld.model.guest_state import GuestOrder

if TYPE_CHECKING:
    from qkilld.engine.ladder_job import LadderJob
    from qkilld.engine.ports import Process

BEFORE_SIGNALS: Final = (Phase.POWERDOWN, Phase.QUIT)


class PowerdownPhase:
    __slots__ = (
        "_asker", "_clock", "_end", "_is_rechecked", "_job", "_journal", "_link", "_parts",
        "_past_attempt", "_process", "_standstill",
    )  # fmt: skip

    def __init__(
        self,
        job: LadderJob,
        process: Process,
        parts: Collaborators[Any],
        link: MonitorLink,
    ) -> None:
        self._job, self._process, self._clock = job, process, parts.clock
        self._journal, self._link = parts.journal, link
        self._parts = parts
        self._standstill: StandstillCheck | None = None
        self._is_rechecked = False
        self._asker: GuestAsker | None = None
        self._past_attempt: Attempt | None = None
        self._end: AskOutcome | None = None

    @property
    def attempt(self) -> Attempt | None:
        """The state of asking the guest. The next daemon needs it."""
        return self._asker.attempt if self._asker is not None else self._past_attempt

    def resume(self, past: Attempt | None) -> None:
        """Set the state of asking that an earlier daemon has saved. Call this before `begin`."""
        self._past_attempt = past

    def follow_up(self, ended: Attempt | None) -> None:
        """If a request to the guest by an earlier job may still take effect, count it as this job's
        request. A second press of the power button would cancel the shutdown of some systems. Call
        this before `begin`."""
        job = self._job
        if ended is None or Flag.POWERDOWN not in job.flags or Flag.NOWAIT in job.flags:
            return
        if powerdown.still_counts(ended, self._clock.now(), job.policy.powerdown):
            self._past_attempt = ended
            job.guest_asked = GuestAsked.ASKED

    def begin(self) -> None:
        """Ask the guest, or continue what an earlier daemon or job has begun."""
        job = self._job
        asks = tuple(
            AskRecord(AskMethod(rung.action), rung.at)
            for rung in job.rungs
            if rung.phase is Phase.POWERDOWN and rung.action in set(AskMethod)
        )
        self._asker = GuestAsker(
            self._link,
            self._clock,
            attempt=self._first_attempt(asks),
            agent_tried=any(one.method is AskMethod.AGENT for one in asks),
            span=job.policy.powerdown,
            help=job.request.help,
            may_ask=lambda: not job.control.held,
            stall=None if Flag.NOWAIT in job.flags else lambda: job.policy.storage_stall,
            on_jobs=self._waits_for,
            on_order=self._was_asked,
            on_pressed=self._was_pressed,
            on_judgement=self._judged,
            on_end=self._asker_ended,
            on_fault=lambda error: self._journal.write(
                events.internal_error(f"asking {job.guest.title}", error)
            ),
        )
        # If the process exited while no daemon ran, the guest cannot be asked. `note_exit` will
        # read its last events from the kept connection.
        if self._process.exited():
            return
        if self._asker.attempt.asked:
            self._asker.start()
        else:
            self._check_standstill(self._checked)

    def _check_standstill(self, callback: StandstillCallback) -> None:
        if self._standstill is None:
            self._standstill = StandstillCheck(self._job, self._process, self._parts)
        may_continue = GuestOrder.RESUME in self._job.request.help
        self._standstill.begin(callback, may_continue=may_continue, ask_until=self._ask_until)

    def _checked(self, obstacle: str, continued: bool) -> None:
        """Ask the guest, or end the asking if its process cannot run (`obstacle`)."""
        if self._asker is None:
            return
        if obstacle:
            self._job.turn_to(Verdict.STOPPED, (obstacle,), self._clock.now())
            self._ended(AskOutcome(GuestAsked.NOT_RUNNING, obstacle))
        else:
            if continued:
                self._asker.note_continued()
            self._asker.start()

    def lasts(self) -> bool:
        """Return whether the next rung must wait. This call may end the job."""
        job, now = self._job, self._clock.now()
        if self._process.exited():
            job.note_gone()
            return True
        if self._end is None and now >= self._ask_until:
            self.close()
            outcome = job.guest_asked
            if outcome is GuestAsked.ASKED:
                outcome = job.guest_asked = GuestAsked.IGNORED
            self._end = AskOutcome(outcome, "no more time was given for asking it")
            self._journal.write(events.asking_ended(job, self._end.reason))
        if self._end is None or job.control.held:
            limit = job.control.held_until if self._end is not None else self._ask_until
            job.wait_until(min(job.deadline, limit), limit)
            return True
        if Flag.NOWAIT in job.flags:
            job.error = self._end.reason
            job.finish(Result.FAILED)
        elif job.request.powerdown_only:
            job.finish(Result.SURVIVED)
        else:
            return False
        return True

    def set_span(self, span: int) -> None:
        if self._asker is not None:
            self._asker.set_span(span)

    def note_exit(self) -> None:
        """Determine the outcome of asking, and stop asking. Call this when the process has
        exited."""
        if self._job.phase in BEFORE_SIGNALS:
            self._judge_exit()
        self.close()

    def _judge_exit(self) -> None:
        if self._asker is None or self._job.guest_asked is GuestAsked.SHUT_DOWN:
            return
        if (order := self._asker.take_unanswered()) is not None:
            self._note_order(order)
        killed = os.WIFSIGNALED(self._process.exit_status())
        self._job.guest_asked = self._asker.judge_exit(killed=killed) or self._job.guest_asked

    def close(self) -> None:
        """Stop asking. May be called twice."""
        if self._standstill is not None:
            self._standstill.close()
        if self._asker is not None:
            self._past_attempt = self._asker.attempt
            self._asker.close()
            self._asker = None

    def _first_attempt(self, records: tuple[AskRecord, ...]) -> Attempt:
        now = self._clock.now()
        if self._past_attempt is not None:
            return powerdown.go_on(self._past_attempt, now)
        if records:
            down = self._job.verdict is Verdict.GUEST_SHUTDOWN
            return powerdown.go_on_unseen(records, now, shutting_down=down)
        return powerdown.start(now)

    @property
    def _latest(self) -> int:
        """Return the latest time for SIGTERM: the end of MaxSec= minus the shorter of GraceSec= and
        half of MaxSec=. If no signal follows, return the end of MaxSec=."""
        job, policy = self._job, self._job.policy
        is_without_signals = job.request.powerdown_only or Flag.NOWAIT in job.flags
        reserve = 0 if is_without_signals else min(policy.grace, policy.max // 2)
        return min(job.started + policy.max - reserve, INFINITY)

    @property
    def _ask_until(self) -> int:
        """Return the time at which MaxSec= or the caller's limit ends the asking."""
        return min(self._job.started + self._job.request.ask_at_most, self._latest)

    def _waits_for(self, jobs: Sequence[BackgroundJob]) -> None:
        job = self._job
        if job.verdict is not Verdict.FLUSHING:
            job.turn_to(Verdict.FLUSHING, tuple(one.title for one in jobs[:4]), self._clock.now())
        job.wait_until(self._ask_until, self._ask_until)
        job.enter(job.phase)

    def _was_pressed(self) -> None:
        """Record that somebody else has pressed the guest's power button. A job with NOWAIT then
        ends."""
        self._job.guest_asked = GuestAsked.ASKED
        if Flag.NOWAIT in self._job.flags:
            self._job.finish(Result.SIGNALLED)
        else:
            self._job.enter(self._job.phase)

    def _note_order(self, order: GuestOrder) -> None:
        self._job.note_rung(order.value, self._clock.now())
        self._job.guest_asked = GuestAsked.ASKED
        self._journal.write(events.guest_asked(self._job, self._job.rungs[-1]))

    def _was_asked(self, order: GuestOrder) -> None:
        job = self._job
        self._note_order(order)
        if Flag.NOWAIT in job.flags:
            job.finish(Result.SIGNALLED)
        else:
            until = min(self._clock.now() + job.policy.powerdown, self._ask_until)
            job.wait_until(until, self._ask_until)
            job.enter(job.phase)

    def _judged(self, judgement: Judgement) -> None:
        """Report how the guest reacts, and how long the job waits for it."""
        job = self._job
        down = judgement.conclusion is Conclusion.SHUTTING_DOWN
        verdict = Verdict.GUEST_SHUTDOWN if down else Verdict.UNKNOWN
        latest = job.history[-1] if job.history else None
        if latest is None or (latest.verdict, latest.reasons) != (verdict, (judgement.reason,)):
            job.turn_to(verdict, (judgement.reason,), self._clock.now())
        job.wait_until(min(judgement.until or INFINITY, self._ask_until), self._ask_until)
        # Enter the same phase again, so that the state of asking is saved for the next daemon.
        job.enter(job.phase)

    def _asker_ended(self, end: AskOutcome) -> None:
        """If the monitor is unreachable, check again whether the process is stopped. It may have
        been stopped meanwhile, or earlier samples may have come too late."""
        if end.outcome is not GuestAsked.UNREACHABLE or self._is_rechecked:
            self._ended(end)
            return
        self._is_rechecked, self._job.guest_asked = True, end.outcome

        def checked(obstacle: str, continued: bool) -> None:
            if obstacle or continued:
                self._checked(obstacle, continued)
            else:
                self._ended(end)

        self._check_standstill(checked)

    def _ended(self, end: AskOutcome) -> None:
        self._end, self._job.guest_asked = end, end.outcome
        self._journal.write(events.asking_ended(self._job, end.reason))
        self._job.advance()
