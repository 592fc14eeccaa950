"""Shell completion: print the words for a target, unit, job or container.

Users choose the names of their guests, and shells interpret special characters, so only plain names
are printed. A guest with any other name is offered by its process id. Completion does not start the
daemon, and prints nothing after an error.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from qkilld.adapters import config, procfs
from qkilld.model.policy import Config, is_qemu

TARGETS, JOBS, UNITS, MACHINES = KINDS = ("targets", "jobs", "units", "machines")
JOBS_TIMEOUT_S: Final = 1.0
_UNIT_DIRECTORIES: Final = ("etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system")
_MACHINES: Final = Path("run/systemd/machines")
_NAME: Final = re.compile(r"(?![0-9]+\Z)[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
"""A guest's name. The name must not be a number, because qkillctl takes numbers for process ids."""
_UNIT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*\.(?:service|scope)", re.ASCII)


def main() -> int:
    kind = sys.argv[1] if len(sys.argv) == 2 else ""
    try:
        for word in sorted(set(words(kind))):
            print(word)
        sys.stdout.flush()
    except Exception:
        return 1
    return 0


def words(kind: str, root: Path = Path("/")) -> Iterator[str]:
    """Return the words for one of KINDS; `root` is the parent of /etc, /run and /usr."""
    match kind:
        case "targets":
            yield from _targets()
        case "jobs":
            yield from _targets()
            yield from asyncio.run(_jobs())
        case "units":
            yield from _units(root)
        case "machines":
            yield from plain_names(path.name for path in (root / _MACHINES).glob("*"))


def plain_names(names: Iterable[str]) -> Iterator[str]:
    """Yield the names that need no quoting in any shell, and that qkillctl parses as names."""
    for name in names:
        if _NAME.fullmatch(name) and not name.endswith((".service", ".scope")):
            yield name


def _guests() -> Iterator[int]:
    """Yield the QEMU processes whose executable the caller can read; root can read all."""
    try:
        executables = config.load().executables
    except Exception:
        executables = Config().executables
    for pid in procfs.pids():
        try:
            if is_qemu(procfs.read_executable(pid)[0], executables):
                yield pid
        except OSError:
            continue


def _targets() -> Iterator[str]:
    for pid in _guests():
        try:
            words = list(plain_names([procfs.read_names(pid)[0] or ""]))
        except OSError:
            continue
        yield from words or [str(pid)]


def _units(root: Path) -> Iterator[str]:
    """Yield the names of installed services, and of units that run guests."""
    names = {path.name for each in _UNIT_DIRECTORIES for path in (root / each).glob("*.service")}
    for pid in _guests():
        try:
            unit = procfs.read_unit(pid)
        except OSError:
            continue
        if unit is not None:
            names.add(unit.system)
    yield from (name for name in names if _UNIT.fullmatch(name))


async def _jobs() -> list[str]:
    """Return the jobs of a running daemon as object paths, because bash would split `job:N` at the
    colon."""
    from qkilld.bus.client import ManagerProxy
    from qkilld.ctl.session import open_connection
    from qkilld.model.bus_address import SYSTEM_BUS
    from qkilld.model.constants import JOB_PATH_PREFIX
    from qkilld.model.errors import QkilldError

    try:
        async with asyncio.timeout(JOBS_TIMEOUT_S), open_connection(SYSTEM_BUS) as connection:
            manager = ManagerProxy(connection)
            if not await manager.owner():
                return []
            return [f"{JOB_PATH_PREFIX}{number}" for number, *_ in await manager.list_jobs()]
    except (QkilldError, TimeoutError):
        return []


if __name__ == "__main__":
    sys.exit(main())
