"""/proc/PID: who a process is. Sources: proc(5), cgroups(7), qemu(1).

What names a process (stat, status, exe) never blocks. Its command line can: the kernel takes the
memory lock of the target for it, which a QEMU stuck in a page fault may hold for ever. So
`read_name_and_uuid` is for a thread of its own (adapters.detached).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from qkilld.adapters import qemu_args
from qkilld.adapters.cgroup import unit_of
from qkilld.model.guest import Identity, Unit
from qkilld.model.text import printable

PROC: Final = Path("/proc")
_MAX_CMDLINE: Final = 1 << 20
"""Bytes read of a command line; a process can make its own as long as it likes."""
PF_EXITING: Final = 0x4
"""In the flags of stat: include/linux/sched.h."""
_UNIT_NAME: Final = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}")


class Stat(NamedTuple):
    command: str
    state: str
    start_time: int
    exiting: bool
    """It has begun to end: what it ran is gone, and no signal changes anything any more."""


def pids(proc: Path = PROC) -> list[int]:
    """The ids of all processes to be seen."""
    return sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal())


def read_stat(pid: int, proc: Path = PROC) -> Stat:
    """Raises OSError where there is no such process (FileNotFoundError, ProcessLookupError).

    The command stands in parentheses and may itself hold any byte but NUL, parentheses and line
    breaks too: what follows the last ")" is the rest.
    """
    head, _, tail = (proc / str(pid) / "stat").read_bytes().rpartition(b")")
    fields = tail.split()
    command = head.partition(b"(")[2].decode("utf-8", "surrogateescape")
    exiting = bool(int(fields[6]) & PF_EXITING)
    return Stat(printable(command), fields[0].decode(), int(fields[19]), exiting)


def read_uid(pid: int, proc: Path = PROC) -> int:
    """The real uid. Raises OSError."""
    for line in (proc / str(pid) / "status").read_bytes().splitlines():
        if line.startswith(b"Uid:"):
            return int(line.split()[1])
    raise ProcessLookupError(f"no Uid line for {pid}")


def read_executable(pid: int, proc: Path = PROC) -> tuple[str, bool]:
    """What exe points to, and whether it is deleted; ("", False) where there is none.

    Kernel threads have none, nor has what is exiting. Raises PermissionError where the kernel does
    not show it.
    """
    try:
        path = str((proc / str(pid) / "exe").readlink())
    except (FileNotFoundError, ProcessLookupError):
        return "", False
    bare = path.removesuffix(" (deleted)")
    return bare, bare != path


def read_identity(pid: int, proc: Path = PROC) -> Identity:
    """Raises OSError: FileNotFoundError, ProcessLookupError where it is gone, PermissionError."""
    stat = read_stat(pid, proc)
    uid = read_uid(pid, proc)
    executable, deleted = read_executable(pid, proc)
    return Identity(
        pid=pid,
        start_time=stat.start_time,
        uid=uid,
        command=stat.command,
        state=stat.state,
        executable=executable,
        executable_deleted=deleted,
    )


def read_name_and_uuid(pid: int, proc: Path = PROC) -> tuple[str, str]:
    """What the guest calls itself, "" each where it says nothing. May block, see above."""
    try:
        with (proc / str(pid) / "cmdline").open("rb") as file:
            argv = os.fsdecode(file.read(_MAX_CMDLINE)).split("\0")
    except OSError:
        return "", ""
    name, uuid_text = qemu_args.name_and_uuid(argv)
    return printable(name), _canonical_uuid(uuid_text)


def read_unit(pid: int, proc: Path = PROC) -> Unit:
    """The systemd unit; empty where it runs in none or cannot be read."""
    try:
        own = (proc / str(pid) / "cgroup").read_text("utf-8", "surrogateescape")
        init = (proc / "1" / "cgroup").read_text("utf-8", "surrogateescape")
    except OSError:
        return Unit()
    unit = unit_of(own, init)
    names = (unit.system, unit.user)
    return Unit(*(name if _UNIT_NAME.fullmatch(name) else "" for name in names))


def _canonical_uuid(text: str) -> str:
    import uuid  # here, for a guest's own name alone is worth it

    try:
        return str(uuid.UUID(text)) if len(text) == 36 else ""
    except ValueError:
        return ""
