"""What the engine needs of the outside. Adapters implement these, tests fake them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from signal import Signals
from typing import TYPE_CHECKING, Protocol

from qkilld.model.access import Action, Answer
from qkilld.model.evidence import Sample
from qkilld.model.guest import Guest, Identity, Label
from qkilld.model.trace import Header, Record
from qkilld.model.unit import UnitFacts

if TYPE_CHECKING:
    from qkilld.engine.events import Event
    from qkilld.engine.job import Job
    from qkilld.engine.snapshot import Snapshot


class Process(Protocol):
    """A process that is held by a pidfd: whatever becomes of its pid, this is the same process."""

    @property
    def guest(self) -> Guest: ...

    def identify(self) -> Identity:
        """Read again who it is: it may have executed another program by now.

        Raises NoSuchProcess, NotQemu, Failed.
        """

    def set_label(self, label: Label) -> None:
        """Say what it is called."""

    def signal(self, number: Signals) -> None:
        """Raises ProcessLookupError where the process is gone, PermissionError where refused."""

    def exited(self) -> bool:
        """Whether it has exited, collected by its parent or not. Does not block."""

    def collected(self) -> bool:
        """After it has exited: whether its parent has collected it, so that it is no zombie."""

    def watch(self, callback: Callable[[], None]) -> None:
        """Call back once, as soon as it exits."""

    def fileno(self) -> int | None:
        """The pidfd, for who keeps a copy; None where there is none."""

    def close(self) -> None:
        """Let go of it; no call back comes after this. May be called twice."""


class Host(Protocol):
    """The processes of this system."""

    def open(self, pid: int) -> Process:
        """Take hold of a process. Raises NoSuchProcess, Exiting, NotQemu, Failed."""

    async def label(self, identity: Identity) -> Label:
        """What it is called. Never takes long; an empty name where the kernel does not answer."""

    async def identities(self) -> list[Identity]:
        """Of every process whose executable can be seen; off the loop, for there may be many."""


class Caller(Protocol):
    """Who calls."""

    async def uid(self) -> int:
        """Asked only once the process is held, so that its id cannot change hands meanwhile."""

    async def may(self, action: Action, details: Mapping[str, str], *, ask: bool) -> Answer:
        """Whether an administrator lets the caller do that, which may take minutes.

        `details` are for whoever is asked for a password; without `ask` nobody is. Raises Busy
        where the caller has too many such questions open. Never answers from memory.
        """


class Units(Protocol):
    """The manager of systemd whose units TerminateUnit names. What it raises is a QkilldError."""

    async def unit(self, name: str) -> UnitFacts:
        """Raises InvalidArgs, NoSuchUnit."""


class Watch(Protocol):
    """Somebody who looks at one process."""

    def look(self, callback: Callable[[Sample], None]) -> None:
        """Take a sample and call back with it, in the loop; perhaps late, perhaps never."""

    def close(self) -> None:
        """Look no more; no call back comes after this."""


class Sampler(Protocol):
    def watch(self, process: Process) -> Watch: ...


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    """CLOCK_MONOTONIC in µs."""

    def now(self) -> int: ...

    def call_at(self, when: int, callback: Callable[[], None]) -> Timer: ...


class Journal(Protocol):
    def write(self, event: Event) -> None:
        """Note an event. Never blocks and never raises."""


class Recorder(Protocol):
    """The trace of one job."""

    def record(self, record: Record) -> None:
        """Note it. Never blocks and never raises."""

    def close(self) -> None:
        """Nothing more comes."""


class Traces(Protocol):
    """Where traces go."""

    def begin(self, header: Header) -> Recorder:
        """For one job. Nothing is made before its first record."""


class Store(Protocol):
    """Where jobs are kept over the end of this program. Nothing here blocks or raises."""

    def hold(self, number: int, process: Process) -> None:
        """Keep hold of the process of that job."""

    def save(self, snapshot: Snapshot) -> None:
        """In place of what was saved of that job before."""

    def release(self, number: int) -> None:
        """Its process need not be held any more."""

    def forget(self, number: int) -> None:
        """Nobody asks for that job any more."""


class Observer(Protocol):
    """Who wants to hear of jobs: the bus. Nothing that it raises may reach a job."""

    def job_new(self, job: Job) -> None: ...

    def job_changed(self, job: Job) -> None: ...

    def job_ended(self, job: Job) -> None: ...
