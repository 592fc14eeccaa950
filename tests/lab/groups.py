"""A temporary control group in any hierarchy, below any group.

    python -m tests.lab.groups GROUP

This command waits for the end of its input, then thaws the group, kills its processes and removes
the group. temporary_group() runs the command, so that the group is removed even if the process of
temporary_group() is killed.
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
    """Make a group in this directory of a cgroup file system, v1 or v2.

    To move a process into the group, write its pid to the group's cgroup.procs. At the end of the
    context or of this process, the group is thawed, its processes are killed and the group is
    removed. Raises OSError if groups cannot be made there.
    """
    group = parent / f"qkilld-lab-{os.getpid()}-{time.monotonic_ns():x}"
    group.mkdir()
    # The guard has its own session and no parent-death signal, because it must outlive this
    # process.
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
    """Thaw the group. In v1, SIGKILL has no effect on a frozen process."""
    for state in group.rglob("freezer.state"):
        with contextlib.suppress(OSError):
            state.write_text("THAWED")


if __name__ == "__main__":
    sys.stdin.read()
    _thaw(Path(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, "-m", "tests.lab.cgroup", sys.argv[1]])
