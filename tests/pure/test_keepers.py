"""Which units are keepers."""

from __future__ import annotations

import pytest

from qkilld.model.unit import Command, UnitFacts
from qkilld.unitcheck.keepers import KEEPERS, is_keeper, keepers_of, project_of


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
        # The name of a keeper as an argument is no keeper.
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
