"""Before a guest is asked, check whether its process can run at all. If SIGSTOP has stopped the
process, send SIGCONT, provided that the caller allows it.

While SIGSTOP, a debugger or the freezer stops QEMU, its monitor does not answer. SIGTERM would take
effect as soon as QEMU runs again. The data in the caches of the guest's operating system would then
be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from signal import SIGCONT
from typing import TYPE_CHECKING, Any, Final

from qkilld.debug_log import note
from qkilld.decision.powerdown import obstacle_to_asking
from qkilld.decision.verdict import can_be_continued
from qkilld.engine import events
from qkilld.engine.checks import check_process
from qkilld.engine.collaborators import Collaborators
from qkilld.engine.sampling import TIMEOUT, JobSampler
from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.errors import ProcessChanged, UnknownIdentity
from qkilld.model.sample import Sample

if TYPE_CHECKING:
    from qkilld.engine.ladder_job import LadderJob
    from qkilld.engine.ports import Process, Timer

HELD_INTERVAL: Final = USEC_PER_SEC
"""While the job is held, a stopped process is checked again after this time (µs)."""
MAX_SAMPLES: Final = 5
"""How many times to request a sample if none is taken within sampling.TIMEOUT. On a busy host, the
first samples may be late."""

StandstillCallback = Callable[[str, bool], None]
"""Its arguments: the reason why the guest cannot be asked, or ""; and whether its process got
SIGCONT."""


class StandstillCheck:
    __slots__ = ("_job", "_parts", "_process", "_sampler", "_timer")

    def __init__(self, job: LadderJob, process: Process, parts: Collaborators[Any]) -> None:
        self._job, self._process, self._parts = job, process, parts
        self._sampler = JobSampler(job, process, parts.sampler, parts.clock)
        self._timer: Timer | None = None

    def begin(self, callback: StandstillCallback, *, may_continue: bool, ask_until: int) -> None:
        """Take a sample, and call back. If only SIGSTOP stops the process and `may_continue` is
        set, send SIGCONT first, but not while the job is held. If there is no sample after
        MAX_SAMPLES requests, or after a third of the time until `ask_until`, assume that the guest
        can be asked. No callback follows `close` or the exit of the process."""
        self._timer = None
        taken, now = 0, self._parts.clock.now()
        latest = now + (ask_until - now) // 3 - TIMEOUT

        def take_sample() -> None:
            nonlocal taken
            taken += 1
            self._sampler.take_sample(sampled, detail=False)

        def sampled(sample: Sample) -> None:
            reason = obstacle_to_asking(sample)
            may_take_more = taken < MAX_SAMPLES and self._parts.clock.now() <= latest
            if sample.state == "?" and not reason and may_take_more:
                take_sample()
                return
            self._sampler.close()
            if not may_continue or not can_be_continued(sample):
                callback(reason, False)
            elif self._job.control.held:
                at = self._parts.clock.now() + HELD_INTERVAL
                again = lambda: self.begin(  # noqa: E731
                    callback, may_continue=may_continue, ask_until=ask_until
                )
                self._timer = self._parts.clock.call_at(at, again)
            else:
                self._continue(reason, callback)

        take_sample()

    def close(self) -> None:
        """May be called twice."""
        self._sampler.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _continue(self, reason: str, callback: StandstillCallback) -> None:
        job = self._job
        try:
            check_process(self._process, job.guest.identity, self._parts.executables)
            self._process.signal(SIGCONT)
        except ProcessLookupError:
            return  # The pidfd will report the exit.
        except PermissionError:
            self._parts.journal.write(events.signal_refused(job, SIGCONT))
            callback(reason, False)
        except (ProcessChanged, UnknownIdentity) as error:
            # SIGTERM comes next, and its identity check will end the job or delay the signal.
            note(f"continuing process {job.guest.identity.pid}", error)
            callback(reason, False)
        else:
            job.note_rung(SIGCONT.name, self._parts.clock.now())
            self._parts.journal.write(events.signal_sent(job, job.rungs[-1]))
            job.enter(job.phase)
            callback("", True)
