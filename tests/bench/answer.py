"""The time from a guest's exit to the answer of Wait at the client, for a single job and among
other jobs.

The client is jeepney's connection in this process. It waits in one epoll_wait(2) for the socket of
the bus and for a pidfd of the guest. The time of the exit is when this call returns for the pidfd
or, if that is earlier, when qkilld noticed the exit (CLOCK_MONOTONIC). The time of the answer is
when jeepney has parsed it. So the figure includes the time that jeepney and the message bus take.
"""

from __future__ import annotations

import contextlib
import select
import time
from dataclasses import dataclass, field
from typing import Any, Final

from jeepney import (  # type: ignore[import-untyped]
    DBusAddress,
    HeaderFields,
    Message,
    MessageType,
    new_method_call,
)
from jeepney.io.blocking import open_dbus_connection  # type: ignore[import-untyped]

from qkilld.model.constants import (
    BUS_NAME,
    JOB_INTERFACE,
    MANAGER_INTERFACE,
    MANAGER_PATH,
    USEC_PER_SEC,
)
from tests.bench import progress
from tests.bench.figures import Figure, Row, at_most
from tests.bench.processor_usage import ProcessorUsage
from tests.lab.bus import Client, daemon, plain, private_bus
from tests.lab.guest import Guest, fake_qemu, start_qemu

MEDIAN_MS: Final = 5
P99_MS: Final = 20
ROUND_TRIPS: Final = 2
"""The median time from exit to answer must not exceed this many round trips of Peer.Ping on the
same connection."""
OTHER_JOBS: Final = 50
_HOUR: Final = 3600 * USEC_PER_SEC
_TIMEOUT_S: Final = 30


def measure(guests: int) -> Figure:
    """Stop `guests` real QEMUs (-M none) one after another, then as many again while other jobs
    run."""
    figure = Figure(
        "From QEMU's exit to Wait's answer at the client (jeepney, on the same bus); real QEMUs"
    )
    for others in (0, OTHER_JOBS):
        where = f"with {others} other jobs running" if others else "alone"
        times = _stop_many(guests, others, where)
        answered = Row(f"exit to answer, {where}", "ms", times.answered)
        ping = Row("  one org.freedesktop.DBus.Peer.Ping instead", "ms", times.pinged)
        figure.rows += [
            answered,
            ping,
            Row("  of which until qkilld has seen the exit", "ms", times.seen),
            Row("qkilld kept waiting for a processor, since request", "ms", times.kept_waiting),
        ]
        figure.targets += [
            at_most(f"median, {where}", answered.median, MEDIAN_MS, "ms"),
            at_most(f"99th percentile, {where}", answered.p99, P99_MS, "ms"),
            at_most(f"in round trips, {where}", answered.median / ping.median, ROUND_TRIPS, ""),
        ]
    return figure


@dataclass(slots=True)
class _AnswerTimes:
    answered: list[float] = field(default_factory=list)
    """ms from the exit to the answer."""
    seen: list[float] = field(default_factory=list)
    """ms from the exit to the end of the job according to qkilld."""
    pinged: list[float] = field(default_factory=list)
    """ms for a round trip on the same connection, measured once before each guest."""
    kept_waiting: list[float] = field(default_factory=list)
    """The time (ms) that qkilld waited for a processor between the request and the answer, because
    of other work on this machine."""


def _stop_many(guests: int, others: int, where: str) -> _AnswerTimes:
    times = _AnswerTimes()
    with contextlib.ExitStack() as stack:
        bus = stack.enter_context(private_bus())
        running = stack.enter_context(daemon(bus))
        asking = stack.enter_context(bus.client())
        for _ in range(others):
            stubborn = stack.enter_context(fake_qemu(stubborn=True))
            job = asking.terminate(stubborn.pid, 0, grace_usec=("t", _HOUR))
            asking.send("Wait", path=job, interface=JOB_INTERFACE)
        waiter = stack.enter_context(contextlib.closing(_Waiter(bus.address)))
        for number in range(guests):
            progress.show(f"exit to answer, {where}: guest {number + 1} of {guests}")
            with start_qemu() as guest:
                times.pinged.append(waiter.ping())
                before = ProcessorUsage.of(running.pid)
                stop = waiter.stop(guest)
                spent = ProcessorUsage.of(running.pid) - before
            # If qkilld noticed the exit before this process did, use qkilld's time.
            seen = _ended(asking, stop) * 1000
            exited = min(stop.exited, seen)
            times.kept_waiting.append(spent.kept_waiting_ms)
            times.answered.append((stop.answered - exited) / 1e6)
            times.seen.append((seen - exited) / 1e6)
        jobs = asking.properties()["NJobs"]
        assert jobs == others, f"{jobs} jobs are running and not {others}"
    return times


