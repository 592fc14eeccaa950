"""A flood of hostile messages, and its effect on a daemon and on another client."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.fuzz.hostile import Deeds, Order
from tests.lab import bus as lab_bus
from tests.lab import needs
from tests.lab.bus import Bus, CallError, Client, Daemon
from tests.lab.guest import Guest, fake_qemu
from tests.lab.process import OTHER_UID, TOP, end, spawn
from tests.lab.scratch import scratch
from tests.lab.varlink import VarlinkClient

GUESTS: Final = 8
"""The number of guests of the attacker. Other users have as many."""
PAUSE_S: Final = 0.02
"""Pause between two rounds of the well-behaved client."""
SETTLE_S: Final = 2.0
"""Time after the flood in which open calls are answered. Memory is measured afterwards."""
PEER: Final = "org.freedesktop.timedate1"
"""A service that uses sd-bus, and does nothing unless it is called."""
_PEER_PROGRAM: Final = Path("/usr/lib/systemd/systemd-timedated")
WARM: Final = 0.1
"""After this share of the flood, the daemon is warm: it has allocated the memory that such a load
needs."""


@dataclass(frozen=True)
class Latency:
    """The latency of one call, in seconds."""

    calls: int
    median: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        ordered = sorted(seconds)
        p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        return cls(len(ordered), statistics.median(ordered), p99, ordered[-1])


@dataclass
class Report:
    """The report of one run."""

    deeds: Deeds
    seconds: float
    resident: tuple[int, int, int]
    """The daemon's memory in bytes: at rest, when it was warm, and after the flood."""
    descriptors: tuple[int, int]
    """The daemon's open descriptors before and after the flood."""
    latency: dict[str, Latency]
    """The latency of the well-behaved client's calls, by method."""
    faults: list[str] = field(default_factory=list)
    """Broken invariants."""

    @property
    def growth(self) -> int:
        """Growth of resident memory in bytes since the daemon was warm."""
        return self.resident[2] - self.resident[1]

    @property
    def messages(self) -> int:
        return self.deeds.sent.total()


