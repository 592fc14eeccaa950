"""Install the structures of the corpus as units of a throwaway system."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from qkilld.unitcheck.command import quoted
from tests.corpus.structures import Structure
from tests.lab.container import Container

DIRECTORY: Final = "/etc/systemd/system"
SOCKETS: Final = "/run/corpus"
IDLE: Final = ("/usr/bin/qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none")
_WAIT_S: Final = 30

_SCRIPTS: Final = {
    "corpus-noop": "#!/bin/sh\nexit 0\n",
    "corpus-ask": '#!/bin/sh\necho system_powerdown | socat - "TCP:127.0.0.1:$1"\n',
    "corpus-wait": (
        '#!/bin/sh\ni=0\necho system_powerdown | socat - "UNIX-CONNECT:$1"\n'
        'while [ -S "$1" ] && socat -u OPEN:/dev/null "UNIX-CONNECT:$1" 2>/dev/null; do\n'
        '    sleep 0.2; i=$((i + 1)); [ "$i" -lt 300 ] || exit 1\ndone\n'
    ),
    "corpus-trap": (
        '#!/bin/sh\nmonitor=$1; shift\n"$@" -monitor "unix:$monitor,server=on,wait=off" &\n'
        "trap 'echo system_powerdown | socat - \"UNIX-CONNECT:$monitor\"' TERM\n"
        "wait; wait\n"
    ),
    "corpus-manager": (
        "import subprocess, sys\nidle = " + repr(list(IDLE)) + "\n"
        "for guest in [subprocess.Popen(idle) for _ in range(2)]:\n    guest.wait()\n"
    ),
}
"""Replacements for a site's own programs."""


class Words:
    """The values of the placeholders {guest}, {mute}, {monitor}, {served}, {nbd} and {store} for
    one structure."""

    def __init__(self, structure: Structure, words: Iterable[str], disk: str = "") -> None:
        """`disk`: the path of the guest's own disk, if it has one."""
        self.monitor = f"{SOCKETS}/{structure.unit}.monitor"
        self.nbd = f"{SOCKETS}/{structure.unit}.nbd"
        self.store = f"file {disk}" if disk else "memory 16M"
        self.mute = [*words, "-name", structure.unit.partition(".")[0].rstrip("@")]
        self.guest = [*self.mute, "-monitor", f"unix:{self.monitor},server=on,wait=off"]
        self.served = [
            word.replace(f"file={disk},", f"file=nbd:unix:{self.nbd},") if disk else word
            for word in self.mute
        ]
        if not disk:
            self.served += ["-drive", f"file=nbd:unix:{self.nbd},format=raw"]

    def format(self, text: str) -> str:
        return text.format(
            guest=" ".join(map(quoted, self.guest)),
            mute=" ".join(map(quoted, self.mute)),
            served=" ".join(map(quoted, self.served)),
            monitor=self.monitor,
            nbd=self.nbd,
            store=self.store,
        )


FAILS: Final = "corpus-fails.service"
_FAILS_TEXT: Final = (
    "[Unit]\nOnFailure=emergency.target\nOnFailureJobMode=isolate\n"
    "[Service]\nType=oneshot\nExecStart=/bin/false\n"
)
"""A unit that brings the host to its emergency shell when it fails, as file systems do."""


def prepare(system: Container) -> None:
    system.write(f"{DIRECTORY}/{FAILS}", _FAILS_TEXT)
    system.run("mkdir", "-p", SOCKETS)
    for name, text in _SCRIPTS.items():
        system.write(f"/usr/local/bin/{name}", text, 0o755)


def write(system: Container, structure: Structure, words: Words) -> None:
    """Write all files of a structure, without daemon-reload. A scope has no file."""
    for path, text in structure.files.items():
        where = path if path.startswith("/") else f"{DIRECTORY}/{path}"
        system.write(where, words.format(text))
    if not structure.is_scope:
        head = f"[Unit]\n{words.format(structure.head)}\n"
        text = f"{head}[Service]\n{words.format(structure.text)}\n"
        system.write(f"{DIRECTORY}/{structure.unit}", text)


def start(system: Container, structure: Structure, words: Words, units: Iterable[str]) -> None:
    for unit in units:
        if unit != structure.unit or not structure.is_scope:
            system.run("systemctl", "start", unit)
            continue
        properties = [f"--property={line}" for line in structure.text.splitlines()]
        run = ["systemd-run", "--scope", f"--unit={unit}", *properties, *words.guest]
        # With --fork, the program becomes a child of the system's first process, which reaps it.
        script = 'exec setsid --fork "$@" </dev/null >/dev/null 2>&1'
        system.run("sh", "-c", script, "sh", *run)
        wait_for(lambda unit=unit: system.property(unit, "ActiveState") == "active")  # type: ignore[misc]


def wait_for(condition: Callable[[], bool], timeout: float = _WAIT_S) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not after {timeout:g} s"
        time.sleep(0.05)


def judge(system: Container, units: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the output of `check-unit --json` for each unit."""
    names = list(units)
    done = system.run("qkillctl", "--json", "check-unit", *names, check=False, timeout=120)
    return dict(zip(names, json.loads(done.stdout), strict=True))


@contextlib.contextmanager
def idle_units(system: Container, structures: Iterable[Structure]) -> Iterator[None]:
    """Install all structures with idle guests, and start the units that must run."""
    prepare(system)
    pairs = [(structure, Words(structure, IDLE)) for structure in structures]
    for structure, words in pairs:
        write(system, structure, words)
    system.run("systemctl", "daemon-reload")
    try:
        for structure, words in pairs:
            start(system, structure, words, structure.starts)
        yield
    finally:
        for structure, _ in pairs:
            for unit in reversed(structure.starts):
                system.run("systemctl", "kill", "--signal=KILL", unit, check=False)
                system.run("systemctl", "stop", unit, check=False)
            files = [path for path in structure.files if not path.startswith("/")]
            paths = [f"{DIRECTORY}/{name}" for name in (structure.unit, *files)]
            system.run("rm", "-rf", *paths, f"{DIRECTORY}/{structure.unit}.d")
        system.run("systemctl", "daemon-reload")
