"""Targets: the kind of a word, and the guest that it means."""

from __future__ import annotations

import asyncio
import os
from unittest.mock import Mock

import pytest

from qkilld.adapters import procfs
from qkilld.adapters.blockable import Unanswered
from qkilld.bus.client import ManagerProxy
from qkilld.ctl.targets import (
    AmbiguousTarget,
    GuestRow,
    Resolver,
    TargetKind,
    TargetProcess,
    find,
    parse,
)
from qkilld.model.constants import ExitCode
from qkilld.model.errors import (
    InvalidArgs,
    NoSuchProcess,
    NoSuchUnit,
    ProcessChanged,
    QkilldError,
)

UUID = "5f0c3c1e-6a0e-4a53-9f1a-0d6a4be4b6c5"
OTHER_UUID = "00000000-0000-4000-8000-000000000001"


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("4711", TargetKind.PID, "4711"),
        ("007", TargetKind.PID, "7"),
        ("0", TargetKind.PID, "0"),
        ("4294967295", TargetKind.PID, "4294967295"),
        ("pid:4711", TargetKind.PID, "4711"),
        ("web", TargetKind.WORD, "web"),
        ("web 1", TargetKind.WORD, "web 1"),
        ("-1", TargetKind.WORD, "-1"),
        ("4711a", TargetKind.WORD, "4711a"),
        ("٤٧", TargetKind.WORD, "٤٧"),  # digits, but not those of a pid
        ("name:4711", TargetKind.NAME, "4711"),
        ("name:a/b", TargetKind.NAME, "a/b"),
        ("name:name:x", TargetKind.NAME, "name:x"),
        ("colour:red", TargetKind.WORD, "colour:red"),
        ("word:x", TargetKind.WORD, "word:x"),
        (UUID, TargetKind.WORD, UUID),
        (f"uuid:{UUID.upper()}", TargetKind.UUID, UUID),
        (f"uuid:{UUID.replace('-', '')}", TargetKind.UUID, UUID),
        ("/run/web.pid", TargetKind.PIDFILE, "/run/web.pid"),
        ("./4711", TargetKind.PIDFILE, "./4711"),
        ("pidfile:web.pid", TargetKind.PIDFILE, "web.pid"),
        ("pidfile:\udcff", TargetKind.PIDFILE, "\udcff"),  # a path may be any bytes
        ("web.service", TargetKind.UNIT, "web.service"),
        ("machine-qemu\\x2d1.scope", TargetKind.UNIT, "machine-qemu\\x2d1.scope"),
        ("unit:web", TargetKind.UNIT, "web.service"),
        ("unit:4711.scope", TargetKind.UNIT, "4711.scope"),
        ("job:3", TargetKind.WORD, "job:3"),  # a job is not a guest
        ("/org/qkilld1/job/3", TargetKind.PIDFILE, "/org/qkilld1/job/3"),
    ],
)
def test_kind(text: str, kind: TargetKind, value: str) -> None:
    target = parse(text)
    assert (target.kind, target.value) == (kind, value)


@pytest.mark.parametrize("text", ["job:3", "job:003", "/org/qkilld1/job/3"])
def test_job(text: str) -> None:
    target = parse(text, jobs=True)
    assert (target.kind, target.value) == (TargetKind.JOB, "3")


@pytest.mark.parametrize(
    "text",
    [
        *("", "name:", "pidfile:", "unit:"),
        *("pid:", "pid:x", "pid:-1", "pid:1.0", "pid: 1", "pid:0x10", "pid:٤٧"),
        *("4294967296", "9" * 5000),  # 5000 digits: int() itself refuses from 4300 on
        *("uuid:", "uuid:1234", f"uuid:{UUID}0"),
        *("web\udcff", "name:\udcff"),
    ],
)
def test_malformed(text: str) -> None:
    with pytest.raises(InvalidArgs) as caught:
        parse(text)
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("text", ["job:", "job:x", "/org/qkilld1/job/", "/org/qkilld1/job/3/4"])
def test_malformed_job(text: str) -> None:
    with pytest.raises(InvalidArgs, match=r"a job's number|empty"):
        parse(text, jobs=True)


WEB = GuestRow(10, "web", UUID, 0, "web-vm.service")
DB = GuestRow(11, "db", OTHER_UUID, 1000, "db.service")
TWIN = GuestRow(12, "web", "", 1000, "")
NAMELESS = GuestRow(13, "", "", 0, "")
IMPOSTOR = GuestRow(14, "db.service", "", 1000, "")
NUMBER = GuestRow(15, "4711", "", 0, "")
DB_BY_NAME = GuestRow(16, "db", "", 1000, "")


