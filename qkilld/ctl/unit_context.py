"""Gather the facts for judging a unit: the daemon's policy, the unit's processes, and the disks of
its guests.

Unreadable facts are left out: only root can read the processes of other users.
"""

from __future__ import annotations

import glob
import os
import pwd
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final

from qkilld.adapters import config as files
from qkilld.adapters import procfs
from qkilld.adapters.ancestors import ancestors, services_that_run
from qkilld.adapters.qemu_args import QemuOption
from qkilld.bus.systemd import Systemd
from qkilld.ctl.guest_storage import for_all_instances, planned_options, read_storage
from qkilld.ctl.process_stats import command_line, executable
from qkilld.ctl.session import Session, open_connection
from qkilld.ctl.unit_processes import others_are_hidden, processes_of
from qkilld.debug_log import ignore, note
from qkilld.model.bus_address import SYSTEM_BUS
from qkilld.model.constants import BUS_NAME, INFINITY
from qkilld.model.errors import ConfigError, NoSuchUnit, QkilldError
from qkilld.model.policy import SPANS, Config, Policy, is_qemu
from qkilld.model.unit import UnitFacts
from qkilld.monitor.endpoints import NO_MONITOR, UnixListener, find_endpoints
from qkilld.monitor.reach import read_listeners, read_options
from qkilld.unitcheck.command import HELPER, helper_program, is_helper
from qkilld.unitcheck.command_text import matching_texts
from qkilld.unitcheck.context import (
    GUESTS_SERVICE,
    Surroundings,
    is_guest_of,
    looks_like_qemu,
    starts_elsewhere,
)
from qkilld.unitcheck.dropin import (
    FILE_NAME,
    Change,
    Override,
    overridden_by_template,
    override,
    own_files,
    read_later,
    sets_facts,
)
from qkilld.unitcheck.keepers import (
    GuestKeeper,
    KeeperCandidates,
    keeper_names,
    keeper_targets,
    runtime_keepers,
)
from qkilld.unitcheck.storage import Storage
from qkilld.unitcheck.unit_text import merged, parse_environment

MAX_DROP_IN: Final = 1 << 20
MAX_BEFORE: Final = 256
"""The maximum number of units in Before= that are queried."""
_USUAL_HELPER: Final = Path("/usr/bin") / HELPER


async def config_of(session: Session) -> Config:
    """Read the configuration files; if they are invalid, say so and use the defaults. A running
    daemon's policy takes precedence, because that daemon may have read other files. This function
    does not start the daemon."""
    try:
        config = files.load()
    except ConfigError as error:
        session.output.error(f"the configuration is wrong, so this is for the defaults: {error}")
        config = Config()
    with ignore("asking qkilld for its policy", QkilldError):
        (running,) = await session.connection.request_bus("NameHasOwner", "s", BUS_NAME)
        if running:
            properties = await session.manager.properties()
            spans = {span.field: properties[span.bus_property] for span in SPANS}
            return replace(config, policy=Policy(**spans))
    return config


