"""The time from the request to the answer that a guest is gone, compared with libvirt on the same
guests.

tests.bench.stops stops the guests in a throwaway system. So this machine's libvirt is not used, and
nothing is left behind.
"""

from __future__ import annotations

import json
import tempfile
from typing import Final

from tests.bench import peer, progress
from tests.bench.figures import Figure, Row, at_least, at_most, shown
from tests.bench.stops import REAP_LATE_S, Series, Way
from tests.lab import container, needs
from tests.lab.image import guest_image

TIMES_FASTER: Final = 50
ROUND_TRIPS: Final = 4
"""Terminate and Wait may add this many round trips of Peer.Ping to the time of kill(2)."""
_TITLES: Final = {
    Series.REAPED_AT_ONCE: (
        "From the request to the answer that the guest is gone: libvirt's idle Linux guests,\n"
        "stopped in each way in turn; PID 1 is systemd, which collects a zombie at once"
    ),
    Series.REAPED_LATE: (
        "The same if the guest's new parent collects its zombie only after "
        f"{REAP_LATE_S:g} s,\nas PID 1 of some containers and virtual machines does"
    ),
}
_WHY: Final = {
    Series.REAPED_AT_ONCE: "libvirt looks every 200 ms whether the process is gone.",
    Series.REAPED_LATE: "libvirt takes a zombie for a process that is still there.",
}

Samples = dict[Series, dict[Way, list[float]]]


def measure(rounds: int, late_rounds: int) -> list[Figure]:
    """Stop a guest in every way in each round.

    Raises needs.Missing without libvirt or root, or if no container can be booted; AssertionError
    if a stop fails.
    """
    peer.programs()
    guest_image()  # Build it now, because the checkout is read-only in the container.
    progress.show("beside libvirt: boots a throwaway system")
    with container.boot() as system:
        samples = _stop_guests(system, rounds, late_rounds)
    return [_figure(series, ways) for series, ways in samples.items()]


def _stop_guests(system: container.Container, rounds: int, late_rounds: int) -> Samples:
    samples: Samples = {series: {way: [] for way in Way} for series in Series}
    program = (container.PYTHON, "-m", "tests.bench.stops", str(rounds), str(late_rounds))
    with (
        tempfile.TemporaryFile() as stderr,
        system.spawn(*program, stderr=stderr) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if "progress" in said:
                progress.show(said["progress"])
            elif "missing" in said:
                raise needs.Missing(said["missing"])
            else:
                series, way, milliseconds = said["sample"]
                samples[Series(series)][Way(way)].append(milliseconds)
        if process.wait() != 0:
            stderr.seek(0)
            raise AssertionError(stderr.read().decode(errors="replace"))
    return samples


def _figure(series: Series, ways: dict[Way, list[float]]) -> Figure:
    rows = {way: Row(way.value, "ms", times) for way, times in ways.items() if times}
    figure = Figure(_TITLES[series], list(rows.values()))
    floor, ours, virsh, ping = (
        rows[way].median for way in (Way.KILL, Way.QKILLD, Way.VIRSH_GRACEFUL, Way.PING)
    )
    what = "virsh destroy --graceful to qkilld, medians"
    figure.targets.append(at_least(what, virsh / ours, TIMES_FASTER, "times"))
    what = f"qkilld beyond the floor, in round trips of {shown(ping)} ms"
    figure.targets.append(at_most(what, (ours - floor) / ping, ROUND_TRIPS, ""))
    figure.notes += [
        f"virsh destroy --graceful to the floor, which is kill(2) and QEMU's own end: "
        f"{shown(virsh / floor)} times.",
        f"Beyond the floor: qkilld {shown(ours - floor)} ms, virsh destroy --graceful "
        f"{shown(virsh - floor)} ms.",
        _WHY[series],
    ]
    return figure
