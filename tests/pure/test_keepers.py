"""Which units are keepers."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from qkilld.model.guest import Ancestor
from qkilld.model.unit import Command, UnitFacts
from qkilld.unitcheck.keepers import (
    KEEPERS,
    GuestKeeper,
    KeeperCandidates,
    is_keeper,
    keeper_names,
    keeper_targets,
    project_of,
    runtime_keepers,
)


def keepers_of(facts: UnitFacts, active: list[UnitFacts]) -> tuple[GuestKeeper, ...]:
    return KeeperCandidates(tuple(keeper_names(facts))).keepers(
        [other for other in active if other.id in keeper_names(facts)]
    )


def unit(name: str, start: str, stop: str = "") -> UnitFacts:
    starts, stops = (
        (Command(line.split()[0], tuple(line.split())),) if line else () for line in (start, stop)
    )
    return UnitFacts(name, exec_start=starts, exec_stop=stops)


@pytest.mark.parametrize(
    ("start", "stop", "project"),
    [
        ("/usr/sbin/pacemakerd", "", "pacemaker"),
        ("/usr/bin/dockerd -H fd://", "", "docker"),
        ("/usr/local/sbin/incusd --group incus-admin", "", "Incus"),
        ("/usr/bin/perl -T /usr/sbin/pve-ha-lrm start", "", "Proxmox VE"),
        ("/usr/bin/snap run multipass.multipassd", "", "multipass"),
        ("/bin/true", "/usr/lib/libvirt/libvirt-guests.sh stop", "libvirt"),
    ],
)
def test_a_keeper_under_another_name(start: str, stop: str, project: str) -> None:
    other = unit("our-cluster.service", start, stop)
    assert other.id not in KEEPERS
    assert is_keeper(other)
    assert project_of(other) == project
    scope = UnitFacts("web.scope", before=(other.id, "shutdown.target"))
    (keeper,) = keepers_of(scope, [other])
    assert (keeper.unit, keeper.project) == (other.id, project)


@pytest.mark.parametrize(
    "start",
    [
        "/usr/sbin/sshd -D",
        # A program is not a keeper just because an argument names one.
        "/usr/bin/tail -f /var/log/dockerd",
        "/usr/bin/grep dockerd",
        "/usr/bin/systemctl restart dockerd",
    ],
)
def test_another_unit_is_none(start: str) -> None:
    other = unit("logs.service", start)
    assert not is_keeper(other)
    assert project_of(other) == ""


def test_a_unit_that_is_not_ordered_after_the_guest_is_not_its_keeper() -> None:
    other = unit("our-cluster.service", "/usr/sbin/pacemakerd")
    assert keepers_of(UnitFacts("web.scope"), [other]) == ()


SHIM = "containerd-shim-runc-v2"


@pytest.mark.parametrize(
    ("program", "words", "asked"),
    [
        (SHIM, f"{SHIM} -namespace moby -id 1", {"dockerd", "docker.dockerd"}),
        (SHIM, f"{SHIM} -namespace k8s.io -id 1", {"kubelet", "containerd"}),
        (SHIM, f"{SHIM} -namespace default -id 1", {"containerd"}),
        (SHIM, SHIM, {"containerd"}),
        ("conmon", "conmon -c 1 --exit-command /usr/bin/podman", {"podman"}),
        ("conmon", "conmon -c 1 --exit-command /usr/bin/crio", {"crio", "kubelet"}),
        ("incusd", "incusd forkstart web", {"incusd"}),
        ("multipassd", "multipassd", {"multipassd"}),
        ("sshd", "sshd -D", None),
        ("bash", "bash containerd-shim", None),
    ],
)
def test_the_services_that_stop_a_container(
    program: str, words: str, asked: set[str] | None
) -> None:
    found: list[set[str]] = []

    def search(programs: Collection[str]) -> dict[str, str]:
        found.append(set(programs))
        return {"engine.service": next(iter(programs))}

    ancestor = Ancestor(program, tuple(words.split()), "")
    keepers = runtime_keepers([ancestor], search)
    assert found == ([] if asked is None else [asked])
    assert set(keepers) == (set() if asked is None else {"engine.service"})


def test_a_service_that_runs_a_container_of_podman_is_its_keeper() -> None:
    above = [Ancestor("conmon", ("conmon", "--exit-command", "/usr/bin/podman"), "web.service")]
    runtime = runtime_keepers(above, lambda programs: {})
    candidates = KeeperCandidates(runtime=runtime)
    assert candidates.names == ["web.service"]
    web = unit("web.service", "/bin/sh /srv/run-web", "/usr/bin/podman stop web")
    assert [keeper.unit for keeper in candidates.keepers([web])] == ["web.service"]


def test_what_is_ordered_after_a_target_is_a_keeper_if_its_project_is_known() -> None:
    scope = UnitFacts("machine-web.scope", before=("virt-guest-shutdown.target", "shutdown.target"))
    assert keeper_targets(scope) == ["virt-guest-shutdown.target"]
    assert keeper_targets(UnitFacts("web.service", before=scope.before)) == []
    script = unit("our-guests.service", "/bin/true", "/usr/lib/libvirt/libvirt-guests.sh stop")
    other = unit("other.service", "/bin/true", "/usr/bin/something")
    behind = KeeperCandidates(behind_targets=(script.id, other.id, "x.target"))
    assert behind.names == [script.id, other.id]
    (keeper,) = behind.keepers([script, other])
    assert (keeper.unit, keeper.project) == (script.id, "libvirt")


def test_a_manager_keeps_the_guests_in_its_own_unit() -> None:
    for start, project in (
        ("/usr/bin/multipassd", "multipass"),
        ("/usr/bin/systemd-nspawn --boot --machine=web", "systemd-nspawn"),
    ):
        own = unit("our-vms.service", start)
        (keeper,) = keepers_of(own, [own])
        assert (keeper.unit, keeper.project) == ("our-vms.service", project)
    plain = unit("crio.service", "/usr/bin/qemu-system-x86_64")
    assert keepers_of(plain, [plain]) == ()
