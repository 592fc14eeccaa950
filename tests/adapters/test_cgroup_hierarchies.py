"""Which cgroup hierarchy systemd uses, on real mounts: v2 beside a foreign v1, hybrid, and v1."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.lab import needs
from tests.lab.cgroup import own_cgroup
from tests.lab.process import end, run, spawn
from tests.lab.scratch import scratch

_V2: Final = "mount -t cgroup2 none /sys/fs/cgroup"
_TMPFS: Final = "mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/{systemd,unified}"
_V1: Final = "mount -t cgroup -o none,name=systemd none"

_ASK: Final = """
import sys
from qkilld.adapters.procfs import read_unit
unit = read_unit(int(sys.argv[1]))
print(None if unit is None else unit.system or "none")
"""

V1, V2 = "v1", "v2"


@pytest.fixture
def process() -> Iterator[tuple[int, dict[str, str]]]:
    """A process that is in a different group in each hierarchy. Yields its pid and the names of its
    units.

    If this host has not mounted a hierarchy, the process is in its root group, and the name is
    "none".
    """
    needs.root("to make control groups and mounts")
    mark = secrets.token_hex(4)
    names = {version: f"qkilld-lab-{mark}-{version}.service" for version in (V1, V2)}
    with own_cgroup(names[V1]) as first, own_cgroup(names[V2]) as second:
        running = spawn(["sleep", "infinity"])
        try:
            for version, groups in ((V1, first), (V2, second)):
                group = next((one for one in groups if _kind(one) == version), None)
                if group is None:
                    names[version] = "none"
                else:
                    (group / "cgroup.procs").write_text(str(running.pid))
            yield running.pid, names
        finally:
            end(running)


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ([_V2], V2),
        # v1 is mounted for another purpose, such as a container of an old system.
        ([_V2, f"{_V1} $ELSEWHERE"], V2),
        ([_TMPFS, f"{_V1} /sys/fs/cgroup/systemd"], V1),
        (
            [
                _TMPFS,
                f"{_V1} /sys/fs/cgroup/systemd",
                "mount -t cgroup2 none /sys/fs/cgroup/unified",
            ],
            V2,
        ),
        # v2 is mounted elsewhere.
        ([_TMPFS, f"{_V1} /sys/fs/cgroup/systemd", "mount -t cgroup2 none $ELSEWHERE"], V1),
        # systemd 232.
        ([_TMPFS, "mount -t cgroup2 none /sys/fs/cgroup/systemd"], V2),
    ],
    ids=["v2", "v2 and a foreign v1", "v1", "hybrid", "v1 and a foreign v2", "hybrid of 232"],
)
def test_the_unit_is_that_of_systemds_hierarchy(
    process: tuple[int, dict[str, str]], mounts: list[str], expected: str
) -> None:
    pid, names = process
    steps = " && ".join(["umount -R /sys/fs/cgroup", *mounts])
    with scratch("e") as elsewhere:
        asked = _in_own_mounts(f'{steps} && exec "$@"', elsewhere, sys.executable, "-c", _ASK, pid)
        assert asked.stdout.strip() == names[expected]


def test_without_any_hierarchy_the_unit_is_unknown(process: tuple[int, dict[str, str]]) -> None:
    pid, _ = process
    with scratch("e") as elsewhere:
        # With v1, every process is in both hierarchies.
        script = f'{_V1} $ELSEWHERE && umount -R /sys/fs/cgroup && exec "$@"'
        asked = _in_own_mounts(script, elsewhere, sys.executable, "-c", _ASK, pid)
    assert asked.stdout.strip() == "None"


def test_this_host(process: tuple[int, dict[str, str]]) -> None:
    """Find the hierarchy of this host by statfs(2), as systemd does (cg_unified_cached)."""
    pid, names = process
    places = ("", "/unified", "/systemd")
    kinds = [_statfs(Path(f"/sys/fs/cgroup{place}")) for place in places]
    version = V2 if "cgroup2fs" in kinds else V1
    asked = run([sys.executable, "-c", _ASK, str(pid)])
    assert asked.stdout.strip() == names[version]


def _in_own_mounts(
    script: str, elsewhere: Path, *words: str | int
) -> subprocess.CompletedProcess[str]:
    unshare = str(needs.program("unshare", "util-linux"))
    argv = [unshare, "--mount", "--propagation=private", "bash", "-c", script, "bash"]
    return run([*argv, *map(str, words)], env=os.environ | {"ELSEWHERE": str(elsewhere)})


def _kind(group: Path) -> str:
    return V2 if _statfs(group) == "cgroup2fs" else V1


def _statfs(path: Path) -> str:
    """Return the type of a file system, as statfs(2) gives it; "" if there is none."""
    return run(["stat", "--file-system", "--format=%T", str(path)], check=False).stdout.strip()
