"""The phase right before SIGTERM: read the state of disks, and flush them.

decision.flush_plan decides which disks to flush and what the flush proves. If the guest's
processors are stopped, a flush also proves that QEMU holds no data back. The intention to stop them
is saved first: if the job ends without a signal, or the daemon crashes, they are started again. In
the API, this phase is called `quit`, because QEMU is told to quit if the guest has powered off. The
monitor stays open until the job ends, because QEMU answers no new connection after SIGTERM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from qkilld.decision import early_flush, flush_plan
from qkilld.decision.early_flush import EarlyFlush
from qkilld.decision.flush_plan import FlushPlan, JobsProgress
from qkilld.decision.verdict import Assessment, assess
from qkilld.engine import events
from qkilld.engine.monitor_link import MonitorLink
from qkilld.engine.sampling import JobSampler
from qkilld.model.block_state import BlockState, FlushResult, GuestDisk, NetworkStorage
from qkilld.model.constants import INFINITY, USEC_PER_SEC, GuestAsked, Phase, Verdict
from qkilld.model.guest_state import GuestOrder
from qkilld.model.job import FlushReport, Risk
from qkilld.model.sample import Sample

if TYPE_CHECKING:
    from qkilld.engine.collaborators import Collaborators
    from qkilld.engine.ladder_job import LadderJob
    from qkilld.engine.ports import GuestMonitor, Process, Timer
    from qkilld.engine.server_watch import ServerWatch

OPEN_TIMEOUT: Final = 2 * USEC_PER_SEC
"""Timeout (µs) for opening the monitor and taking a sample. When any timeout of this phase expires,
SIGTERM follows."""
READ_TIMEOUT: Final = 3 * USEC_PER_SEC
"""Timeout (µs) for reading the state of the disks, which usually takes 2 ms."""
READ_INTERVAL: Final = USEC_PER_SEC
"""Interval (µs) between readings of the disks while the job is held or waits for a backup,
and between samples during a flush."""
REREAD_INTERVAL: Final = 50_000
"""The first interval (µs) between checks for stuck requests. Later intervals are longer."""
SAVE_TIMEOUT: Final = USEC_PER_SEC // 2
"""Timeout (µs) for saving the intention to stop the processors."""
FLUSH_TIMEOUT: Final = USEC_PER_SEC
"""Timeout (µs) for stopping the processors and flushing. The timeout is short, because the job
cannot be held while the processors are stopped."""
STANDSTILL: Final = 6 * USEC_PER_SEC
"""A flush that does not stop the processors is abandoned after this time (µs) without progress, or
when it has lasted for StorageStallSec=. Disks write data back in bursts up to 5 s apart."""
QUIT_TIMEOUT: Final = 2 * USEC_PER_SEC
"""How long (µs) QEMU may take to exit after `quit`."""
UNDO_TIMEOUT: Final = USEC_PER_SEC
"""Timeout (µs) for starting the processors again while the job runs."""
UNDO_INTERVAL: Final = USEC_PER_SEC
"""Interval (µs) at which an ended job tries to start the processors again."""

_NO_JOBS: Final = JobsProgress()


class FlushPhase:
    def __init__(
        self,
        job: LadderJob,
        process: Process,
        parts: Collaborators[Any],
        link: MonitorLink,
        servers: ServerWatch,
    ) -> None:
        self._job, self._process, self._clock = job, process, parts.clock
        self._journal, self._link, self._servers = parts.journal, link, servers
        self._when_saved = parts.when_saved
        self._sampler = JobSampler(job, process, parts.sampler, parts.clock)
        self._evidence: Assessment | None = None
        """The assessment of the process, from samples of this phase."""
        self._on_sample: tuple[int, Callable[[bool], None]] | None = None
        """The step that waits for a sample, and its callback."""
        self.stopped = False
        """Whether the processors may have been stopped: set before QEMU is told to stop them.
        Unless a signal is sent, they must be started again."""
        self._timer: Timer | None = None
        self._until = self._due = INFINITY
        """`_until`: when the current step is abandoned. `_due`: the deadline to report."""
        self._step = 0
        """The number of the current step. Replies to commands of earlier steps are ignored."""
        self._is_over = False
        self._powered_off = False
        self.storage = NetworkStorage()
        """The network connections of the disks at the last reading."""
        self._first: BlockState | None = None
        self._is_early_flush = False
        """Whether disks are flushed before QEMU asks a file system that may hang."""
        self._flushed: tuple[str, ...] = ()
        """The disks that were flushed early."""
        self._unflushed: tuple[str, ...] = ()
        self._jobs = _NO_JOBS

    # ---- beginning ----

    def begin(self, *, skip: bool = False) -> None:
        """Open the monitor, unless it was already opened to ask the guest. `skip`: the disks cannot
        be flushed, so the phase only waits for `not_before` (see `lasts`).

        If an earlier daemon has stopped the processors, start them again. SIGTERM follows.
        """
        self._job.phase = Phase.QUIT
        self._powered_off = self._job.guest_asked is GuestAsked.SHUT_DOWN
        if self.stopped:
            self._undo()
        elif skip:
            self._is_over = True
        elif self._link.is_human and not self._powered_off:
            self._leave_out("the human monitor does not report whether a flush failed")
            self._is_over = True
        else:
            self._job.enter(Phase.QUIT)
            self._open()

    def lasts(self, not_before: int) -> bool:
        """Return whether SIGTERM must wait. This call may end the job. `not_before`: SIGTERM waits
        until this time (µs, CLOCK_MONOTONIC), but not longer than MaxSec= allows."""
        job, now = self._job, self._clock.now()
        if self._process.exited():
            job.note_gone()
            return True
        latest = self._latest
        if now >= min(self._until, latest) and not self._is_over:
            why = "the monitor did not answer in time" if now < latest else "MaxSec has passed"
            self._leave_out(why)
            self._is_over = True
        if self._is_over and job.control.held and not self.stopped:
            job.wait_until(min(job.deadline, job.control.held_until), job.control.held_until)
            return True
        not_before = min(not_before, latest)
        if self._is_over and now < not_before:
            job.wait_until(not_before, not_before)
            return True
        if self._is_over:
            self._step += 1
            self._stop_timer()
            self._sampler.close()
            job.enter(Phase.TERMINATE)
            return False
        self._wait()
        return True

    # ---- ending ----

    def close(self, *, ending: bool) -> None:
        """End the phase, because the job ends. If the processors are stopped, start them again,
        unless SIGTERM or SIGKILL was sent (`ending`). May be called twice."""
        self._step += 1
        self._stop_timer()
        self._sampler.close()
        if self.stopped and not ending and not self._process.exited():
            self._undo()
        else:
            self.stopped = False
            self._link.close()

    def commit(self) -> None:
        """Leave the processors stopped, because a signal was sent."""
        self.stopped = False

    def undo(self) -> None:
        """Start the processors again, because SIGTERM cannot be sent yet."""
        if self.stopped:
            self._undo()

    def recover(self) -> None:
        """Start the processors again for a job that ended just before an earlier daemon exited."""
        self._undo()

    # ---- the steps ----

    def _start(self, timeout: int, due: int = 0) -> int:
        """Begin a step with this timeout (µs); return its number. `due`: the deadline (µs) to
        report, if it is later than the timeout."""
        self._step += 1
        self._stop_timer()
        self._until = min(self._clock.now() + timeout, INFINITY)
        self._due = max(self._until, due)
        if self._job.running:
            self._wait()
        return self._step

    def _wait(self) -> None:
        self._job.wait_until(min(self._due, self._latest), min(self._until, self._latest))

    @property
    def _latest(self) -> int:
        """Return the latest time for SIGTERM: the end of MaxSec= minus the shorter of GraceSec= and
        half of MaxSec=."""
        policy = self._job.policy
        return min(self._job.started + policy.max - min(policy.grace, policy.max // 2), INFINITY)

    def _is_current(self, step: int) -> bool:
        """Return whether this step is in progress. `force` or the job's end may have stopped it."""
        return step == self._step and self._job.phase is Phase.QUIT

    def _finish(self) -> None:
        self._is_over = True
        # The call is delayed because `advance` may be the caller.
        self._clock.call_at(self._clock.now(), self._advance)

    def _advance(self) -> None:
        if self._job.running and self._job.phase is Phase.QUIT:
            self._job.advance()

    def _open(self) -> None:
        step = self._start(OPEN_TIMEOUT)

        def handle_monitor(result: GuestMonitor | str | Exception) -> None:
            if not self._is_current(step):
                return
            if isinstance(result, str | Exception):
                self._fail(result)
            else:
                self._sampler.take_sample(sampled, detail=False)

        def sampled(sample: Sample) -> None:
            if self._is_current(step):
                self._servers.note_sample(sample)
                self._is_early_flush = early_flush.may_hang(sample)
                self._read_disks()

        self._link.open(handle_monitor, was_asked=bool(self._job.rungs))

    def _read_disks(self) -> None:
        step = self._start(READ_TIMEOUT)

        def handle_disks(result: BlockState | str | Exception) -> None:
            if not self._is_current(step):
                return
            if isinstance(result, str | Exception):
                self._fail(result)
            elif flush_plan.wants_evidence(result):
                self._take_sample(step, lambda moved: self._plan(result))
            else:
                self._plan(result)

        if self._is_early_flush:
            self._read_disks_early(step)
        elif (monitor := self._monitor()) is not None:
            monitor.read_disks(handle_disks)

    def _read_disks_early(self, step: int) -> None:
        """Read the state of the disks without making QEMU ask a file system."""

        def handle_disks(state: BlockState | str | Exception) -> None:
            if not self._is_current(step):
                return
            if isinstance(state, str | Exception):
                self._fail(state)
            else:
                self._take_sample(step, lambda moved: self._plan_early(state))

        if (monitor := self._monitor()) is not None:
            monitor.read_disks(handle_disks, files=False)

    def _take_sample(self, step: int, callback: Callable[[bool], None]) -> None:
        """Take a sample, and tell `callback` whether there was progress since the last one.

        If a sample was requested before and has not come yet, use that one.
        """
        self._on_sample = (step, callback)
        self._sampler.take_sample(self._sampled, detail=False)

    def _sampled(self, sample: Sample) -> None:
        wanted, self._on_sample = self._on_sample, None
        if wanted is None or not self._is_current(wanted[0]):
            return
        self._servers.note_sample(sample)
        before = self._evidence
        self._evidence = after = assess(before, sample)
        wanted[1](before is not None and after.progress_at != before.progress_at)

    def _monitor(self) -> GuestMonitor | None:
        """Return the open monitor. If it was lost, end this phase and return None."""
        if self._link.monitor is None:
            self._fail("the connection to the monitor was lost")
        return self._link.monitor

    def _fail(self, why: str | Exception) -> None:
        if isinstance(why, Exception):
            doing = f"flushing the disks of {self._job.guest.title}"
            self._journal.write(events.internal_error(doing, why))
            why = "an error in qkilld prevents flushing"
        self._leave_out(why)
        self._end_qemu()

    def _read_later(self, interval: int, due: int = 0) -> None:
        self._start(interval + READ_TIMEOUT, due)
        self._timer = self._clock.call_at(self._clock.now() + interval, self._read_again)
        self._advance()

    def _read_again(self) -> None:
        self._timer = None
        if self._job.running and self._job.phase is Phase.QUIT:
            self._read_disks()

    def _plan(self, state: BlockState) -> None:
        self._powered_off = flush_plan.is_powered_off(state)
        self.storage = NetworkStorage.of(state.disks, self.storage.stuck)
        evidence = self._evidence if flush_plan.wants_evidence(state) else None
        if self._waits_for_jobs(state):
            due = self._jobs.moved_at + self._job.policy.storage_stall
            self._read_later(READ_INTERVAL, min(due, INFINITY))
        elif self._first is None and flush_plan.needs_second_reading(state, evidence):
            self._first = state
            self._read_later(REREAD_INTERVAL)
        elif self._first and not flush_plan.is_second_reading(self._first, state, evidence):
            passed = state.at - self._first.at
            self._read_later(max(min(passed, flush_plan.OLD - passed), REREAD_INTERVAL))
        elif self._job.control.held:
            self._read_later(READ_INTERVAL)
        else:
            first, second = self._first or state, self._second(state)
            self._carry_out(flush_plan.plan_flush(first, second, evidence), state)

    def _plan_early(self, state: BlockState) -> None:
        evidence = self._evidence
        self._powered_off = flush_plan.is_powered_off(state)
        if self._job.control.held or evidence is None:
            self._read_later(READ_INTERVAL)
        elif self._first is None and early_flush.needs_second_reading(state, evidence):
            self._first = state
            self._read_later(flush_plan.OLD)
        else:
            plan = early_flush.plan_early_flush(self._first or state, self._second(state), evidence)
            self._unflushed = tuple(disk.title for disk in state.disks)
            batches = [batch for batch in (plan.healthy, plan.others) if batch]
            self._flush_early(plan, state, batches)

    def _flush_early(
        self, plan: EarlyFlush, state: BlockState, batches: Sequence[tuple[GuestDisk, ...]]
    ) -> None:
        """Flush these disks, one batch after the other, and continue with the phase."""
        if not batches:
            self._end_early(plan, state)
            return
        batch, *others = batches
        step, most = self._start_flush()

        def handle_results(results: tuple[FlushResult, ...] | Exception) -> None:
            if not self._is_current(step):
                return
            if isinstance(results, Exception):
                self._fail(results)
                return
            titles = tuple(one.title for one in results if not one.error)
            self._flushed += titles
            self._unflushed = tuple(t for t in self._unflushed if t not in titles)
            if len(results) < len(batch):
                self._fail("flushing a disk takes longer")
            else:
                self._flush_early(plan, state, others)

        if (monitor := self._monitor()) is not None:
            monitor.flush_running(batch, handle_results, timeout=most)

    def _end_early(self, plan: EarlyFlush, state: BlockState) -> None:
        self._is_early_flush = False
        if plan.hang_reason:
            self._add_risks(flush_plan.risks_of_state(state))
            self._fail(plan.hang_reason)
        else:
            self._read_disks()

    def _second(self, state: BlockState) -> BlockState | None:
        return state if self._first is not None else None

    def _waits_for_jobs(self, state: BlockState) -> bool:
        """Return whether SIGTERM must wait because background jobs of QEMU make progress."""
        job, now = self._job, self._clock.now()
        before, self._jobs = self._jobs, self._jobs.after(state.jobs, now)
        if self._jobs.progress:
            self._first = None
        if self._jobs.moved_at != before.moved_at and job.verdict is not Verdict.FLUSHING:
            job.turn_to(Verdict.FLUSHING, tuple(one.title for one in state.jobs[:4]), now)
        return self._jobs.waited_for(now, job.policy.storage_stall)

    def _carry_out(self, plan: FlushPlan, state: BlockState) -> None:
        self._add_risks(flush_plan.risks_of_state(state))
        stuck = [name for disk in plan.stuck for name in disk.connections]
        self.storage = NetworkStorage.of(state.disks, stuck)
        if plan.stop and not plan.disks:
            self._report(plan, state, ())
            self._end_qemu()
        elif plan.stop and plan.before:
            self._flush_before(plan, state)
        elif plan.stop and plan.running:
            self._stop_when_saved(plan, state)
        elif plan.stop:
            self._flush(plan, state)
        elif plan.disks:
            self._flush_running(plan, state)
        else:
            self._leave_out(plan.incomplete_because)
            self._end_qemu()

    def _start_flush(self) -> tuple[int, int]:
        """Begin a flush that does not stop the processors; return its step and timeout (µs)."""
        most = self._job.policy.storage_stall
        step = self._start(min(STANDSTILL, most))
        latest = min(self._clock.now() + most, INFINITY)

        def take_sample() -> None:
            self._timer = None
            if self._is_current(step):
                self._take_sample(step, handle_sample)

        def handle_sample(moved: bool) -> None:
            job, now = self._job, self._clock.now()
            if moved:
                self._until = self._due = min(now + STANDSTILL, latest)
                self._wait()
                if job.verdict is not Verdict.FLUSHING and self._evidence is not None:
                    job.turn_to(Verdict.FLUSHING, self._evidence.reasons[:4], now)
            self._timer = self._clock.call_at(now + READ_INTERVAL, take_sample)

        self._timer = self._clock.call_at(self._clock.now() + READ_INTERVAL, take_sample)
        return step, most

    def _flush_before(self, plan: FlushPlan, state: BlockState) -> None:
        step, most = self._start_flush()

        def handle_results(result: tuple[FlushResult, ...] | Exception) -> None:
            if not self._is_current(step):
                return
            if isinstance(result, Exception):
                self._fail(result)
            elif len(result) < len(plan.before):
                self._leave_out("flushing a disk takes longer")
                self._end_qemu()
            elif self._job.control.held:
                self._read_later(READ_INTERVAL)
            else:
                self._stop_when_saved(plan, state)

        if (monitor := self._monitor()) is not None:
            monitor.flush_running(plan.before, handle_results, timeout=most)

    def _stop_when_saved(self, plan: FlushPlan, state: BlockState) -> None:
        step = self._start(SAVE_TIMEOUT)
        self.stopped = True
        self._job.enter(Phase.QUIT)

        def saved() -> None:
            if self._is_current(step):
                self._flush(plan, state)

        self._when_saved(saved)

    def _flush(self, plan: FlushPlan, state: BlockState) -> None:
        if plan.running:
            # The flush times out before the step does, so that the results so far are reported.
            step, timeout = self._start(FLUSH_TIMEOUT), FLUSH_TIMEOUT * 9 // 10
        else:
            step, timeout = self._start_flush()

        def handle_results(result: tuple[FlushResult, ...] | str | Exception) -> None:
            if not self._is_current(step):
                return
            if isinstance(result, str | Exception):
                self._fail(result)
            else:
                self._report(plan, state, result)
                self._end_qemu()

        if (monitor := self._monitor()) is not None:
            self._note_flush()
            monitor.stop_and_flush(plan.disks, handle_results, stop=plan.running, timeout=timeout)

    def _flush_running(self, plan: FlushPlan, state: BlockState) -> None:
        step, most = self._start_flush()

        def handle_results(result: tuple[FlushResult, ...] | Exception) -> None:
            if not self._is_current(step):
                return
            if isinstance(result, Exception):
                self._fail(result)
            else:
                titles = [one.title for one in result if not one.error]
                missing = [disk.title for disk in state.disks if disk.title not in titles]
                reason = f"{plan.incomplete_because}; flushed but for {_join_titles(missing)}"
                self._record_flush(FlushReport("partial" if titles else "left-out", reason), ())
                self._end_qemu()

        if (monitor := self._monitor()) is not None:
            self._note_flush()
            monitor.flush_running(plan.disks, handle_results, timeout=most)

    def _end_qemu(self) -> None:
        """If the guest has powered off, tell QEMU to quit. If it does not exit, SIGTERM follows."""
        monitor = self._link.monitor
        if not self._powered_off or monitor is None or self._job.control.held:
            self._finish()
            return
        step = self._start(QUIT_TIMEOUT)

        def ordered(refused: str | Exception) -> None:
            if refused and self._is_current(step):
                self._finish()

        self._job.note_rung(GuestOrder.QUIT.value, self._clock.now())
        self._job.enter(Phase.QUIT)
        monitor.order(GuestOrder.QUIT, ordered)
        self._advance()

    # ---- results ----

    def _report(self, plan: FlushPlan, state: BlockState, result: Sequence[FlushResult]) -> None:
        risks = flush_plan.risks_of_flush(result)
        failed = [one for one in result if one.error]
        proven = flush_plan.proves_all(plan, state, result)
        outcome = "left-out" if failed else "complete"
        if risks:
            outcome = "failed"
        reason = f"{failed[0].title}: {failed[0].error}" if failed else ""
        self._record_flush(FlushReport(outcome, reason, proven), risks)

    def _leave_out(self, reason: str) -> None:
        if self._job.flush != FlushReport():
            return
        outcome = "left-out"
        if self._flushed:
            missing = _join_titles(self._unflushed)
            outcome, reason = "partial", f"{reason}; flushed but for {missing}"
            self._note_flush()
        self._record_flush(FlushReport(outcome, reason), ())

    def _note_flush(self) -> None:
        self._job.note_rung("flush", self._clock.now())

    def _record_flush(self, report: FlushReport, risks: tuple[Risk, ...]) -> None:
        self._add_risks(risks)
        self._job.flush = report
        self._servers.note_flush()
        self._journal.write(events.disks_flushed(self._job))

    def _add_risks(self, risks: tuple[Risk, ...]) -> None:
        known = self._job.risks
        self._job.risks = (*known, *(risk for risk in risks if risk not in known))

    # ---- starting the processors again ----

    def _undo(self) -> None:
        """Use the open connection, or a new one, to start the processors again."""
        self._job.flush = replace(self._job.flush, proven=False)
        step = self._start(UNDO_TIMEOUT)

        def handle_monitor(result: GuestMonitor | str | Exception) -> None:
            if step != self._step:
                return
            if isinstance(result, str | Exception):
                self._undo_later()
            else:
                result.resume_guest(resumed)

        def resumed(refused: str | Exception) -> None:
            if step == self._step and not refused:
                self._is_undone()
            elif step == self._step:
                self._undo_later()

        if self._process.exited():
            self._is_undone()
        else:
            self._link.open(handle_monitor, was_asked=False)

    def _undo_later(self) -> None:
        if self._process.exited():
            self._is_undone()
        elif self._job.running:
            self._fail("the processors may be stopped, and the monitor does not answer")
        else:
            self._timer = self._clock.call_at(self._clock.now() + UNDO_INTERVAL, self._undo)

    def _is_undone(self) -> None:
        self.stopped = False
        if self._job.running:
            self._leave_out("an earlier attempt was interrupted")
            self._job.enter(self._job.phase)
            self._finish()
        else:
            self._link.close()
            self._job.note_processors_running()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _join_titles(titles: Sequence[str]) -> str:
    return ", ".join(titles[:4]) or "none"
