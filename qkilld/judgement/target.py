"""Judgement of a target: is it a QEMU, is it still the same one, may this caller stop it, and what
somebody who is asked for a password gets to read of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Final

from qkilld.model.access import Action, Answer
from qkilld.model.errors import (
    AccessDenied,
    InteractiveAuthorizationRequired,
    NotQemu,
    ProcessChanged,
)
from qkilld.model.guest import Guest, Identity
from qkilld.model.text import printable
from qkilld.model.words import Flag

MAX_DIALOG_TEXT: Final = 64
_MARKUP: Final = frozenset("<>&$%\\\"'`")
_SAFE_MARK: Final = "\N{REPLACEMENT CHARACTER}"


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


def is_free(caller_uid: int, identity: Identity) -> bool:
    """Whether the caller may do anything with the process without further question."""
    return caller_uid in (0, identity.uid)


def check_free(caller_uid: int, before: Identity, after: Identity) -> None:
    """Raise ProcessChanged where the process is another user's than it was when this was decided.

    Whoever it belongs to, root may stop it.
    """
    if caller_uid != 0 and before.uid != after.uid:
        raise ProcessChanged(
            f"Process {before.pid} belongs to another user by now: nothing was done"
        )


def action_for(flags: Flag) -> Action:
    """What who is not free to stop a process must be authorized for."""
    return Action.FORCE if Flag.FORCE in flags else Action.TERMINATE


def check_answer(answer: Answer, what: str) -> None:
    """Raise AccessDenied or InteractiveAuthorizationRequired unless it is GRANTED.

    `what` begins a sentence and tells nothing that the caller did not say: `Process 4711 is`.
    """
    if answer is Answer.CHALLENGE:
        raise InteractiveAuthorizationRequired(
            f"{what} not yours: that needs authorization as an administrator"
        )
    if answer is not Answer.GRANTED:
        raise AccessDenied(f"{what} not yours, and you are not authorized to do that")


def details_of(guest: Guest, flags: Flag) -> dict[str, str]:
    """For polkit's rules and its dialog: target (words), pid, guest, unit, uid, flags.

    The guest's name is its owner's own word and is shown to whoever types a password.
    """
    name = for_dialog(guest.label.name)
    process = f"process {guest.identity.pid}"
    return {
        "target": f"the QEMU guest {name} ({process})" if name else f"the QEMU {process}",
        "pid": str(guest.identity.pid),
        "guest": name,
        "unit": for_dialog(guest.label.unit.name),
        "uid": str(guest.identity.uid),
        "flags": str(int(flags)),
    }


def details_of_all(flags: Flag) -> dict[str, str]:
    """As `details_of`, for the guests of all other users."""
    target = "all QEMU guests of other users"
    return dict.fromkeys(("pid", "guest", "unit", "uid"), "") | {
        "target": target,
        "flags": str(int(flags)),
    }


def for_dialog(text: str) -> str:
    """Without what could pass for markup, for an end of quotation, or for a variable of polkit's.

    Desktops differ in what their dialogs make of a text.
    """
    return "".join(_SAFE_MARK if c in _MARKUP else c for c in printable(text, MAX_DIALOG_TEXT))
