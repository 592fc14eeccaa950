"""The surroundings of a unit, and what follows from them and from the unit's settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import PurePosixPath
from typing import Final

from qkilld.model import timespan
from qkilld.model.constants import INFINITY
from qkilld.model.dataclass import dataclass
from qkilld.model.policy import DEFAULT_EXECUTABLES, JOB_SPANS, Policy, Span, is_qemu
from qkilld.model.unit import Command, UnitFacts
from qkilld.unitcheck.command import (
    HELPER,
    helper_program,
    is_helper,
    programs_of,
)
from qkilld.unitcheck.helper_usage import helper_options, usage_fault
from qkilld.unitcheck.keepers import MANAGERS, GuestKeeper
from qkilld.unitcheck.stop_line import StopLine, read_line
from qkilld.unitcheck.stop_outcome import Helper
from qkilld.unitcheck.storage import Storage

GUESTS_SERVICE: Final = "qkilld-guests.service"
OWN_STARTER: Final = "qemu-guest"
"""The program in ExecStart= of qemu-guest@.service, which executes QEMU."""
_SHELLS: Final = frozenset(
    ["sh", "bash", "dash", "zsh", "ksh", "ash", "busybox", "env", "sudo", "setpriv", "nice"]
)
_CONTAINERS: Final = frozenset(["systemd-nspawn", "lxc-start"])
_QEMU_NAME: Final = re.compile(
    r"\.?(?:qemu-system-[\w.-]+|qemu-kvm|kvm)(?:-wrapped|-real)?|kvm-spice", re.ASCII
)
_QEMU_WORD: Final = re.compile(
    r"(?<![\w.-])(/[\w./@%+-]*/)?(qemu-system-\w+|qemu-kvm|kvm)(?=[\s\"';|&)]|$)"
)
_ELSEWHERE: Final = re.compile(
    r"^ssh\s|\b(?:virsh\b.*\b(?:start|create)|su\s|runuser\s|machinectl\s+shell|podman\s+machine\s+start"
    r"|systemd-run\s|(?:docker|podman|lxc|incus|kubectl)\s+exec"
    r"|(?:multipass|limactl|incus|lxc|qm|minikube|crc)\s+start|(?:docker|podman)\s+(?:run|start))"
)
_MAY_LEAVE: Final = re.compile(
    r"(?<![\w.-])(?:tmux|screen|byobu|sudo|doas|pkexec|run0|machinectl|at|batch|cgexec)\s"
)
"""Programs that may start a command in another unit, such as the unit of a server or a session."""
_NEEDED: Final = ("/proc", "/usr/bin/qkilld-stop", "/usr/lib/qkilld")
"""The paths without which qkilld-stop cannot run, or cannot find its guest."""
_EXECUTED: Final = ("/usr/bin/qkilld-stop", "/usr/bin/python3")
_HIDDEN_BUS: Final = ("/run", "/run/dbus", "/run/systemd", "/run/systemd/notify", "/var/run")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Facts about a unit besides its settings."""

    policy: Policy = field(default_factory=Policy)
    executables: tuple[str, ...] = DEFAULT_EXECUTABLES
    """Executables= of qkilld.conf: globs for the paths of QEMU."""
    helper: str = f"/usr/bin/{HELPER}"
    """The installed path of qkilld-stop."""
    main_executable: str = ""
    """The executable of the running main process; "" if there is none or it is unreadable."""
    main_traps: bool | None = None
    """Whether the shell script in ExecStart= has a `trap`; None if there is no readable script."""
    guests: int = 0
    """The number of QEMU processes in the unit that match Executables=."""
    uncovered: tuple[str, ...] = ()
    """The paths of QEMU processes in the unit that do not match Executables=."""
    missing: tuple[str, ...] = ()
    """The program of each ExecStop= line for qkilld-stop, if that program does not exist or is not
    executable."""
    has_foreign: bool = False
    """Whether a guest in the unit runs as a user other than the unit's User=."""
    is_running: bool = False
    """Whether the unit's processes could be read. If not, `guests` says nothing."""
    are_all_seen: bool = True
    """Whether every process of the unit is visible and has a known executable."""
    other_unit: str = ""
    """The unit in which the guest runs, if this unit only starts the guest."""
    can_ask: bool | None = None
    """Whether the guests can be asked to shut down; None if unknown."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The variables that systemd sets for the unit's commands."""
    stop_texts: tuple[str, ...] = ()
    """Each command of ExecStop= as written in the unit's files, in order; empty if unknown."""
    is_template: bool = False
    """The unit represents a template: its settings are those of one instance, but adopt writes
    lines for all instances."""
    special_instances: tuple[str, ...] = ()
    """For a template: the running instances, if all of them have settings of their own."""
    keepers: tuple[GuestKeeper, ...] = ()
    """The units that shut the guests down at host shutdown, before this unit is stopped."""
    guests_service: bool = False
    """Whether qkilld-guests.service is active, and is stopped before this unit."""
    storage: tuple[Storage, ...] = ()
    unasked: tuple[str, ...] = ()
    """For each guest that cannot be asked to shut down, although it should be: the reason."""
    guard: str = ""
    """For a scope: its guard (qkilld-scope@.service), which stops the guest before systemd stops
    the scope."""
    is_guarded: bool = False
    manager: str = ""
    """For a user's unit: the unit of the user manager; "" for system units."""
    manager_timeout: int = INFINITY
    """The time (µs) that `manager` has to stop all of its units when it exits."""


