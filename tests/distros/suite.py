"""The suite inside another release, with its Python, systemd, QEMU, D-Bus library and bus."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Final

from tests.distros.trees import DIRECTORY, Release, tree
from tests.lab import needs
from tests.lab.image import CACHE
from tests.lab.process import TOP

PARTS: Final = (
    ("tests/pure", "tests/engine", "tests/adapters", "tests/evidence", "tests/stop"),
    ("tests/varlink", "tests/monitor", "tests/lab", "tests/rungs", "tests/shutdown"),
    ("tests/bus",),
    ("tests/bus", "--dbus-library=dbus-fast"),
    ("tests/system",),
    ("tests/system/test_system.py", "tests/system/test_polkit.py", "--message-bus=dbus-broker"),
    ("tests/fuzz", "tests/chaos", "tests/campaign"),
)
"""The arguments of each run of pytest."""
_WORKERS: Final = "4"
_TIMEOUT_S: Final = 3600
_RUN: Final = (
    "packaging/setup build venv && .venv/bin/python -m compileall -q qkilld tests"
    ' && exec .venv/bin/python -m pytest "$@"'
)
"""Compile byte code first: the daemon writes none, and tests limit the time of its start."""


def _packages() -> list[str]:
    """List the packages that packaging/setup installs."""
    setup: list[str | Path] = [TOP / "packaging/setup", "--list", "build", "lab", "campaign"]
    lists = subprocess.run(setup, check=True, capture_output=True, text=True).stdout.split()
    return [*lists, "python3-dbus-fast", "dbus-broker", "git", "kmod", "util-linux-extra"]


def run(release: Release, *arguments: str) -> bool:
    """Run pytest in the release with these arguments; print one line, or the failures. Return False
    if a test failed."""
    root = tree(release, _packages(), variant="-suite")
    mountpoint = DIRECTORY / "mnt"
    mountpoint.mkdir(exist_ok=True)
    # Keep the virtual environment, because making it takes minutes.
    venv = DIRECTORY / f"{release.name}-venv"
    venv.mkdir(exist_ok=True)
    # Named by the release, because the suite may run on several releases at once.
    disk = DIRECTORY / f"{release.name}-disk"
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
    log = DIRECTORY / f"{release.name}-tests.log"
    command: list[str | Path] = [
        # timeout(1) sends SIGTERM to the whole process group, so the tests clean up.
        *(needs.program("timeout", "coreutils"), "--kill-after=60", str(_TIMEOUT_S)),
        *(needs.program("unshare", "util-linux"), "--mount", "--propagation", "private"),
        *(Path(__file__).with_name("chroot"), mountpoint, root, TOP, CACHE, venv, disk),
        *("sh", "-c", _RUN, "sh"),
        *("-q", f"--numprocesses={_WORKERS}", "--dist=loadgroup", "-p", "no:cacheprovider"),
        *arguments,
    ]
    # Leave out PIP_FIND_LINKS, which names directories of this machine.
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    with log.open("wb") as written:
        code = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            env=environment,
        ).returncode
    lines = log.read_text(errors="replace").splitlines()
    end = lines[-1] if lines else "nothing was said"
    print(f"  {' '.join(arguments)}: {end}", flush=True)
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"    {line}", flush=True)
    skipped = Counter(line.partition(": ")[2] for line in lines if line.startswith("SKIPPED"))
    for reason, number in skipped.items():
        print(f"    skipped in {number} places: {reason}", flush=True)
    if code:
        copy = log.with_name(f"{release.name}-failed-{os.getpid()}-{len(lines)}.log")
        log.rename(copy)
        why = f"after {_TIMEOUT_S} s" if code in (124, 137) else f"with exit code {code}"
        print(f"    ended {why}; see {copy}", flush=True)
    return code == 0
