"""Judgement of a target: is it a QEMU, is it still the same one, may this caller stop it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from qkilld.model.errors import AccessDenied, NotQemu, ProcessChanged
from qkilld.model.guest import Identity


def is_qemu(executable: str, globs: Iterable[str]) -> bool:
    """Whether the path matches one of the globs; `*` does not cross a `/`."""
    path = PurePosixPath(executable)
    return path.is_absolute() and any(path.match(glob) for glob in globs)


def check_qemu(identity: Identity, globs: Iterable[str], own_pid: int) -> None:
    """Raise NotQemu unless the process is shown to be a QEMU; `own_pid` is never one."""
    pid = identity.pid
    if pid == 1:
        raise NotQemu("Process 1 is the init of this system, not a QEMU")
    if pid == own_pid:
        raise NotQemu(f"Process {pid} is qkilld itself, not a QEMU")
    if not identity.executable:
        raise NotQemu(f"Process {pid} ({identity.command}) has no executable file to tell it by")
    if not is_qemu(identity.executable, globs):
        raise NotQemu(
            f"Process {pid} ({identity.command}) is not a QEMU: "
            "its executable matches none of Executables= in qkilld.conf"
        )


def check_same(identity: Identity, start_time: int) -> None:
    """Raise ProcessChanged unless the process started at `start_time` (clock ticks since boot)."""
    if identity.start_time != start_time:
        raise ProcessChanged(
            f"Process {identity.pid} is another process by now: it started at clock tick "
            f"{identity.start_time}, not {start_time}"
        )


def check_caller(caller_uid: int, identity: Identity) -> None:
    """Raise AccessDenied unless the caller is root or the process's real uid is the caller's."""
    if caller_uid not in (0, identity.uid):
        raise AccessDenied(
            f"Process {identity.pid} is not yours: only root and its own user may do that"
        )
