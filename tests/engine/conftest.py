"""Fakes for the engine's ports: a clock advanced by hand, processes that exit on command."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from signal import SIGKILL, Signals

import pytest

from qkilld.engine.job import Job
from qkilld.engine.ports import GuestMonitor, ObservedJob, Process
from qkilld.engine.registry import Registry
from qkilld.model.block_state import (
    BackgroundJob,
    BlockState,
    FlushResult,
    GuestDisk,
    YankInstance,
)
from qkilld.model.constants import Flag
from qkilld.model.errors import UnknownIdentity
from qkilld.model.event import Event, MessageId
from qkilld.model.guest import AskingWays, Guest, GuestChannels, Identity, Label, Unit
from qkilld.model.guest_state import GuestObservation, GuestOrder, KeptMonitor, ShutdownSign
from qkilld.model.job import Request
from qkilld.model.policy import Config
from qkilld.model.sample import Io, Sample, Thread

S = 1_000_000
NO_FLAGS = Flag(0)


class FakeTimer:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeClock:
    def __init__(self) -> None:
        self._now = 1_000 * S
        self._order = itertools.count()
        self._timers: list[tuple[int, int, FakeTimer, Callable[[], None]]] = []

    def now(self) -> int:
        return self._now

    def started_at(self, start_time: int) -> int:
        return start_time * S // 100

    def call_at(
        self, when: int, callback: Callable[[], None], user: int | None = None
    ) -> FakeTimer:
        timer = FakeTimer()
        heapq.heappush(self._timers, (when, next(self._order), timer, callback))
        return timer

    def advance(self, seconds: float) -> None:
        """Advance the clock, and run each timer at its exact time."""
        end = self._now + int(seconds * S)
        while self._timers and self._timers[0][0] <= end:
            when, _, timer, callback = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            if not timer.cancelled:
                callback()
        self._now = end

    @property
    def pending(self) -> int:
        return sum(not timer.cancelled for _, _, timer, _ in self._timers)


def make_guest(pid: int = 4711, start_time: int = 99, uid: int = 1000, name: str = "web") -> Guest:
    identity = Identity(pid, start_time, uid, "qemu", "S", "/usr/bin/qemu-system-x86_64", False)
    return Guest(identity, Label(name, unit=Unit("web.service")))


@dataclass
class FakeProcess:
    guest: Guest = field(default_factory=make_guest)
    dies_of: tuple[Signals, ...] = (SIGKILL,)
    refuses: tuple[Signals, ...] = ()
    zombie: bool = False
    status: int = 0
    """How the process has ended, in the form of wait(2)."""
    dead: bool = False
    closed: bool = False
    unknown: int = 0
    """How often `identify` raises UnknownIdentity."""
    sent: list[Signals] = field(default_factory=list)
    _callback: Callable[[], None] | None = None

    def identify(self) -> Identity:
        if self.unknown:
            self.unknown -= 1
            raise UnknownIdentity.blocked(self.guest.identity.pid, "busy")
        return self.guest.identity

    def set_label(self, label: Label) -> None:
        self.guest = Guest(self.guest.identity, label)

    def signal(self, number: Signals) -> None:
        assert not self.closed, "a signal through a pidfd that was closed"
        if number in self.refuses:
            raise PermissionError
        if self.dead:
            raise ProcessLookupError
        self.sent.append(number)
        if number in self.dies_of:
            self.dead = True

    def exited(self) -> bool:
        assert not self.closed
        return self.dead

    def collected(self) -> bool:
        return not self.zombie

    def exit_status(self) -> int:
        assert not self.closed
        return self.status

    def dying(self) -> bool:
        return self.dead or SIGKILL in self.sent

    def watch(self, callback: Callable[[], None]) -> None:
        assert not self.closed
        self._callback = callback

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True
        self._callback = None

    def die(self, status: int = 0) -> None:
        """Exit, or end by a signal of another program; the pidfd becomes readable.

        `status`: in the form of wait(2), so the number of a signal means that this signal ended the
        process.
        """
        self.dead, self.status = True, status
        self.wake()

    def wake(self) -> None:
        """Let the loop notice an exit."""
        if self._callback is not None:
            callback, self._callback = self._callback, None
            callback()


class FakeJournal:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        self.events.append(event)

    @property
    def ids(self) -> list[MessageId]:
        return [event.id for event in self.events]


class FakeObserver:
    """Records the phases that a job goes through, and its result."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def _note(self, word: str) -> None:
        if not self.seen or self.seen[-1] != word:
            self.seen.append(word)

    def job_new(self, job: ObservedJob) -> None:
        self._note(job.phase.value)

    def job_changed(self, job: ObservedJob) -> None:
        self._note(job.phase.value)

    def job_ended(self, job: ObservedJob) -> None:
        assert job.result is not None
        self._note(job.phase.value)
        self._note(job.result.value)

    def job_forgotten(self, job: ObservedJob) -> None: ...


