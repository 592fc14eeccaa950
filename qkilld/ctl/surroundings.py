"""What is to be known beside a unit to judge it: the daemon's policy, what runs in it, its disks.

What cannot be read is left out: only root sees the processes of others.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from qkilld.adapters import config as files
from qkilld.bus.systemd import Systemd
from qkilld.ctl.session import Bus, Session, open_connection
from qkilld.judgement.adoption import Change, Override, override, read_later
from qkilld.judgement.stopcommand import HELPER
from qkilld.judgement.surroundings import Surroundings
from qkilld.judgement.target import is_qemu
from qkilld.judgement.unitstorage import (
    REMOTE_TYPES,
    Storage,
    image_paths,
    mount_unit,
    servers,
)
from qkilld.model.errors import ConfigError, NoSuchUnit, QkilldError
from qkilld.model.policy import Config, Policy
from qkilld.model.unit import UnitFacts
from qkilld.model.words import BUS_NAME, INFINITY

MAX_COMMAND_LINE: Final = 1 << 20
MAX_DROP_IN: Final = 1 << 20
_USUAL_HELPER: Final = Path("/usr/bin") / HELPER
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


async def config_of(session: Session) -> Config:
    """That of the files; where they are wrong the default one. The policy is that of the daemon
    where it runs, which may have read others: it is not started for this."""
    try:
        found = files.load()
    except ConfigError:
        found = Config()
    with contextlib.suppress(QkilldError):
        (running,) = await session.connection.request_bus("NameHasOwner", "s", BUS_NAME)
        if running:
            said = await session.manager.properties()
            spans = (
                said[f"{key}USec"] for key in ("Grace", "Stall", "StorageStall", "Max", "Reap")
            )
            return replace(found, policy=Policy(*spans))
    return found


async def gather(systemd: Systemd, facts: UnitFacts, config: Config, *, user: bool) -> Surroundings:
    """`user`: it is a unit of a user's own manager."""
    guests: list[int] = []
    if facts.control_group:
        with contextlib.suppress(QkilldError):
            guests = [
                process.pid
                for process in await systemd.processes(facts.id)
                if is_qemu(executable(process.pid), config.executables)
            ]
    # The guard is a unit of the system's: there is none for the scopes of a user's manager.
    guard = guard_of(facts.id) if facts.is_scope and not user else ""
    manager = f"user@{os.getuid()}.service" if user else ""
    return Surroundings(
        policy=config.policy,
        executables=config.executables,
        helper=str(find_helper() or _USUAL_HELPER),
        main_executable=executable(facts.main_pid) if facts.main_pid else "",
        # All of a user's units are stopped before user@.service, which is ordered after these.
        storage=() if user else tuple(_storage(facts, guests)),
        guard=guard,
        is_guarded=bool(guard) and await _is_active(systemd, guard),
        manager=manager,
        manager_timeout=await _manager_timeout(manager) if user else INFINITY,
    )


def overrides(facts: UnitFacts, wanted: Sequence[Change]) -> Iterator[Override]:
    """The drop-ins of the unit that stand over what is to be written into ours."""
    for path in read_later(facts.drop_ins):
        if not Path(path).is_file():
            continue
        with contextlib.suppress(OSError), Path(path).open("rb") as file:
            text = file.read(MAX_DROP_IN).decode(errors="surrogateescape")
            if found := override(path, text, wanted):
                yield found


def guard_of(scope: str) -> str:
    """The unit that stops the guest of a scope before systemd stops the scope."""
    # Not escaped: of its specifiers systemd knows only %i, the name as it is, in BindsTo=.
    return f"qkilld-scope@{scope}.service"


def executable(pid: int) -> str:
    """The path of what a process executes, "" where that cannot be read."""
    try:
        return str(Path(f"/proc/{pid}/exe").readlink()).removesuffix(" (deleted)")
    except OSError:
        return ""


def find_helper() -> Path | None:
    """qkilld-stop, as it was installed with this program; else from PATH."""
    places = [Path(sys.argv[0]).resolve().parent, Path(sys.executable).parent]
    found = next((place / HELPER for place in places if os.access(place / HELPER, os.X_OK)), None)
    if found is None and (path := shutil.which(HELPER)):
        found = Path(path).resolve()
    return found


async def _is_active(systemd: Systemd, unit: str) -> bool:
    try:
        return (await systemd.unit(unit)).active_state == "active"
    except NoSuchUnit:
        return False


async def _manager_timeout(unit: str) -> int:
    """Of the system, which knows; INFINITY where it does not tell."""
    try:
        async with open_connection(Bus()) as connection:
            facts = await Systemd(connection).unit(unit)
    except QkilldError:
        return INFINITY
    return facts.timeout_stop if facts.exists else INFINITY


def _storage(facts: UnitFacts, guests: list[int]) -> Iterator[Storage]:
    words = [word for command in facts.exec_start for word in command.arguments]
    points = {point for point, _ in _mounts("self").values()}
    remote = {point for point, kind in _mounts("self").values() if kind in REMOTE_TYPES}
    used = set()
    for pid in guests:
        words += _command_line(pid)
        mounts = _mounts(str(pid))
        used |= {
            mounts[number][0]
            for number in _open_mounts(pid)
            if number in mounts and mounts[number][1] in REMOTE_TYPES
        }
    for path in image_paths(words):
        parents = [path, *map(str, Path(path).parents)]
        used |= {next((point for point in parents if point in points), "/")} & remote
    for point in sorted(used):
        yield Storage(mount_point=point, unit=mount_unit(point))
    yield from servers(words)


def _mounts(pid: str) -> dict[str, tuple[str, str]]:
    """Number → (mount point, file system): proc(5), mountinfo."""
    found = {}
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
        for line in text.splitlines():
            before, _, after = line.partition(" - ")
            fields = before.split(" ")
            point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
            found[fields[0]] = point, after.split(" ")[0]
    return found


def _open_mounts(pid: int) -> set[str]:
    """The mounts that its open files are on; no file system is asked, as one may hang."""
    found = set()
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
            with contextlib.suppress(OSError):
                if match := re.search(r"^mnt_id:\s*(\d+)$", entry.read_text(), re.MULTILINE):
                    found.add(match[1])
    return found


def _command_line(pid: int) -> list[str]:
    try:
        with Path(f"/proc/{pid}/cmdline").open("rb") as file:
            raw = file.read(MAX_COMMAND_LINE)
    except OSError:
        return []
    return raw.decode(errors="surrogateescape").split("\0")
