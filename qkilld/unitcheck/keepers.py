"""Keepers: the units of other projects that shut guests down at host shutdown.

A guest's unit has its keeper in Before=, so systemd stops the keeper first. libvirt, Proxmox and
pacemaker set this order. A keeper is recognised by its name, its programs or an ExecStop=. The unit
of a guest in a container has no such order. The guest's keeper is found through the processes that
run the container. Sources: the unit files and scope properties of each project.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import field
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Final

from qkilld.model.constants import INFINITY
from qkilld.model.dataclass import dataclass
from qkilld.model.guest import Ancestor
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
    "crio.service": "CRI-O",
    "snap.multipass.multipassd.service": "multipass",
    "multipassd.service": "multipass",
    "systemd-machined.service": "systemd-machined",
    "machines.target": "systemd-machined",
    "ganeti.service": "ganeti",
    "vdsmd.service": "VDSM",
    "kubelet.service": "kubelet",
}
"""The project of each unit that shuts guests down at host shutdown."""
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
    "crio": "CRI-O",
    "multipassd": "multipass",
    "multipass.multipassd": "multipass",
    "ganeti-noded": "ganeti",
    "vdsmd": "VDSM",
    "kubelet": "kubelet",
}
"""The project of each program that a keeper runs. A keeper with an unknown name is recognised by
its program."""
_MACHINES: Final = {"systemd-nspawn": "systemd-nspawn", "systemd-vmspawn": "systemd-vmspawn"}
"""The project of each program that shuts down only the guests of its own unit."""
MANAGERS: Final = frozenset(
    ["libvirtd", "virtqemud", "incusd", "lxd", "lxd.daemon", "dockerd", "docker.dockerd",
     "containerd", "crio", "kubelet", "multipassd", "multipass.multipassd", "atd", "cron", "crond",
     "ganeti-noded", "vdsmd", "nova-compute", "pacemakerd", "pacemaker-remoted", "pve-ha-lrm",
     "pvedaemon", "systemd", "systemd-machined", "systemd-logind", "sshd"]
)  # fmt: skip
"""Programs that start guests in other units. Stopping or restarting the service of such a program,
whatever its name is, does not stop these guests. A name with a dot is an app of a snap."""
_OWNERS: Final = (
    ("machine-qemu", ("libvirt-guests.service",)),
    ("docker-", ("docker.service", "snap.docker.dockerd.service")),
    ("libpod-", ("podman-restart.service", "podman.service")),
    ("cri-containerd-", ("containerd.service",)),
    ("nerdctl-", ("containerd.service",)),
    ("crio-", ("crio.service",)),
)
"""Name prefixes of scopes that have no keeper in Before=, with the services that may be their
keepers."""
_SHIM: Final = re.compile(r"(?:docker-)?containerd-shim.*")
"""The supervisor of a container in containerd, or in docker, which uses containerd."""
_PROGRAMS_BY_NAMESPACE: Final = {
    "moby": frozenset({"dockerd", "docker.dockerd"}),
    "k8s.io": frozenset({"kubelet", "containerd"}),
}
"""For each namespace in containerd: the programs that stop its containers."""
_MONITORS: Final = frozenset(["conmon", "conmonrs"])
"""The supervisors of podman's and CRI-O's containers."""
NO_KEEPERS: Final = frozenset(
    ["shutdown.target", "umount.target", "multi-user.target", "graphical.target", "default.target",
     "qkilld-guests.service", "slices.target", "basic.target", "sysinit.target", "network.target",
     "rescue.target", "emergency.target", "systemd-user-sessions.service"]
)  # fmt: skip
"""Units that are often in Before=, but have nothing to do with guests."""


@dataclass(frozen=True, slots=True)
class GuestKeeper:
    unit: str
    project: str = ""
    """The keeper's project; "" if unknown."""
    timeout: int = INFINITY
    """TimeoutStopSec=, µs."""