@dataclass
class GoodClient:
    """A well-behaved client that repeats typical calls and measures their latency."""

    bus: Bus
    varlink: Path
    guest: Guest
    job: str
    stop: threading.Event = field(default_factory=threading.Event)
    times: dict[str, list[float]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Run until `stop` is set."""
        with self.bus.client() as client, VarlinkClient(self.varlink) as varlink:
            calls: dict[str, Callable[[], Any]] = {
                "qkilld, GetJobByPID": lambda: client.call("GetJobByPID", "u", self.guest.pid),
                "qkilld, GetJobByPID on Varlink": lambda: self._job_by_varlink(varlink),
                "qkilld, Peer.Ping": lambda: _ping(client, "org.qkilld1"),
                f"{_PEER_PROGRAM.name}, Peer.Ping": lambda: _ping(client, PEER),
                "the bus, Peer.Ping": lambda: _ping(client, "org.freedesktop.DBus"),
            }
            while not self.stop.wait(PAUSE_S):
                for name, call in calls.items():
                    began = time.perf_counter()
                    try:
                        answer = call()
                    except (CallError, EOFError, TimeoutError, OSError) as error:
                        self.faults.append(f"{name}: {error!r}")
                        return
                    self.times.setdefault(name, []).append(time.perf_counter() - began)
                    if answer not in ((), (self.job,)):
                        self.faults.append(f"{name} answered {answer}")

    def _job_by_varlink(self, varlink: VarlinkClient) -> tuple[str]:
        state = varlink.call("GetJobByPID", pid=self.guest.pid)["state"]
        return (f"/org/qkilld1/job/{state['job']}",)


def _ping(client: Client, destination: str) -> tuple[Any, ...]:
    return client.call(
        "Ping", path="/", interface="org.freedesktop.DBus.Peer", destination=destination
    )


def flood(seed: int, *, messages: int, seconds: float, connections: int = 8) -> Report:
    """Flood the daemon with `messages`, for at most `seconds`. Raises needs.Missing."""
    uid = OTHER_UID if os.geteuid() == 0 else None
    with contextlib.ExitStack() as stack:
        bus = stack.enter_context(lab_bus.private_bus())
        directory = stack.enter_context(scratch("v"))
        directory.chmod(0o711)
        path = directory / "org.qkilld1"
        daemon = stack.enter_context(lab_bus.daemon(bus, "--varlink", str(path)))
        daemon.wait_for("serves the bus at")
        stack.enter_context(_sd_bus_service(bus))
        own = [stack.enter_context(fake_qemu(uid=uid, stubborn=True)) for _ in range(GUESTS)]
        others = [stack.enter_context(fake_qemu(name=f"other{i}")) for i in range(GUESTS)]
        wanted = stack.enter_context(fake_qemu(name="wanted", stubborn=True))
        client = stack.enter_context(bus.client())
        job = client.terminate(wanted.pid, grace_usec=("t", 3_600_000_000))
        behaved = GoodClient(bus, path, wanted, job)
        order = Order(
            address=bus.address,
            seed=seed,
            connections=connections,
            messages=int(messages * WARM),
            seconds=seconds * WARM,
            own=[guest.pid for guest in own],
            # If the attacker is root, no guest is forbidden, because root may stop every guest.
            others=[guest.pid for guest in (*others, wanted)] if uid is not None else [],
            varlink=str(path),
        )
        at_rest, descriptors = resident(daemon.pid), _descriptors(daemon.pid)
        began = time.monotonic()
        first = _attack(order, uid)
        time.sleep(SETTLE_S)
        warm = resident(daemon.pid)
        thread = threading.Thread(target=behaved.run)
        thread.start()
        try:
            order = dataclasses.replace(
                order,
                seed=seed + 1,
                messages=messages - order.messages,
                seconds=seconds * (1 - WARM),
            )
            second = _attack(order, uid)
        finally:
            behaved.stop.set()
            thread.join()
        took = time.monotonic() - began - SETTLE_S
        time.sleep(SETTLE_S)
        report = Report(
            deeds=Deeds(
                first.sent + second.sent,
                first.replies + second.replies,
                first.ended + second.ended,
            ),
            seconds=took,
            resident=(at_rest, warm, resident(daemon.pid)),
            descriptors=(descriptors, _descriptors(daemon.pid)),
            latency={name: Latency.of(times) for name, times in behaved.times.items()},
            faults=behaved.faults,
        )
        if not behaved.faults:  # After a fault, the service may have exited because it was idle.
            flooded = f"{_PEER_PROGRAM.name} flooded itself"
            report.latency[flooded] = _peer_latency(bus, order, uid)
        report.faults += list(_faults(daemon, client, job, wanted, others))
        return report


def _peer_latency(bus: Bus, order: Order, uid: int | None) -> Latency:
    """Measure Peer.Ping of the sd-bus service during the same kind of flood, with a tenth of the
    messages."""
    order = dataclasses.replace(
        order,
        destination=PEER,
        varlink="",
        messages=int(order.messages * WARM),
        seconds=max(5.0, order.seconds * WARM),
    )
    times: list[float] = []
    stop = threading.Event()

    def measure() -> None:
        with bus.client() as client:
            while not stop.wait(PAUSE_S):
                began = time.perf_counter()
                _ping(client, PEER)
                times.append(time.perf_counter() - began)

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        _attack(order, uid)
    finally:
        stop.set()
        thread.join()
    return Latency.of(times)


def _faults(
    daemon: Daemon, client: Client, job: str, wanted: Guest, others: list[Guest]
) -> Iterator[str]:
    """Yield a text for everything that is wrong after the flood."""
    text = daemon.stderr.text()
    for pattern in (r"Traceback[^\n]*", r"[^\n]*[Ii]nternal error[^\n]*", r"Task exception[^\n]*"):
        yield from re.findall(pattern, text)
    if daemon.process.poll() is not None:
        yield f"qkilld ended with exit code {daemon.process.returncode}:\n{text[-2000:]}"
        return
    yield from (f"{guest.name} of another user has ended" for guest in others if not guest.alive)
    if not wanted.alive:
        yield "the guest that root stops without FORCE has ended"
    values = client.properties(job, "org.qkilld1.Job")
    if (values["Phase"], values["Held"], values["Flags"]) != ("terminate", False, 0):
        yield f"another user changed a job of root: {values}"


def _attack(order: Order, uid: int | None) -> Deeds:
    """Run the attacker in its own process, so that its processor time is separate."""
    order = dataclasses.replace(order, uid=uid)
    words = [sys.executable, "-m", "tests.fuzz.hostile", json.dumps(dataclasses.asdict(order))]
    environment = lab_bus.environment(order.address)
    process = spawn(words, stdout=subprocess.PIPE, cwd=TOP, env=environment)
    try:
        text, _ = process.communicate(timeout=order.seconds + 120)
        assert process.returncode == 0, "the attacker failed, see the messages above"
    finally:
        end(process)
    deeds = json.loads(text)
    return Deeds(Counter(deeds["sent"]), deeds["replies"], deeds["ended"])


@contextlib.contextmanager
def _sd_bus_service(bus: Bus) -> Iterator[None]:
    if not _PEER_PROGRAM.exists():
        raise needs.Missing(f"{_PEER_PROGRAM} is not installed: apt-get install systemd")
    process = spawn([_PEER_PROGRAM], env=lab_bus.environment(bus.address))
    try:
        with bus.client() as client:
            _wait_for_name(client, PEER)
        yield
    finally:
        end(process)


def _wait_for_name(client: Client, name: str, timeout: float = 30) -> None:
    bus = "org.freedesktop.DBus"
    where: Any = {"destination": bus, "path": "/org/freedesktop/DBus", "interface": bus}
    deadline = time.monotonic() + timeout
    while not client.call("NameHasOwner", "s", name, **where)[0]:
        assert time.monotonic() < deadline, f"{name} did not appear on the bus"
        time.sleep(0.02)


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes. Source: proc(5)."""
    (line,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(line) * 1024


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
