"""A control group for each container, so that a container has a group of its own and leaves nothing
behind.

    python -m tests.lab.cgroup GROUP...

This command waits for the end of its input, then kills the processes in the groups and removes the
groups. own_cgroup() runs the command, so that the groups are removed even if the process of
own_cgroup() is killed.
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
    """Make a group with this name below this process's group, in the hierarchies that systemd uses.

    Yields the group's directories: one in cgroup v2, one in v1's name=systemd, or both. To move a
    process into the group, write its pid to cgroup.procs in each. At the end of the context or of
    this process, the processes in the group are killed and the group is removed. Raises OSError if
    groups cannot be made.
    """
    with contextlib.ExitStack() as stack:
        groups = []
        for parent in _own_directories():
            (parent / name).mkdir()
            groups.append(parent / name)
            stack.callback(_remove_empty, parent / name)
        # The guard has its own session and no parent-death signal, because it must outlive this
        # process.
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
    """Yield this process's group in each hierarchy that systemd uses."""
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
            # Yield each hierarchy only once, even if it is mounted twice.
            yield Path(mounted_at) / os.path.relpath(own.pop(key), root)


def _clear(groups: list[Path]) -> None:
    """Kill the processes in the groups, and remove the groups. Retry for up to 30 s."""
    deadline = time.monotonic() + 30
    while any(group.exists() for group in groups) and time.monotonic() < deadline:
        for group in groups:
            for procs in group.rglob("cgroup.procs"):
                with contextlib.suppress(OSError):
                    for pid in procs.read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
            _remove_empty(group)
        # v1 and v2 have no common event for an empty group.
        time.sleep(0.02)


def _remove_empty(group: Path) -> None:
    for directory, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()


if __name__ == "__main__":
    sys.stdin.read()
    _clear([Path(argument) for argument in sys.argv[1:]])