async def gather(
    systemd: Systemd, facts: UnitFacts, config: Config, *, user: bool, is_template: bool = False
) -> Surroundings:
    """`user`: the unit belongs to a user manager. `is_template`: the unit represents all
    instances."""
    pids = processes_of(facts.id, user=user) if facts.control_group else []
    executables = {pid: executable(pid) for pid in pids}
    guests = [pid for pid, path in executables.items() if is_qemu(path, config.executables)]
    uncovered = [
        path for pid, path in executables.items() if pid not in guests and looks_like_qemu(path)
    ]
    # A guard (qkilld-scope@SCOPE.service) is a system unit, so a scope of a user manager has none.
    guard = guard_of(facts.id) if facts.is_scope and not user else ""
    manager = f"user@{os.getuid()}.service" if user else ""
    places = [] if user else read_storage(facts, guests)
    storage = [await with_target(systemd, place) for place in places]
    if is_template:
        instance = facts.id.partition("@")[2].rpartition(".")[0]
        storage = for_all_instances(storage, instance)
    texts = _texts_of(facts)
    return Surroundings(
        policy=config.policy,
        executables=config.executables,
        helper=str(find_helper() or _USUAL_HELPER),
        main_executable=executable(facts.main_pid) if facts.main_pid else "",
        main_traps=_main_traps(facts),
        guests=len(guests),
        uncovered=tuple(dict.fromkeys(uncovered)),
        missing=tuple(_missing_helpers(facts)),
        has_foreign=_has_foreign(facts, guests, user=user),
        is_running=bool(executables),
        are_all_seen="" not in executables.values() and (user or not others_are_hidden()),
        other_unit="" if guests else _other_unit(facts, config),
        can_ask=_can_ask(facts, () if is_template else guests, config, is_template=is_template),
        environment=_environment(facts, texts, is_template=is_template),
        stop_texts=matching_texts(merged(texts, "Service", "ExecStop"), facts.exec_stop),
        is_template=is_template,
        keepers=await find_keepers(systemd, facts, guests),
        guests_service=GUESTS_SERVICE in facts.before and await _is_active(systemd, GUESTS_SERVICE),
        # Empty for units of a user manager. They need no ordering of their own, because
        # user@.service is ordered, and is stopped after them.
        storage=tuple(storage),
        unasked=tuple(_unasked(facts, guests, config)) if config.switches.powerdown else (),
        guard=guard,
        is_guarded=bool(guard) and await _is_active(systemd, guard),
        manager=manager,
        manager_timeout=await _manager_timeout(manager) if user else INFINITY,
    )


def _missing_helpers(facts: UnitFacts) -> Iterator[str]:
    """Yield the programs in Surroundings.missing; none for a unit with its own root directory."""
    for command in () if facts.root else filter(is_helper, facts.exec_stop):
        program = helper_program(command)
        with ignore(f"looking for {program}", OSError):
            if not _is_executable(shutil.which(program) or program):
                yield program


def _is_executable(path: str) -> bool:
    """Return whether a file exists and somebody may execute it. Raises OSError if unknown."""
    try:
        return bool(os.stat(path).st_mode & 0o111)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return False


def _has_foreign(facts: UnitFacts, guests: Iterable[int], *, user: bool) -> bool:
    """Return Surroundings.has_foreign; False if it is unknown."""
    with ignore(f"reading the users of {facts.id} and its guests", OSError, KeyError):
        if user:
            own = os.getuid()
        elif facts.user.isdecimal():
            own = int(facts.user)
        else:
            own = pwd.getpwnam(facts.user or "root").pw_uid
        return own != 0 and any(procfs.read_uid(pid) != own for pid in guests)
    return False


async def with_target(systemd: Systemd, place: Storage) -> Storage:
    """Set Storage.outside_target. Assume True if systemd does not answer."""
    if not place.unit:
        return place
    is_before: bool | None = False
    with ignore(f"asking systemd for {place.unit}", QkilldError):
        is_before = await systemd.is_before(place.unit, "remote-fs.target")
    return replace(place, outside_target=is_before is False)


async def find_keepers(
    systemd: Systemd, facts: UnitFacts | None, guests: Iterable[int]
) -> tuple[GuestKeeper, ...]:
    """Find the active or stopping units that shut down these guests. `facts` describes the unit in
    which the guests run; None if they run in no unit."""
    runtime: dict[str, str] = {}
    for pid in guests:
        runtime |= runtime_keepers(ancestors(pid), services_that_run)
    candidates = KeeperCandidates(runtime=runtime)
    if facts is not None:
        behind: list[str] = []
        for target in keeper_targets(facts)[:MAX_BEFORE]:
            behind += await systemd.units_after(target)
        candidates = KeeperCandidates(tuple(keeper_names(facts)), tuple(behind), runtime)
    active = []
    for name in candidates.names[:MAX_BEFORE]:
        with ignore(f"asking systemd for {name}", QkilldError):
            other = await systemd.unit(name)
            if other.active_state in ("active", "deactivating"):
                active.append(other)
    return candidates.keepers(active)