def runs_qemu(start: Command, globs: Iterable[str]) -> bool:
    """Return whether a command of ExecStart= is QEMU, or qkilld's own launcher, which becomes
    QEMU."""
    return is_qemu(start.path, globs) or PurePosixPath(start.path).name == OWN_STARTER


def main_is_qemu(facts: UnitFacts, around: Surroundings) -> bool:
    """Return whether the main process is known to be QEMU."""
    if around.main_executable:
        return is_qemu(around.main_executable, around.executables)
    if around.is_running and facts.type == "forking" and not facts.main_pid:
        return False
    starts = facts.exec_start
    return len(starts) == 1 and runs_qemu(starts[0], around.executables)


def is_wrapper(facts: UnitFacts, around: Surroundings) -> bool:
    """Return whether at most one guest runs in the unit, and the main process is a shell or a
    program such as sudo."""
    if around.main_executable:
        shell = PurePosixPath(around.main_executable).name in _SHELLS
    else:
        shell = any(PurePosixPath(start.path).name in _SHELLS for start in facts.exec_start)
    return shell and around.guests <= 1


def may_trap(facts: UnitFacts, around: Surroundings) -> bool:
    """Return whether the main process may handle SIGTERM in its own way."""
    if main_is_qemu(facts, around) or facts.is_scope:
        return False
    if around.main_traps is not None:
        return around.main_traps
    texts = [" ".join(start.arguments) for start in facts.exec_start if _is_shell_text(start)]
    return len(texts) < len(facts.exec_start) or any("trap" in text for text in texts)


def traps(facts: UnitFacts, around: Surroundings) -> bool:
    """Return whether the main process is known to handle SIGTERM in its own way."""
    if not may_trap(facts, around):
        return False
    texts = [" ".join(start.arguments) for start in facts.exec_start if _is_shell_text(start)]
    return bool(around.main_traps) or any("trap" in text for text in texts)


def _is_shell_text(start: Command) -> bool:
    return PurePosixPath(start.path).name in _SHELLS and "-c" in start.arguments


def is_manager(facts: UnitFacts, around: Surroundings) -> bool:
    """Return whether the unit runs one of MANAGERS or `podman service`, whatever its name."""
    if facts.is_scope or main_is_qemu(facts, around):
        return False
    running = PurePosixPath(around.main_executable.removesuffix(" (deleted)")).name
    return running in MANAGERS or any(
        name in MANAGERS or (name == "podman" and "service" in start.arguments)
        for start in facts.exec_start
        for name in programs_of(start)
    )


def runs_container(facts: UnitFacts, around: Surroundings) -> bool:
    """Return whether the main process runs a container, and shuts down the container together with
    its guests."""
    running = PurePosixPath(around.main_executable.removesuffix(" (deleted)")).name
    return not facts.is_scope and not _CONTAINERS.isdisjoint(
        (running, *(name for start in facts.exec_start for name in programs_of(start)))
    )


def outlives(facts: UnitFacts, around: Surroundings) -> bool:
    """Return whether the guests are meant to keep running when the unit is stopped. For example,
    upgrading a manager of guests stops the manager, but must not stop its guests."""
    if facts.is_scope or facts.kill_mode not in ("process", "none"):
        return False
    if is_manager(facts, around):
        return True
    if around.guests <= 1 and main_is_qemu(facts, around):
        return False
    if facts.type == "forking" and around.guests == 1:
        return False
    return not is_wrapper(facts, around)


