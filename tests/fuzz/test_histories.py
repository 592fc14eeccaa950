"""Random histories of one job: it is held, extended, joined, forced, cancelled and resumed after
crashes, while its samples change. Whatever happens, no signal is early or unallowed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from signal import SIGCONT, SIGKILL, SIGTERM, Signals

from hypothesis import given, settings
from hypothesis import strategies as st

from qkilld.engine.job import Job
from qkilld.engine.steering import may_steer
from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import Flag, Result
from qkilld.model.errors import Failed
from qkilld.model.event import MessageId
from qkilld.model.job import Request
from qkilld.model.policy import Policy
from qkilld.model.sample import Io
from tests.engine.conftest import IDLE, FakeProcess, S, World, make_guest
from tests.engine.test_snapshot import BLIND, IDLES, WAITING, WAITS, Shows, crash

OWNER, STRANGER = 1000, 1001
GRACE = Policy().grace
WRITES: Shows = lambda now: replace(WAITING, io=Io(0, 0, 0, 0, 0, now, 0))  # noqa: E731
STOPPED: Shows = lambda now: replace(IDLE, state="T")  # noqa: E731
SHOWS: dict[str, Shows] = {
    "idle": IDLES,
    "waits": WAITS,
    "blind": BLIND,
    "writes": WRITES,
    "stopped": STOPPED,
    "late": lambda now: None,
}
RANKS = {0: Rank.ROOT, STRANGER: Rank.AUTHORIZED, OWNER: Rank.OWNER}

FLAGS = st.sampled_from([Flag(0), Flag.FORCE, Flag.FIXED, Flag.FORCE | Flag.FIXED])
UIDS = st.sampled_from(list(RANKS))
SPANS = st.sampled_from([0.01, 0.3, 1, 4, 9, 12, 25, 70])
WAIT = st.tuples(st.just("wait"), SPANS)
STEPS = st.one_of(
    *[WAIT] * 3,
    st.tuples(st.just("show"), st.sampled_from(list(SHOWS))),
    st.tuples(st.sampled_from(["hold", "release", "force"]), UIDS),
    st.tuples(st.just("extend"), UIDS, SPANS),
    st.tuples(st.just("join"), UIDS, FLAGS),
    st.tuples(st.just("crash"), SPANS),
    st.tuples(st.sampled_from(["cancel", "exit"])),
)


@dataclass
class WatchedProcess(FakeProcess):
    before_signal: Callable[[Signals], None] = lambda number: None

    def signal(self, number: Signals) -> None:
        self.before_signal(number)
        super().signal(number)


class History:
    def __init__(self, flags: Flag, uid: int, dies_of: tuple[Signals, ...]) -> None:
        self.world = World()
        self.process = WatchedProcess(make_guest(uid=OWNER), dies_of, before_signal=self.check)
        self.shown, self.shown_since = "idle", self.world.clock.now()
        self.forces = Flag.FORCE in flags
        self.forcing = False
        self.terminated_at = 0
        self.not_before = 0
        self.held = False
        """Whether somebody other than the owner has held or extended the job."""
        self.ends = 0
        self.job: Job | None = None
        self.job = self.world.stop(self.process, flags, uid=uid)

    def check(self, number: Signals) -> None:
        """Check a signal that the job is about to send."""
        now = self.world.clock.now()
        if number is SIGTERM:
            assert SIGTERM not in self.process.sent
            self.terminated_at = now
        assert number in (SIGTERM, SIGKILL, SIGCONT)
        if (job := self.job) is None:
            return
        assert job.running
        if self.forcing:
            return
        assert not job.control.held
        assert not self.held
        if number is SIGKILL:
            assert self.forces
            assert SIGTERM in self.process.sent
            assert now - self.terminated_at >= GRACE
            assert now >= max(job.control.not_before, self.not_before)
            writes_for = now - self.shown_since if self.shown == "writes" else 0
            assert writes_for < 2 * S or Flag.FIXED in job.flags

    def run(self, step: tuple[object, ...]) -> None:
        match step:
            case ("wait", float(seconds) | int(seconds)):
                self.world.clock.advance(seconds)
            case ("show", str(what)):
                self.shown, self.shown_since = what, self.world.clock.now()
                self.world.sampler.shows = SHOWS[what]
            case ("exit",):
                self.process.die()
            case ("crash", float(down) | int(down)):
                self._crash(down)
            case (str(what), *details) if self.job is not None:
                with contextlib.suppress(Failed):  # because it has ended or sent SIGKILL
                    self._steer(self.job, what, *details)

    def _crash(self, down: float) -> None:
        if (job := self.job) is None or not job.running:
            return
        self._count_ends()
        control, flags = job.control, job.flags
        # The next daemon resumes the job before crash() returns it, so `check` cannot look at the
        # job until then.
        self.job = None
        self.world, self.job = crash(self.world, job, self.process, down)
        assert (self.job.number, self.job.control, self.job.flags) == (job.number, control, flags)

    def _steer(self, job: Job, what: str, *details: object) -> None:
        match what, details:
            case "cancel", ():
                job.cancel()
            case "join", (int(uid), Flag() as flags):
                if job.running:
                    self.forces |= Flag.FORCE in flags
                    job.join(Request(flags, uid=uid))
            case "extend", (int(uid), float(seconds) | int(seconds)):
                job.extend(int(seconds * S), Steerer(uid, RANKS[uid]))
                if uid != OWNER:
                    until = self.world.clock.now() + int(seconds * S)
                    self.not_before = max(self.not_before, until)
            case _, (int(uid),) if may_steer(RANKS[uid], job.rank):
                act = {"hold": job.hold, "release": job.release, "force": job.force}[what]
                self.forcing, self.held = what == "force", what == "hold" and self.held
                self.forces |= self.forcing and job.running
                try:
                    act(Steerer(uid, RANKS[uid]))
                finally:
                    self.forcing = False
                self.held = what == "hold" and uid != OWNER

    def _count_ends(self) -> None:
        self.ends += self.world.journal.ids.count(MessageId.JOB_ENDED)

    def finish(self) -> None:
        """Let nothing delay the job any more. The job must end, and leave nothing behind."""
        job = self.job
        assert job is not None
        self.run(("release", 0))
        self.run(("show", "idle"))
        self.run(("join", 0, Flag.FORCE))
        self.world.clock.advance(1_000)
        self._count_ends()
        assert not job.running
        assert self.ends == 1
        sent = self.process.sent
        match job.result:
            case Result.EXITED | Result.KILLED:
                assert self.process.dead
            case Result.CANCELLED:
                pass
            case _:
                assert not self.forces or SIGKILL in sent
        assert job.result is not Result.KILLED or SIGKILL in sent
        times = [rung.at for rung in job.rungs]
        assert times == sorted(times)
        if not self.process.closed:  # It is watched until the process is gone.
            assert not self.process.dead
            self.process.die(SIGKILL)
        assert self.process.closed
        assert self.world.clock.pending == 0


@settings(max_examples=max(300, settings().max_examples))  # 2 s
@given(
    FLAGS,
    UIDS,
    st.sampled_from([(SIGKILL,), (SIGTERM, SIGKILL), ()]),
    st.lists(STEPS, max_size=15),
)
def test_no_signal_is_early_or_unallowed(
    flags: Flag, uid: int, dies_of: tuple[Signals, ...], steps: list[tuple[object, ...]]
) -> None:
    history = History(flags, uid, dies_of)
    for step in steps:
        history.run(step)
    history.finish()
