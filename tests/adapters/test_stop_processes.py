"""Opening the processes that the helper should stop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qkilld.adapters import procfs
from qkilld.model.errors import Failed, NoSuchProcess
from qkilld.model.guest import Unit
from qkilld.stop import finder
from qkilld.stop.finder import ProcessFinder
from qkilld.stop.options import Options
from qkilld.stop.process import has_others, open_process
from qkilld.stop.systemd_units import unattended
from tests.lab.guest import Guest

Make = Callable[..., Guest]
Units = dict[int, Unit | None]
WEB = Unit("web.service")
USERS = Unit("user@7.service", "web.service")


@pytest.mark.parametrize("pid", [2**31, 2**32 - 1, 9_999_999_999, 2**70])
def test_a_number_that_no_process_can_have(pid: int) -> None:
    with pytest.raises(NoSuchProcess):
        open_process(pid)


def test_another_process_of_the_same_number() -> None:
    process = open_process(os.getpid())
    process.close()
    assert process.start_time is not None
    with pytest.raises(NoSuchProcess):
        open_process(os.getpid(), process.start_time + 1)


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProcessFinder]:
    """A function that makes a helper's finder, with these processes in these units."""

    def make(units: Units, own: Unit | None, options: Options | None = None) -> ProcessFinder:
        monkeypatch.setattr(procfs, "pids", lambda: list(units))
        every = {**units, os.getpid(): own}
        monkeypatch.setattr(procfs, "read_unit", lambda pid: every[pid])
        return ProcessFinder(options or Options(), {})

    return make


def pids_of(finder: ProcessFinder, globs: list[str]) -> list[int]:
    processes = finder.in_unit(globs)
    for process in processes:
        process.close()
    return [process.pid for process in processes]


@pytest.mark.parametrize(
    ("own", "named", "units", "expected"),
    [
        (WEB, None, (WEB, Unit("db.service"), None), [0]),
        (WEB, None, (Unit("db.service"), Unit()), []),
        (WEB, None, (None, Unit("db.service")), Failed),
        # Two unknown units do not count as the same unit, and neither do two missing units.
        (None, None, (None, None, None), Failed),
        (None, None, (WEB,), Failed),
        (None, None, (), []),
        (Unit(), None, (Unit(), Unit()), []),
        (WEB, "db.service", (WEB, Unit("db.service"), None), [1]),
        (WEB, "db.service", (WEB, None), Failed),
        (None, "db.service", (WEB, Unit("db.service")), [1]),
        (None, "web.service", (USERS,), []),
        (Unit("user@7.service", "a.service"), "web.service", (USERS,), [0]),
    ],
)
def test_the_guests_of_a_unit(
    own: Unit | None,
    named: str | None,
    units: tuple[Unit | None, ...],
    expected: list[int] | type[Failed],
    fake_qemu: Make,
    find: Callable[..., ProcessFinder],
) -> None:
    guests = [fake_qemu() for _ in units]
    globs = [procfs.read_executable(guest.pid)[0] for guest in guests]
    there = {guest.pid: unit for guest, unit in zip(guests, units, strict=True)}
    finder = find(there, own, Options(unit=named))
    if isinstance(expected, list):
        assert pids_of(finder, globs) == [guests[index].pid for index in expected]
        return
    with pytest.raises(expected, match="cannot tell"):
        finder.in_unit(globs)


def test_every_guest_but_those_of_unknown_units(
    fake_qemu: Make, find: Callable[..., ProcessFinder], capsys: pytest.CaptureFixture[str]
) -> None:
    hidden, shell = fake_qemu(), fake_qemu()
    globs = [procfs.read_executable(guest.pid)[0] for guest in (hidden, shell)]
    there = {hidden.pid: None, shell.pid: Unit("session-1.scope")}
    guests = find(there, Unit("qkilld-guests.service")).of_manager(globs)
    (left,) = asyncio.run(unattended(guests, "no bus"))
    left.close()
    assert left.pid == shell.pid
    assert f"process {hidden.pid} is not stopped" in capsys.readouterr().err
    with pytest.raises(Failed, match="cannot tell whose"):
        find(there, None).of_manager(globs)


@pytest.mark.parametrize(
    ("own", "its", "same"),
    [
        ("0::/a.slice/web.service\n", "0::/a.slice/web.service\n", True),
        ("0::/a.slice/web.service\n", "0::/a.slice/db.service\n", False),
        ("0::/web.service/.control\n", "0::/web.service\n", True),
        ("0::/web.service/.control\n", "0::/web.service/own\n", False),
        ("0::/\n", "0::/\n", False),  # Control groups are hidden.
        ("0::/web.service\n", None, False),
    ],
)
def test_a_process_in_our_own_control_group(
    tmp_path: Path, own: str, its: str | None, same: bool
) -> None:
    for name, text in (("self", own), ("7", its)):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "cgroup").write_text(text)
    assert finder._in_own_cgroup(7, tmp_path) is same


@pytest.mark.parametrize(
    ("groups", "directory", "others"),
    [
        ("0::/a.slice/web.service\n", "a.slice/web.service", {"": False, "7": False, "8": True}),
        ("0::/web.service\n", "unified/web.service", {"7": False, "8": True}),
        ("1:name=systemd:/web.service\n0::/\n", "systemd/web.service", {"7": False, "7\n8": True}),
        # The result is True because the unit's processes are unknown: the unit is not a service, it
        # has control groups below its own, its control group does not exist, or the file is not a
        # list of control groups.
        ("0::/web.scope\n", "web.scope", {"7": True}),
        ("0::/web.service\n", "web.service/own", {"7": True}),
        ("0::/web.service\n", "db.service", {"7": True}),
        ("nonsense", "web.service", {"7": True}),
    ],
)
def test_whether_the_unit_has_other_processes(
    tmp_path: Path, groups: str, directory: str, others: dict[str, bool]
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(groups)
    (tmp_path / "sys" / directory).mkdir(parents=True)
    for pids, expected in others.items():
        text = f"{os.getpid()}\n{pids}".rstrip()
        (tmp_path / "sys" / directory / "cgroup.procs").write_text(f"{text}\n")
        assert has_others({7}, str(tmp_path), str(tmp_path / "sys")) is expected
    (tmp_path / "self/cgroup").unlink()
    assert has_others({7}, str(tmp_path), str(tmp_path / "sys"))
