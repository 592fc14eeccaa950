"""A control group of a container's own, so that two do not meet and nothing of either is left.

    python -m tests.lab.cgroup GROUP...

waits for the end of its input, then kills what is in the groups and removes them. own_cgroup() runs
it so that this happens even where the process that made them is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab.process import TOP


@contextlib.contextmanager
def own_cgroup(name: str) -> Iterator[list[Path]]:
    """Makes a group NAME below this process's in the hierarchies that systemd uses.

    Yields its directories: one in cgroup v2, one in v1's name=systemd, or both where there are
    both. To put a process into it, write its pid to their cgroup.procs. When this ends, or this
    process does, what is in the group is killed and the group removed. Raises OSError where groups
    cannot be made.
    """
    with contextlib.ExitStack() as stack:
        groups = []
        for parent in _own_directories():
            (parent / name).mkdir()
            groups.append(parent / name)
            stack.callback(_remove_empty, parent / name)
        # In a session of its own and without a parent-death signal: it has to outlive this process.
        guard = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.cgroup", *map(str, groups)],
            stdin=subprocess.PIPE,
            cwd=TOP,
            start_new_session=True,
        )
        try:
            yield groups
        finally:
            guard.communicate()


def _own_directories() -> Iterator[Path]:
    """This process's group in each hierarchy that systemd uses."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = (part.split() for part in line.split(" - ", 1))
        root, mounted_at = before[3], before[4]
        kind, options = after[0], after[-1].split(",")
        key = "" if kind == "cgroup2" else "name=systemd" if "name=systemd" in options else None
        if kind in ("cgroup", "cgroup2") and key in own:
            # Once each: a hierarchy may be mounted twice.
            yield Path(mounted_at) / os.path.relpath(own.pop(key), root)


def _clear(groups: list[Path]) -> None:
    """Kills what is in the groups and removes them; tries for 30 s."""
    deadline = time.monotonic() + 30
    while any(group.exists() for group in groups) and time.monotonic() < deadline:
        for group in groups:
            for procs in group.rglob("cgroup.procs"):
                with contextlib.suppress(OSError):
                    for pid in procs.read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
            _remove_empty(group)
        # There is no event for an empty group that v1 and v2 have in common.
        time.sleep(0.02)


def _remove_empty(group: Path) -> None:
    for directory, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()


if __name__ == "__main__":
    sys.stdin.read()
    _clear([Path(argument) for argument in sys.argv[1:]])
