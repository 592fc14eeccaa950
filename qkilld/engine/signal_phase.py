"""The phase that sends signals, based on samples of the process.

decision.ladder decides, and SignalPhase carries out the decisions. It takes the samples, and checks
the process's identity before every signal. It uses the job only through LadderJob.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto
from signal import SIGCONT, SIGKILL, SIGTERM, Signals
from typing import TYPE_CHECKING, Final

from qkilld.decision.ladder import Action, Decision, JobFacts, Promise, decide, sample_interval
from qkilld.decision.risk import risks_of_kill
from qkilld.decision.verdict import assess, is_dead, is_news
from qkilld.engine import events
from qkilld.engine.checks import check_process
from qkilld.engine.job_trace import JobTrace
from qkilld.engine.sampling import JobSampler
from qkilld.engine.snapshot import Snapshot
from qkilld.engine.yank_rung import YankRung
from qkilld.model.constants import INFINITY, USEC_PER_SEC, Phase, Result
from qkilld.model.errors import ProcessChanged, UnknownIdentity
from qkilld.model.job import Risk, Rung
from qkilld.model.sample import Sample

if TYPE_CHECKING:
    from qkilld.engine.ladder_job import LadderJob
    from qkilld.engine.ports import Clock, Journal, Process, Sampler

RECHECK: Final = USEC_PER_SEC
"""If the process's executable is unreadable, a signal is tried again after this time (µs)."""

_CONTINUE: Final = SIGCONT.name
_SIGNALS: Final = {
    Action.CONTINUE: SIGCONT,
    Action.TERMINATE: SIGTERM,
    Action.KILL: SIGKILL,
}


class _Intent(Enum):
    """Whether the intention to send SIGKILL is saved. If saving takes too long, the intention
    counts as WRITTEN."""

    NONE = auto()
    BEING_WRITTEN = auto()
    WRITTEN = auto()


