"""Keepers: the units of other projects that shut guests down at host shutdown.

A guest's own unit names its keeper in Before=, as set up by libvirt, Proxmox and pacemaker, so that
systemd stops the keeper first. A keeper is recognised by its name, its programs or an ExecStop=.
Sources: the unit files and scope properties of each project.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from qkilld.model.constants import INFINITY
from qkilld.model.dataclass import dataclass
from qkilld.model.unit import UnitFacts
from qkilld.unitcheck.command import programs_of

KEEPERS: Final = {
    "libvirt-guests.service": "libvirt",
    "pve-guests.service": "Proxmox VE",
    "pve-ha-lrm.service": "Proxmox VE",
    "qemu-server.service": "Proxmox VE",
    "pacemaker.service": "pacemaker",
    "pacemaker_remote.service": "pacemaker",
    "resource-agents-deps.target": "pacemaker",
    "incus.service": "Incus",
    "incus-startup.service": "Incus",
    "lxd.service": "LXD",
    "lxd-containers.service": "LXD",
    "snap.lxd.daemon.service": "LXD",
    "docker.service": "docker",
    "snap.docker.dockerd.service": "docker",
    "podman.service": "podman",
    "podman-restart.service": "podman",
    "containerd.service": "containerd",
    "snap.multipass.multipassd.service": "multipass",
    "multipassd.service": "multipass",
    "systemd-machined.service": "systemd-machined",
    "machines.target": "systemd-machined",
    "ganeti.service": "ganeti",
    "vdsmd.service": "VDSM",
    "kubelet.service": "kubelet",
}
"""The units that shut guests down at host shutdown, with their projects."""
PROGRAMS: Final = {
    "libvirt-guests.sh": "libvirt",
    "pve-ha-lrm": "Proxmox VE",
    "pacemakerd": "pacemaker",
    "pacemaker-remoted": "pacemaker",
    "pacemaker_remoted": "pacemaker",
    "incusd": "Incus",
    "lxd": "LXD",
    "lxd.daemon": "LXD",
    "dockerd": "docker",
    "docker.dockerd": "docker",
    "containerd": "containerd",
    "multipassd": "multipass",
    "multipass.multipassd": "multipass",
    "ganeti-noded": "ganeti",
    "vdsmd": "VDSM",
    "kubelet": "kubelet",
}
"""The programs that keepers run, whatever the names of their units, with their projects."""
MANAGERS: Final = frozenset(
    ["libvirtd", "virtqemud", "incusd", "lxd", "lxd.daemon", "dockerd", "docker.dockerd",
     "containerd", "crio", "kubelet", "multipassd", "multipass.multipassd", "atd", "cron", "crond",
     "ganeti-noded", "vdsmd", "nova-compute", "pacemakerd", "pacemaker-remoted", "pve-ha-lrm",
     "pvedaemon", "systemd", "systemd-machined", "systemd-logind", "sshd"]
)  # fmt: skip
"""Programs that start guests in other units. A stop or restart of a program's own service does not
stop these guests. The service's name does not matter; `x.y` is an app of a snap."""
_OWNERS: Final = (
    ("machine-qemu", ("libvirt-guests.service",)),
    ("docker-", ("docker.service", "snap.docker.dockerd.service")),
    ("libpod-", ("podman-restart.service", "podman.service")),
    ("cri-containerd-", ("containerd.service",)),
    ("nerdctl-", ("containerd.service",)),
    ("crio-", ("crio.service",)),
)
"""Prefixes of scopes that have no keeper in Before=, with the services that create these scopes."""
NO_KEEPERS: Final = frozenset(
    ["shutdown.target", "umount.target", "multi-user.target", "graphical.target", "default.target",
     "qkilld-guests.service", "slices.target", "basic.target", "sysinit.target", "network.target",
     "rescue.target", "emergency.target", "systemd-user-sessions.service"]
)  # fmt: skip
"""Units in many Before= that have nothing to do with guests."""


@dataclass(frozen=True, slots=True)
class GuestKeeper:
    unit: str
    project: str = ""
    """The keeper's project; "" if unknown."""
    timeout: int = INFINITY
    """TimeoutStopSec=, µs."""


def keepers_of(facts: UnitFacts, active: Iterable[UnitFacts]) -> tuple[GuestKeeper, ...]:
    """Return the units among `active` that shut down the unit's guests before the unit is stopped.

    `active`: those units of keeper_names() that are active.
    """
    names = keeper_names(facts)
    return tuple(
        GuestKeeper(other.id, project_of(other), other.timeout_stop)
        for other in active
        if other.id in names and is_keeper(other)
    )


def keeper_names(facts: UnitFacts) -> list[str]:
    """List the services that may be keepers of the unit's guests."""
    names = [name for name in facts.before if name.endswith(".service") and name not in NO_KEEPERS]
    for prefix, owners in _OWNERS:
        if facts.is_scope and facts.id.startswith(prefix):
            names += owners
    return list(dict.fromkeys(names))


def is_keeper(other: UnitFacts) -> bool:
    """Return whether a unit in the Before= of a guest's unit may shut the guest down when
    stopped."""
    if other.id in NO_KEEPERS or other.id.startswith("qkilld-scope@"):
        return False
    return bool(project_of(other)) or bool(other.exec_stop)


def project_of(keeper: UnitFacts) -> str:
    """Return the project of a keeper, by its name or its programs; "" if neither is known."""
    if keeper.id in KEEPERS:
        return KEEPERS[keeper.id]
    names = (
        name for command in (*keeper.exec_start, *keeper.exec_stop) for name in programs_of(command)
    )
    return next((PROGRAMS[name] for name in names if name in PROGRAMS), "")
