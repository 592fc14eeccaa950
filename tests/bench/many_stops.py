"""A program, run as `python -m tests.bench.many_stops ROUNDS COUNT...`: stop COUNT idle guests at
the same time, each in its own unit. This is done without a helper, with a helper that does nothing,
and with qkilld-stop.

It writes units to /run, so run it only in a throwaway system (tests.lab.container) with qkilld.
Each guest is a busybox with QEMU's name.

Each line of stdout is JSON: {"progress": TEXT} or {"sample": [WAY, COUNT, wall ms, processor ms]}.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

_GUEST: Final = "/usr/local/bin/qemu-system-lab"
_TICK_MS: Final = 1000 / os.sysconf("SC_CLK_TCK")


class ManyWay(StrEnum):
    PLAIN = "no ExecStop="
    FLOOR = "ExecStop=/usr/bin/python3 -I -c pass"
    DAEMON = "ExecStop=qkilld-stop, qkilld running"


_STOPS: Final = {
    ManyWay.PLAIN: [],
    ManyWay.FLOOR: ["ExecStop=/usr/bin/python3 -I -c pass"],
    ManyWay.DAEMON: ["ExecStop=/usr/bin/qkilld-stop", "NotifyAccess=exec"],
}


def main() -> int:
    rounds, *counts = map(int, sys.argv[1:])
    for way, lines in _STOPS.items():
        text = "\n".join(["[Service]", f"ExecStart=@{_GUEST} sleep 1d", *lines])
        Path(f"/run/systemd/system/{way.name.lower()}@.service").write_text(text + "\n")
    _systemctl("daemon-reload")
    _systemctl("start", "qkilld.service")
    for way in ManyWay:
        _stop(way, 2)  # Brings the programs into the page cache.
    for number in range(rounds):
        for count in counts:
            ways = list(ManyWay)
            shift = number % len(ways)
            for way in (*ways[shift:], *ways[:shift]):
                _say(progress=f"{count} units at once, round {number + 1} of {rounds}: {way}")
                _say(sample=[way, count, *_stop(way, count)])
    return 0


def _stop(way: ManyWay, count: int) -> tuple[float, float]:
    """Return the wall time, and the processor time of all processes in the system, in ms."""
    units = [f"{way.name.lower()}@{number}.service" for number in range(count)]
    _systemctl("start", *units)
    time.sleep(0.5)
    before, start = _processor_ms(), time.monotonic()
    _systemctl("stop", *units)
    wall = (time.monotonic() - start) * 1000
    time.sleep(0.3)  # Include the time in which the daemon removes the state of ended jobs.
    spent = _processor_ms() - before
    results = _systemctl("show", "--property=Result", "--value", *units).split()
    assert results == ["success"] * count, f"{way}: {set(results)}"
    return wall, spent


def _processor_ms() -> float:
    """Return the processor time (ms) of all processes, and of the children that they have
    reaped."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text()
            ticks += sum(map(int, text[text.rindex(")") + 2 :].split()[11:15]))
    return ticks * _TICK_MS


def _systemctl(*arguments: str) -> str:
    result = subprocess.run(
        ["systemctl", *arguments], check=True, stdout=subprocess.PIPE, text=True, timeout=300
    )
    return result.stdout


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    sys.exit(main())