IDLE = Sample(
    at=0,
    state="S",
    term_pending=False,
    tracer=0,
    cpu=0,
    switches=0,
    io=Io(0, 0, 0, 0, 0, 0, 0),
    threads=(),
    rings=0,
    direct=False,
    nodes=(),
    formatted=0,
    pluggable=False,
    devices=(),
    mounts=(),
    sockets=(),
)
"""A process that has nothing to do, with every field readable."""

ON_PIPE = replace(
    IDLE,
    threads=(
        Thread(
            7,
            "qemu",
            "S",
            2,
            io_call=False,
            wchan="pipe_write",
            call="write",
            descriptor=2,
            target="pipe",
        ),
    ),
)
"""A sample of a process that waits to write to a full pipe."""


class FakeSampler:
    """A sample is what `shows` returns for its time. If this is None, the sample never arrives."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.looks = 0
        self.closed = 0
        self.shows: Callable[[int], Sample | None] = lambda now: IDLE
        self.late: list[Callable[[Sample], None]] = []
        """The callbacks that were not called."""

    def watch(self, process: Process) -> FakeSampler:
        return self

    lacks_thread: bool = False

    def take_sample(
        self, callback: Callable[[Sample], None], *, detail: bool = False, urgent: bool = False
    ) -> None:
        self.looks += 1
        sample = self.shows(self._clock.now())
        if sample is None:
            self.late.append(callback)
        else:
            callback(replace(sample, at=self._clock.now()))

    def close(self) -> None:
        self.closed += 1


class FakeMonitors:
    """The monitor of a guest. An observation is what `shows` returns for its time. If `shows` is
    None, the guest has no monitor."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.shows: Callable[[int], GuestObservation | None] = lambda now: None
        self.has_agent = False
        self.orders: list[GuestOrder] = []
        self.rest: tuple[frozenset[ShutdownSign], bool] = (frozenset(), False)
        """What read_rest() returns after QEMU's exit."""
        self.fault: Exception | None = None
        """Raised by observations."""
        self.adopted: list[KeptMonitor] = []
        self.passed: list[int] = []
        self.refuses: set[GuestOrder] = set()
        self.on_order: Callable[[GuestOrder], None] = lambda order: None
        self.open_monitors = 0
        self.reads_disks = True
        self.opens = False
        """Whether the monitor opens even if the guest cannot be observed."""
        self.opens_after_s = 0.0
        self.disks: Callable[[int], BlockState | str] = lambda now: "its disks cannot be seen"
        self.flushes: Callable[[], tuple[FlushResult, ...] | str | None] = lambda: ()
        """The result of a flush; None for no reply."""
        self.answers_flush = True
        """Whether a flush is answered while the processors run."""
        self.files_answer = True
        """Whether QEMU answers a reading of the disks that asks the file systems."""
        self.done: list[str] = []
        """Operations on the disks, and readings of them. Readings are recorded from the first one
        that asks no file system."""
        self.instances: tuple[YankInstance, ...] | str = "no out-of-band commands"
        self.answers = True
        """Whether out-of-band commands are answered."""
        self.answers_after_s = 0.0
        """The delay of the reply to query-yank."""
        self.answers_yank = True
        self.yank_reply: str | None = ""
        self.yanked: list[list[str]] = []
        self.on_yank: Callable[[], None] = lambda: None

    def open(
        self,
        process: Process,
        qmp_socket: str,
        callback: Callable[[GuestMonitor | str | Exception], None],
        *,
        kept: KeptMonitor | None = None,
        passed: int | None = None,
        was_asked: bool = False,
        agent_was_open: bool | None = None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> Callable[[], None]:
        if passed is not None:
            self.passed.append(passed)
        if kept is not None:
            self.adopted.append(kept)
        at = self._clock.now() + int(self.opens_after_s * S)
        timer = self._clock.call_at(at, lambda: self._open(callback, kept))
        return timer.cancel

    def _open(
        self,
        callback: Callable[[GuestMonitor | str | Exception], None],
        kept: KeptMonitor | None,
    ) -> None:
        if self.shows(self._clock.now()) is None and not self.opens:
            callback("it has no monitor")
        else:
            self.open_monitors += 1
            callback(FakeMonitor(self, self._clock, adopted=kept is not None))

    def read_rest(self, kept: KeptMonitor) -> frozenset[ShutdownSign]:
        self.adopted.append(kept)
        return self.rest[0]

    async def check(self, process: Process, qmp_socket: str) -> None: ...

    async def check_passed(self, process: Process, passed: int) -> None: ...

    async def read_disks(
        self, process: Process, qmp_socket: str, *, files: bool
    ) -> BlockState | None:
        found = self.disks(self._clock.now())
        return None if isinstance(found, str) else found

    async def describe(self, process: Process) -> AskingWays:
        return AskingWays()

    async def survey(self, identity: Identity) -> GuestChannels:
        return GuestChannels()


class FakeMonitor:
    def __init__(self, monitors: FakeMonitors, clock: FakeClock, *, adopted: bool) -> None:
        self._monitors, self._clock = monitors, clock
        self.adopted = adopted
        self._closed = False

    @property
    def has_agent(self) -> bool:
        return self._monitors.has_agent

    @property
    def reads_disks(self) -> bool:
        return self._monitors.reads_disks

    @property
    def lost(self) -> bool:
        seen = self._monitors.shows(self._clock.now())
        return seen is None and not self._monitors.opens

    @property
    def own_chardevs(self) -> tuple[str, ...]:
        return ("monitor",)

    def fileno(self) -> int:
        return 99

    def read_rest(self) -> tuple[frozenset[ShutdownSign], bool]:
        return self._monitors.rest

    def observe(self, callback: Callable[[GuestObservation | Exception], None]) -> None:
        if (fault := self._monitors.fault) is not None:
            self._call(lambda: callback(fault))
            return
        seen = self._monitors.shows(self._clock.now())
        assert seen is not None
        self._call(lambda: callback(replace(seen, at=self._clock.now())))

    def order(self, what: GuestOrder, callback: Callable[[str | Exception], None]) -> None:
        self._monitors.orders.append(what)
        refused = "refused" if what in self._monitors.refuses else ""
        if not refused:
            self._monitors.on_order(what)
        self._call(lambda: callback(refused))

    def read_disks(
        self, callback: Callable[[BlockState | str | Exception], None], *, files: bool = True
    ) -> None:
        if not files:
            self._monitors.done.append("look")
        elif "look" in self._monitors.done:
            self._monitors.done.append("look at files")
        if files and not self._monitors.files_answer:
            return
        found = self._monitors.disks(self._clock.now())
        if not isinstance(found, str):
            found = replace(found, at=self._clock.now())
        self._call(lambda: callback(found))

    def read_jobs(
        self, callback: Callable[[tuple[BackgroundJob, ...] | str | Exception], None]
    ) -> None:
        found = self._monitors.disks(self._clock.now())
        self._call(lambda: callback(found if isinstance(found, str) else found.jobs))

    def stop_and_flush(
        self,
        disks: Sequence[GuestDisk],
        callback: Callable[[tuple[FlushResult, ...] | str | Exception], None],
        *,
        stop: bool,
        timeout: int,
    ) -> None:
        self._monitors.done += ["stop", "flush"] if stop else ["flush"]
        if (found := self._monitors.flushes()) is not None:
            self._call(lambda: callback(found))

    def flush_running(
        self,
        disks: Sequence[GuestDisk],
        callback: Callable[[tuple[FlushResult, ...] | Exception], None],
        *,
        timeout: int,
    ) -> None:
        self._monitors.done += [f"flush {disk.title}" for disk in disks]
        if self._monitors.answers_flush:
            self._call(
                lambda: callback(tuple(FlushResult(disk.node, disk.title) for disk in disks))
            )

    def resume_guest(self, callback: Callable[[str | Exception], None]) -> None:
        self._monitors.done.append("cont")
        self._call(lambda: callback(""))

    def query_yank(
        self, callback: Callable[[tuple[YankInstance, ...] | str | Exception], None]
    ) -> None:
        if self._monitors.answers:
            after_s = self._monitors.answers_after_s
            self._call(lambda: callback(self._monitors.instances), after_s)

    def yank(
        self, instances: Sequence[YankInstance], callback: Callable[[str | Exception | None], None]
    ) -> None:
        self._monitors.yanked.append([instance.name for instance in instances])
        self._monitors.on_yank()
        if self._monitors.answers_yank:
            self._call(lambda: callback(self._monitors.yank_reply))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._monitors.open_monitors -= 1

    def _call(self, callback: Callable[[], None], after_s: float = 0) -> None:
        """Call `callback` from the loop, unless this monitor has been closed by then."""
        at = self._clock.now() + int(after_s * S)
        self._clock.call_at(at, lambda: None if self._closed else callback())


class World:
    def __init__(self, config: Config | None = None) -> None:
        self.clock = FakeClock()
        self.journal = FakeJournal()
        self.observer = FakeObserver()
        self.sampler = FakeSampler(self.clock)
        self.monitors = FakeMonitors(self.clock)
        self.registry = Registry(
            config or Config(),
            self.clock,
            self.journal,
            self.observer,
            self.sampler,
            self.monitors,
        )

    def stop(self, process: FakeProcess, flags: Flag = NO_FLAGS, **request: object) -> Job:
        return self.registry.terminate(process, Request(flags, **request))  # type: ignore[arg-type]


@pytest.fixture
def world() -> World:
    return World()
