"""The engine's outside, faked: a clock that is moved by hand, processes that die on command."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from signal import SIGKILL, Signals

import pytest

from qkilld.engine.events import Event, MessageId
from qkilld.engine.job import Job
from qkilld.engine.ports import Process
from qkilld.engine.registry import Registry
from qkilld.model.evidence import Io, Sample
from qkilld.model.guest import Guest, Identity, Label
from qkilld.model.job import Request
from qkilld.model.policy import Config
from qkilld.model.words import Flag

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

    def call_at(self, when: int, callback: Callable[[], None]) -> FakeTimer:
        timer = FakeTimer()
        heapq.heappush(self._timers, (when, next(self._order), timer, callback))
        return timer

    def advance(self, seconds: float) -> None:
        """Move on, and run what falls due at its very time."""
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
    return Guest(identity, Label(name))


@dataclass
class FakeProcess:
    guest: Guest = field(default_factory=make_guest)
    dies_of: tuple[Signals, ...] = (SIGKILL,)
    refuses: tuple[Signals, ...] = ()
    zombie: bool = False
    dead: bool = False
    closed: bool = False
    sent: list[Signals] = field(default_factory=list)
    _callback: Callable[[], None] | None = None

    def identify(self) -> Identity:
        return self.guest.identity

    def set_label(self, label: Label) -> None:
        self.guest = Guest(self.guest.identity, label)

    def signal(self, number: Signals) -> None:
        assert not self.closed, "a signal through a pidfd that was let go of"
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

    def watch(self, callback: Callable[[], None]) -> None:
        assert not self.closed
        self._callback = callback

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True
        self._callback = None

    def die(self) -> None:
        """Exit; the pidfd becomes readable."""
        self.dead = True
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
    """Notes the phases that a job goes through, and in the end its result."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def _note(self, word: str) -> None:
        if not self.seen or self.seen[-1] != word:
            self.seen.append(word)

    def job_new(self, job: Job) -> None:
        self._note(job.phase.value)

    def job_changed(self, job: Job) -> None:
        self._note(job.phase.value)

    def job_ended(self, job: Job) -> None:
        assert job.result is not None
        self._note(job.phase.value)
        self._note(job.result.value)


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
    devices=(),
    mounts=(),
    sockets=(),
)
"""A process that has nothing to do, all of it read."""


class FakeSampler:
    """Sees what `shows` says at that time: None is a look that never comes back."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.looks = 0
        self.closed = 0
        self.shows: Callable[[int], Sample | None] = lambda now: IDLE
        self.late: list[Callable[[Sample], None]] = []
        """Those that were not called back."""

    def watch(self, process: Process) -> FakeSampler:
        return self

    def look(self, callback: Callable[[Sample], None]) -> None:
        self.looks += 1
        sample = self.shows(self._clock.now())
        if sample is None:
            self.late.append(callback)
        else:
            callback(replace(sample, at=self._clock.now()))

    def close(self) -> None:
        self.closed += 1


class World:
    def __init__(self, config: Config | None = None) -> None:
        self.clock = FakeClock()
        self.journal = FakeJournal()
        self.observer = FakeObserver()
        self.sampler = FakeSampler(self.clock)
        self.registry = Registry(
            config or Config(), self.clock, self.journal, self.observer, self.sampler
        )

    def stop(self, process: FakeProcess, flags: Flag = NO_FLAGS, **request: object) -> Job:
        return self.registry.terminate(process, Request(flags, **request))  # type: ignore[arg-type]


@pytest.fixture
def world() -> World:
    return World()
