"""One guest being stopped: the ladder climbed with real signals.

A job is driven by four things only: its start, the exit of its process, the time that its last
decision named, and a sample that was asked for. Each leads to `_advance`, which asks the judgement
what to do until that is to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from signal import SIGCONT, SIGKILL, SIGTERM, Signals
from typing import TYPE_CHECKING, Final

from qkilld.engine import events
from qkilld.engine.looking import Looking
from qkilld.engine.snapshot import Snapshot
from qkilld.engine.tracing import JobTrace
from qkilld.judgement.ladder import Action, Standing, at_risk, decide, lengthened, policy_for
from qkilld.judgement.verdict import Assessment, assess, is_dead
from qkilld.model.errors import Failed, NoSuchProcess
from qkilld.model.evidence import Sample
from qkilld.model.job import UNCONTROLLED, Request, Rung, Turn
from qkilld.model.policy import Policy
from qkilld.model.trace import Changed, Ended, Gone, Sent, Turned
from qkilld.model.words import INFINITY, Flag, Phase, Result, Verdict

if TYPE_CHECKING:
    from qkilld.engine.ports import Clock, Journal, Process, Sampler, Timer, Traces

MAX_HISTORY: Final = 100
"""Changes of the verdict that a receipt tells."""


class Job:
    """The ladder of one process.

    `phase` runs terminate → kill → reap → done, a job that needs no SIGKILL leaves two of them out.
    `result` is None while it runs. After its end nothing of a job changes any more.
    """

    def __init__(
        self,
        number: int,
        process: Process,
        request: Request,
        policy: Policy,
        clock: Clock,
        journal: Journal,
        sampler: Sampler | None,
        traces: Traces | None,
        *,
        load: Callable[[], int],
        on_change: Callable[[Job], None],
        on_end: Callable[[Job], None],
        on_survivor_gone: Callable[[Job], None],
    ) -> None:
        self.number = number
        self.guest = process.guest
        self.request = request
        self.flags = request.flags
        self.control = UNCONTROLLED
        self.phase = Phase.TERMINATE
        self.verdict = Verdict.UNKNOWN
        self.result: Result | None = None
        self.error = ""
        """With `failed`: what the kernel refused. With `cancelled`: why, where nobody asked."""
        self.rungs: list[Rung] = []
        self.history: list[Turn] = []
        self.assessment: Assessment | None = None
        self.data_at_risk = False
        """SIGKILL was sent while I/O was outstanding or moving, or none of that could be seen."""
        self.started = clock.now()
        self.ended: int | None = None
        self.deadline = INFINITY
        """When the next rung is due or the job gives up; CLOCK_MONOTONIC, µs."""

        self._process = process
        self._policy = policy_for(request.flags, policy, request.spans)
        self._term_at: int | None = None
        self._kill_at: int | None = None
        self._continued_at: int | None = None
        self._looking = Looking(process, sampler, clock)
        self._load = load
        self._clock = clock
        self._journal = journal
        self._on_change = on_change
        self._on_end = on_end
        self._on_survivor_gone = on_survivor_gone
        self._timer: Timer | None = None
        self._waiters: list[Callable[[], None]] = []
        self._trace = JobTrace(self, traces)

    @property
    def running(self) -> bool:
        return self.result is None

    @property
    def elapsed(self) -> int:
        """µs from the start to the end, or to now."""
        return (self._clock.now() if self.ended is None else self.ended) - self.started

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def standing(self) -> Standing:
        """What the next step is decided on."""
        return Standing(
            self.flags,
            self._policy,
            self._term_at,
            self._kill_at,
            self._continued_at,
            sum(rung.signal == SIGCONT for rung in self.rungs),
            self.assessment,
            self._load(),
            self.control,
        )

    def start(self) -> None:
        """Send the first signal.

        Raises NoSuchProcess where the process has just gone and Failed where the kernel refuses the
        signal; the job has not started then and the process is let go of.
        """
        first = SIGKILL if Flag.NOWAIT in self.flags and Flag.FORCE in self.flags else SIGTERM
        try:
            self._send(first)
        except ProcessLookupError:
            self._process.close()
            raise NoSuchProcess(f"Process {self.guest.identity.pid} has just exited") from None
        except PermissionError:
            self._process.close()
            self._journal.write(events.signal_refused(self, first))
            raise Failed(
                f"The kernel does not let qkilld signal process {self.guest.identity.pid}"
            ) from None
        self._journal.write(events.job_started(self))
        self._journal.write(events.signal_sent(self, self.rungs[-1]))
        self._process.watch(self._advance)

    def resume(self, past: Snapshot) -> None:
        """Take up what another has begun, in place of `start`. No signal is sent here."""
        self.guest, self.phase, self.verdict = past.guest, past.phase, past.verdict
        self.flags, self._policy, self.control = past.flags, past.policy, past.control
        self.started, self.ended = past.started, past.ended
        self.result, self.error, self.data_at_risk = past.result, past.error, past.data_at_risk
        self.rungs, self.history = list(past.rungs), list(past.history)
        self.assessment = past.assessment_at(self._clock.now())
        self._term_at, self._kill_at = past.sent_at(SIGTERM), past.sent_at(SIGKILL)
        self._continued_at = past.sent_at(SIGCONT)
        if self.running:
            if self._kill_at is not None:
                self.phase = Phase.REAP
            self._journal.write(events.job_resumed(self))
            for rung in self.rungs:
                self._trace.record(Sent(rung.at, rung.phase, rung.signal.name))
            self._process.watch(self._advance)
        elif self.result is Result.SURVIVED:
            self._process.watch(self._survivor_gone)

    def follow(self) -> None:
        """Go on from the first signal; to be called once, after `start` or `resume`."""
        if self.result is Result.SURVIVED and self._process.exited():
            self._survivor_gone()
        self._advance()

    def snapshot(self) -> Snapshot:
        """The job as it is now."""
        return Snapshot.of_job(self)

    def join(self, request: Request) -> None:
        """Let a further request take part: it may add FORCE and lengthen spans, never less.

        FORCE with NOWAIT asks for SIGKILL now, and gets it; Failed where somebody was promised
        that there will be none.
        """
        at_once = (Flag.FORCE | Flag.NOWAIT) in request.flags and self._kill_at is None
        if at_once and (self.control.held or self.control.not_before > self._clock.now()):
            raise Failed(
                f"Job {self.number} was held or extended by somebody: only its Force overrides that"
            )
        self.flags |= request.flags & Flag.FORCE
        self._policy = lengthened(self._policy, request.spans)
        if at_once and not self._process.exited():
            self._climb(SIGKILL)
        self._journal.write(events.job_joined(self, request))
        self._changed()

    def extend(self, usec: int, uid: int) -> None:
        """No SIGKILL for at least so much longer, whatever the policy; never less than before.

        This and the next two raise Failed where no SIGKILL is to come any more.
        """
        self._check_controllable()
        until = min(self._clock.now() + usec, INFINITY)
        if until > self.control.not_before:
            self.control = replace(self.control, not_before=until)
            self._journal.write(events.job_extended(self, usec, uid))
            self._changed()

    def hold(self, uid: int) -> None:
        """Send nothing more, and do not give up either, until `release`."""
        self._set_held(True, uid)

    def release(self, uid: int) -> None:
        self._set_held(False, uid)

    def force(self, uid: int) -> None:
        """Send SIGKILL now, held or not. Raises Failed where the job has ended."""
        if not self.running:
            raise self._over()
        if self._kill_at is None and not self._process.exited():
            self.flags |= Flag.FORCE
            self.control = UNCONTROLLED
            self._journal.write(events.job_forced(self, uid))
            self._climb(SIGKILL)
            self._changed()

    def cancel(self, why: str = "") -> None:
        """Send nothing more and end as `cancelled`; nothing where the job has ended."""
        if self.running:
            self.error = why
            self._finish(Result.CANCELLED)

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call back once when the job ends; to be asked for only while it runs. It still runs then
        where nobody will be told of its end."""
        self._waiters.append(callback)

    def no_longer(self, callback: Callable[[], None], *, left: bool) -> None:
        """Do not call back any more. `left`: because whoever waited did not want to."""
        if callback in self._waiters:
            self._waiters.remove(callback)
            if left and not self._waiters:
                self._journal.write(events.waiter_gone(self))

    def interrupt_waits(self) -> None:
        """Call back whoever waits, though the job has not ended."""
        waiters, self._waiters = self._waiters, []
        for callback in waiters:
            callback()

    def let_go(self) -> None:
        """Stop watching a process that survived: a newer job has taken it over."""
        self._process.close()
        self._trace.end()

    def _set_held(self, held: bool, uid: int) -> None:
        self._check_controllable()
        if held is not self.control.held:
            self.control = replace(self.control, held=held)
            self._journal.write(events.job_held(self, uid))
            self._changed()

    def _check_controllable(self) -> None:
        if not self.running:
            raise self._over()
        if self._kill_at is not None:
            raise Failed(f"Job {self.number} has sent SIGKILL already")

    def _over(self) -> Failed:
        assert self.result is not None
        return Failed(f"Job {self.number} has ended already ({self.result.value})")

    def _changed(self) -> None:
        """What the job goes by is another now."""
        self._trace.record(Changed(self._clock.now(), self.flags, self._policy, self.control))
        self._advance()
        self._on_change(self)

    def _advance(self) -> None:
        while self.running:
            decision = decide(self.standing, self._clock.now())
            # Looked at right before a signal: the deadline and the exit may have come together.
            if decision.action is not Action.LEAVE and self._process.exited():
                self._gone()
                return
            match decision.action:
                case Action.WAIT:
                    self._wait_until(decision.deadline, decision.wake)
                    return
                case Action.LOOK:
                    # What comes of it, or that nothing does, leads here again.
                    self._looking.look(self._seen)
                    return
                case Action.CONTINUE:
                    self._climb(SIGCONT)
                case Action.TERMINATE:
                    self._climb(SIGTERM)
                case Action.KILL:
                    self._climb(SIGKILL)
                case Action.GIVE_UP:
                    self._finish(Result.SURVIVED)
                case Action.LEAVE:
                    self._finish(Result.SIGNALLED)

    def _climb(self, number: Signals) -> None:
        """A rung of a job that has started: the signal first, then the talk about it."""
        try:
            self._send(number)
        except ProcessLookupError:
            self._gone()
        except PermissionError:
            self.error = f"the kernel does not let qkilld send {number.name}"
            self._journal.write(events.signal_refused(self, number))
            self._finish(Result.FAILED)
        else:
            self._journal.write(events.signal_sent(self, self.rungs[-1]))
            self._on_change(self)
            if number == SIGKILL:
                self.phase = Phase.REAP
                self._on_change(self)

    def _send(self, number: Signals) -> None:
        self._process.signal(number)
        now = self._clock.now()
        if number == SIGKILL:
            self._kill_at = now
            self.deadline = min(now + self._policy.reap, INFINITY)
            self.phase = Phase.KILL
            by_evidence = self.standing.by_evidence
            self.data_at_risk = by_evidence and at_risk(self.assessment, self._policy, now)
        elif number == SIGCONT:
            self._continued_at = now
        else:
            self._term_at = now
        self.rungs.append(Rung(self.phase, number, now))
        self._trace.record(Sent(now, self.phase, number.name))

    def _seen(self, sample: Sample) -> None:
        if not self.running:
            return
        before = self.assessment
        # One that comes after its time was up may be older than what was put in its place.
        if before is None or sample.at >= before.last.at:
            self.assessment = evidence = assess(before, sample)
            self._trace.record(sample)
            if evidence.verdict is not self.verdict:
                self.verdict = evidence.verdict
                self._turned(evidence)
            self._on_change(self)
            if self._kill_at is not None and is_dead(sample):
                self._gone()
                return
        self._advance()

    def _turned(self, evidence: Assessment) -> None:
        turn = Turn(evidence.verdict, evidence.reasons[:4], evidence.last.at)
        if len(self.history) < MAX_HISTORY:
            self.history.append(turn)
        self._trace.record(Turned(turn.at, turn.verdict, turn.reasons))
        self._journal.write(events.verdict_turned(self, turn))

    def _wait_until(self, deadline: int, wake: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wake != INFINITY:
            self._timer = self._clock.call_at(wake, self._advance)
        if deadline != self.deadline:
            self.deadline = deadline
            self._on_change(self)

    def _gone(self) -> None:
        self.verdict = Verdict.GONE if self._process.collected() else Verdict.ZOMBIE
        self._finish(Result.EXITED if self._kill_at is None else Result.KILLED)

    def _finish(self, result: Result) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._looking.close()
        self.ended = self._clock.now()
        self.result = result
        self.phase = Phase.DONE
        self.deadline = INFINITY
        if result is Result.SURVIVED:
            self._process.watch(self._survivor_gone)
        else:
            self._process.close()
        # Who waits comes first: the journal is not on the way from the exit to the answer.
        self.interrupt_waits()
        self._on_end(self)
        self._journal.write(events.job_ended(self))
        self._trace.record(Ended(self.ended, result))
        if result is not Result.SURVIVED:
            self._trace.end()

    def _survivor_gone(self) -> None:
        self._process.close()
        self._journal.write(events.survivor_gone(self, self._clock.now()))
        self._trace.record(Gone(self._clock.now()))
        self._trace.end()
        self._on_survivor_gone(self)
