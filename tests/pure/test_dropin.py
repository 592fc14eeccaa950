"""The drop-in of adopt: its lines, its text, and its file. It never replaces a file of others."""

from __future__ import annotations

import errno
import os
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from qkilld.ctl.dropin_file import DropIn
from qkilld.ctl.unit_context import has_own_settings
from qkilld.model.errors import AccessDenied, Failed
from qkilld.model.unit import SETTINGS, UnitFacts
from qkilld.unitcheck.check import check
from qkilld.unitcheck.dropin import (
    Change,
    changes,
    is_ours,
    is_unchanged,
    missing_changes,
    overridden_by_template,
    override,
    own_files,
    read_later,
    sets_facts,
    text_of,
)
from qkilld.unitcheck.finding import Finding, Line, Severity
from tests.lab.process import OTHER_UID
from tests.pure.test_unitcheck import AROUND, SAFE, S, line

BARE = replace(SAFE, exec_stop=(), notify_access="none", timeout_stop=5 * S)
CHANGES = [Change("a reason", (Line("Service", "ExecStop=-/usr/bin/qkilld-stop"),))]
TEXT = text_of("web.service", "qkillctl adopt --undo web.service", "1.0", CHANGES)


def directives(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_only_the_lines_that_are_needed() -> None:
    assert changes(check(SAFE, AROUND)) == []
    advice = replace(SAFE, restart="always", type="forking")
    assert changes(check(advice, AROUND)) == []
    by_hand = replace(SAFE, type="oneshot")
    assert changes(check(by_hand, AROUND)) == []
    text = text_of("web.service", "undo", "1.0", changes(check(BARE, AROUND)))
    assert directives(text) == [
        "[Service]",
        "ExecStop=-/usr/bin/qkilld-stop",
        "NotifyAccess=exec",
        "TimeoutStopSec=90s",
    ]


def test_sections_and_a_list_that_is_given_once() -> None:
    facts = replace(
        SAFE, default_dependencies=False, root="/r", kill_mode="none", exec_stop=(line("nc x"),)
    )
    facts = replace(facts, exec_stop=(*facts.exec_stop, *SAFE.exec_stop))
    text = text_of("web.service", "undo", "1.0", changes(check(facts, AROUND)))
    assert directives(text) == [
        "[Unit]",
        "DefaultDependencies=yes",
        "[Service]",
        "KillMode=control-group",
        "ExecStop=",
        'ExecStop=-/bin/sh -c "nc x"',
        "ExecStop=-+/usr/bin/qkilld-stop",
    ]
    assert "before qkilld-stop" in text


def test_an_earlier_one_of_ours_is_kept() -> None:
    more = [Change("another", (Line("Service", "KillMode=control-group"),))]
    text = text_of("web.service", "undo", "1.0", more, TEXT)
    assert directives(text) == [
        "[Service]",
        "ExecStop=-/usr/bin/qkilld-stop",
        "KillMode=control-group",
    ]


def test_changes_already_in_the_file_are_not_written_again() -> None:
    more = Change("another", (Line("Service", "KillMode=control-group"),))
    assert missing_changes([*CHANGES, more], TEXT) == [more]
    assert missing_changes([more], "") == [more]


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("[Service]\nKillSignal=SIGKILL\n", ("KillSignal=",)),
        ("[Service]\n  KillSignal = SIGKILL\nExecStop=\n", ("KillSignal=", "ExecStop=")),
        ("[Service]\nExecStop=/bin/more\n", ("ExecStop=",)),
        ("[Service]\n#KillSignal=SIGKILL\nFinalKillSignal=SIGKILL\n", ()),
        ("\udcff", ()),
    ],
)
def test_a_later_drop_in_stands_over_ours(text: str, keys: tuple[str, ...]) -> None:
    wanted = [Change("a reason", (Line("Service", "KillSignal=SIGTERM"),)), *CHANGES]
    found = override("/etc/systemd/system/w\n.service.d/x.conf", text, wanted)
    assert (found.keys if found else ()) == keys
    assert str(found).isprintable()


