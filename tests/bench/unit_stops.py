"""A program, run as `python -m tests.bench.unit_stops ROUNDS`: in each round, stop idle guests in
units with and without qkilld-stop.

It writes units to /run, so run it only in a throwaway system (tests.lab.container) with qkilld.

Each line of stdout is JSON: {"progress": TEXT} or {"sample": [WAY, ms]}.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

_GUEST: Final = "/usr/bin/qemu-system-x86_64 -M none -nodefaults -display none"
_UP_S: Final = 0.3
"""Long enough for a QEMU without a machine to reach its main loop."""


class Way(StrEnum):
    PLAIN = "systemctl stop, no ExecStop="
    FLOOR = "ExecStop=/usr/bin/python3 -I -c pass"
    DAEMON = "ExecStop=qkilld-stop, qkilld running"
    ALONE = "ExecStop=qkilld-stop, without qkilld"
    COLD = "ExecStop=qkilld-stop, whose call starts qkilld"


def main() -> int:
    rounds = int(sys.argv[1])
    _settle()
    for way in Way:
        _stop(way, 0)  # Brings the programs into the page cache.
    for number in range(rounds):
        _say(progress=f"units: round {number + 1} of {rounds}")
        # In each round, another way is first.
        shift = number % len(Way)
        for way in (*list(Way)[shift:], *list(Way)[:shift]):
            _say(sample=[way, _stop(way, number)])
    return 0


def _stop(way: Way, number: int) -> float:
    """Stop one unit; return how long this took (ms)."""
    unit = f"guest-{way.name.lower()}-{number}.service"
    lines = [f"ExecStart={_GUEST}"]
    if way is Way.FLOOR:
        lines.append("ExecStop=/usr/bin/python3 -I -c pass")
    elif way is not Way.PLAIN:
        lines += ["ExecStop=/usr/bin/qkilld-stop", "NotifyAccess=exec"]
    _write(f"/run/systemd/system/{unit}", "[Service]\n" + "\n".join(lines) + "\n")
    services = ("qkilld.socket", "qkilld.service")
    _systemctl("unmask", "--runtime", *services)
    _systemctl("stop", *services)
    if way is Way.ALONE:
        _systemctl("mask", "--runtime", *services)
    _systemctl("daemon-reload")
    if way is Way.DAEMON:
        _systemctl("start", "qkilld.service")
    elif way is Way.COLD:
        _systemctl("start", "qkilld.socket")
    _systemctl("start", unit)
    time.sleep(_UP_S)
    start = time.monotonic()
    _systemctl("stop", unit)
    taken = (time.monotonic() - start) * 1000
    result = _systemctl("show", "--property=Result", "--value", unit)
    if result != "success\n":
        journal = ["journalctl", "--no-pager", "--output=cat", f"--unit={unit}"]
        subprocess.run(journal, stdout=sys.stderr)
        raise AssertionError(f"{unit}: {result}")
    Path(f"/run/systemd/system/{unit}").unlink()
    return taken


def _settle() -> None:
    """Disable the start limit of qkilld.service, because many rounds follow within a minute."""
    _write("/run/systemd/system/qkilld.service.d/bench.conf", "[Unit]\nStartLimitIntervalSec=0\n")
    _systemctl("daemon-reload")


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def _systemctl(*arguments: str) -> str:
    result = subprocess.run(
        ["systemctl", *arguments], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    )
    return result.stdout


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    sys.exit(main())
