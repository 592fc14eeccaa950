"""Execute one run: make storage, start QEMU and noise, stop QEMU, follow the schedule, and check
the disks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.trace import decode
from tests.campaign import disks, standstill
from tests.campaign.noise import NOISES, Surroundings
from tests.campaign.spec import HOST, PROCESS, Change, Spec
from tests.campaign.truth import BOUNDED, truth
from tests.campaign.ways import OURS, WAYS
from tests.lab.bare import bare_guest
from tests.lab.bus import daemon, private_bus
from tests.lab.process import wait_gone
from tests.lab.scratch import scratch

CONFIG: Final = "[Target]\nExecutables=/usr/bin/qemu-system-* /usr/local/bin/qemu-system-*\n"
_BETTER: Final = frozenset({"fast", "thaw", "alive", "back", "go"})
_PATIENCE_S: Final = 300
"""A time (s) that is longer than any run in which storage moves."""


@dataclass
class Outcome:
    """The outcome of a run. Times are seconds from the request to stop."""

    result: str
    """The job's result; `running` if the job still runs long after it should have ended."""
    seconds: float
    at_risk: bool
    records: int
    lost: int
    """The number of acknowledged records that are missing in the images."""
    bitmap_lost: bool = False
    applied: list[tuple[float, Change]] = field(default_factory=list)
    """The changes with their actual times."""
    delay: float = 0.0
    """Time from the request to the start of the job. (qkilld's times count from the start of the
    job.)"""
    trace: str = ""
    receipt: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Outcome:
        applied = [(at, Change(**change)) for at, change in value["applied"]]
        return cls(**{**value, "applied": applied})


@dataclass(frozen=True)
class Server:
    """A daemon that stops the runs."""

    address: str
    traces: Path
    pid: int


@contextlib.contextmanager
def server(traces: Path) -> Iterator[Server]:
    with private_bus() as bus, daemon(bus, f"--trace-dir={traces}", config=CONFIG) as running:
        yield Server(bus.address, traces, running.pid)


def run(
    spec: Spec, by: Server, begun: Callable[[], None] = lambda: None, way: str = OURS
) -> Outcome:
    """Execute a run. `begun` is called when the stop has been requested.

    Raises AssertionError and TimeoutError if the lab itself fails, and needs.Missing.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("m"))
        made = [disks.make_disk(stack, n, disk) for n, disk in enumerate(spec.disks)]
        around = Surroundings(directory, made[0].image.parent, stack)
        starts = [NOISES[name](around) for name in spec.noises]
        pipe = None
        if any(change.what == "pipe" for change in spec.changes):
            pipe = standstill.FullPipe()
            stack.callback(pipe.close)
        arguments = [word for disk in made for word in disk.arguments()]
        guest = stack.enter_context(
            bare_guest(
                directory,
                [*arguments, *around.arguments],
                name=spec.name,
                pass_fds=[fd for disk in made for fd in disk.pass_fds()],
                stderr=pipe.write if pipe else None,
                before=around.before,
            )
        )
        still = standstill.Standstill(guest, pipe, stack)
        recover = contextlib.ExitStack()
        stack.push(recover)
        for disk in made:
            recover.callback(disk.recover)
            process = disk.server.process if disk.server else None
            disk.joined(process.pid if process else guest.pid)
        recover.callback(still.go)
        for disk in made:
            disk.close_pair()
            disk.write(guest)
        for start in starts:
            start(guest)
        applied: list[tuple[float, Change]] = []
        schedule = sorted(spec.changes, key=lambda change: change.at)
        began = time.monotonic()

        def apply(change: Change) -> None:
            before = time.monotonic()
            if change.of == PROCESS:
                still.apply(change.what)
            elif change.of == HOST:
                _pause(change.what, guest.pid, by, made)
            else:
                made[change.of].apply(change)
            # A change for the worse counts from its end, and a change for the better from its
            # beginning.
            applied.append((before if change.what in _BETTER else time.monotonic(), change))

        first = [change for change in schedule if change.at <= 0]
        del schedule[: len(first)]
        for change in first:
            if change.of != PROCESS:
                apply(change)
        for disk in made:
            disk.write_late(guest)
        for change in first:
            if change.of == PROCESS:
                apply(change)
        if "no-monitor" in spec.noises:
            guest.close_monitor()
        with contextlib.closing(WAYS[way][1](by.address)) as stop:
            began = time.monotonic()
            stop.begin(guest, spec)
            begun()
            patience = _patience(spec)
            while True:
                next_change = began + (schedule[0].at if schedule else patience)
                remaining = next_change - time.monotonic()
                if (end := stop.wait(max(0.0, remaining))) is not None or not schedule:
                    break
                apply(schedule.pop(0))
        seconds = time.monotonic() - began
        result, receipt = end or ("running", {})
        recover.close()
        if result == "running":
            with contextlib.suppress(ProcessLookupError):
                guest.signal(signal.SIGKILL)
        assert wait_gone(guest.pidfd, 60), "QEMU outlives the run"
        guest.close()
        for disk in made:
            if disk.server is not None:
                # A server has written the data of all requests that it has answered, so it can be
                # killed.
                disk.server.leave()
            else:
                disk.wait_closed()
        number = stop.job.rpartition("/")[2]
        traces = list(by.traces.glob(f"job{number}-pid{guest.pid}-*.jsonl"))
        return Outcome(
            result,
            round(seconds, 2),
            bool(receipt.get("data-at-risk", False)),
            sum(disk.layout.count * disk.layout.passes for disk in made),
            sum(disk.lost() for disk in made),
            any(disk.bitmap_left() for disk in made),
            [(round(at - began, 3), change) for at, change in applied],
            _started(traces[0]) - began if traces else 0.0,
            str(traces[0]) if traces else "",
            receipt,
        )


def _started(trace: Path) -> float:
    """Return the start of the job, time.monotonic()."""
    deadline = time.monotonic() + 10
    while "\n" not in (text := trace.read_text()):
        # A thread of the daemon writes the trace, perhaps only after the end of the run.
        assert time.monotonic() < deadline, "the job has no trace"
        time.sleep(0.01)
    return decode(text).header.started / USEC_PER_SEC


def _patience(spec: Spec) -> float:
    """Return how many seconds after the request a running job counts as endless."""
    planned = truth(spec, [(change.at, change) for change in spec.changes])
    last = planned.spans[-1]
    return (
        last.since + 2 * spec.storage_stall + spec.longest_stall
        if last.state in BOUNDED
        else _PATIENCE_S
    )


def _pause(what: str, guest: int, by: Server, made: list[disks.RunDisk]) -> None:
    """Pause or continue the whole host. The daemon is paused first and continued last."""
    running = [disk.server for disk in made if disk.server and not disk.frozen]
    processes = [server.process for server in running if server.process]
    pids = [by.pid, guest, *(process.pid for process in processes)]
    for pid in pids if what == "pause" else reversed(pids):
        os.kill(pid, signal.SIGSTOP if what == "pause" else signal.SIGCONT)