@pytest.mark.parametrize(
    ("text", "adds"),
    [
        ("[Service]\nExecStop=/bin/more\n", True),
        ("[Service]\nExecStop=\nExecStop=/bin/more\n", False),
        ("[Service]\nExecStop=/bin/less\nExecStop=\nExecStop=/bin/more\n", False),
        ("[Service]\nExecStop=/bin/less\nExecStop=\n", False),
        ("[Service]\nExecStop=\n", False),
        ("[Service]\nKillSignal=SIGKILL\n", False),
    ],
)
def test_a_later_drop_in_that_adds_a_line_to_the_stop(text: str, adds: bool) -> None:
    wanted = [Change("a reason", (Line("Service", "KillSignal=SIGTERM"),)), *CHANGES]
    found = override("/etc/systemd/system/w.service.d/60-local.conf", text, wanted)
    assert found is not None and found.adds_stop is adds
    # Now this drop-in belongs to an instance, and our drop-in to the template.
    path = "/etc/systemd/system/w@a.service.d/60-local.conf"
    assert overridden_by_template(path, text, wanted) is adds
    if adds:
        assert override("x", text, wanted[:1]) is None
        assert not overridden_by_template(path, text, wanted[:1])


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("/etc/systemd/system/w@.service.d/x.conf", False),
        ("/etc/systemd/system/service.d/x.conf", False),
        ("/etc/systemd/system/w@a.service.d/50-qkilld.conf", True),
        ("/run/systemd/system.control/w@a.service.d/x.conf", True),
    ],
)
def test_what_an_instance_has_alone(path: str, own: bool) -> None:
    facts = replace(SAFE, id="w@a.service", fragment="/etc/systemd/system/w@.service")
    assert own_files(facts) == []
    assert own_files(replace(facts, drop_ins=(path,))) == [path] * own
    unit_file = "/etc/systemd/system/w@a.service"
    assert own_files(replace(facts, fragment=unit_file)) == [unit_file]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("[Service]\nMemoryMax=8G\nCPUWeight=20\n", False),
        ("[Unit]\nDescription=After=x\n[Service]\n#KillSignal=SIGKILL\n", False),
        ("[Service]\nKillSignal=SIGKILL\n", True),
        ("[Service]\nMemoryMax=8G\n  ExecStop \\\n# a comment\n =\n", True),
        ("[Unit]\nAfter=nbd-web.service\n", True),
        ("[Service]\nEnvironment=DISK=/srv/web\n", True),
    ],
)
def test_which_settings_of_an_instance_count(text: str, counts: bool, tmp_path: Path) -> None:
    assert sets_facts(text) is counts
    path = tmp_path / "w@a.service.d/override.conf"
    path.parent.mkdir()
    path.write_text(text)
    facts = replace(SAFE, id="w@a.service", fragment="/etc/systemd/system/w@.service")
    assert has_own_settings(replace(facts, drop_ins=(str(path),))) is counts
    path.unlink()  # An unreadable file may have any setting.
    assert has_own_settings(replace(facts, drop_ins=(str(path),)))
    assert has_own_settings(replace(facts, fragment=str(path.with_name("w@a.service"))))


def test_the_settings_of_every_fact_are_known() -> None:
    assert set(SETTINGS) == {each.name for each in fields(UnitFacts)}


def test_which_drop_ins_are_later() -> None:
    names = [
        "/etc/a.d/10-x.conf",
        "/etc/a.d/50-qkilld.conf",
        "/run/a.d/50-z.conf",
        "/usr/a.d/o.conf",
    ]
    assert read_later(names) == names[2:]


def test_its_mark() -> None:
    assert is_ours(TEXT) and is_unchanged(TEXT)
    assert "qkillctl adopt --undo web.service" in TEXT
    assert is_ours(TEXT + "Nice=1\n") and not is_unchanged(TEXT + "Nice=1\n")
    assert not is_ours("[Service]\nExecStop=/usr/bin/qkilld-stop\n")


def test_no_text_of_the_units_gets_out_of_its_comment() -> None:
    evil = Finding(
        "k", Severity.LOSES, "x\n[Service]\nExecStart=/bin/evil\\", "y\r\n", (Line("Unit", "A=b"),)
    )
    text = text_of("w\nExecStart=/e", "u\nExecStart=/e", "1.0", changes([evil]))
    assert directives(text) == ["[Unit]", "A=b"]
    assert "\\" not in text


