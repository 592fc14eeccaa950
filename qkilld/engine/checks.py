"""Check a process before it is stopped: it must be QEMU and still the same process, and the caller
must be allowed to stop it. Describe the process for polkit's dialog.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from qkilld.model.access import Answer, PolkitAction
from qkilld.model.constants import Flag
from qkilld.model.errors import (
    AccessDenied,
    ExitInProgress,
    InteractiveAuthorizationRequired,
    NoSuchProcess,
    NotQemu,
    ProcessChanged,
    QkilldError,
    UnknownIdentity,
)
from qkilld.model.guest import Guest, Identity
from qkilld.model.policy import is_qemu
from qkilld.model.text import printable

if TYPE_CHECKING:
    from qkilld.engine.ports import Process

MAX_DIALOG_TEXT: Final = 64
_MARKUP: Final = frozenset("<>&$%\\\"'`")
_SAFE_MARK: Final = "\N{REPLACEMENT CHARACTER}"


def check_qemu(identity: Identity, globs: Iterable[str], own_pid: int) -> None:
    """Raise NotQemu unless the process is known to be QEMU. Also raise it for qkilld itself
    (`own_pid`).

    Raises ExitInProgress if the process can no longer be identified because it is exiting.
    """
    pid = identity.pid
    if pid == 1:
        raise NotQemu("Process 1 is the init of this system, not a QEMU")
    if pid == own_pid:
        raise NotQemu(f"Process {pid} is qkilld itself, not a QEMU")
    if identity.exiting:
        raise ExitInProgress(pid)
    if not identity.executable:
        raise NotQemu(
            f"Process {pid} ({identity.command}) has no executable file that identifies it"
        )
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


def check_unchanged(before: Identity, now: Identity, globs: Iterable[str]) -> None:
    """Check, right before a signal, that a process still is QEMU and belongs to the same user.

    The executable may have changed to another QEMU, because QEMU executes a new program for an
    upgrade (cpr-exec). Raises ProcessChanged if the check fails, and UnknownIdentity if the
    executable cannot be read.
    """
    pid = now.pid
    if now.key != before.key:
        raise ProcessChanged(f"Process {pid} is another process by now: it gets no signal")
    if now.uid != before.uid:
        raise ProcessChanged(
            f"Process {pid} belongs to uid {now.uid} by now, not {before.uid}: it gets no signal"
        )
    if not now.executable:
        raise UnknownIdentity(
            f"Cannot read the executable of process {pid} at the moment: no signal was sent",
            exiting=now.exiting,
        )
    if not is_qemu(now.executable, globs):
        raise ProcessChanged(
            f'Process {pid} runs "{now.command}" by now, which is not a QEMU: it gets no signal'
        )


def check_process(process: Process, before: Identity, globs: Iterable[str]) -> None:
    """Read the identity again, and check it with `check_unchanged`.

    Raises ProcessLookupError if the process is gone, UnknownIdentity if the identity is unreadable,
    and what `check_unchanged` raises.
    """
    try:
        now = process.identify()
    except NoSuchProcess:
        raise ProcessLookupError from None
    except QkilldError as error:
        raise UnknownIdentity(str(error)) from None
    check_unchanged(before, now, globs)


def is_free(caller_uid: int, identity: Identity) -> bool:
    """Return whether polkit need not be asked: the caller is root or owns the process."""
    return caller_uid in (0, identity.uid)


def check_free(caller_uid: int, before: Identity, after: Identity) -> None:
    """Raise ProcessChanged if the process's user has changed since the caller was authorized. For
    root, this does not matter.
    """
    if caller_uid != 0 and before.uid != after.uid:
        raise ProcessChanged(
            f"Process {before.pid} belongs to another user by now: nothing was done"
        )


def action_for(flags: Flag) -> PolkitAction:
    """The polkit action required of a caller who does not own the process."""
    return PolkitAction.FORCE if Flag.FORCE in flags else PolkitAction.TERMINATE


def check_answer(answer: Answer, what: str) -> None:
    """Raise AccessDenied or InteractiveAuthorizationRequired unless `answer` is GRANTED.

    `what` is the beginning of the error's text, such as `Process 4711 is`. It must not reveal what
    a process runs.
    """
    if answer is Answer.CHALLENGE:
        raise InteractiveAuthorizationRequired(
            f"{what} not yours: that needs authorization as an administrator"
        )
    if answer is not Answer.GRANTED:
        raise AccessDenied(f"{what} not yours, and you are not authorized to do that")


def details_of(guest: Guest, flags: Flag) -> dict[str, str]:
    """Return details of a request, for polkit's rules and dialog.

    The guest's owner may have chosen any name, so `for_dialog` makes the name harmless.
    """
    name = for_dialog(guest.label.shown_name)
    process = f"process {guest.identity.pid}"
    return {
        "target": f"the QEMU guest {name} ({process})" if name else f"the QEMU {process}",
        "pid": str(guest.identity.pid),
        "guest": name,
        "unit": for_dialog(guest.label.unit_name),
        "uid": str(guest.identity.uid),
        "flags": str(int(flags)),
    }


def details_of_all(flags: Flag) -> dict[str, str]:
    """Return the details of a request to stop the guests of all other users, with the keys of
    `details_of`."""
    target = "all QEMU guests of other users"
    return dict.fromkeys(("pid", "guest", "unit", "uid"), "") | {
        "target": target,
        "flags": str(int(flags)),
    }


def for_dialog(text: str) -> str:
    """Replace characters that a desktop's dialog may interpret as markup, a closing quote or a
    variable of polkit."""
    return "".join(_SAFE_MARK if c in _MARKUP else c for c in printable(text, MAX_DIALOG_TEXT))