@pytest.mark.parametrize(
    ("text", "guests", "pid"),
    [
        ("web", [WEB, DB, NAMELESS], 10),
        ("name:web", [WEB, DB], 10),
        ("WEB", [WEB, GuestRow(9, "WEB", "", 0, "")], 9),
        (UUID, [WEB, DB], 10),
        (UUID.upper(), [WEB, DB], 10),
        (f"uuid:{UUID}", [WEB, DB], 10),
        ("web-vm", [WEB, DB], 10),
        ("unit:web-vm", [WEB, DB], 10),
        ("db.service", [DB, IMPOSTOR], 11),  # a guest's name cannot pass for a unit
        ("name:db.service", [DB, IMPOSTOR], 14),
        ("db", [WEB, DB], 11),  # both the name and the unit match, but it is one guest
        ("unit:db", [DB, DB_BY_NAME], 11),
        ("name:4711", [WEB, NUMBER], 15),
    ],
)
def test_found(text: str, guests: list[GuestRow], pid: int) -> None:
    assert find(parse(text), guests).pid == pid


@pytest.mark.parametrize(
    ("text", "guests", "pids"),
    [
        ("web", [WEB, DB, TWIN], (10, 12)),
        ("name:web", [WEB, TWIN], (10, 12)),
        ("db", [DB, DB_BY_NAME], (11, 16)),  # one has the unit, the other took the name
        (UUID, [WEB, GuestRow(17, UUID, "", 1000, "")], (10, 17)),
    ],
)
def test_ambiguous(text: str, guests: list[GuestRow], pids: tuple[int, int]) -> None:
    with pytest.raises(AmbiguousTarget) as caught:
        find(parse(text), guests)
    assert caught.value.exit_code == ExitCode.NOT_FOUND
    for pid in pids:
        assert f"{pid} (" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("nobody", NoSuchProcess),
        ("name:nobody", NoSuchProcess),
        ("name:web-vm", NoSuchProcess),
        ("name:10", NoSuchProcess),
        (f"uuid:{OTHER_UUID}", NoSuchProcess),
        ("nobody.service", NoSuchUnit),
        ("unit:web", NoSuchUnit),
        ("name:\x1b[2J", NoSuchProcess),
    ],
)
def test_not_found(text: str, error: type[QkilldError]) -> None:
    with pytest.raises(error) as caught:
        find(parse(text), [WEB, NAMELESS])
    assert caught.value.exit_code == ExitCode.NOT_FOUND
    assert "`qkillctl list`" in str(caught.value)
    assert str(caught.value).isprintable()


def test_candidates_are_printable_and_not_without_end() -> None:
    crowd = [
        GuestRow(pid, "x\x1b]0;owned\x07\n\u202e", "", 0, "x.service") for pid in range(100, 150)
    ]
    with pytest.raises(AmbiguousTarget) as caught:
        find(parse("unit:x"), crowd)
    text = str(caught.value)
    assert text.isprintable()
    assert "100 (" in text
    assert "109 (" in text
    assert "110 (" not in text
    assert "and 40 more" in text


class Answers(ManagerProxy):
    """A daemon whose guests change between two calls."""

    def __init__(self, lists: list[list[GuestRow]]) -> None:
        self.lists = lists

    @property
    def is_remote(self) -> bool:
        return False

    async def list_guests(self) -> list[tuple[int, str, str, int, str]]:
        return [*self.lists.pop(0)]


def pin(text: str, daemon: Answers) -> TargetProcess:
    return asyncio.run(Resolver(daemon).pin(parse(text)))


ME = WEB._replace(pid=os.getpid())


def test_pin_holds_the_process_by_its_start() -> None:
    """The start time is read from /proc. The list then shows whether the process still has the
    name."""
    found = TargetProcess(ME.pid, "web", procfs.read_stat(ME.pid).start_time)
    assert pin("web", Answers([[ME, DB], [DB, ME]])) == found
    assert pin("10", Answers([])) == TargetProcess(10)


def test_pin_waits_for_a_process_that_is_unreadable_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stat = procfs.read_stat(ME.pid)
    monkeypatch.setattr(procfs, "read_stat", Mock(side_effect=[Unanswered(), stat]))
    assert pin("web", Answers([[ME], [ME]])).start_time == stat.start_time


@pytest.mark.parametrize("text", ["web", f"uuid:{UUID}", "unit:web-vm"])
def test_pin_notices_a_pid_that_changed_hands(text: str) -> None:
    for later in ([DB._replace(pid=ME.pid)], []):
        with pytest.raises(ProcessChanged, match=f"Process {ME.pid}"):
            pin(text, Answers([[ME], later]))
    gone = WEB._replace(pid=2**22 + 1)  # beyond the kernel's own limit for a pid
    with pytest.raises(NoSuchProcess, match="has just exited"):
        pin(text, Answers([[gone]]))
