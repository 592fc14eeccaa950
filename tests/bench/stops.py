"""A program, run as `python -m tests.bench.stops ROUNDS LATE_ROUNDS`: in each round, stop a guest
in each of the compared ways.

It writes to /etc, /run and /var, so run it only in a throwaway system (tests.lab.container), whose
first process is systemd. libvirt starts every guest, so that all are alike. In ROUNDS, systemd
reaps the guest at once. In LATE_ROUNDS, another parent reaps the guest REAP_LATE_S after its exit,
as the first process of some containers and virtual machines does.

Each line of stdout is JSON: {"progress": TEXT}, {"sample": [SERIES, WAY, ms]} or {"missing": TEXT}.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from qkilld.model.constants import JOB_INTERFACE
from tests.bench import peer
from tests.lab import needs
from tests.lab.bus import Bus, Client, daemon, environment, private_bus
from tests.lab.process import become_subreaper, end, spawn
from tests.lab.scratch import remove_run_directory, run_directory

REAP_LATE_S: Final = 1.0
_TIMEOUT_S: Final = 60


class Way(StrEnum):
    """How a guest is stopped, and which interval is measured."""

    KILL = "kill(2) through a pidfd, poll(2) on it"
    QKILLD = "qkilld: Terminate and Wait, connected client"
    QKILLD_SIGNAL = "  of which until qkilld has sent SIGTERM"
    QKILLD_END = "  of which until qkilld has seen the end"
    PING = "  one org.freedesktop.DBus.Peer.Ping instead"
    VIRSH_GRACEFUL = "virsh destroy --graceful, connected (its --timing)"
    VIRSH = "virsh destroy, connected (its --timing)"
    QKILLCTL_PROGRAM = "qkillctl terminate --wait, as a program"
    VIRSH_GRACEFUL_PROGRAM = "virsh destroy --graceful, as a program"
    VIRSH_PROGRAM = "virsh destroy, as a program"


class Series(StrEnum):
    REAPED_AT_ONCE = "reaped at once"
    REAPED_LATE = "reaped late"


_CONFIG: Final = "[Target]\nExecutables=/usr/bin/qemu-system-*\n"
"""This covers the installed QEMU, which libvirt runs."""

Times = dict[Way, float]
"""The length (ms) of each measured interval. One stop may give several intervals."""
Stop = Callable[[peer.Domain], Times]


def main() -> int:
    rounds, late_rounds = map(int, sys.argv[1:])
    # Write bytecode elsewhere, because the checkout is read-only. An installed qkillctl has
    # bytecode.
    os.environ["PYTHONPYCACHEPREFIX"] = str(run_directory() / "pycache")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    try:
        with (
            private_bus() as bus,
            daemon(bus, config=_CONFIG),
            bus.client() as client,
            peer.libvirtd(),
        ):
            stops = _stops(bus, client)
            _qkillctl(bus, "list")  # This writes the bytecode.
            _series(Series.REAPED_AT_ONCE, rounds, stops)
            become_subreaper()
            _series(Series.REAPED_LATE, late_rounds, stops[:3])
    except needs.Missing as missing:
        _say(missing=str(missing))
    finally:
        remove_run_directory()
    return 0


def _series(series: Series, rounds: int, stops: list[Stop]) -> None:
    for number in range(rounds):
        _say(progress=f"beside libvirt, {series}: round {number + 1} of {rounds}")
        names = [f"{series}-{number}-{way}".replace(" ", "-") for way in range(len(stops))]
        with peer.domains(names) as guests:
            # In each round, another way is first.
            shift = number % len(stops)
            for stop, guest in zip(stops[shift:] + stops[:shift], guests, strict=True):
                with _reaper(guest, late=series is Series.REAPED_LATE):
                    times = stop(guest)
                guest.wait_forgotten()
                for way, milliseconds in times.items():
                    _say(sample=[series, way, milliseconds])


@contextlib.contextmanager
def _reaper(guest: peer.Domain, *, late: bool) -> Iterator[None]:
    """Reap the guest REAP_LATE_S after its exit. This process has become its parent."""
    if not late:
        yield
        return
    # If another process reaped the guest, this would measure something else.
    status = Path(f"/proc/{guest.pid}/status").read_text()
    assert f"PPid:\t{os.getpid()}\n" in status, f"{guest.name} is not our child:\n{status}"

    def reap() -> None:
        select.select([guest.pidfd], [], [], _TIMEOUT_S)
        time.sleep(REAP_LATE_S)
        os.waitpid(guest.pid, os.WNOHANG)

    thread = threading.Thread(target=reap)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _stops(bus: Bus, client: Client) -> list[Stop]:
    """Return the ways to stop a guest. The first three are also used for guests that are reaped
    late."""

    def by_kill(guest: peer.Domain) -> Times:
        # Measure a single ping, after the same pause as before a Terminate. The fastest of several
        # consecutive pings would take only a fourth of this time.
        ping = _ping(client)
        start = time.monotonic()
        signal.pidfd_send_signal(guest.pidfd, signal.SIGTERM)
        gone = select.select([guest.pidfd], [], [], _TIMEOUT_S)[0]
        taken = _since(start)
        assert gone, f"{guest.name} is still there"
        return {Way.KILL: taken, Way.PING: ping}

    def by_qkilld(guest: peer.Domain) -> Times:
        start = time.monotonic()
        job = client.terminate(guest.pid)
        result, receipt = client.wait(job)
        taken = _since(start)
        assert result == "exited", receipt
        began = client.properties(job, JOB_INTERFACE)["StartedUSec"] / 1000 - start * 1000
        (_, _, signalled), *_ = receipt["rungs"]
        return {
            Way.QKILLD: taken,
            Way.QKILLD_SIGNAL: began + signalled / 1000,
            Way.QKILLD_END: began + receipt["elapsed-usec"] / 1000,
        }

    def by_virsh(connected: Way, program: Way, *options: str) -> Stop:
        def stop(guest: peer.Domain) -> Times:
            start = time.monotonic()
            said = peer.virsh("--timing", "destroy", *options, guest.name)
            taken = _since(start)
            timing = re.search(r"\(Time: ([\d.]+) ms\)", said)
            assert timing, said
            return {connected: float(timing[1]), program: taken}

        return stop

    def by_qkillctl(guest: peer.Domain) -> Times:
        start = time.monotonic()
        _qkillctl(bus, "terminate", "--wait", str(guest.pid))
        return {Way.QKILLCTL_PROGRAM: _since(start)}

    return [
        by_kill,
        by_qkilld,
        by_virsh(Way.VIRSH_GRACEFUL, Way.VIRSH_GRACEFUL_PROGRAM, "--graceful"),
        by_virsh(Way.VIRSH, Way.VIRSH_PROGRAM),
        by_qkillctl,
    ]


def _ping(client: Client) -> float:
    """Return the time (ms) of a round trip through the bus to qkilld's event loop."""
    start = time.monotonic()
    client.call("Ping", interface="org.freedesktop.DBus.Peer")
    return _since(start)


def _qkillctl(bus: Bus, *arguments: str) -> None:
    process = spawn(
        [sys.executable, "-m", "qkilld.ctl", "--bus", bus.address, *arguments],
        stdout=subprocess.DEVNULL,
        env=environment(bus.address),
    )
    try:
        code = process.wait(_TIMEOUT_S)
    finally:
        end(process)
    assert code == 0, f"qkillctl {arguments} ended with {code}"


def _since(start: float) -> float:
    return (time.monotonic() - start) * 1000


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    sys.exit(main())
