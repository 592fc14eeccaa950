"""Stop the guests of structures, before and after adopting their units, and count the records that
were kept."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.corpus import units
from tests.corpus.guest import MACHINE, CorpusGuest, KeptRecords, machine_for_newer, saved_state
from tests.corpus.structures import Structure
from tests.distros.trees import DIRECTORY, RELEASES, tree
from tests.lab import container as lab_container
from tests.lab.container import Container
from tests.lab.process import wait_gone
from tests.lab.scratch import scratch
from tests.safety.contained import ContainerPolicy

STOP_S: Final = 200
_ROOM: Final = 64 << 20
"""The size of a disk behind a server, because servers do not grow files."""
START_S: Final = 180

OCCASIONS: Final = {
    "stop": "systemctl stop",
    "poweroff": "systemctl poweroff",
    "reboot": "systemctl reboot",
    "kexec": "systemctl start kexec.target",
    "isolate": "systemctl isolate emergency.target",
    "kill": "systemctl kill",
    "failure": "OnFailure=emergency.target of a unit that fails",
    "soft-reboot": "systemctl soft-reboot",
    "soft-reboot, service": "the same with qkilld-guests.service and without adopting, for scopes",
}
SOFT_REBOOTS: Final = ("soft-reboot", "soft-reboot, service")
"""Occasions that need systemd 254, and therefore the Debian 13 that newer_debian() makes."""
_WITH_SERVICE: Final = ("soft-reboot, service",)
_VARIANT: Final = "-units"
_PACKAGES: Final = (
    *("default-dbus-system-bus", "python3", "python3-dbus-next", "python3-psutil", "python3-rich"),
    *("python3-systemd", "qemu-system-x86", "socat", "nbdkit", "make"),
)
_ENDS_THE_HOST: Final = ("poweroff", "reboot", "kexec")


@dataclass
class Row:
    """The results for one structure."""

    structure: Structure
    verdict: str = ""
    """The verdict of check-unit after adopting."""
    is_written: bool = False
    """Whether adopt wrote a drop-in or started a guard."""
    kept: dict[tuple[str, bool], KeptRecords] = field(default_factory=dict)
    """The records kept, for each pair: the occasion, and whether the unit was adopted."""

    def is_measured(self, occasion: str) -> bool:
        return (occasion, False) in self.kept and (occasion, True) in self.kept

    def is_worse(self, occasion: str) -> bool:
        if not self.is_measured(occasion):
            return False
        before, after = self.kept[occasion, False], self.kept[occasion, True]
        return after.disks < before.disks or after.guest < before.guest


def newer_debian(*, make: bool) -> Path | None:
    """Return the root file system of a Debian 13 with the packages that the units need.

    If it is missing, return None or, with `make`, make it, which takes minutes.
    """
    release = next(each for each in RELEASES if each.name == "trixie")
    if not make and not (DIRECTORY / f"{release.name}{_VARIANT}").is_dir():
        return None
    return tree(release, _PACKAGES, variant=_VARIANT)


@contextlib.contextmanager
def _host(
    structures: Sequence[Structure], directory: Path, newer: Path | None = None
) -> Iterator[Host]:
    """Boot a host with the units. `newer`: the root file system to boot; by default, the one of
    this machine."""
    with contextlib.ExitStack() as stack:
        if newer is None:
            system = stack.enter_context(lab_container.boot())
            lab_container.install(system)
        else:
            system = stack.enter_context(lab_container.boot(newer, unified=True))
            lab_container.install(system, "PYTHON=/usr/bin/python3")
        ContainerPolicy(system).show_storage()
        units.prepare(system)
        host = Host(system, {}, machine_for_newer() if newer else MACHINE)
        for structure in structures:
            own = directory / structure.unit
            own.mkdir(exist_ok=True)
            host.guests[structure] = CorpusGuest(structure.unit, own)
        yield host


@dataclass
class Host:
    system: Container
    guests: dict[Structure, CorpusGuest]
    machine: str = MACHINE
    """The machine type of the guests, under the name that the host's QEMU uses."""

    def start(self) -> None:
        """Start all guests, and wait until each has written its records."""
        state = saved_state()
        words = {}
        for structure, guest in self.guests.items():
            guest.make_disks()
            if "{served}" in structure.text:
                os.truncate(guest.disks[0], guest.disks[0].stat().st_size + _ROOM)
            words[structure] = units.Words(
                structure, guest.words(state, machine=self.machine), str(guest.disks[0])
            )
            units.write(self.system, structure, words[structure])
        self.system.run("systemctl", "daemon-reload")
        self.system.run("systemctl", "start", "qkilld.service")
        for structure in self.guests:
            own = () if structure.unit in structure.starts else (structure.unit,)
            units.start(self.system, structure, words[structure], (*structure.starts, *own))
        for guest in self.guests.values():
            guest.wait_until_written(START_S)

    def adopt(self, rows: Mapping[Structure, Row]) -> None:
        names = [structure.unit for structure in self.guests]
        done = self.system.run("qkillctl", "--json", "adopt", *names, check=False, timeout=200)
        for structure, document in zip(self.guests, json.loads(done.stdout), strict=True):
            rows[structure].is_written = bool(document.get("path") or structure.is_scope)
        found: dict[str, dict[str, Any]] = units.judge(self.system, names)
        for structure in self.guests:
            rows[structure].verdict = str(found[structure.unit].get("verdict", "error"))

    def stop(self, occasion: str) -> None:
        names = [name for each in self.guests for name in (each.unit, *each.stops)]
        if occasion in _ENDS_THE_HOST:
            leader = os.pidfd_open(self.system.leader)
            try:
                what = ["start", "kexec.target"] if occasion == "kexec" else [occasion]
                self.system.run("systemctl", "--no-block", *what)
                assert wait_gone(leader, STOP_S), "the host does not go down"
            finally:
                os.close(leader)
            return
        if occasion in SOFT_REBOOTS:
            self.system.run("systemctl", "soft-reboot")
            units.wait_for(self._has_rebooted, STOP_S)
            return
        commands = {
            "isolate": ["isolate", "emergency.target"],
            "kill": ["kill", *names],
            "failure": ["start", units.FAILS],
        }
        what = commands.get(occasion, ["stop", *names])
        self.system.run("systemctl", *what, check=False, timeout=STOP_S)
        # Wait for the guests: `systemctl kill` does not wait, and with KillMode=none, guests still
        # run. Do not wait for scopes after isolate, which does not stop them: IgnoreOnIsolate= in
        # systemd.unit(5).
        isolated = occasion in ("isolate", "failure")
        for name in (name for name in names if not (isolated and name.endswith(".scope"))):
            units.wait_for(lambda name=name: self._is_gone(name), STOP_S)  # type: ignore[misc]

    def _has_rebooted(self) -> bool:
        show = ("systemctl", "show", "--value", "--property=SoftRebootsCount")
        # During the soft-reboot, no manager answers.
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.system.run(*show, check=False, timeout=10).stdout.strip() == "1"
        return False

    def _is_gone(self, unit: str) -> bool:
        return self.system.property(unit, "ActiveState") in ("inactive", "failed", "")