def test_a_file_is_written_and_taken_back(tmp_path: Path) -> None:
    drop_in = DropIn(tmp_path, "web.service")
    assert drop_in.read() == ""
    assert drop_in.remove() is False
    drop_in.write(TEXT)
    assert drop_in.read() == TEXT == drop_in.path.read_text()
    assert drop_in.path.stat().st_mode & 0o7777 == 0o644
    assert [path.name for path in drop_in.directory.iterdir()] == ["50-qkilld.conf"]
    again = text_of("web.service", "undo", "2.0", CHANGES)
    drop_in.write(again)
    assert drop_in.read() == again
    assert drop_in.remove() is True
    assert list(tmp_path.iterdir()) == []


def test_other_files_in_the_directory_stay(tmp_path: Path) -> None:
    drop_in = DropIn(tmp_path, "web.service")
    drop_in.write(TEXT)
    (drop_in.directory / "other.conf").touch()
    drop_in.remove()
    assert [path.name for path in drop_in.directory.iterdir()] == ["other.conf"]


def test_nothing_remains_if_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(Failed, match="No space left"):
        DropIn(tmp_path / "base", "web.service").write(TEXT)
    assert list((tmp_path / "base").iterdir()) == []
    # An earlier file stays as it was.
    drop_in = DropIn(tmp_path, "web.service")
    drop_in.directory.mkdir()
    drop_in.path.write_text(TEXT)
    with pytest.raises(Failed):
        drop_in.write(text_of("web.service", "undo", "2.0", CHANGES))
    assert [path.read_text() for path in drop_in.directory.iterdir()] == [TEXT]


@pytest.mark.parametrize("text", ["[Service]\nNice=1\n", TEXT + "Nice=1\n", ""])
def test_another_file_is_left_alone(tmp_path: Path, text: str) -> None:
    drop_in = DropIn(tmp_path, "web.service")
    drop_in.directory.mkdir()
    drop_in.path.write_text(text)
    for act in (drop_in.read, drop_in.remove, lambda: drop_in.write(TEXT)):
        with pytest.raises(Failed, match="left alone"):
            act()
    assert drop_in.path.read_text() == text
    assert len(list(drop_in.directory.iterdir())) == 1


def test_no_link_is_followed(tmp_path: Path) -> None:
    drop_in = DropIn(tmp_path / "base", "web.service")
    drop_in.directory.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(TEXT)
    drop_in.path.symlink_to(elsewhere)
    for act in (drop_in.read, drop_in.remove, lambda: drop_in.write("x")):
        with pytest.raises(Failed, match="symbolic link"):
            act()
    assert elsewhere.read_text() == TEXT
    drop_in.path.unlink()
    drop_in.directory.rmdir()
    (tmp_path / "dir").mkdir()
    drop_in.directory.symlink_to(tmp_path / "dir")
    with pytest.raises(Failed, match="is a link"):
        drop_in.write(TEXT)
    assert list((tmp_path / "dir").iterdir()) == []


def test_a_directory_writable_by_others_is_refused(tmp_path: Path) -> None:
    drop_in = DropIn(tmp_path, "web.service")
    drop_in.directory.mkdir()
    drop_in.directory.chmod(0o777)
    with pytest.raises(Failed, match="other users can write to"):
        drop_in.write(TEXT)
    drop_in.directory.chmod(0o755)
    if os.geteuid() == 0:
        drop_in.write(TEXT)
        os.chown(drop_in.path, OTHER_UID, OTHER_UID)
        with pytest.raises(Failed, match="did not write"):
            drop_in.remove()


def test_without_the_right_to_write(tmp_path: Path) -> None:
    drop_in = DropIn(Path("/proc/self"), "web.service")
    with pytest.raises((AccessDenied, Failed)):
        drop_in.write(TEXT)
    if os.geteuid() != 0:
        tmp_path.chmod(0o555)
        with pytest.raises(AccessDenied, match="as root"):
            DropIn(tmp_path, "web.service").write(TEXT)
