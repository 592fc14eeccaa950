"""A control group anywhere: in any hierarchy, below any group.

    python -m tests.lab.groups GROUP

waits for the end of its input, then thaws the group, kills what is in it and removes it.
temporary_group() runs it so that this happens even where the process that made it is killed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab.process import TOP


@contextlib.contextmanager
def temporary_group(parent: Path) -> Iterator[Path]:
    """A new group in this directory of a cgroup file system, v1 or v2.

    To put a process into it, write its pid to its cgroup.procs. When this ends, or this process
    does, the group is thawed, what is in it is killed and the group removed. Raises OSError where
    groups cannot be made there.
    """
    group = parent / f"qkilld-lab-{os.getpid()}-{time.monotonic_ns():x}"
    group.mkdir()
    # In a session of its own and without a parent-death signal: it has to outlive this process.
    guard = subprocess.Popen(
        [sys.executable, "-m", "tests.lab.groups", str(group)],
        stdin=subprocess.PIPE,
        cwd=TOP,
        start_new_session=True,
    )
    try:
        yield group
    finally:
        guard.communicate()


def _thaw(group: Path) -> None:
    """In v1 SIGKILL waits for the end of the freeze."""
    for state in group.rglob("freezer.state"):
        with contextlib.suppress(OSError):
            state.write_text("THAWED")


if __name__ == "__main__":
    sys.stdin.read()
    _thaw(Path(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, "-m", "tests.lab.cgroup", sys.argv[1]])