def _environment(facts: UnitFacts, texts: Sequence[str], *, is_template: bool) -> dict[str, str]:
    """Return the known environment of the unit's commands. Files with a `%` or a glob in the name
    are left out. For a template, the environment is not known if it may differ between
    instances."""
    lines = [
        line for key in ("Environment", "EnvironmentFile") for line in merged(texts, "Service", key)
    ]
    if is_template and any("%" in line.replace("%%", "") for line in lines):
        return {}
    variables = dict(pair.partition("=")[::2] for pair in facts.environment)
    for path in facts.environment_files:
        with ignore(f"reading {path}", OSError), Path(path).open("rb") as file:
            variables.update(parse_environment(file.read(MAX_DROP_IN).decode(errors="replace")))
    return variables


def _texts_of(facts: UnitFacts) -> list[str]:
    """Return the texts of the unit's files, except those that cannot be read."""
    texts = []
    for path in (facts.fragment, *facts.drop_ins):
        with ignore(f"reading {path}", OSError), Path(path).open("rb") as file:
            texts.append(file.read(MAX_DROP_IN).decode(errors="surrogateescape"))
    return texts


def _main_traps(facts: UnitFacts) -> bool | None:
    """Return Surroundings.main_traps."""
    for start in facts.exec_start:
        for word in (start.path, *start.arguments[1:]):
            if not word.startswith("/") or not Path(word).is_file():
                continue
            with ignore(f"reading {word}", OSError), Path(word).open("rb") as file:
                text = file.read(MAX_DROP_IN)
                shell = PurePosixPath(start.path).name in ("sh", "bash", "dash")
                if text.startswith(b"#!") or (word != start.path and shell and b"\0" not in text):
                    first = text.partition(b"\n")[0]
                    if shell or re.search(rb"\b(?:sh|bash|dash|ksh)\b", first):
                        return b"trap" in text
    return None


def _can_ask(
    facts: UnitFacts, guests: Sequence[int], config: Config, *, is_template: bool
) -> bool | None:
    """Return whether qkilld-stop can ask every guest of the unit to shut down. None means unknown,
    as for guests of libvirt, and for a template whose instances may have different options."""
    if not config.switches.powerdown:
        return False
    if guests:
        can = [_can_ask_process(pid) for pid in guests]
        return None if None in can else all(can)
    planned = planned_options(facts)
    words = [word for start in facts.exec_start for word in start.arguments]
    if not planned or (is_template and any("$" in w or "-readconfig" in w for w in words)):
        return None
    guest_endpoints = [find_endpoints(options, _would_listen(options)) for options in planned]
    return all(each.endpoints for each in guest_endpoints)


def _can_ask_process(pid: int) -> bool | None:
    try:
        options = read_options(procfs.read_identity(pid))
        guest_endpoints = find_endpoints(options, read_listeners(pid))
    except (OSError, QkilldError) as error:
        note(f"reading what process {pid} listens on", error)
        return None
    return None if guest_endpoints.libvirt else bool(guest_endpoints.endpoints)


def _would_listen(options: Sequence[QemuOption]) -> list[UnixListener]:
    """Return the sockets on which a QEMU with these options would listen."""
    paths = dict.fromkeys(
        path for option in options if (path := option.flat.get("path", "")).startswith("/")
    )
    return [UnixListener(number, (path,)) for number, path in enumerate(paths, 1)]


def _other_unit(facts: UnitFacts, config: Config) -> str:
    """If the guest of this unit runs in another unit, return that unit's name, otherwise ""."""
    if facts.active_state != "active" and not starts_elsewhere(facts):
        return ""
    for pid in procfs.pids():
        with ignore(f"looking at process {pid}", OSError):
            if not is_qemu(procfs.read_executable(pid)[0], config.executables):
                continue
            unit = procfs.read_unit(pid)
            if unit is None or unit.system in (facts.id, ""):
                continue
            if is_guest_of(facts, procfs.read_names(pid)[0] or "", command_line(pid)):
                return unit.system
    return ""