class SignalPhase:
    __slots__ = (
        "_clock", "_continued_at", "_could_yank", "_executables", "_forced", "_intent", "_job",
        "_journal", "_kill_at", "_load", "_on_sample", "_process", "_promise", "_sampler",
        "_term_at", "_trace", "_unidentified_since", "_yank",
    )  # fmt: skip

    def __init__(
        self,
        job: LadderJob,
        process: Process,
        *,
        clock: Clock,
        journal: Journal,
        sampler: Sampler | None,
        executables: tuple[str, ...],
        trace: JobTrace,
        yank: YankRung,
        load: Callable[[], int],
        on_sample: Callable[[Sample], None],
    ) -> None:
        """`load` returns the number of running jobs. `on_sample` gets each sample."""
        self._job, self._process = job, process
        self._clock, self._journal, self._trace = clock, journal, trace
        self._sampler = JobSampler(job, process, sampler, clock)
        self._executables = executables
        self._load, self._on_sample = load, on_sample
        self._yank = yank
        self._intent = _Intent.NONE
        self._forced = False
        """Whether to send SIGKILL, whatever the ladder decides."""
        self._could_yank = False
        self._term_at: int | None = None
        self._kill_at: int | None = None
        self._continued_at: int | None = None
        self._promise = Promise()
        self._unidentified_since: int | None = None

    @property
    def killed(self) -> bool:
        return self._kill_at is not None

    @property
    def forced(self) -> bool:
        return self._forced

    @property
    def must_kill(self) -> bool:
        """Whether SIGKILL was sent, or will be sent whatever the ladder decides."""
        return self.killed or self._forced

    @property
    def sent(self) -> bool:
        """Whether SIGTERM or SIGKILL was sent."""
        return self._term_at is not None or self._kill_at is not None

    @property
    def is_sampling(self) -> bool:
        return self._sampler.is_pending

    @property
    def facts(self) -> JobFacts:
        job = self._job
        return JobFacts(
            flags=job.flags,
            policy=job.policy,
            started=job.started,
            term_at=self._term_at,
            kill_at=self._kill_at,
            continued_at=self._continued_at,
            yank_at=self._yank.at,
            may_yank=self._yank.possible,
            continues=sum([rung.action == _CONTINUE for rung in job.rungs]),
            assessment=job.assessment,
            jobs=self._load(),
            control=job.control,
            promise=self._promise,
        )

    def resume(self, past: Snapshot) -> None:
        """Continue the ladder of an earlier daemon, without repeating the signals that it has
        sent."""
        self._term_at, self._kill_at = past.sent_at(SIGTERM), past.sent_at(SIGKILL)
        self._continued_at = past.sent_at(SIGCONT)
        self._forced, self._promise = past.forced, past.promise
        self._yank.resume(past)

    def advance(self) -> None:
        job = self._job
        while job.running:
            now = self._clock.now()
            decision = self._decide(now)
            # The process may exit right at the deadline, so check for its exit before the next
            # rung.
            if decision.action is not Action.LEAVE and self._process.exited():
                job.note_gone()
                return
            action = Action.KILL if self._forced and not self.killed else decision.action
            if action not in (Action.KILL, Action.SAMPLE):
                self._withdraw()
            # Reset this only before the deadline: after it, a due signal is being retried.
            if action in (Action.WAIT, Action.SAMPLE) and decision.deadline > now:
                self._unidentified_since = None
            match action:
                case Action.WAIT:
                    self._yank.withdraw()
                    job.wait_until(decision.deadline, decision.wake)
                    return
                case Action.SAMPLE:
                    # `advance` is called again when the sample arrives or times out.
                    assessment = job.assessment
                    detail = assessment is not None and assessment.wants_detail
                    # If SIGKILL waits for this sample, take it before the samples of thousands of
                    # other jobs.
                    urgent = decision.deadline <= now
                    self._sampler.take_sample(self._seen, detail=detail, urgent=urgent)
                    return
                case Action.YANK:
                    # `advance` is called again when the reply arrives or times out.
                    if self._yank.step():
                        return
                case Action.GIVE_UP:
                    job.finish(Result.SURVIVED)
                case Action.LEAVE:
                    job.finish(Result.SIGNALLED)
                case Action.CONTINUE | Action.TERMINATE | Action.KILL:
                    if not self.climb(_SIGNALS[action]):
                        return

    def _decide(self, now: int) -> Decision:
        decision = decide(self.facts, now)
        self._promise = decision.promise or self._promise
        return decision

    def force(self) -> None:
        self._forced = True
        self.climb(SIGKILL)

    def as_intended(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot, and record in it when SIGKILL is due, and whether it is forced or
        about to be sent."""
        if snapshot.result is None:
            # A job is saved after a sample, before the next decision.
            self._decide(self._clock.now())
        snapshot = replace(snapshot, forced=self._forced, promise=self._promise)
        if self._intent is _Intent.NONE or snapshot.result is not None:
            return snapshot
        rung = Rung(Phase.KILL, SIGKILL.name, self._clock.now())
        known, of_kill = snapshot.risks, self._risks_of_kill()
        rungs, risks = (*snapshot.rungs, rung), (*known, *of_kill)
        return replace(snapshot, rungs=rungs, risks=risks, earlier_risks=len(known))

    def climb(self, number: Signals) -> bool:
        """Send the signal of a rung, then record and report it.

        Return False if the signal must wait, because the intention to send SIGKILL is not saved
        yet, or because the process's executable is unreadable.
        """
        job = self._job
        if number == SIGKILL and not self._is_written_down():
            return False
        try:
            self.send(number)
        except UnknownIdentity as error:
            job.note_unsent()
            self._try_again(number, error)
            return False
        except ProcessChanged as error:
            self._end_as_changed(error)
        except ProcessLookupError:
            job.note_gone()
        except PermissionError:
            job.error = f"the kernel does not let qkilld send {number.name}"
            self._journal.write(events.signal_refused(job, number))
            job.finish(Result.FAILED)
        else:
            self._journal.write(events.signal_sent(job, job.rungs[-1]))
            job.enter(Phase.REAP if number == SIGKILL else job.phase)
        return True

    def send(self, number: Signals) -> None:
        """Send a signal. Raises what `check_identity` raises, and PermissionError."""
        job = self._job
        self.check_identity()
        self._process.signal(number)
        job.note_signal()
        now = self._clock.now()
        if number == SIGKILL:
            self._kill_at = now
            job.deadline = min(now + job.policy.reap, INFINITY)
            job.phase = Phase.KILL
            job.risks = (*job.risks, *self._risks_of_kill())
            self._intent = _Intent.NONE
        elif number == SIGCONT:
            self._continued_at = now
        else:
            self._term_at = now
            # Set the deadline now: the next decision waits for a sample, and callers may read the
            # deadline before that.
            job.deadline = self._decide(now).deadline
        job.note_rung(number.name, now)

    def check_identity(self) -> None:
        """Check that the process is still the QEMU of this guest. Raises what `check_process`
        raises."""
        check_process(self._process, self._job.guest.identity, self._executables)
        self._unidentified_since = None

    def check_on_request(self) -> None:
        """Check the identity for a caller's request, without sending a signal. If the identity
        has changed, end the job as failed.

        Raises ProcessChanged, UnknownIdentity.
        """
        try:
            self.check_identity()
        except ProcessLookupError:
            pass  # The pidfd will report the exit.
        except ProcessChanged as error:
            self._end_as_changed(error)
            raise

    def check_resumed(self) -> None:
        """End the job as failed if the process's identity has changed."""
        if not self._process.exited():
            with contextlib.suppress(ProcessChanged, UnknownIdentity):
                self.check_on_request()

    def close(self) -> None:
        self._sampler.close()

    def _is_written_down(self) -> bool:
        """Return whether the intention to send SIGKILL is WRITTEN. If not, start to save it.

        If qkilld dies right after sending SIGKILL, the next daemon must not report "exited".
        SIGTERM needs no such record: the next daemon may send it again, and QEMU ignores the second
        one.
        """
        if self._intent is not _Intent.NONE:
            return self._intent is _Intent.WRITTEN
        self._intent = _Intent.BEING_WRITTEN
        self._job.enter(Phase.KILL)
        self._job.write_down(self._go_on)  # Calls back at once if jobs are not saved.
        return False

    def _go_on(self) -> None:
        if self._job.running and self._intent is _Intent.BEING_WRITTEN:
            self._intent = _Intent.WRITTEN
            self._job.advance()

    def _withdraw(self) -> None:
        """Withdraw the intention to send SIGKILL, because progress or a caller delays SIGKILL."""
        if self._intent is not _Intent.NONE:
            self._intent = _Intent.NONE
            self._job.enter(Phase.TERMINATE)

    def _risks_of_kill(self) -> tuple[Risk, ...]:
        """Return the risks of a SIGKILL that is sent now."""
        job = self._job
        evidence = job.assessment if job.by_evidence else None
        return () if job.flush.proven else risks_of_kill(evidence)

    def _try_again(self, number: Signals, error: UnknownIdentity) -> None:
        job, now = self._job, self._clock.now()
        if self._unidentified_since is None:
            self._unidentified_since = now
        reap = job.policy.reap
        tried = now - self._unidentified_since
        latest = max(job.started + job.policy.max, job.control.not_before) + reap
        if error.exiting and number == SIGKILL and tried >= reap:
            # All threads of the process are exiting, so SIGKILL would change nothing.
            job.finish(Result.SURVIVED)
        elif now >= latest and tried >= reap:
            job.error = f"{number.name} could not be sent before MaxSec= had passed: {error}"
            job.finish(Result.SURVIVED)
        else:
            job.wait_until(job.deadline, now + RECHECK)

    def _end_as_changed(self, error: ProcessChanged) -> None:
        job = self._job
        job.error, job.error_name = str(error), error.bus_name
        self._journal.write(events.process_changed(job, self._process.guest.identity))
        job.finish(Result.FAILED)

    def _seen(self, sample: Sample) -> None:
        job = self._job
        if not job.running:
            return
        before = job.assessment
        # Ignore a late sample if it is older than the empty one that replaced it.
        if before is None or sample.at >= before.last.at:
            job.assessment = evidence = assess(before, sample, sample_interval(self._load()))
            self._trace.record(sample)
            self._on_sample(sample)
            if evidence.verdict is not job.verdict:
                job.turn_to(evidence.verdict, evidence.reasons[:4], evidence.last.at)
            could_yank, self._could_yank = self._could_yank, self._yank.possible
            if before is None or could_yank != self._could_yank or is_news(before, evidence):
                job.enter(job.phase)
            else:
                job.note_sample()
            if self._kill_at is not None and is_dead(sample):
                job.note_gone()
                return
        job.advance()
