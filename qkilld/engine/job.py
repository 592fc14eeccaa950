"""One guest being stopped: the ladder climbed with real signals.

A job is driven by three things only: its start, the exit of its process, and the deadline of its
last decision. Each leads to `_advance`, which asks the judgement what to do until that is to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from signal import SIGKILL, SIGTERM, Signals
from typing import TYPE_CHECKING

from qkilld.engine import events
from qkilld.judgement.ladder import Action, Standing, decide, policy_for
from qkilld.model.errors import Failed, NoSuchProcess
from qkilld.model.policy import Policy
from qkilld.model.words import INFINITY, Flag, Phase, Result, Verdict

if TYPE_CHECKING:
    from qkilld.engine.ports import Clock, Journal, Process, Timer


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asked for."""

    flags: Flag
    grace: int | None = None
    """µs, in place of the policy's."""
    reason: str = ""
    """Printable."""
    uid: int = 0
    """Whose request it is."""


@dataclass(frozen=True, slots=True)
class Rung:
    """A signal that was sent."""

    phase: Phase
    signal: Signals
    at: int
    """CLOCK_MONOTONIC, µs."""


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
        *,
        on_change: Callable[[Job], None],
        on_end: Callable[[Job], None],
        on_survivor_gone: Callable[[Job], None],
    ) -> None:
        self.number = number
        self.guest = process.guest
        self.request = request
        self.flags = request.flags
        self.phase = Phase.TERMINATE
        self.verdict = Verdict.UNKNOWN
        self.result: Result | None = None
        self.error = ""
        """With `failed`: what the kernel refused."""
        self.rungs: list[Rung] = []
        self.started = clock.now()
        self.ended: int | None = None
        self.deadline = INFINITY
        """When the next rung is due or the job gives up; CLOCK_MONOTONIC, µs."""

        self._process = process
        self._policy = policy_for(request.flags, policy, request.grace)
        self._term_at: int | None = None
        self._kill_at: int | None = None
        self._clock = clock
        self._journal = journal
        self._on_change = on_change
        self._on_end = on_end
        self._on_survivor_gone = on_survivor_gone
        self._timer: Timer | None = None
        self._waiters: list[Callable[[], None]] = []

    @property
    def running(self) -> bool:
        return self.result is None

    @property
    def elapsed(self) -> int:
        """µs from the start to the end, or to now."""
        return (self._clock.now() if self.ended is None else self.ended) - self.started

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

    def follow(self) -> None:
        """Go on from the first signal; to be called once, after `start`."""
        self._advance()

    def join(self, request: Request) -> None:
        """Let a further request take part: it may add FORCE and lengthen the grace, never less.

        FORCE with NOWAIT asks for SIGKILL now, and gets it.
        """
        self.flags |= request.flags & Flag.FORCE
        if request.grace is not None:
            self._policy = replace(self._policy, grace=max(self._policy.grace, request.grace))
        at_once = (Flag.FORCE | Flag.NOWAIT) in request.flags
        if at_once and self._kill_at is None and not self._process.exited():
            self._climb(SIGKILL)
        self._journal.write(events.job_joined(self, request))
        self._advance()
        self._on_change(self)

    def cancel(self) -> None:
        """Send nothing more and end as `cancelled`; nothing where the job has ended."""
        if self.running:
            self._finish(Result.CANCELLED)

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call back once when the job ends; to be asked for only while it runs."""
        self._waiters.append(callback)

    def let_go(self) -> None:
        """Stop watching a process that survived: a newer job has taken it over."""
        self._process.close()

    def _advance(self) -> None:
        while self.running:
            decision = decide(
                Standing(self.flags, self._policy, self._term_at, self._kill_at), self._clock.now()
            )
            # Looked at right before a signal: the deadline and the exit may have come together.
            if decision.action is not Action.LEAVE and self._process.exited():
                self._gone()
                return
            match decision.action:
                case Action.WAIT:
                    self._wait_until(decision.deadline)
                    return
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
            self.deadline = INFINITY
            self.phase = Phase.KILL
        else:
            self._term_at = now
        self.rungs.append(Rung(self.phase, number, now))

    def _wait_until(self, deadline: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline != INFINITY:
            self._timer = self._clock.call_at(deadline, self._advance)
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
        self.ended = self._clock.now()
        self.result = result
        self.phase = Phase.DONE
        self.deadline = INFINITY
        if result is Result.SURVIVED:
            self._process.watch(self._survivor_gone)
        else:
            self._process.close()
        # Who waits comes first: the journal is not on the way from the exit to the answer.
        waiters, self._waiters = self._waiters, []
        for callback in waiters:
            callback()
        self._on_end(self)
        self._journal.write(events.job_ended(self))

    def _survivor_gone(self) -> None:
        self._process.close()
        self._journal.write(events.survivor_gone(self, self._clock.now()))
        self._on_survivor_gone(self)
