"""The engine's interfaces to the outside, and the readable part of a job.

Other packages implement these protocols; tests fake them. Import this module for types only
(TYPE_CHECKING): the running daemon never loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from signal import Signals
from typing import Any, Protocol

from qkilld.decision.ladder import JobFacts
from qkilld.decision.verdict import Assessment
from qkilld.model.access import Answer, PolkitAction, Rank
from qkilld.model.block_state import BackgroundJob, BlockState, FlushResult, GuestDisk, YankInstance
from qkilld.model.constants import Flag, GuestAsked, Phase, Result, Verdict
from qkilld.model.event import Event
from qkilld.model.guest import AskingWays, Guest, GuestChannels, Identity, Label, Unidentified
from qkilld.model.guest_state import GuestObservation, GuestOrder, KeptMonitor, ShutdownSign
from qkilld.model.job import Control, FlushReport, Request, Risk, Rung, VerdictChange
from qkilld.model.policy import Policy
from qkilld.model.sample import Sample
from qkilld.model.trace import Header, Record
from qkilld.model.unit import UnitFacts


class Process(Protocol):
    """A process opened by pidfd. It stays the same process even if its pid is reused."""

    @property
    def guest(self) -> Guest: ...

    def identify(self) -> Identity:
        """Read the identity again: the process may have executed another program.

        Raises NoSuchProcess, NotQemu, Failed.
        """

    def set_label(self, label: Label) -> None:
        """Set the guest's names."""

    def signal(self, number: Signals) -> None:
        """Send a signal. Raises ProcessLookupError if the process is gone, and PermissionError if
        the kernel refuses."""

    def exited(self) -> bool:
        """Return whether the process has exited, even if its parent has not reaped it yet. Does not
        block."""

    def collected(self) -> bool:
        """Return whether the process has exited and is not a zombie any more."""

    def exit_status(self) -> int:
        """Return how the process has ended, in the form of wait(2); 0 if unknown. Call this after
        the exit."""

    def dying(self) -> bool:
        """Return whether the process is known to have received SIGKILL, or to be exiting."""

    def watch(self, callback: Callable[[], None]) -> None:
        """Call back once, when the process exits."""

    def fileno(self) -> int | None:
        """Return the pidfd, so that the caller can duplicate it; None if there is none."""

    def close(self) -> None:
        """Close the pidfd and cancel the callback. May be called twice."""


class ServerExits(Protocol):
    """Finds out which servers ended, or closed a connection, before their guest did."""

    @property
    def unwatched(self) -> frozenset[int]:
        """Return the added processes whose end will go unnoticed, because watching them failed."""

    def add(self, pid: int, seen_at: int) -> None:
        """Watch a process that ran at `seen_at` (CLOCK_MONOTONIC, µs). May be called again."""

    def remove(self, pid: int) -> None:
        """Does nothing if the process is not watched."""

    def started(self, pid: int) -> int | None:
        """Return when a watched process started (CLOCK_MONOTONIC, µs); None if it is not
        watched."""

    def has_ended(self, pid: int) -> bool:
        """Return whether an added process is known to have ended."""

    def ended(self) -> tuple[frozenset[int], frozenset[int]]:
        """Return two sets: the processes that ended, or may have ended, before the guest; and those
        that ended after it or are ending now. Call this once, after the guest's end."""

    def closed_first(self, tcp_id: str) -> bool | None:
        """Return whether the guest closed a connection (Socket.tcp_id) before its server did; None
        if unknown. Call this within a minute after the guest's end. It takes up to 20 ms."""

    def close(self) -> None:
        """May be called twice."""


class Host(Protocol):
    """The processes of this system."""

    def open(self, pid: int) -> Process:
        """Open a process by pidfd. Raises NoSuchProcess, NotQemu, Failed."""

    def open_unidentified(self, pid: int) -> Process:
        """Open a process by pidfd. Until its `identify` succeeds, only its pid is known
        (Identity.unread). Raises NoSuchProcess, Failed."""

    async def label(self, identity: Identity) -> Label:
        """Return the names of a guest. Takes at most a second; if reading them blocks, the guest's
        name is None."""

    async def labels(self, identities: Sequence[Identity]) -> list[Label]:
        """Return the names of many guests, in this order. Takes at most a second, even if some
        cannot be read without blocking."""

    async def identities(self) -> tuple[list[Identity], list[Unidentified]]:
        """Return every process whose executable is visible, and the processes that cannot be
        identified at the moment. Does not block the loop."""


class Caller(Protocol):
    async def uid(self) -> int:
        """Return the caller's uid. Call this after the process was opened, because a pid could be
        reused while this waits."""

    async def may(self, action: PolkitAction, details: Mapping[str, str], *, ask: bool) -> Answer:
        """Ask polkit whether the caller may perform this action. The answer may take minutes, and
        is never cached.

        `details` are shown to the person who is asked for a password. Without `ask`, nobody is
        asked. Raises Busy if the caller has too many open requests.
        """