@dataclass(slots=True)
class _StopTimes:
    """Times are CLOCK_MONOTONIC in ns."""

    job: str
    elapsed_usec: int
    exited: int
    answered: int


def _ended(client: Client, stop: _StopTimes) -> int:
    """Return the time at which the job ended according to qkilld (CLOCK_MONOTONIC, µs)."""
    started = client.properties(stop.job, JOB_INTERFACE)["StartedUSec"]
    assert isinstance(started, int)
    return started + stop.elapsed_usec


class _Waiter:
    """A client that also waits for the pidfd of its guest."""

    def __init__(self, address: str) -> None:
        self._connection = open_dbus_connection(address, auth_timeout=_TIMEOUT_S)
        self._epoll = select.epoll()
        self._socket: int = self._connection.sock.fileno()
        self._epoll.register(self._socket, select.EPOLLIN)

    def close(self) -> None:
        self._epoll.close()
        self._connection.close()

    def stop(self, guest: Guest) -> _StopTimes:
        """Call Terminate, and call Wait as soon as Terminate has replied."""
        self._epoll.register(guest.pidfd, select.EPOLLIN)
        exited, job = 0, ""
        waited_for = self._send("Terminate", MANAGER_PATH, MANAGER_INTERFACE, "ut", guest.pid, 0)
        while True:
            ready = [descriptor for descriptor, _ in self._epoll.poll(_TIMEOUT_S)]
            now = time.monotonic_ns()
            assert ready, f"{guest.name} has no answer after {_TIMEOUT_S} s"
            if guest.pidfd in ready:
                exited = now
                self._epoll.unregister(guest.pidfd)
            body = self._receive(waited_for) if self._socket in ready else None
            if body is None:
                continue
            if not job:
                (job,) = body
                waited_for = self._send("Wait", job, JOB_INTERFACE, None)
                continue
            answered = time.monotonic_ns()
            result, receipt = plain(list(body))
            assert result == "exited", f"{guest.name}: {result}, {receipt}"
            assert exited, f"by its pidfd, {guest.name} has not exited; qkilld reports {receipt}"
            return _StopTimes(job, receipt["elapsed-usec"], exited, answered)

    def ping(self) -> float:
        """Return the time (ms) of a round trip through the bus to qkilld's event loop."""
        began = time.monotonic_ns()
        interface = "org.freedesktop.DBus.Peer"
        serial = self._send("Ping", MANAGER_PATH, interface, None)
        while self._receive(serial) is None:
            assert self._epoll.poll(_TIMEOUT_S), f"no answer after {_TIMEOUT_S} s"
        return (time.monotonic_ns() - began) / 1e6

    def _send(
        self, member: str, path: str, interface: str, signature: str | None, *body: Any
    ) -> int:
        serial: int = next(self._connection.outgoing_serial)
        address = DBusAddress(path, BUS_NAME, interface)
        self._connection.send(new_method_call(address, member, signature, body), serial=serial)
        return serial

    def _receive(self, serial: int) -> tuple[Any, ...] | None:
        """Return the body of the reply to the call with this serial; None if there is none yet."""
        while True:
            try:
                message: Message = self._connection.receive(timeout=0)
            except TimeoutError:
                return None
            if message.header.fields.get(HeaderFields.reply_serial) == serial:
                assert message.header.message_type is MessageType.method_return, message.body
                return tuple(message.body)