def _unasked(facts: UnitFacts, guests: Sequence[int], config: Config) -> Iterator[str]:
    """Yield the reasons why guests of the unit cannot be asked to shut down. If no guest runs,
    judge by ExecStart=."""
    for pid in guests:
        with ignore(f"reading what process {pid} listens on", OSError, QkilldError):
            options = read_options(procfs.read_identity(pid))
            guest_endpoints = find_endpoints(options, read_listeners(pid))
            if not guest_endpoints.endpoints and not guest_endpoints.libvirt:
                yield "; ".join(guest_endpoints.obstacles)
    if not guests:
        for options in planned_options(facts):
            guest_endpoints = find_endpoints(options, ())
            yield from (text for text in guest_endpoints.obstacles if text.startswith(NO_MONITOR))


def has_own_settings(facts: UnitFacts) -> bool:
    """Return whether an instance has files of its own with settings that matter for the verdict.
    Such an instance cannot represent its template. Return True if such a file cannot be read."""
    for path in own_files(facts):
        try:
            with Path(path).open("rb") as file:
                data = file.read(MAX_DROP_IN + 1)
        except OSError as error:
            note(f"reading {path}", error)
            return True
        if path == facts.fragment or len(data) > MAX_DROP_IN:
            return True
        if sets_facts(data.decode(errors="surrogateescape")):
            return True
    return False


def overrides(facts: UnitFacts, wanted: Sequence[Change]) -> Iterator[Override]:
    """Yield the unit's drop-ins that override settings of our drop-in."""
    for path in read_later(facts.drop_ins):
        if not Path(path).is_file():
            continue
        with ignore(f"reading {path}", OSError), Path(path).open("rb") as file:
            text = file.read(MAX_DROP_IN).decode(errors="surrogateescape")
            if change := override(path, text, wanted):
                yield change


def instances_with_own(
    search_path: Sequence[str], template: str, wanted: Sequence[Change]
) -> Iterator[str]:
    """Yield each instance of a template if its own files have settings that our drop-in for the
    template would override. Leave out instances that have their own drop-in of adopt, because it
    takes precedence."""
    prefix, _, kind = template.partition("@")
    own_files: dict[str, list[Path]] = {}
    for directory in map(Path, search_path):
        for path in directory.glob(f"{glob.escape(prefix)}@?*{kind}"):
            if path.resolve().name != template:
                own_files.setdefault(path.name, []).append(path)
        for path in directory.glob(f"{glob.escape(prefix)}@?*{kind}.d/*.conf"):
            own_files.setdefault(path.parent.name.removesuffix(".d"), []).append(path)
    for instance, paths in sorted(own_files.items()):
        if any(path.name == FILE_NAME for path in paths):
            continue
        for path in paths:
            with ignore(f"reading {path}", OSError), path.open("rb") as file:
                text = file.read(MAX_DROP_IN).decode(errors="surrogateescape")
                if overridden_by_template(str(path), text, wanted):
                    yield instance
                    break


def guard_of(scope: str) -> str:
    """Return the guard of a scope: the unit that stops the guest before systemd stops the scope."""
    # The scope's name is not escaped: in BindsTo=, systemd does not unescape %i.
    return f"qkilld-scope@{scope}.service"


def find_helper() -> Path | None:
    """Find qkilld-stop beside this program or its Python, or else in PATH."""
    places = [Path(sys.argv[0]).resolve().parent, Path(sys.executable).parent]
    helper = next((place / HELPER for place in places if os.access(place / HELPER, os.X_OK)), None)
    if helper is None and (path := shutil.which(HELPER)):
        helper = Path(path).resolve()
    return helper


async def _is_active(systemd: Systemd, unit: str) -> bool:
    try:
        return (await systemd.unit(unit)).active_state == "active"
    except NoSuchUnit:
        return False


async def _manager_timeout(unit: str) -> int:
    """Return TimeoutStopSec= (µs) of user@UID.service, the unit of a user manager; INFINITY if
    unknown."""
    try:
        async with open_connection(SYSTEM_BUS) as connection:
            facts = await Systemd(connection).unit(unit)
    except QkilldError as error:
        note(f"asking the manager of the system for {unit}", error)
        return INFINITY
    return facts.timeout_stop if facts.exists else INFINITY
