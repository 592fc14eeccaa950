"""A host shuts down, and keepers shut down some of its guests. qkilld-guests.service waits for the
keepers.

The keepers imitate pve-guests.service, docker, libvirt-guests and a keeper of the site. They have
the same unit properties.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.corpus.guest import RECORDS, CorpusGuest, KeptRecords, saved_state
from tests.corpus.units import wait_for
from tests.lab import container as lab_container
from tests.lab.container import Container
from tests.lab.log import Log
from tests.lab.process import wait_gone
from tests.lab.scratch import scratch
from tests.safety.contained import ContainerPolicy

BUSY_S, HUNG_S = 3, 5
"""The time (s) before pve-guests asks its guest, and the timeout (s) of the keeper that hangs."""

# keep SECONDS|SOCKET SOCKET: wait for SECONDS, or up to a minute for the exit of the guest with the
# first SOCKET. Then ask the guest with the second SOCKET, and return when this guest is gone.
KEEP = """\
#!/bin/sh
runs() { socat -u OPEN:/dev/null "UNIX-CONNECT:$1" 2>/dev/null; }
i=0
case $1 in
    /*) while runs "$1" && [ $i -lt 300 ]; do sleep 0.2; i=$((i + 1)); done ;;
    *) sleep "$1" ;;
esac
echo system_powerdown | socat - "UNIX-CONNECT:$2"
while runs "$2"; do sleep 0.2; done
echo "keeper ends"
"""
KEEPER = """\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop={stop}
TimeoutStopSec={timeout}
"""
LINGER = """\
[Unit]
Before=qkilld-guests.service pve-guests.service site-keeper.service hung-keeper.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sleep 2
"""
"""This unit delays the end of the shutdown until the guests are stopped, because journalctl
--follow gets an entry 250 ms late."""
SCOPES = {
    # Scopes as Proxmox VE's qemu-server makes them.
    "100": ("Before=pve-guests.service", "KillMode=process", "SendSIGKILL=no",
            "TimeoutStopSec=infinity"),
    "101": ("Before=pve-guests.service", "KillMode=process", "SendSIGKILL=no",
            "TimeoutStopSec=infinity"),
    "site": ("Before=site-keeper.service", "TimeoutStopSec=10"),
    "hung": ("Before=hung-keeper.service", "TimeoutStopSec=10"),
    # A scope of libvirt. Its keeper is ordered after this target.
    "virt": ("Before=virt-guest-shutdown.target", "TimeoutStopSec=10"),
    # The scope of a docker container. It is not ordered before its keeper.
    "box": ("TimeoutStopSec=10",),
    "free": ("TimeoutStopSec=10",),
}  # fmt: skip
SHIM = "/usr/local/bin/containerd-shim-runc-v2"
ENGINE = f"""\
#!/bin/sh
{SHIM} -c 'shift 2; "$@"; true' shim -namespace moby "$@" &
exec /usr/local/sbin/dockerd infinity
"""
"""Docker under another name: the shim that runs the container, and the daemon."""


@pytest.fixture
def host() -> Iterator[Container]:
    """A host for one test only."""
    with lab_container.boot() as booted:
        lab_container.install(booted)
        ContainerPolicy(booted).show_storage()
        booted.write("/usr/local/bin/keep", KEEP, 0o755)
        stops = {
            # pve-guests does not know guest 101.
            "pve-guests": (f"/usr/local/bin/keep {BUSY_S} /run/100.monitor", "infinity"),
            "site-keeper": ("/usr/local/bin/keep /run/free.monitor /run/site.monitor", "10min"),
            "hung-keeper": ("/bin/sleep 1000", str(HUNG_S)),
            "our-guests": (
                "/usr/local/bin/libvirt-guests.sh /run/free.monitor /run/virt.monitor",
                "10min",
            ),
        }
        for name, (stop, timeout) in stops.items():
            text = KEEPER.format(stop=stop, timeout=timeout)
            booted.write(f"/etc/systemd/system/{name}.service", text)
        booted.run("cp", "/usr/local/bin/keep", "/usr/local/bin/libvirt-guests.sh")
        after = "[Unit]\nAfter=virt-guest-shutdown.target\n"
        booted.write("/etc/systemd/system/our-guests.service.d/order.conf", after)
        booted.run("cp", "/bin/dash", SHIM)
        booted.run("cp", "/bin/sleep", "/usr/local/sbin/dockerd")
        booted.write("/usr/local/bin/engine", ENGINE, 0o755)
        booted.write("/etc/systemd/system/lab-linger.service", LINGER)
        booted.run("systemctl", "daemon-reload")
        units = ("qkilld.service", "qkilld-guests.service", "lab-linger.service")
        booted.run("systemctl", "start", *units, *(f"{name}.service" for name in stops))
        yield booted


def start(host: Container, guest: CorpusGuest, state: Path) -> None:
    guest.make_disks()
    monitor = ("-monitor", f"unix:/run/{guest.name}.monitor,server=on,wait=off")
    words = guest.words(state, ("-name", guest.name, *monitor))
    properties = (f"--property={line}" for line in SCOPES[guest.name])
    scope = ("systemd-run", "--scope", f"--unit={guest.name}.scope", *properties)
    if guest.name == "box":
        stop = "/usr/local/bin/keep /run/free.monitor /run/box.monitor"
        engine = (f"--property=ExecStop={stop}", "--property=TimeoutStopSec=10min")
        unit = ("--unit=engine.service", "--property=KillMode=process", *engine)
        host.run("systemd-run", *unit, "/usr/local/bin/engine", *scope, *words)
        wait_for(lambda: host.property("box.scope", "ActiveState") == "active")
        return
    # Make the process a child of the host's first process, which reaps it.
    script = 'exec setsid --fork "$@" </dev/null >/dev/null 2>&1'
    host.run("sh", "-c", script, "sh", *scope, *words)
    wait_for(lambda: host.property(f"{guest.name}.scope", "ActiveState") == "active")


@dataclass
class Story:
    """The whole journal of the host."""

    entries: list[dict[str, Any]]

    def at(self, text: str, unit: str = "") -> list[int]:
        """Return the times (µs) at which this text was logged."""
        return [
            int(entry["__MONOTONIC_TIMESTAMP"])
            for entry in self.entries
            if text in str(entry.get("MESSAGE")) and unit in entry.get("_SYSTEMD_UNIT", "")
        ]

    def __str__(self) -> str:
        return "\n".join(f"{e['__MONOTONIC_TIMESTAMP']} {e.get('MESSAGE')}" for e in self.entries)


@contextlib.contextmanager
def recorded(host: Container, log: Log) -> Iterator[None]:
    with log.path.open("wb") as file:
        # journalctl must not be a child of nsenter: see test_shutdown.
        follow = ("setsid", "--fork", "journalctl", "--follow", "--lines=all", "--output=json")
        with host.spawn(*follow, stdout=file) as started:
            started.wait(30)
    yield


def story_of(log: Log) -> Story:
    entries = []
    for line in log.text().splitlines():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return Story(entries)


def test_a_guest_is_left_to_its_keeper_and_what_that_leaves_is_not(host: Container) -> None:
    state = saved_state()
    with scratch("k") as directory:
        guests = {}
        for name in SCOPES:
            (directory / name).mkdir()
            guests[name] = CorpusGuest(name, directory / name)
            start(host, guests[name], state)
        for guest in guests.values():
            guest.wait_until_written(180)
        report = json.loads(host.run("qkillctl", "--json", "check-host", check=False).stdout)
        journal = Log(directory / "journal")
        leader = os.pidfd_open(host.leader)
        try:
            with recorded(host, journal):
                host.run("systemctl", "--no-block", "poweroff")
                assert wait_gone(leader, 300), f"it is still up:\n{story_of(journal)}"
        finally:
            os.close(leader)
        story = story_of(journal)
        kept = {name: guest.kept() for name, guest in guests.items()}
    assert kept == dict.fromkeys(SCOPES, KeptRecords(RECORDS, RECORDS)), story

    keepers = {guest["unit"]: guest["keepers"] for guest in report["guests"]}
    assert keepers == {
        "100.scope": ["pve-guests.service"],
        "101.scope": ["pve-guests.service"],
        "site.scope": ["site-keeper.service"],
        "hung.scope": ["hung-keeper.service"],
        "virt.scope": ["our-guests.service"],
        "box.scope": ["engine.service"],
        "free.scope": [],
    }
    projects = {keeper["unit"]: keeper["project"] for keeper in report["keepers"]}
    assert projects["our-guests.service"] == "libvirt" and projects["engine.service"] == "docker"

    def stopped(name: str) -> list[int]:
        """Return when qkilld started its job for the guest."""
        return story.at(f'Stopping guest "{name}" ')

    (pve_ends,) = story.at("keeper ends", "pve-guests.service")
    (site_ends,) = story.at("keeper ends", "site-keeper.service")
    (hung_begins,) = story.at("Stopping hung-keeper.service")
    # Keepers shut down these guests, so qkilld leaves them alone.
    assert not stopped("100") and not stopped("site"), story
    assert not stopped("virt") and not stopped("box"), story
    for keeper in ("site-keeper", "our-guests", "engine"):
        assert story.at(f"is left to {keeper}.service"), story
    # The keeper does not know guest 101. qkilld stops this guest when the keeper has finished.
    (left,) = stopped("101")
    assert left >= pve_ends, story
    # The keeper of this guest hangs. qkilld waits only until the keeper's timeout.
    (stuck,) = stopped("hung")
    assert stuck - hung_begins >= HUNG_S * 1_000_000, story
    # For this guest, qkilld does not wait for the keepers of other guests. One of those keepers
    # itself waits for this guest.
    (free,) = stopped("free")
    assert free < site_ends, story
    assert not story.at("Sent SIG"), story


def test_isolate_leaves_the_guests_in_scopes_to_run() -> None:
    """systemd leaves scopes running. Scopes must also keep running if they have a guard, or if
    qkilld-guests.service runs."""
    with lab_container.boot() as host:
        lab_container.install(host)
        host.write("/etc/systemd/system/other.service", "[Service]\nExecStart=/bin/sleep 1000\n")
        host.run("systemctl", "daemon-reload")
        units = ("other.service", "qkilld.service", "qkilld-guests.service")
        host.run("systemctl", "start", *units)
        idle = ("qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none")
        script = 'exec setsid --fork "$@" </dev/null >/dev/null 2>&1'
        for name in ("guarded.scope", "plain.scope"):
            scope = ("systemd-run", "--scope", f"--unit={name}", *idle)
            host.run("sh", "-c", script, "sh", *scope)
            wait_for(lambda name=name: host.property(name, "ActiveState") == "active")  # type: ignore[misc]
        host.run("qkillctl", "adopt", "guarded.scope")
        host.run("systemctl", "isolate", "emergency.target", check=False)
        wait_for(lambda: host.property("other.service", "ActiveState") == "inactive")
        guard = "qkilld-scope@guarded.scope.service"
        for name in ("guarded.scope", "plain.scope", guard, "qkilld-guests.service"):
            # When isolate returns, systemd has queued every stop.
            assert host.property(name, "ActiveState") == "active", name
            assert host.property(name, "Job") in ("", "0"), name