def _stop_all(
    structures: Sequence[Structure],
    occasion: str,
    rows: Mapping[Structure, Row] | None,
    newer: Path | None,
) -> Iterator[tuple[Structure, KeptRecords]]:
    """Start the guests of these structures on a new host, and stop them. With `rows`, first adopt
    the units, and store the results of adopting in `rows`."""
    with scratch("u") as directory:
        with _host(structures, directory, newer) as host:
            host.start()
            if rows is not None and occasion in _WITH_SERVICE:
                host.system.run("systemctl", "start", "qkilld-guests.service")
            elif rows is not None:
                host.adopt(rows)
            host.stop(occasion)
        for structure, guest in host.guests.items():
            yield structure, guest.kept()


def measure(
    structures: Sequence[Structure],
    occasions: Sequence[str] = ("stop", "poweroff"),
    say: Callable[[str], None] = lambda text: None,
    *,
    newer: Path | None = None,
) -> list[Row]:
    """Measure each occasion twice, each time on a new host: without and with adopting the units.

    `newer`: a root file system with a newer QEMU to boot; by default, the one of this machine.
    """
    rows = {structure: Row(structure) for structure in structures}
    for occasion in occasions:
        for adopted in (False, True):
            say(f"{occasion}, {'adopted' if adopted else 'as it is'}: {len(structures)} guests")
            try:
                noted = rows if adopted else None
                for structure, kept in _stop_all(structures, occasion, noted, newer):
                    rows[structure].kept[occasion, adopted] = kept
            except (AssertionError, subprocess.TimeoutExpired) as error:
                # The results on other hosts remain valid.
                say(f"no result: {error}")
    return list(rows.values())
