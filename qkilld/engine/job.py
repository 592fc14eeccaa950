"""Stop one guest: climb the ladder with real signals.

A job acts only on events: its start, a call, the exit of its process, the end of a timer, a sample,
or a reply of the monitor. After each event, `advance` does what is due.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from signal import SIGKILL, SIGTERM
from typing import TYPE_CHECKING, Final

from qkilld.decision.ladder import JobFacts, lengthen, policy_for
from qkilld.decision.verdict import Assessment
from qkilld.engine import events, steering
from qkilld.engine.collaborators import Collaborators
from qkilld.engine.flush_phase import FlushPhase
from qkilld.engine.guest_end import GuestEnd
from qkilld.engine.job_trace import JobTrace
from qkilld.engine.monitor_link import MonitorLink
from qkilld.engine.powerdown_phase import BEFORE_SIGNALS, PowerdownPhase
from qkilld.engine.server_watch import ServerWatch
from qkilld.engine.signal_phase import SignalPhase
from qkilld.engine.snapshot import Snapshot
from qkilld.engine.waiters import Waiters
from qkilld.engine.yank_rung import YankRung
from qkilld.model.access import Rank, Steerer, rank_of
from qkilld.model.constants import INFINITY, Flag, GuestAsked, Phase, Result, Verdict
from qkilld.model.errors import Busy, Failed, NoSuchProcess, QkilldError, UnknownIdentity
from qkilld.model.guest_state import KeptMonitor
from qkilld.model.job import NOT_FLUSHED, UNCONTROLLED, Request, Risk, Rung, VerdictChange
from qkilld.model.policy import Policy
from qkilld.model.trace import ChangeRecord, EndRecord, ExitRecord, RungRecord, VerdictRecord

if TYPE_CHECKING:
    from qkilld.engine.ports import Process, Timer

MAX_HISTORY: Final = 100
"""The maximum number of changes of the verdict in a receipt."""


class Job:
    """The ladder of one process.

    `phase` goes from powerdown to quit, terminate, kill, reap and done, and skips phases that are
    not needed. If progress or a caller delays SIGKILL, `phase` returns from kill to terminate.
    `result` is None while the job runs. After the end, only `processors_stopped` can change.
    """

    # Without slots, each of thousands of jobs would need a dictionary of 1.8 kB.
    __slots__ = (
        "_configured", "_end", "_flush_phase", "_link", "_parts", "_powerdown", "_process",
        "_servers", "_signals", "_timer", "_trace", "_waiters", "_yank", "assessment", "control",
        "deadline", "ended", "error", "error_name", "flags", "flush", "guest", "guest_asked",
        "history", "number", "phase", "policy", "request", "result", "risks", "rungs", "started",
        "verdict",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        process: Process,
        request: Request,
        policy: Policy,
        collaborators: Collaborators[Job],
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
        """If the result is `failed`: the reason. If `cancelled`: the reason, or "" if a caller
        cancelled the job. If `survived`: why a signal could not be sent, or "" if all were sent."""
        self.error_name = ""
        """If the result is `failed`: the D-Bus name of the error, or ""."""
        self.rungs: tuple[Rung, ...] = ()
        self.history: tuple[VerdictChange, ...] = ()
        self.assessment: Assessment | None = None
        self.risks: tuple[Risk, ...] = ()
        """Why data may be lost, for example because of SIGKILL or an error of a disk."""
        self.flush = NOT_FLUSHED
        self.guest_asked = GuestAsked.NOT_ASKED
        self.started = collaborators.clock.now()
        self.ended: int | None = None
        self.deadline = INFINITY
        """When the next rung is due or the job gives up; CLOCK_MONOTONIC, µs."""

        self._process = process
        self._configured = policy
        self.policy = policy_for(request.flags, policy, request.spans)
        self._parts = collaborators
        clock = collaborators.clock
        self._trace = JobTrace(self, collaborators.traces)
        self._link = MonitorLink(
            process, collaborators.monitors, request.qmp_socket, self._keep_monitor
        )
        self._powerdown = PowerdownPhase(self, process, collaborators, self._link)
        self._servers = ServerWatch(self, process, collaborators)
        self._flush_phase = FlushPhase(self, process, collaborators, self._link, self._servers)
        self._yank = YankRung(
            self,
            clock,
            collaborators.journal,
            self._link,
            self._flush_phase,
            allowed=collaborators.may_yank(process.guest.label.name),
        )
        self._signals = SignalPhase(
            self,
            process,
            clock=clock,
            journal=collaborators.journal,
            sampler=collaborators.sampler,
            executables=collaborators.executables,
            trace=self._trace,
            yank=self._yank,
            load=collaborators.load,
            on_sample=self._servers.note_sample,
        )
        self._end = GuestEnd(self, process, clock, self._servers)
        self._timer: Timer | None = None
        self._waiters = Waiters()

    @property
    def running(self) -> bool:
        return self.result is None

    @property
    def data_at_risk(self) -> bool:
        return bool(self.risks)

    @property
    def processors_stopped(self) -> bool:
        """Whether this job may have stopped the guest's processors, and must start them again
        unless it sends a signal."""
        return self._flush_phase.stopped

    @property
    def elapsed(self) -> int:
        """µs from the start to the end, or until now."""
        return (self._parts.clock.now() if self.ended is None else self.ended) - self.started

    @property
    def rank(self) -> Rank:
        """The rank of the job's requester (see steering.py)."""
        return rank_of(self.request.uid, self.guest.identity)

    @property
    def owner_limit(self) -> int:
        """See steering.owner_limit."""
        return steering.owner_limit(self.started, self.policy)

    @property
    def facts(self) -> JobFacts:
        return self._signals.facts

    @property
    def own_chardevs(self) -> tuple[str, ...]:
        """The labels of the connection to the monitor; () if there is none."""
        return self._link.own_chardevs

    @property
    def by_evidence(self) -> bool:
        return self.facts.by_evidence

    @property
    def forced(self) -> bool:
        """Whether a caller was promised SIGKILL, whatever the ladder says."""
        return self._signals.forced

    @property
    def is_sampling(self) -> bool:
        """Whether the signal phase waits for a sample."""
        return self._signals.is_sampling

    def offer_monitor(self, passed: int) -> None:
        """Use this connection to the guest's monitor. Call this before `start`. If `start`
        succeeds, the job owns the connection."""
        self._link.offer(passed)

    def follow_up(self, ended: Job) -> None:
        """Do not ask the guest again if the previous job (`ended`) has just asked it. Call this
        before `start`."""
        self._powerdown.follow_up(ended._powerdown.attempt)

    def start(self) -> None:
        """Send the first signal, or begin a phase that comes before signals.

        Raises NoSuchProcess if the process has just exited, ProcessChanged if its identity has
        changed, UnknownIdentity if its identity is unreadable, and Failed if the kernel refuses the
        signal. In these cases the process is closed, and the job has not started.
        """
        waits = self._first_phase()
        first = SIGKILL if Flag.NOWAIT in self.flags and Flag.FORCE in self.flags else SIGTERM
        try:
            if waits is not None:
                self._signals.check_identity()
                self.phase = waits
            else:
                self._signals.send(first)
        except (ProcessLookupError, PermissionError, QkilldError) as error:
            self._process.close()
            who = f"process {self.guest.identity.pid}"
            if isinstance(error, ProcessLookupError):
                raise NoSuchProcess(f"{who.capitalize()} has just exited") from None
            if isinstance(error, PermissionError):
                self._parts.journal.write(events.signal_refused(self, first))
                raise Failed(f"The kernel does not let qkilld signal {who}") from None
            raise
        self._parts.journal.write(events.job_started(self))
        if waits is None:
            self._parts.journal.write(events.signal_sent(self, self.rungs[-1]))
        self._process.watch(self.advance)

    def _first_phase(self) -> Phase | None:
        """Return the phase that comes before the first signal, or None."""
        if Flag.POWERDOWN in self.flags:
            return Phase.POWERDOWN
        return Phase.QUIT if self._can_flush or self._servers.is_needed else None

    @property
    def _can_flush(self) -> bool:
        """Whether the guest may have a monitor that can flush its disks."""
        link, named = self._link, self.guest.label.qmp or bool(self.request.qmp_socket)
        may_open = self.by_evidence and self._parts.monitors is not None
        return may_open and (named or link.is_passed or link.is_kept)

    def resume(self, past: Snapshot, monitor: KeptMonitor | None = None) -> None:
        """Call this instead of `start` to continue a job of an earlier daemon. Sends no signal."""
        self.guest, self.phase, self.verdict = past.guest, past.phase, past.verdict
        self.flags, self.policy, self.control = past.flags, past.policy, past.control
        self.started, self.ended = past.started, past.ended
        self.result, self.error, self.error_name = past.result, past.error, past.error_name
        self.risks, self.guest_asked = past.risks, past.guest_asked
        self.flush, self._flush_phase.stopped = past.flush, past.processors_stopped
        self._flush_phase.storage = past.storage
        self.rungs, self.history = past.rungs, past.history
        self.assessment = past.assessment_at(self._parts.clock.now())
        self._signals.resume(past)
        self._servers.restore(past.servers)
        self._powerdown.resume(past.asking)
        if monitor is not None:
            self._link.keep(monitor)
        if self.running:
            if self._signals.killed:
                self.phase = Phase.REAP
            self._parts.journal.write(events.job_resumed(self))
            for rung in self.rungs:
                self._trace.record(RungRecord(rung.at, rung.phase, rung.action))
            self._process.watch(self.advance)
        elif self.result is Result.SURVIVED:
            self._process.watch(self._survivor_gone)
        elif self.processors_stopped:
            self._flush_phase.recover()

    def follow(self) -> None:
        """Begin or continue the present phase. Call this once, after `start` or `resume`."""
        if self.result is Result.SURVIVED and self._process.exited():
            self._survivor_gone()
        if self.running:
            self._servers.begin()
        if self.running and self.phase is Phase.POWERDOWN:
            self._powerdown.begin()
        elif self.running and self.phase is Phase.QUIT:
            self._flush_phase.begin(skip=not self._can_flush)
        elif self.running and self._link.is_kept:
            self._link.open(lambda outcome: None, was_asked=True)
        self.advance()

    def check_process(self) -> None:
        """If the identity has changed, end the job as failed. Call this before `follow`."""
        if self.running:
            self._signals.check_resumed()

    def snapshot(self) -> Snapshot:
        snapshot = Snapshot(
            number=self.number,
            guest=self.guest,
            request=self.request,
            flags=self.flags,
            policy=self.policy,
            control=self.control,
            phase=self.phase,
            verdict=self.verdict,
            result=self.result,
            error=self.error,
            error_name=self.error_name,
            risks=self.risks,
            guest_asked=self.guest_asked,
            flush=self.flush,
            processors_stopped=self.processors_stopped,
            rungs=self.rungs,
            history=self.history,
            assessment=self.assessment,
            asking=self._powerdown.attempt if self.phase in BEFORE_SIGNALS else None,
            own_chardevs=self.own_chardevs,
            started=self.started,
            ended=self.ended,
            storage=self._flush_phase.storage,
            servers=self._servers.to_save,
            cut_off=self._yank.cut_off_names,
        )
        return self._signals.as_intended(snapshot)

    def join(self, request: Request) -> None:
        """Let another request change the job. It can add FORCE, lengthen time spans, shorten the
        time for asking the guest, and allow signals in a job that would only ask the guest. It
        cannot do the opposite of any of these. If the job has a higher rank than the owner of the
        process, the owner's request can only add FORCE.

        A request of higher rank takes the job over and replaces the former request. The guest gets
        all the help (Request.help) that either request allows. If the owner had requested the job,
        the new request also sets the spans and FIXED, the owner's hold ends, and the owner's
        extensions are cut to `owner_limit`.

        If the job and the request both only ask the guest, no signal follows. The job ends right
        after asking only if both have NOWAIT.

        A request with FORCE and NOWAIT sends SIGKILL now. It raises UnknownIdentity if the
        process's executable is unreadable, and Failed if the job is held or extended. If it was the
        owner who held or extended the job, only the owner's own requests of this kind fail. If the
        identity has changed, every request with FORCE ends the job as failed and raises
        ProcessChanged.
        """
        rank, before = rank_of(request.uid, self.guest.identity), self.rank
        at_once = (Flag.FORCE | Flag.NOWAIT) in request.flags and not self._signals.killed
        promised = self.control if rank is Rank.OWNER else steering.take_over(self.control, 0)
        if at_once and (promised.held or promised.not_before > self._parts.clock.now()):
            raise Failed(
                f"Job {self.number} was held or extended: only the job's Force overrides that"
            )
        if Flag.FORCE in request.flags and not self._process.exited():
            try:
                self._signals.check_on_request()
            except UnknownIdentity:
                if at_once:
                    raise
        asks_alone = replace(self.request, flags=self.flags).asks_alone and request.asks_alone
        if rank > before:
            self.request = steering.replace_request(self.request, request)
            if before is Rank.OWNER:
                self.flags = self.flags & ~Flag.FIXED | request.flags & Flag.FIXED
                self.policy = policy_for(self.flags, self._configured, request.spans)
                self.control = steering.take_over(self.control, self.owner_limit)
        self.flags |= request.flags & Flag.FORCE
        if steering.may_steer(rank, before):
            self.policy = lengthen(self.policy, request.spans)
            if not asks_alone or Flag.NOWAIT not in request.flags:
                self.flags &= ~Flag.NOWAIT
            self.request = replace(
                self.request,
                powerdown_only=asks_alone and Flag.NOWAIT not in self.flags,
                ask_at_most=min(self.request.ask_at_most, request.ask_at_most),
            )
            self._powerdown.set_span(self.policy.powerdown)
        if at_once and not self._process.exited():
            self._kill()
        self._parts.journal.write(events.job_joined(self, request, took_over=rank > before))
        self._changed()

    def extend(self, usec: int, by: Steerer) -> None:
        """Send no SIGKILL for at least `usec` (µs) from now, whatever the policy says.

        The owner can extend a job of higher rank up to `owner_limit`. `extend`, `hold` and
        `release` raise Failed if the job has ended, or if it has sent or must send SIGKILL.
        """
        self._check_controllable()
        until = min(self._parts.clock.now() + usec, INFINITY)
        if not steering.may_steer(by.rank, self.rank):
            until = min(until, self.owner_limit)
        before, self.control = self.control, steering.extended(self.control, until, by.rank)
        if self.control != before:
            self._parts.journal.write(events.job_extended(self, usec, by.uid))
            self._changed()

    def hold(self, by: Steerer) -> None:
        """Send no signals and do not give up until `release`. A hold by the owner also ends when
        MaxSec= has passed. Raises Busy while the guest's processors are stopped."""
        self._check_controllable()
        if self.processors_stopped:
            raise Busy(f"Job {self.number} is flushing the guest's disks: try again in a second")
        before = self.control
        self.control = steering.hold(before, by, self.started, self.policy)
        if self.control != before:
            self._parts.journal.write(events.job_held(self, by.uid))
            self._changed()

    def release(self, by: Steerer) -> None:
        self._check_controllable()
        if self.control.held:
            self.control = steering.release(self.control)
            self._parts.journal.write(events.job_released(self, f"Uid {by.uid}", by.uid))
            self._changed()

    def force(self, by: Steerer) -> None:
        """Send SIGKILL now, even if the job is held.

        Raises Failed if the job has ended, and UnknownIdentity if the process's executable is
        unreadable. If the identity has changed, this ends the job as failed and raises
        ProcessChanged.
        """
        self._check_running()
        if not self._signals.killed and not self._process.exited():
            self._signals.check_on_request()
            self.flags = self.flags & ~Flag.NOWAIT | Flag.FORCE
            self.control = UNCONTROLLED
            self._parts.journal.write(events.job_forced(self, by.uid))
            self._kill()
            self._changed()

    def _kill(self) -> None:
        # The intention to send SIGKILL may have to be saved first. Meanwhile, a reply of the
        # monitor must not end the job.
        self._powerdown.close()
        self._signals.force()

    def cancel(self, why: str = "") -> None:
        """Send no more signals and end as `cancelled`, or as `exited` if the process has exited.
        Does nothing if the job has ended."""
        if self.running and self._process.exited():
            self.note_gone(wait=False)
        elif self.running:
            self.error = why
            self.finish(Result.CANCELLED)

    def when_ended(self, callback: Callable[[], None], uid: int | None = None) -> None:
        """Call back once, when the job ends or the daemon exits. Call this only for a running job.
        `uid`: the uid of the waiting client, or None."""
        self._waiters.add(callback, requester=uid == self.request.uid)

    @property
    def process_exited(self) -> bool:
        """Whether the process has exited, even if the job has not noticed yet."""
        return self._process.exited()

    def forget_waiter(self, callback: Callable[[], None], *, disconnected: bool) -> None:
        """Cancel a callback of `when_ended`. `disconnected`: its client has disconnected."""
        if self._waiters.remove(callback) and disconnected:
            self._parts.journal.write(events.waiter_gone(self))

    def interrupt_waits(self) -> None:
        """Call back all waiters now, even if the job has not ended."""
        self._waiters.call()

    def stop_watching(self) -> None:
        """Stop watching a process that survived, because a newer job watches it."""
        self._process.close()
        self._trace.end()

    def _end_hold_in_time(self) -> None:
        if self.control.held and self._parts.clock.now() >= self.control.held_until:
            self.control = steering.release(self.control)
            self._parts.journal.write(events.job_released(self, "MaxSec", None))
            self._record_change()
            self._parts.on_change(self)

    def _check_running(self) -> None:
        if self.result is not None:
            raise Failed(f"Job {self.number} has ended already ({self.result.value})")

    def _check_controllable(self) -> None:
        self._check_running()
        if self._signals.must_kill:
            raise Failed(f"Job {self.number} has sent SIGKILL already, or will as soon as it can")

    def _changed(self) -> None:
        """Report a change of the flags, the policy or the control, and act on it."""
        self._record_change()
        self.advance()
        self._parts.on_change(self)

    def _record_change(self) -> None:
        now = self._parts.clock.now()
        self._trace.record(ChangeRecord(now, self.flags, self.policy, self.control))

    def note_rung(self, action: str, at: int) -> None:
        self.rungs += (Rung(self.phase, action, at),)
        self._trace.record(RungRecord(at, self.phase, action))

    def turn_to(self, verdict: Verdict, reasons: tuple[str, ...], at: int) -> None:
        self.verdict = verdict
        turn = VerdictChange(verdict, reasons, at)
        if len(self.history) < MAX_HISTORY:
            self.history += (turn,)
        self._trace.record(VerdictRecord(turn.at, turn.verdict, turn.reasons))
        self._parts.journal.write(events.verdict_turned(self, turn))

    def enter(self, phase: Phase) -> None:
        self.phase = phase
        self._parts.on_change(self)

    def note_sample(self) -> None:
        """Note a sample that changed nothing worth reporting."""
        self._parts.on_sample(self)

    def advance(self) -> None:
        """Do everything that is due."""
        self._end_hold_in_time()
        if self.running and self.phase is Phase.POWERDOWN:
            if self._powerdown.lasts():
                return
            if self._link.monitor is not None:
                self._flush_phase.begin()
            elif self._servers.until:
                self._flush_phase.begin(skip=True)
            else:
                self.enter(Phase.TERMINATE)
        flushes = self.running and self.phase is Phase.QUIT
        if flushes and self._flush_phase.lasts(self._servers.until):
            return
        if self.running:
            self._signals.advance()

    def _keep_monitor(self, fd: int | None) -> None:
        self._parts.on_monitor(self, fd)

    def write_down(self, go_on: Callable[[], None]) -> None:
        self._parts.write_down(self, go_on)

    def note_signal(self) -> None:
        self._powerdown.close()
        self._flush_phase.commit()

    def note_unsent(self) -> None:
        self._flush_phase.undo()

    def wait_until(self, deadline: int, wake: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wake != INFINITY:
            self._timer = self._parts.clock.call_at(wake, self.advance, self.request.uid)
        if deadline != self.deadline:
            self.deadline = deadline
            self._parts.on_change(self)

    def note_gone(self, *, wait: bool = True) -> None:
        is_first, is_known = self._end.at is None, self._end.note(self._signals, wait=wait)
        if is_first:
            # Do this before the monitor reports that it was closed, because that report changes the
            # state of `_powerdown` and `_yank`.
            self._powerdown.note_exit()
            self._yank.note_exit()
        if is_known:
            self.verdict = Verdict.GONE if self._process.collected() else Verdict.ZOMBIE
            self.finish(Result.EXITED if not self._signals.killed else Result.KILLED)

    def finish(self, result: Result) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._signals.close()
        self._powerdown.close()
        self._flush_phase.close(ending=self._signals.sent)
        self.ended = self._parts.clock.now() if self._end.at is None else self._end.at
        self.result = result
        if result is not Result.EXITED and not self._signals.sent:
            self.risks = ()  # QEMU still runs, so nothing is at risk.
        if result is Result.EXITED:
            self.risks = (*self.risks, *self._end.risks(self._signals))
        self._servers.close()
        self.phase = Phase.DONE
        self.deadline = INFINITY
        if result is Result.SURVIVED:
            self._process.watch(self._survivor_gone)
        elif not self.processors_stopped:
            self._process.close()
        self.interrupt_waits()  # Reply first: writing the journal takes time.
        self._parts.on_end(self)
        self._parts.journal.write(events.job_ended(self))
        self._trace.record(EndRecord(self.ended, result))
        if result is not Result.SURVIVED:
            self._trace.end()

    def note_processors_running(self) -> None:
        """Close the process of the ended job, because the guest's processors run again."""
        if self.result is not Result.SURVIVED:
            self._process.close()
        self._parts.on_change(self)

    def _survivor_gone(self) -> None:
        self._process.close()
        self._parts.journal.write(events.survivor_gone(self, self._parts.clock.now()))
        self._trace.record(ExitRecord(self._parts.clock.now()))
        self._trace.end()
        self._parts.on_survivor_exit(self)
