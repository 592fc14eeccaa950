"""What systemd says of a unit, as far as it matters for stopping a guest in it."""

from __future__ import annotations

from dataclasses import dataclass

from qkilld.model.words import INFINITY


@dataclass(frozen=True, slots=True)
class Command:
    """One line of ExecStart=, ExecStop=, …"""

    path: str
    arguments: tuple[str, ...]
    """With argv[0] first."""
    ignores_failure: bool = False
    """The line begins with `-`."""
    flags: tuple[str, ...] = ()
    """Of the other prefixes, as systemd names them: privileged (`+`), no-setuid (`!`), ambient
    (`!!`), no-env-expand (`:`)."""


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """Properties of a loaded .service or .scope: org.freedesktop.systemd1(5).

    What a scope does not have (everything about commands and processes) has its default here.
    """

    id: str
    """The primary name, with its suffix."""
    names: tuple[str, ...] = ()
    """All its names, aliases among them."""
    load_state: str = "loaded"
    """loaded, not-found, bad-setting, error, masked, …"""
    active_state: str = "inactive"
    """active, inactive, activating, deactivating, failed, …"""
    sub_state: str = ""
    job: int = 0
    """The id of systemd's own job for it, 0 for none."""
    fragment: str = ""
    """FragmentPath: the file that it is defined in, "" where there is none."""
    drop_ins: tuple[str, ...] = ()
    transient: bool = False
    after: tuple[str, ...] = ()
    """Names of the units that this one is ordered after, so that it is stopped before them."""
    default_dependencies: bool = True
    """DefaultDependencies=."""
    job_timeout: int = INFINITY
    """The shorter of JobTimeoutSec= and JobRunningTimeoutSec=, µs."""
    control_group: str = ""
    """Below the cgroup root; "" while it runs nothing."""
    kill_mode: str = "control-group"
    kill_signal: int = 15
    sends_sigkill: bool = True
    """SendSIGKILL=."""
    final_kill_signal: int = 9
    """What is sent in place of SIGKILL."""
    timeout_stop: int = INFINITY
    """TimeoutStopUSec, µs; INFINITY for never."""
    type: str = ""
    """Type= of a service: simple, exec, forking, oneshot, notify, …; "" of a scope."""
    timeout_failure_mode: str = "terminate"
    """TimeoutStopFailureMode=: terminate, abort or kill."""
    restart: str = "no"
    remain_after_exit: bool = False
    pid_file: str = ""
    """PIDFile=, "" for none."""
    root: str = ""
    """RootDirectory= or RootImage=, "" for the system's own."""
    main_pid: int = 0
    """0 for none."""
    control_pid: int = 0
    """Of the ExecStop= (or other control) process that runs just now, 0 for none."""
    notify_access: str = "none"
    """none, main, exec or all."""
    user: str = ""
    """User=, "" for the manager's own."""
    environment_files: tuple[str, ...] = ()
    """EnvironmentFile=: each a file with variables for every command of the unit."""
    exec_start: tuple[Command, ...] = ()
    exec_stop: tuple[Command, ...] = ()
    runtime_max: int = INFINITY
    """RuntimeMaxUSec, µs: systemd stops it after so long."""

    @property
    def exists(self) -> bool:
        return self.load_state == "loaded"

    @property
    def cares_for_guests(self) -> bool:
        """It has an ExecStop= of its own, which systemd waits for before it signals what is in the
        unit. The manager of a user takes care of its units and not of what is in them."""
        return bool(self.exec_stop) and not is_user_manager(self.id)

    @property
    def is_scope(self) -> bool:
        return self.id.endswith(".scope")


def is_user_manager(name: str) -> bool:
    """Whether this is the name of a unit with a systemd in it that has units of its own."""
    return name.startswith("user@") and name.endswith(".service")


@dataclass(frozen=True, slots=True)
class UnitProcess:
    """One process in the control group of a unit."""

    pid: int
    control_group: str
    command: str
    """Its command line as systemd shows it; any text."""
