"""Who a process is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a process this one and no other, as the kernel tells it."""

    pid: int
    start_time: int
    """Clock ticks since boot: field 22 of /proc/PID/stat, proc(5)."""
    uid: int
    """The real uid."""
    command: str
    """The kernel's name of the process (comm), at most 15 bytes, printable."""
    state: str
    """One letter, proc(5): R, S, D, T, t, Z, …"""
    executable: str
    """What /proc/PID/exe points to, without " (deleted)"; "" where there is none to be seen."""
    executable_deleted: bool
    """The file is gone from its path: an upgrade replaced it."""

    @property
    def key(self) -> tuple[int, int]:
        """(pid, start time): no two processes of one boot share it."""
        return (self.pid, self.start_time)


@dataclass(frozen=True, slots=True)
class Unit:
    """The systemd unit that a process runs in; "" where it runs in none."""

    system: str = ""
    user: str = ""
    """The unit of the user's own manager, where `system` is user@UID.service."""

    @property
    def name(self) -> str:
        """The name people know it by."""
        return self.user or self.system


@dataclass(frozen=True, slots=True)
class Label:
    """What a guest is called. All of it is the process's own word but for the unit."""

    name: str = ""
    """-name, printable."""
    uuid: str = ""
    """-uuid in its canonical form."""
    unit: Unit = Unit()


@dataclass(frozen=True, slots=True)
class Guest:
    """A process that was shown to be a QEMU."""

    identity: Identity
    label: Label

    @property
    def title(self) -> str:
        """For messages: `guest "web" (process 4711)`."""
        process = f"process {self.identity.pid}"
        return f'guest "{self.label.name}" ({process})' if self.label.name else f"QEMU {process}"