class Units(Protocol):
    """Asks systemd about the units that callers name. Raises only QkilldErrors."""

    async def unit(self, name: str) -> UnitFacts:
        """Raises InvalidArgs, NoSuchUnit."""


class Watch(Protocol):
    def take_sample(
        self, callback: Callable[[Sample], None], *, detail: bool = False, urgent: bool = False
    ) -> None:
        """Take a sample, and call back with it in the loop. The callback may come late or never.
        Urgent samples are taken before others that wait."""

    @property
    def lacks_thread(self) -> bool:
        """Return whether the requested sample is delayed because other users' processes block all
        threads that take samples."""

    def close(self) -> None:
        """No callback follows."""


class Sampler(Protocol):
    def watch(self, process: Process) -> Watch: ...


class GuestMonitor(Protocol):
    """The open monitor of one guest. Callbacks are called in the loop, and never after `close`.

    A callback receives an exception only if a bug in qkilld caused it.
    """

    @property
    def has_agent(self) -> bool:
        """Return whether the guest has an agent that seems to listen."""

    @property
    def reads_disks(self) -> bool:
        """Return whether the state of disks can be read; False for a human monitor."""

    @property
    def lost(self) -> bool:
        """Return whether the connection has ended. Another one can then be opened."""

    @property
    def adopted(self) -> bool:
        """Return whether the connection was opened by an earlier daemon (KeptMonitor)."""

    @property
    def own_chardevs(self) -> tuple[str, ...]:
        """Return the labels to save in a KeptMonitor."""

    def fileno(self) -> int | None:
        """Return the connection's descriptor; None if the connection does not allow out-of-band
        commands."""

    def observe(self, callback: Callable[[GuestObservation | Exception], None]) -> None:
        """Observe the guest once, and always call back. Only one observation may run at a time."""

    def order(self, what: GuestOrder, callback: Callable[[str | Exception], None]) -> None:
        """Give an order to QEMU or the guest. Call back with "", or with the printable reason of a
        failure."""

    def read_rest(self) -> tuple[frozenset[ShutdownSign], bool]:
        """After QEMU's exit, return the signs of a guest shutdown that were seen up to the exit,
        and whether it is certain that none was missed. Does not block."""

    def read_disks(
        self, callback: Callable[[BlockState | str | Exception], None], *, files: bool = True
    ) -> None:
        """Read the state of the disks. Call back with it, or with the reason of a failure. Without
        `files`, QEMU asks no file system, and the state lacks some facts
        (monitor.disks.read_state)."""

    def read_jobs(
        self, callback: Callable[[tuple[BackgroundJob, ...] | str | Exception], None]
    ) -> None:
        """Read only the background jobs that would be cancelled if QEMU exited: backups, a
        migration."""

    def stop_and_flush(
        self,
        disks: Sequence[GuestDisk],
        callback: Callable[[tuple[FlushResult, ...] | str | Exception], None],
        *,
        stop: bool,
        timeout: int,
    ) -> None:
        """Stop the processors if `stop` is set, and then flush the disks. All this takes at most
        `timeout` (µs).

        Calls back with the result of each flush, or with the reason why nothing was flushed.
        """

    def flush_running(
        self,
        disks: Sequence[GuestDisk],
        callback: Callable[[tuple[FlushResult, ...] | Exception], None],
        *,
        timeout: int,
    ) -> None:
        """Flush one disk after another without stopping the processors. Errors of disks are not
        reported. If a disk does not answer in time, its result and those of all later disks are
        missing."""

    def resume_guest(self, callback: Callable[[str | Exception], None]) -> None:
        """As soon as the monitor answers, remove the exports made for flushing and start the
        processors."""

    def query_yank(
        self, callback: Callable[[tuple[YankInstance, ...] | str | Exception], None]
    ) -> None:
        """List the connections that QEMU can cut off ("yank"), except those of the monitor. Works
        even if QEMU is busy."""

    def yank(
        self, instances: Sequence[YankInstance], callback: Callable[[str | Exception | None], None]
    ) -> None:
        """Cut off these connections. Call back with "", with the reason of a refusal, or with None
        if no reply came. Without a reply, it is unknown whether the connections are cut off."""

    def close(self) -> None:
        """May be called twice."""