def stop_lines(facts: UnitFacts, around: Surroundings) -> tuple[StopLine, ...]:
    return tuple(read_line(command, around.environment) for command in facts.exec_stop)


def looks_like_qemu(executable: str) -> bool:
    """Judge by the path alone. A file in init.d is taken for a script."""
    path = PurePosixPath(executable.removesuffix(" (deleted)"))
    name = "" if path.parent.name == "init.d" else path.name
    return _QEMU_NAME.fullmatch(name) is not None


def started_qemus(facts: UnitFacts) -> list[str]:
    """Return the paths of QEMU in ExecStart=. A name without a directory is assumed to be in
    /usr/bin."""
    return [path for start in facts.exec_start for path in _qemus_of(start)]


def _qemus_of(start: Command) -> list[str]:
    if looks_like_qemu(start.path):
        return [start.path]
    if PurePosixPath(start.path).name == OWN_STARTER:
        return ["/usr/bin/qemu-system-*"]
    return [
        f"{directory or '/usr/bin/'}{name}"
        for directory, name in _QEMU_WORD.findall(" ".join(start.arguments))
        if looks_like_qemu(f"{directory}{name}")
    ]


def starts_elsewhere(facts: UnitFacts) -> bool:
    """Return whether ExecStart= has a command that starts guests in another unit: `virsh start`."""
    return any(
        _ELSEWHERE.search(" ".join((PurePosixPath(start.path).name, *start.arguments[1:])))
        for start in facts.exec_start
    )


def _starts_inside(start: Command) -> bool:
    """Return whether the command is known to start no QEMU in another unit."""
    name = PurePosixPath(start.path).name
    text = " ".join((name, *start.arguments[1:]))
    return (
        looks_like_qemu(start.path)
        or name == OWN_STARTER
        or (name in _SHELLS and not _ELSEWHERE.search(text) and not _MAY_LEAVE.search(text))
    )


def is_guest_of(facts: UnitFacts, name: str, words: Sequence[str]) -> bool:
    """Return whether a guest in another unit is the guest of this unit: ExecStart= contains the
    guest's name or whole command line. If ExecStart= starts QEMU in this unit only, a guest in
    another unit is not its guest, even if the words are the same."""
    if started_qemus(facts) and all(map(_starts_inside, facts.exec_start)):
        return False
    text = " ".join(word for start in facts.exec_start for word in start.arguments)
    named = bool(name) and name in re.findall(r"[\w.:-]+", text)
    command = re.escape(" ".join((PurePosixPath(words[0]).name, *words[1:])) if words else "")
    same = re.search(rf"(?<![\w.-]){command} *(?:[;&|)\n]|$)", re.sub("[\"']", "", text))
    return named or (len(words) > 1 and same is not None)


def helper_reach(facts: UnitFacts) -> Helper:
    """Return how well qkilld-stop works in the unit's sandbox if its line has no prefix `+`."""
    if hides_helper(facts):
        return Helper.INEFFECTIVE
    if hides_bus(facts):
        return Helper.TIMED
    return Helper.EXTENDS


def hides_helper(facts: UnitFacts) -> str:
    """Return the setting that prevents qkilld-stop from starting or from seeing guests; "" for
    none."""
    if facts.root:
        return "RootDirectory= or RootImage="
    if facts.private_pids:
        return "PrivatePIDs="
    if facts.private_users:
        return "PrivateUsers="
    if facts.denied_calls:
        return "SystemCallFilter="
    if any(_covers(path, place) for path in facts.hidden_paths for place in _NEEDED):
        return "InaccessiblePaths= or TemporaryFileSystem="
    if any(not _may_run(facts, place) for place in _EXECUTED):
        return "NoExecPaths="
    return ""


def _may_run(facts: UnitFacts, place: str) -> bool:
    """Return whether programs at this place can be executed. Of the paths that cover the place, the
    longest decides."""
    denied = max((len(path) for path in facts.noexec_paths if _covers(path, place)), default=-1)
    allowed = max((len(path) for path in facts.exec_paths if _covers(path, place)), default=-1)
    return allowed >= denied


