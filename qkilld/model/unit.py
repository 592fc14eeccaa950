"""The properties of a systemd unit that matter when a guest in it is stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Final

from qkilld.model.constants import INFINITY
from qkilld.model.dataclass import dataclass

HELPER_CALLS: Final = ("pidfd_open", "pidfd_send_signal")
"""System calls that qkilld-stop needs, but other programs of a unit usually do not."""


@dataclass(frozen=True, slots=True)
class Command:
    """One line of ExecStart=, ExecStop=, …"""

    path: str
    arguments: tuple[str, ...]
    """The words of the command, including argv[0]."""
    ignores_failure: bool = False
    """The line begins with `-`."""
    flags: tuple[str, ...] = ()
    """The other prefixes, by systemd's names: privileged (`+`), no-setuid (`!`), ambient (`!!`),
    no-env-expand (`:`)."""
    pid: int = field(default=0, compare=False)
    """The process of the last run; 0 if the command has not run since systemd was last reloaded."""


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """Properties of a loaded .service or .scope: org.freedesktop.systemd1(5).

    Properties that a scope lacks, such as commands and processes, have their defaults.
    """

    id: str
    """The primary name, with its suffix."""
    names: tuple[str, ...] = ()
    """All its names, including aliases."""
    load_state: str = "loaded"
    """loaded, not-found, bad-setting, error, masked, …"""
    active_state: str = "inactive"
    """active, inactive, activating, deactivating, failed, …"""
    job: int = 0
    """The id of systemd's job for the unit, 0 for none."""
    fragment: str = ""
    """FragmentPath: the file that defines the unit, "" for none."""
    drop_ins: tuple[str, ...] = ()
    transient: bool = False
    after: tuple[str, ...] = ()
    """The units that are started before this unit, and stopped after it."""
    before: tuple[str, ...] = ()
    """The units that are started after this unit, and stopped before it."""
    default_dependencies: bool = True
    job_timeout: int = INFINITY
    """The shorter of JobTimeoutSec= and JobRunningTimeoutSec=, µs."""
    control_group: str = ""
    """The path below the cgroup root; "" if the unit has no control group."""
    kill_mode: str = "control-group"
    kill_signal: int = 15
    restart_kill_signal: int = 0
    """RestartKillSignal=, which replaces KillSignal= at a restart; 0 if both are equal."""
    sends_sigkill: bool = True
    final_kill_signal: int = 9
    """FinalKillSignal=, which systemd sends last, normally SIGKILL."""
    timeout_stop: int = INFINITY
    """TimeoutStopUSec, µs; INFINITY for no limit."""
    type: str = ""
    """Type= of a service: simple, exec, forking, oneshot, notify, …; "" for a scope."""
    timeout_failure_mode: str = "terminate"
    """TimeoutStopFailureMode=: terminate, abort or kill."""
    restart: str = "no"
    remain_after_exit: bool = False
    pid_file: str = ""
    """PIDFile=, "" for none."""
    root: str = ""
    """RootDirectory= or RootImage=; "" for the root directory of the system."""
    main_pid: int = 0
    """The main process; 0 for none."""
    control_pid: int = 0
    """The running ExecStop= process or other control process; 0 for none."""
    notify_access: str = "none"
    """NotifyAccess=: none, main, exec or all."""
    user: str = ""
    """User=; "" for the user of the manager."""
    environment_files: tuple[str, ...] = ()
    """EnvironmentFile=: files with variables for every command of the unit."""
    environment: tuple[str, ...] = ()
    """Environment=: NAME=VALUE assignments."""
    address_families: tuple[str, ...] | None = None
    """The families that RestrictAddressFamilies= allows; None for all. If the setting
    lists denied families, this value is correct only for AF_UNIX."""
    hidden_paths: tuple[str, ...] = ()
    """Paths that InaccessiblePaths= and TemporaryFileSystem= hide from the unit's processes."""
    noexec_paths: tuple[str, ...] = ()
    """NoExecPaths=: files below these paths cannot be executed, except those below `exec_paths`."""
    exec_paths: tuple[str, ...] = ()
    private_pids: bool = False
    """PrivatePIDs=: each command runs in a PID namespace of its own (systemd 257)."""
    private_users: bool = False
    """PrivateUsers=: each command runs in a user namespace of its own."""
    denied_calls: tuple[str, ...] = ()
    """The calls of HELPER_CALLS that SystemCallFilter= denies."""
    exec_start: tuple[Command, ...] = ()
    exec_stop: tuple[Command, ...] = ()
    other_commands: tuple[tuple[str, Command], ...] = ()
    """The lines of ExecStartPre=, ExecStartPost= and ExecStopPost=, each with the name of its
    setting."""
    runtime_max: int = INFINITY
    """RuntimeMaxUSec: systemd stops the unit after this time (µs)."""

    @property
    def exists(self) -> bool:
        return self.load_state == "loaded"

    @property
    def cares_for_guests(self) -> bool:
        """Whether the unit has an ExecStop=, which systemd runs before it sends signals to the
        unit's processes. The ExecStop= of a user manager does not count, because it stops units,
        not guests."""
        return bool(self.exec_stop) and not is_user_manager(self.id)

    @property
    def is_scope(self) -> bool:
        return self.id.endswith(".scope")


SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        ("id", "names", "load_state", "active_state", "job", "fragment", "drop_ins", "transient"),
        (),
    ),
    **dict.fromkeys(("control_group", "main_pid", "control_pid"), ()),
    "after": (
        *("After", "RequiresMountsFor", "WantsMountsFor", "WorkingDirectory", "StateDirectory"),
        *("CacheDirectory", "LogsDirectory", "RuntimeDirectory", "ConfigurationDirectory"),
        *("BindPaths", "BindReadOnlyPaths", "PrivateTmp", "Sockets"),
    ),
    "before": ("Before",),
    "default_dependencies": ("DefaultDependencies",),
    "job_timeout": ("JobTimeoutSec", "JobRunningTimeoutSec"),
    "kill_mode": ("KillMode",),
    "kill_signal": ("KillSignal",),
    "restart_kill_signal": ("RestartKillSignal",),
    "sends_sigkill": ("SendSIGKILL",),
    "final_kill_signal": ("FinalKillSignal",),
    "timeout_stop": ("TimeoutStopSec", "TimeoutSec"),
    "type": ("Type", "BusName"),
    "timeout_failure_mode": ("TimeoutStopFailureMode",),
    "restart": ("Restart",),
    "remain_after_exit": ("RemainAfterExit",),
    "pid_file": ("PIDFile",),
    "root": ("RootDirectory", "RootImage", "RootMStack", "RootDirectoryStartOnly"),
    "notify_access": ("NotifyAccess", "WatchdogSec"),
    "user": ("User", "DynamicUser", "PermissionsStartOnly"),
    "environment_files": ("EnvironmentFile",),
    "environment": ("Environment", "PassEnvironment", "UnsetEnvironment"),
    "address_families": ("RestrictAddressFamilies",),
    "hidden_paths": ("InaccessiblePaths", "InaccessibleDirectories", "TemporaryFileSystem"),
    "noexec_paths": ("NoExecPaths",),
    "exec_paths": ("ExecPaths",),
    "private_pids": ("PrivatePIDs",),
    "private_users": ("PrivateUsers",),
    "denied_calls": ("SystemCallFilter",),
    "exec_start": ("ExecStart", "ExecSearchPath"),
    "exec_stop": ("ExecStop", "ExecSearchPath"),
    "other_commands": ("ExecStartPre", "ExecStartPost", "ExecStopPost", "ExecSearchPath"),
    "runtime_max": ("RuntimeMaxSec",),
}
"""For each field of UnitFacts, the settings in unit files on which it depends (systemd.unit(5)).
A unit's names, files and state depend on no setting."""


def is_user_manager(name: str) -> bool:
    """Return whether a unit of this name runs a systemd manager that has units of its own."""
    return name.startswith("user@") and name.endswith(".service")
