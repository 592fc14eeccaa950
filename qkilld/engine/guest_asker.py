"""Ask a guest to shut down: open the monitor, observe the guest, ask it, and watch how it reacts.

decision.powerdown draws conclusions from the observations. GuestAsker acts on them, with one
command to the monitor at a time. Asking ends with an AskOutcome, unless GuestAsker is closed first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from qkilld.decision import powerdown
from qkilld.decision.flush_plan import JobsProgress
from qkilld.decision.powerdown import AskMethod, Attempt, Conclusion, Judgement
from qkilld.engine.monitor_link import MonitorLink
from qkilld.model.block_state import BackgroundJob
from qkilld.model.constants import USEC_PER_SEC, GuestAsked
from qkilld.model.dataclass import dataclass
from qkilld.model.guest_state import GuestObservation, GuestOrder

if TYPE_CHECKING:
    from qkilld.engine.ports import Clock, GuestMonitor, Timer

OBSERVE_INTERVAL: Final = USEC_PER_SEC
"""The interval of observations (µs) after the guest was asked."""
FIRST_INTERVAL: Final = 250_000
"""The interval of observations (µs) before the guest was asked."""
MAX_UNOBSERVED: Final = 60 * USEC_PER_SEC
"""The longest wait (µs) for a guest that was asked, if a bug in qkilld prevents observing it."""

_ENDS: Final = {
    Conclusion.SHUT_DOWN: GuestAsked.SHUT_DOWN,
    Conclusion.IGNORED: GuestAsked.IGNORED,
    Conclusion.DEAF: GuestAsked.DEAF,
    Conclusion.UNREACHABLE: GuestAsked.UNREACHABLE,
    Conclusion.NOT_RUNNING: GuestAsked.NOT_RUNNING,
}
_ORDERS: Final = {AskMethod.AGENT: GuestOrder.AGENT, AskMethod.BUTTON: GuestOrder.BUTTON}
_HELPED_BY: Final = {"paused": GuestOrder.RESUME, "suspended": GuestOrder.WAKE}
"""For each runstate: the GuestOrder that makes the guest run."""


@dataclass(frozen=True, slots=True)
class AskOutcome:
    outcome: GuestAsked
    reason: str
    """A printable explanation."""


class GuestAsker:
    """Asks one guest. No callback follows `close` or `on_end`."""

    def __init__(
        self,
        link: MonitorLink,
        clock: Clock,
        *,
        attempt: Attempt,
        agent_tried: bool,
        span: int,
        help: tuple[GuestOrder, ...],
        may_ask: Callable[[], bool],
        stall: Callable[[], int] | None,
        on_jobs: Callable[[Sequence[BackgroundJob]], None],
        on_order: Callable[[GuestOrder], None],
        on_pressed: Callable[[], None],
        on_judgement: Callable[[Judgement], None],
        on_end: Callable[[AskOutcome], None],
        on_fault: Callable[[Exception], None],
    ) -> None:
        """`span` is PowerdownSec= (µs); `attempt` and `agent_tried` may come from an earlier daemon
        or job.

        While `may_ask` returns False, the guest is observed but not asked. Backups and other
        background jobs of QEMU would be cancelled when QEMU exits. While one of them makes progress
        at least every `stall` µs, `on_jobs` is called, and the guest is not asked. If `stall` is
        None, they do not delay asking. `on_pressed` is called if somebody else has pressed the
        guest's power button. `on_fault` is called with an exception that a bug in qkilld has
        caused. The guest is not asked after that.
        """
        self._link, self._clock = link, clock
        self._attempt = attempt
        self._agent_tried = agent_tried
        self._span, self._help = span, help
        self._may_ask = may_ask
        self._stall, self._on_jobs = stall, on_jobs
        self._jobs = JobsProgress()
        self._on_order, self._on_judgement, self._on_end = on_order, on_judgement, on_end
        self._on_pressed = on_pressed
        self._on_fault = on_fault
        self._helped: set[GuestOrder] = set()
        self._failed = False
        """Whether pressing the power button has failed."""
        self._unanswered: AskMethod | None = None
        self._timer: Timer | None = None
        self._closed = False

    @property
    def attempt(self) -> Attempt:
        """Everything known so far about asking this guest. The next daemon needs it."""
        return self._attempt

    def start(self) -> None:
        was_asked = bool(self._attempt.asked or self._attempt.restarts)
        was_open = self._attempt.agent_was_open
        self._link.open(self._guarded(self._opened), was_asked=was_asked, agent_was_open=was_open)

    def note_continued(self) -> None:
        """Start to measure the guest's activity now, because its process has just got SIGCONT. Call
        this before `start`."""
        self._attempt = powerdown.note_helped(self._attempt, self._clock.now())

    def set_span(self, span: int) -> None:
        """Change PowerdownSec= to `span` (µs)."""
        self._span = span

    def take_unanswered(self) -> GuestOrder | None:
        """After QEMU's exit, assume that a request without a reply has reached the guest. Return
        this request, or None."""
        if (method := self._unanswered) is None:
            return None
        self._unanswered = None
        self._attempt = powerdown.note_request(self._attempt, method, self._clock.now())
        return _ORDERS[method]

    def judge_exit(self, *, killed: bool) -> GuestAsked | None:
        """After QEMU's exit, return the outcome of asking; None if the guest was not asked.

        `killed`: a signal ended QEMU. In this case, only a report of the shutdown proves that the
        guest shut down.
        """
        signs, all_heard = self._link.read_rest()
        return powerdown.judge_exit(self._attempt, signs, all_heard=all_heard or killed)

    def close(self) -> None:
        """Stop asking. The monitor stays open. May be called twice."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _guarded(self, callback: Callable[..., None]) -> Callable[..., None]:
        """Wrap a callback so that an exception in it ends the asking. Otherwise, the job would wait
        for an outcome that never comes."""

        def guarded(*arguments: object) -> None:
            if self._closed:
                return
            try:
                for argument in arguments:
                    if isinstance(argument, Exception):
                        raise argument
                callback(*arguments)
            except Exception as error:
                self._fail(error)

        return guarded

    def _fail(self, error: Exception) -> None:
        self._on_fault(error)
        if self._closed:
            return
        asks = self._attempt.asked
        if not asks:
            self._end(GuestAsked.UNREACHABLE, "an error in qkilld prevents asking")
            return
        # Wait without observing: the guest may be shutting down. Its exit is noticed anyway.
        until = asks[-1].at + min(self._span, MAX_UNOBSERVED)

        def end() -> None:
            self._end(GuestAsked.ASKED, "an error in qkilld prevents watching")

        self._timer = self._clock.call_at(until, end)

    def _opened(self, opened: GuestMonitor | str) -> None:
        if not isinstance(opened, str):
            self._observe()
        elif not self._attempt.asked and self._attempt.restarts == 0:
            self._end(GuestAsked.UNREACHABLE, opened)
        else:
            # Continue without a monitor: the guest was already asked, and may be shutting down.
            self._learn(GuestObservation(at=self._clock.now()))

    def _observe(self) -> None:
        if (monitor := self._link.monitor) is None:
            self.start()
        else:
            monitor.observe(self._guarded(self._learn))

    def _learn(self, observation: GuestObservation) -> None:
        self._attempt = powerdown.observe(self._attempt, observation)
        monitor = self._link.monitor
        agent = monitor is not None and monitor.has_agent and not self._agent_tried
        judgement = powerdown.judge(self._attempt, powerdown=self._span, agent=agent)
        if self._try_to_help(observation):
            return
        asks = judgement.method is not None and self._may_ask()
        if asks and self._stall is not None and not self._attempt.asked and monitor is not None:
            monitor.read_jobs(self._guarded(lambda jobs: self._wait_for_jobs(jobs, judgement)))
        else:
            self._act_on(judgement)

    def _wait_for_jobs(self, jobs: tuple[BackgroundJob, ...] | str, judgement: Judgement) -> None:
        """Wait while QEMU's background jobs make progress, unless their state is unreadable."""
        now, jobs = self._clock.now(), () if isinstance(jobs, str) else jobs
        self._jobs = self._jobs.after(jobs, now)
        if self._stall is not None and self._jobs.waited_for(now, self._stall()):
            self._on_jobs(jobs)
            self._observe_later(OBSERVE_INTERVAL)
        else:
            self._act_on(judgement)

    def _act_on(self, judgement: Judgement) -> None:
        self._on_judgement(judgement)
        if self._closed:
            return
        if judgement.conclusion in powerdown.ENDS:
            self._end(_ENDS[judgement.conclusion], judgement.reason)
        elif judgement.method is not None and self._may_ask():
            self._ask(judgement.method)
        elif judgement.conclusion is Conclusion.PRESSED:
            self._order(GuestOrder.WATCH, self._watch_press)
        else:
            self._observe_later(until=judgement.until)

    def _watch_press(self, refused: str) -> None:
        """Treat somebody else's press of the power button as our own, because a second press could
        cancel the shutdown."""
        self._attempt = powerdown.note_request(self._attempt, AskMethod.BUTTON, self._clock.now())
        self._on_pressed()
        self._observe_later()

    def _try_to_help(self, observation: GuestObservation) -> bool:
        """Resume or wake the guest once, if the caller allows this. Return False if this is not
        allowed or was already tried."""
        order = _HELPED_BY.get(observation.runstate or "")
        if order is None or order not in self._help or order in self._helped:
            return False
        if not self._may_ask():
            self._observe_later()
            return True
        self._helped.add(order)
        self._order(order, self._runs_again)
        return True

    def _runs_again(self, refused: str) -> None:
        self._attempt = powerdown.note_helped(self._attempt, self._clock.now())
        self._observe_later()

    def _ask(self, method: AskMethod) -> None:
        if method is AskMethod.AGENT:
            self._agent_tried = True
            if GuestOrder.THAW in self._help and GuestOrder.THAW not in self._helped:
                self._helped.add(GuestOrder.THAW)
                self._order(GuestOrder.THAW, lambda refused: self._send(method))
                return
        self._send(method)

    def _send(self, method: AskMethod) -> None:
        def sent(refused: str) -> None:
            self._unanswered = None
            if not refused:
                self._attempt = powerdown.note_request(self._attempt, method, self._clock.now())
                self._on_order(_ORDERS[method])
                self._observe_later()
            elif method is AskMethod.AGENT or self._attempt.asked or not self._failed:
                # Continue: if the agent failed, the power button can still be pressed; if the first
                # press failed, it can be pressed once more. The guest may also react to an earlier
                # request.
                self._failed = self._failed or method is AskMethod.BUTTON
                self._observe_later()
            else:
                self._end(GuestAsked.UNREACHABLE, refused)

        self._unanswered = method
        self._order(_ORDERS[method], sent)

    def _order(self, what: GuestOrder, callback: Callable[[str], None]) -> None:
        if (monitor := self._link.monitor) is None:
            callback("its monitor was lost")
        else:
            monitor.order(what, self._guarded(callback))

    def _observe_later(self, interval: int | None = None, *, until: int | None = None) -> None:
        """Observe after `interval` (µs), or earlier at `until`, when the conclusion may change."""
        if interval is None:
            interval = OBSERVE_INTERVAL if self._attempt.asked else FIRST_INTERVAL
        now = self._clock.now()
        at = now + interval if until is None else min(now + interval, max(until, now))
        self._timer = self._clock.call_at(at, self._guarded(self._observe))

    def _end(self, outcome: GuestAsked, reason: str) -> None:
        """Report the outcome. The monitor stays open, because `quit` may follow."""
        if not self._closed:
            self._on_end(AskOutcome(outcome, reason))
