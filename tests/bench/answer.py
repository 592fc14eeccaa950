"""From a guest's exit to the answer of Wait at the client, alone and among other jobs.

The client is jeepney's connection in this process. It waits in one epoll for the bus's socket and
for a pidfd of the guest: the exit is the moment (CLOCK_MONOTONIC) at which that call returns for
the pidfd, or the one at which qkilld saw it where that is the earlier one; the answer is there when
jeepney has parsed it. What jeepney and the message bus cost is part of the figure.
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
from tests.bench.spent import Spent
from tests.lab.bus import Client, daemon, plain, private_bus
from tests.lab.guest import Guest, fake_qemu, start_qemu

MEDIAN_MS: Final = 5
P99_MS: Final = 20
ROUND_TRIPS: Final = 2
"""Of Peer.Ping on the same connection: the median from exit to answer."""
OTHER_JOBS: Final = 50
_HOUR: Final = 3600 * USEC_PER_SEC
_TIMEOUT_S: Final = 30


def measure(guests: int) -> Figure:
    """Stops that many real QEMUs (-M none) one after the other, and as many again beside others."""
    figure = Figure(
        "From QEMU's exit to Wait's answer at the client (jeepney, on the same bus); real QEMUs"
    )
    for others in (0, OTHER_JOBS):
        where = f"with {others} other jobs running" if others else "alone"
        found = _stop_many(guests, others, where)
        answered = Row(f"exit to answer, {where}", "ms", found.answered)
        ping = Row("  one org.freedesktop.DBus.Peer.Ping instead", "ms", found.pinged)
        figure.rows += [
            answered,
            ping,
            Row("  of which until qkilld has seen the exit", "ms", found.seen),
            Row("qkilld kept waiting for a processor, since request", "ms", found.kept_waiting),
        ]
        figure.targets += [
            at_most(f"median, {where}", answered.median, MEDIAN_MS, "ms"),
            at_most(f"99th percentile, {where}", answered.p99, P99_MS, "ms"),
            at_most(f"in round trips, {where}", answered.median / ping.median, ROUND_TRIPS, ""),
        ]
    return figure


@dataclass(slots=True)
class _Found:
    answered: list[float] = field(default_factory=list)
    """ms from the exit to the answer."""
    seen: list[float] = field(default_factory=list)
    """ms from the exit to the end of the job by qkilld's own clock."""
    pinged: list[float] = field(default_factory=list)
    """ms for a round trip on the same connection, in turns with the guests."""
    kept_waiting: list[float] = field(default_factory=list)
    """ms from the request to the answer in which qkilld was ready to run and had no processor: what
    else this machine was doing."""


def _stop_many(guests: int, others: int, where: str) -> _Found:
    found = _Found()
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
                found.pinged.append(waiter.ping())
                before = Spent.of(running.pid)
                stopped = waiter.stop(guest)
                spent = Spent.of(running.pid) - before
            # If qkilld was woken before this process, the exit was at least that early.
            seen = _ended(asking, stopped) * 1000
            exited = min(stopped.exited, seen)
            found.kept_waiting.append(spent.kept_waiting_ms)
            found.answered.append((stopped.answered - exited) / 1e6)
            found.seen.append((seen - exited) / 1e6)
        jobs = asking.properties()["NJobs"]
        assert jobs == others, f"{jobs} jobs are running and not {others}"
    return found


@dataclass(slots=True)
class _Stopped:
    """Times are CLOCK_MONOTONIC in ns."""

    job: str
    elapsed_usec: int
    exited: int
    answered: int


def _ended(client: Client, stopped: _Stopped) -> int:
    """When the job ended by qkilld's clock; CLOCK_MONOTONIC, µs."""
    started = client.properties(stopped.job, JOB_INTERFACE)["StartedUSec"]
    assert isinstance(started, int)
    return started + stopped.elapsed_usec


class _Waiter:
    """A client that sees its guest's exit by itself."""

    def __init__(self, address: str) -> None:
        self._connection = open_dbus_connection(address, auth_timeout=_TIMEOUT_S)
        self._epoll = select.epoll()
        self._socket: int = self._connection.sock.fileno()
        self._epoll.register(self._socket, select.EPOLLIN)

    def close(self) -> None:
        self._epoll.close()
        self._connection.close()

    def stop(self, guest: Guest) -> _Stopped:
        """Calls Terminate, and Wait as soon as that has answered."""
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
            assert exited, f"{guest.name} has not exited, says its pidfd; qkilld says {receipt}"
            return _Stopped(job, receipt["elapsed-usec"], exited, answered)

    def ping(self) -> float:
        """ms for a round trip through the bus, to qkilld's loop and back."""
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
        """The body of the reply to that call, if it has come."""
        while True:
            try:
                message: Message = self._connection.receive(timeout=0)
            except TimeoutError:
                return None
            if message.header.fields.get(HeaderFields.reply_serial) == serial:
                assert message.header.message_type is MessageType.method_return, message.body
                return tuple(message.body)