def helper_fault(facts: UnitFacts, around: Surroundings, command: Command) -> str:
    """Return why this line of qkilld-stop might fail to stop the unit's guest; "" if it certainly
    stops the guest. The reason is a clause without a subject."""
    options, program = helper_options(command), helper_program(command)
    if program in around.missing:
        return f"is {program}, which does not exist or is not executable"
    starts = [each for each in facts.exec_start if _qemus_of(each)] or facts.exec_start
    started_by_root = any(_is_root(facts, start) for start in starts)
    is_foreign = around.has_foreign or (
        not around.guests and started_by_root and not around.manager
    )
    if is_foreign and (around.manager or not _is_root(facts, command)):
        return "runs as another user than the guest, and so may be unable to stop it"
    if fault := usage_fault(command):
        return fault
    if "--dry-run" in options:
        return "stops nothing, because of --dry-run"
    if "--all" in options:
        return "stops the guests of the whole host, because of --all"
    if options.get("--pid", "$MAINPID") not in ("", "$MAINPID", "${MAINPID}"):
        return f"stops process {options['--pid']}, whatever that is"
    if unit := options.get("--unit"):
        names = {*facts.names, facts.id}
        if not names & {unit, f"{unit}.service"}:
            return f"stops the guests of {unit}, another unit"
    path = options.get("--pidfile", "")
    commands = (
        *facts.exec_start,
        *(command for name, command in facts.other_commands if name != "ExecStopPost="),
    )
    text = " ".join(
        word
        for command in commands
        if PurePosixPath(command.path).name != "rm"
        for word in command.arguments
    )
    if path and path != facts.pid_file and path not in text and started_qemus(facts):
        return f"reads {path}, which no QEMU of the unit writes"
    return ""


def _is_root(facts: UnitFacts, command: Command) -> bool:
    """Return whether a command of a system unit runs as root."""
    is_root = facts.user in ("", "root", "0")
    return is_root or not {"privileged", "no-setuid"}.isdisjoint(command.flags)


def helper_limit(command: Command, policy: Policy) -> str:
    """Return the option, such as `--max 3s`, with which this line of qkilld-stop may end a guest
    earlier than the configuration alone would; "" for none."""
    spans = (span for span in JOB_SPANS if span.field != "powerdown")
    return next((text for span in spans if (text := _shorter(command, span, policy))), "")


def helper_hurry(command: Command, policy: Policy) -> str:
    """Return the option that keeps this line of qkilld-stop from asking the guest to shut down, or
    that gives the guest less time than the configuration does; "" for none."""
    if "--no-powerdown" in helper_options(command):
        return "--no-powerdown"
    spans = (span for span in JOB_SPANS if span.field == "powerdown")
    return next((text for span in spans if (text := _shorter(command, span, policy))), "")


def _shorter(command: Command, span: Span, policy: Policy) -> str:
    value = helper_options(command).get(span.argument)
    if value is None:
        return ""
    try:
        is_shorter = timespan.parse(value) < getattr(policy, span.field)
    except ValueError:
        is_shorter = True  # The value may be a variable.
    return f"{span.argument} {value}" if is_shorter else ""


def forces(command: Command) -> bool:
    """Return whether this line of qkilld-stop may send SIGKILL whatever the unit's settings are."""
    return "--force" in helper_options(command)


def can_ask(facts: UnitFacts, around: Surroundings) -> bool | None:
    """Return whether qkilld-stop would ask all guests of the unit to shut down; None if unknown."""
    own = [command for command in facts.exec_stop if is_helper(command)]
    if any("--no-powerdown" in helper_options(command) for command in own):
        return False
    return around.can_ask


def hides_bus(facts: UnitFacts) -> str:
    """Return the setting that hides the bus and systemd's notify socket from the unit; "" for
    none."""
    if facts.address_families is not None and "AF_UNIX" not in facts.address_families:
        return "RestrictAddressFamilies="
    if any(_covers(path, place) for path in facts.hidden_paths for place in _HIDDEN_BUS):
        return "InaccessiblePaths= or TemporaryFileSystem="
    return ""


def helper_in_unit(facts: UnitFacts, around: Surroundings) -> Helper:
    """Return how well the unit's own qkilld-stop works."""
    own = [command for command in facts.exec_stop if is_helper(command)]
    if own and all(helper_fault(facts, around, command) for command in own):
        return Helper.INEFFECTIVE
    reach = helper_reach(facts)
    if any("privileged" in command.flags for command in own):
        reach = Helper.EXTENDS
    limited = [command for command in own if helper_limit(command, around.policy)]
    if any(map(forces, limited)):
        return Helper.KILLS
    if reach is Helper.EXTENDS and limited:
        return Helper.TIMED
    if reach is Helper.EXTENDS and facts.notify_access not in ("exec", "all"):
        return Helper.TIMED
    return reach


def _covers(path: str, place: str) -> bool:
    return PurePosixPath(place).is_relative_to(path)