@dataclass(frozen=True, slots=True)
class KeeperCandidates:
    """The services that may be keepers of a guest."""

    ordered: tuple[str, ...] = ()
    """The names that keeper_names() returns."""
    behind_targets: tuple[str, ...] = ()
    """The units that are ordered after a target of keeper_targets()."""
    runtime: Mapping[str, str] = field(default_factory=dict)
    """The result of runtime_keepers(): each service, with its project."""

    @property
    def names(self) -> list[str]:
        behind = (name for name in self.behind_targets if name.endswith(".service"))
        return list(dict.fromkeys((*self.ordered, *behind, *self.runtime)))

    def keepers(self, active: Iterable[UnitFacts]) -> tuple[GuestKeeper, ...]:
        """Return the keepers among these units. `active`: the units in `names` that are active."""
        return tuple(
            GuestKeeper(other.id, project, other.timeout_stop)
            for other in active
            if (project := self._project(other)) is not None
        )

    def _project(self, other: UnitFacts) -> str | None:
        """Return a keeper's project, None for other units."""
        if other.id in self.runtime:
            return project_of(other) or self.runtime[other.id]
        if other.id in self.ordered:
            return project_of(other) if is_keeper(other) else None
        return project_of(other) or None


def keeper_names(facts: UnitFacts) -> list[str]:
    """List the services that may be keepers of the unit's guests; is_keeper() checks each."""
    names = [name for name in facts.before if name.endswith(".service") and name not in NO_KEEPERS]
    for prefix, owners in _OWNERS:
        if facts.is_scope and facts.id.startswith(prefix):
            names += owners
    if not facts.is_scope and _project_by_program(facts):
        names.append(facts.id)  # This unit runs a keeper, such as multipass.
    return list(dict.fromkeys(names))


def keeper_targets(facts: UnitFacts) -> list[str]:
    """List the targets before which a scope is ordered.

    A service that is ordered after such a target is a keeper if its project is known. libvirt
    orders its scopes before virt-guest-shutdown.target, and libvirt-guests.service after it.
    """
    if not facts.is_scope:
        return []
    return [name for name in facts.before if name.endswith(".target") and name not in NO_KEEPERS]


def runtime_keepers(
    ancestors: Iterable[Ancestor], services_that_run: Callable[[Collection[str]], Mapping[str, str]]
) -> dict[str, str]:
    """Find the services that stop a guest's container. Return each service, with its project.

    `services_that_run` finds the services in which given programs run.
    """
    keepers: dict[str, str] = {}
    programs: set[str] = set()
    for each in ancestors:
        own = _programs_of_runtime(each)
        programs |= own
        # With podman, the container's supervisor runs in the service that starts and stops the
        # container, so that service is the keeper.
        if own and each.service:
            keepers[each.service] = PROGRAMS.get(each.program, "")
    if programs:
        found = services_that_run(programs)
        keepers |= {name: PROGRAMS.get(program, program) for name, program in found.items()}
    return keepers


def _programs_of_runtime(ancestor: Ancestor) -> frozenset[str]:
    """Return the programs whose services stop the guests below this process. Empty if the program
    of the process is unknown."""
    if ancestor.program in PROGRAMS:
        return frozenset({ancestor.program})
    if _SHIM.fullmatch(ancestor.program):
        pairs = pairwise(ancestor.words)
        namespace = next((value for key, value in pairs if key == "-namespace"), "")
        return _PROGRAMS_BY_NAMESPACE.get(namespace, frozenset({"containerd"}))
    if ancestor.program in _MONITORS:
        by_podman = any(PurePosixPath(word).name == "podman" for word in ancestor.words)
        return frozenset({"podman"} if by_podman else {"crio", "kubelet"})
    return frozenset()


def is_keeper(other: UnitFacts) -> bool:
    """Return whether stopping this unit may shut down a guest whose unit has it in Before=."""
    if other.id in NO_KEEPERS or other.id.startswith("qkilld-scope@"):
        return False
    return bool(project_of(other)) or bool(other.exec_stop)


def project_of(keeper: UnitFacts) -> str:
    """Return the project of a keeper, by its name or its programs; "" if neither is known."""
    return KEEPERS.get(keeper.id) or _project_by_program(keeper)


def _project_by_program(keeper: UnitFacts) -> str:
    names = (
        name for command in (*keeper.exec_start, *keeper.exec_stop) for name in programs_of(command)
    )
    projects = PROGRAMS | _MACHINES
    return next((projects[name] for name in names if name in projects), "")
