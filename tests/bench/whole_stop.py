"""The time from the call of Terminate to the answer of Wait, beside kill(2) and poll(2) on a pidfd.

The guests are QEMUs without libvirt and without a monitor, so qkilld sends SIGTERM at once. The
client is jeepney's connection in this process; it makes both calls and a ping one after the other.
"""

from __future__ import annotations

import contextlib
import re
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qkilld.model.constants import JOB_INTERFACE
from tests.bench import progress
from tests.bench.figures import Figure, Row, at_most, shown
from tests.lab.bus import Client, daemon, private_bus
from tests.lab.guest import Guest, start_qemu

ROUND_TRIPS: Final = 4
"""Terminate and Wait may add this many round trips of Peer.Ping to the time of kill(2)."""
PAUSE_S: Final = 0.1
"""Each measurement follows a pause, after which the processor caches are cold."""
_TIMEOUT_S: Final = 30
_SIGTERM: Final = 1 << (signal.SIGTERM - 1)


def measure(rounds: int) -> Figure:
    """Stop a guest in both ways in each round."""
    killed, answered, pinged = [], [], []
    signalled, replied, seen = [], [], []
    with private_bus() as bus, daemon(bus), bus.client() as client:
        with _guest() as guest:
            client.wait(client.terminate(guest.pid))
        for number in range(rounds):
            progress.show(f"Terminate to answer: round {number + 1} of {rounds}")
            with _guest() as guest:
                killed.append(_kill(guest))
            with _guest() as guest:
                pinged.append(_ping(client))
                time.sleep(PAUSE_S)
                start = time.monotonic()
                job = client.terminate(guest.pid)
                replied.append(_since(start))
                result, receipt = client.wait(job)
                answered.append(_since(start))
                assert result == "exited", receipt
            began = client.properties(job, JOB_INTERFACE)["StartedUSec"] / 1000 - start * 1000
            (_, _, sent), *_ = receipt["rungs"]
            signalled.append(began + sent / 1000)
            seen.append(began + receipt["elapsed-usec"] / 1000)
    floor = Row("kill(2) through a pidfd, poll(2) on it", "ms", killed)
    ours = Row("qkilld: Terminate and Wait, connected client", "ms", answered)
    ping = Row("  one org.freedesktop.DBus.Peer.Ping instead", "ms", pinged)
    beyond = (ours.median - floor.median) / ping.median
    what = f"qkilld beyond the floor, in round trips of {shown(ping.median)} ms"
    return Figure(
        "From the call of Terminate to Wait's answer at the client; plain QEMUs (-M none)",
        rows=[
            floor,
            ours,
            Row("  of which until qkilld has sent SIGTERM", "ms", signalled),
            Row("  of which until Terminate is answered", "ms", replied),
            Row("  of which until qkilld has seen the end", "ms", seen),
            ping,
        ],
        targets=[at_most(what, beyond, ROUND_TRIPS, "")],
    )


@contextlib.contextmanager
def _guest() -> Iterator[Guest]:
    """Start a QEMU without a monitor, wait until it handles SIGTERM, pause, and yield it."""
    with start_qemu(qmp=False) as guest:
        deadline = time.monotonic() + _TIMEOUT_S
        while not _handles_sigterm(guest.pid):
            assert time.monotonic() < deadline, f"QEMU does not handle SIGTERM: {guest.stderr}"
            time.sleep(0.01)
        time.sleep(PAUSE_S)
        yield guest


def _handles_sigterm(pid: int) -> bool:
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) & _SIGTERM)


def _kill(guest: Guest) -> float:
    start = time.monotonic()
    guest.signal(signal.SIGTERM)
    gone = select.select([guest.pidfd], [], [], _TIMEOUT_S)[0]
    taken = _since(start)
    assert gone, f"{guest.name} is still there"
    return taken


def _ping(client: Client) -> float:
    """Return the time (ms) of a round trip through the bus to qkilld's event loop."""
    start = time.monotonic()
    client.call("Ping", interface="org.freedesktop.DBus.Peer")
    return _since(start)


def _since(start: float) -> float:
    """Return the time in ms."""
    return (time.monotonic() - start) * 1000