class Monitors(Protocol):
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
        """Open the guest's monitor. `qmp_socket` is the path that a caller named, or "".

        `kept` is tried first, then `passed`, which `check_passed` must have checked. The callee
        owns both connections. `was_asked`: the guest was already asked to shut down, so signs of a
        shutdown are of interest. `agent_was_open`: whether the agent had its port open when the
        guest was asked; None if unknown. `on_lost` is called if `kept` cannot be used.

        Calls back with the monitor, or with the reason why the guest cannot be asked. Returns a
        function that ends the attempt; no callback follows it.
        """

    def read_rest(self, kept: KeptMonitor) -> frozenset[ShutdownSign]:
        """After QEMU's exit, read the rest of a kept connection, and return the signs of a shutdown
        in it. Signs that an earlier daemon has already read are not included. Does not block.
        """

    async def check(self, process: Process, qmp_socket: str) -> None:
        """Raises InvalidArgs if the process has no such socket."""

    async def check_passed(self, process: Process, passed: int) -> None:
        """Raises InvalidArgs if `passed` is not a connection to a monitor of the process."""

    async def read_disks(
        self, process: Process, qmp_socket: str, *, files: bool
    ) -> BlockState | None:
        """Read the disks of a guest that has no job. Return None if another program uses its QMP
        monitor, or if the monitor does not answer within a second. `files`: see
        GuestMonitor.read_disks."""

    async def describe(self, process: Process) -> AskingWays:
        """Describe how qkilld can ask the guest, and what prevents it."""

    async def survey(self, identity: Identity) -> GuestChannels:
        """Return which channels to the guest exist. Takes a few seconds at most, and connects to
        none of them."""


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    """CLOCK_MONOTONIC in µs."""

    def now(self) -> int: ...

    def started_at(self, start_time: int) -> int:
        """Convert Identity.start_time to the time of this clock."""

    def call_at(self, when: int, callback: Callable[[], None], user: int | None = None) -> Timer:
        """Call back at this time. `user`: the uid for which the work is done, if a user can cause
        any number of such callbacks at a time. Users then take turns (engine.steps)."""


class Journal(Protocol):
    def write(self, event: Event) -> None:
        """Write an event. Never blocks and never raises."""


class Recorder(Protocol):
    def record(self, record: Record) -> None:
        """Write a record. Never blocks and never raises."""

    def close(self) -> None:
        """End the trace."""


class Traces(Protocol):
    def begin(self, header: Header) -> Recorder:
        """Begin the trace of a job. The first record creates the file."""


class JobState(Protocol):
    @property
    def number(self) -> int: ...

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types. May be called in any thread."""


class Store(Protocol):
    """Stores jobs so that they outlast this program. Nothing here blocks or raises."""

    def store_fd(self, number: int, process: Process) -> None:
        """Give systemd the pidfd of the job's process."""

    def save(self, state: JobState) -> None:
        """Save a job's state, in place of an earlier one."""

    def when_written(self, callback: Callable[[], None]) -> None:
        """Call back in the loop when everything saved so far is written, or writing has failed."""

    def write_first(self, number: int, callback: Callable[[], None]) -> None:
        """Write the state of this job before the states of others. Call back in the loop when it is
        written, or writing has failed."""

    def store_monitor(self, number: int, fd: int) -> None:
        """Give systemd a copy of this job's connection to its guest's monitor."""

    def drop_fd(self, number: int) -> None:
        """Drop the stored pidfd of the job's process."""

    def drop_monitor(self, number: int) -> None:
        """Drop the stored connection, so that other programs can use the monitor."""

    def forget(self, number: int) -> None:
        """Remove the job's state."""


class ObservedJob(Protocol):
    """The readable part of a job. engine.job documents each member."""

    @property
    def number(self) -> int: ...
    @property
    def guest(self) -> Guest: ...
    @property
    def request(self) -> Request: ...
    @property
    def flags(self) -> Flag: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def rank(self) -> Rank: ...
    @property
    def control(self) -> Control: ...
    @property
    def phase(self) -> Phase: ...
    @property
    def verdict(self) -> Verdict: ...
    @property
    def result(self) -> Result | None: ...
    @property
    def error(self) -> str: ...
    @property
    def error_name(self) -> str: ...
    @property
    def rungs(self) -> Sequence[Rung]: ...
    @property
    def history(self) -> Sequence[VerdictChange]: ...
    @property
    def assessment(self) -> Assessment | None: ...
    @property
    def by_evidence(self) -> bool: ...
    @property
    def facts(self) -> JobFacts: ...
    @property
    def data_at_risk(self) -> bool: ...
    @property
    def guest_asked(self) -> GuestAsked: ...
    @property
    def risks(self) -> Sequence[Risk]: ...
    @property
    def flush(self) -> FlushReport: ...
    @property
    def started(self) -> int: ...
    @property
    def ended(self) -> int | None: ...
    @property
    def elapsed(self) -> int: ...
    @property
    def deadline(self) -> int: ...


class Observer(Protocol):
    """Receives changes of jobs. Its exceptions must not reach a job."""

    def job_new(self, job: ObservedJob) -> None: ...

    def job_changed(self, job: ObservedJob) -> None: ...

    def job_ended(self, job: ObservedJob) -> None: ...

    def job_forgotten(self, job: ObservedJob) -> None:
        """The job can no longer be queried."""
