"""A program, run as `python -m tests.bench.unit_stops ROUNDS`: stops idle guests in units, with and
without qkilld-stop, one way after the other in each round.

It writes units to /run and is for a throwaway system (tests.lab.container).

stdout has a line of JSON for each thing that there is to say: {"progress": TEXT} and {"sample":
[WAY, ms]}.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from tests.lab.container import CHECKOUT, PYTHON
from tests.lab.process import TOP

_ENVIRONMENT: Final = (
    # What is installed has its bytecode; a checkout that cannot be written to has none.
    f"Environment=PYTHONPATH={CHECKOUT} PYTHONPYCACHEPREFIX=/run/pycache\n"
)
_GUEST: Final = "/usr/bin/qemu-system-x86_64 -M none -nodefaults -display none"
_UP_S: Final = 0.3
"""A QEMU without a machine runs its main loop long before."""


class Way(StrEnum):
    PLAIN = "systemctl stop, no ExecStop="
    DAEMON = "ExecStop=qkilld-stop, qkilld running"
    ALONE = "ExecStop=qkilld-stop, no qkilld to be had"
    COLD = "ExecStop=qkilld-stop, which has the bus start qkilld"


def main() -> int:
    rounds = int(sys.argv[1])
    _install()
    for way in Way:
        _stop(way, 0)  # writes the bytecode
    for number in range(rounds):
        _say(progress=f"units: round {number + 1} of {rounds}")
        # Each way comes first in one round, second in another.
        shift = number % len(Way)
        for way in (*list(Way)[shift:], *list(Way)[:shift]):
            _say(sample=[way, _stop(way, number)])
    return 0


def _stop(way: Way, number: int) -> float:
    """ms."""
    unit = f"guest-{way.name.lower()}-{number}.service"
    lines = [f"ExecStart={_GUEST}"]
    if way is not Way.PLAIN:
        lines += [f"ExecStop={PYTHON} -m qkilld.stop", "NotifyAccess=exec", _ENVIRONMENT]
    _write(f"/run/systemd/system/{unit}", "[Service]\n" + "\n".join(lines) + "\n")
    _systemctl("unmask", "--runtime", "qkilld.service")
    _systemctl("start" if way is Way.DAEMON else "stop", "qkilld.service")
    if way is Way.ALONE:
        _systemctl("mask", "--runtime", "qkilld.service")
    _systemctl("daemon-reload")
    _systemctl("start", unit)
    time.sleep(_UP_S)
    start = time.monotonic()
    _systemctl("stop", unit)
    taken = (time.monotonic() - start) * 1000
    result = _systemctl("show", "--property=Result", "--value", unit)
    assert result == "success\n", f"{unit}: {result}"
    Path(f"/run/systemd/system/{unit}").unlink()
    return taken


def _install() -> None:
    unit = (TOP / "units/qkilld.service").read_text()
    _write("/usr/lib/systemd/system/qkilld.service", unit)
    _write(
        "/run/systemd/system/qkilld.service.d/checkout.conf",
        f"[Service]\nExecStart=\nExecStart={PYTHON} -m qkilld\n{_ENVIRONMENT}"
        "[Unit]\nStartLimitIntervalSec=0\n",
    )
    policy = (TOP / "dbus/org.qkilld1.conf").read_text()
    _write("/etc/dbus-1/system.d/org.qkilld1.conf", policy)
    _write(
        "/usr/share/dbus-1/system-services/org.qkilld1.service",
        "[D-BUS Service]\nName=org.qkilld1\nExec=/bin/false\nUser=root\n"
        "SystemdService=qkilld.service\n",
    )
    _systemctl("daemon-reload")
    _systemctl("reload", "dbus.service")


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def _systemctl(*arguments: str) -> str:
    done = subprocess.run(
        ["systemctl", *arguments], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    )
    return done.stdout


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    sys.exit(main())
