"""The identity of a process, and of the guest that it runs."""

from __future__ import annotations

from qkilld.model.constants import AgentKind, MonitorKind
from qkilld.model.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a process, as read from the kernel."""

    pid: int
    start_time: int
    """Clock ticks since boot (field 22 of /proc/PID/stat, proc(5))."""
    uid: int
    """The real uid."""
    command: str
    """The kernel's name of the process (comm), at most 15 bytes, printable."""
    state: str
    """One letter (proc(5)): R, S, D, T, t, Z, …"""
    executable: str
    """The target of /proc/PID/exe, without " (deleted)"; "" if there is none."""
    executable_deleted: bool
    """The file no longer exists at its path: an upgrade replaced it."""
    exiting: bool = False
    """All threads of the process are exiting, so it has no executable any more."""

    @classmethod
    def unread(cls, pid: int) -> Identity:
        """Return the identity of a process of which only the pid is known. It does not count as
        QEMU, and belongs to no user."""
        return cls(pid, -1, -1, "", "", "", executable_deleted=False)

    @property
    def key(self) -> tuple[int, int]:
        """The pid and the start time. Since the boot, no other process has had both."""
        return (self.pid, self.start_time)


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A process of root that runs a guest, such as the supervisor of the guest's container."""

    program: str
    """The file name of the executable."""
    words: tuple[str, ...]
    """Its command line."""
    service: str
    """The system service in which the process runs; "" for none."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The systemd unit in which a process runs; Unit() if it runs in no unit. An unknown unit is
    None."""

    system: str = ""
    user: str = ""
    """The process's unit in the user manager, if `system` is user@UID.service."""

    @property
    def name(self) -> str:
        """`user` if the process runs in a unit of a user manager; otherwise `system`."""
        return self.user or self.system


@dataclass(frozen=True, slots=True)
class Unidentified:
    """A process whose executable the kernel does not show at the moment. It may be a guest."""

    pid: int
    uid: int
    """-1 if unknown."""
    unit: Unit | None


@dataclass(frozen=True, slots=True)
class Label:
    """The names of a guest. All except the unit come from its command line, which may lie."""

    name: str | None = None
    """The printable argument of -name; "" if there is none, None if unknown."""
    uuid: str = ""
    """The argument of -uuid in its canonical form."""
    unit: Unit | None = None
    """None if unknown."""
    qmp: bool = False
    """Whether the command line has a QMP monitor that does not belong to libvirt. False if the
    command line was not read in time."""
    remote: bool = False
    """Whether the command line names storage on a network. True if the command line was not read in
    time."""

    @property
    def shown_name(self) -> str:
        """The name for display; "" if there is none or it is unknown."""
        return self.name or ""

    @property
    def unit_name(self) -> str:
        """The unit for display; "" if there is none or it is unknown."""
        return self.unit.name if self.unit is not None else ""


@dataclass(frozen=True, slots=True)
class Guest:
    """A QEMU process. Until engine.checks has confirmed this, it may be any process."""

    identity: Identity
    label: Label

    @property
    def title(self) -> str:
        """A title for messages: `guest "web" (process 4711)`."""
        process = f"process {self.identity.pid}"
        return f'guest "{self.label.name}" ({process})' if self.label.name else f"QEMU {process}"


@dataclass(frozen=True, slots=True)
class AskingWays:
    """How a guest can be asked to shut down."""

    texts: tuple[str, ...] = ()
    """Descriptions of the ways to ask the guest, and of the obstacles to other ways."""
    may_work: bool = True
    """False only if it is certain that the guest cannot be asked."""


@dataclass(frozen=True, slots=True)
class GuestChannels:
    """The channels to a guest, according to its sockets and its command line."""

    monitor: MonitorKind = MonitorKind.UNKNOWN
    agent: AgentKind = AgentKind.UNKNOWN
