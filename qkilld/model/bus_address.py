"""The message bus that a program uses."""

from __future__ import annotations

from typing import Final

from qkilld.model.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class BusAddress:
    """The system bus of this host, unless a field says otherwise."""

    user: bool = False
    address: str = ""
    """A D-Bus address, for example `unix:path=/run/bus`."""
    host: str = ""
    """A host whose system bus is used over ssh: [USER@]HOST[:PORT]."""
    machine: str = ""
    """A container, on this host or on `host`, whose system bus is used: [USER@]CONTAINER."""

    @property
    def is_remote(self) -> bool:
        return bool(self.host or self.machine)

    @property
    def is_system_bus(self) -> bool:
        """Whether this is the system bus of this host."""
        return not self.user and not self.address and not self.is_remote

    @property
    def title(self) -> str:
        if self.address:
            return f"bus at {self.address}"
        title = "session bus" if self.user else "system bus"
        parts = [f"container {self.machine}"] if self.machine else []
        parts += [self.host] if self.host else []
        return f"{title} of {' on '.join(parts)}" if parts else title


POLICY_ADVICE: Final = (
    "Install the policy of the bus, dbus/org.qkilld1.conf of the sources, as "
    "/usr/share/dbus-1/system.d/org.qkilld1.conf (`make install` does), and run "
    "`systemctl reload dbus`"
)
"""Advice if the system bus denies qkilld its name, or denies every call to qkilld."""

SYSTEM_BUS: Final = BusAddress()
SESSION_BUS: Final = BusAddress(user=True)
