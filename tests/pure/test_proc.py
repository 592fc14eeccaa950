"""Reading /proc: a tree of files stands in for it, with processes that want to be misread."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkilld.adapters import procfs
from qkilld.adapters.cgroup import unit_of
from qkilld.adapters.qemu_args import name_and_uuid
from qkilld.model.guest import Unit
from qkilld.model.text import printable

PID = 4711
_STAT_TAIL = (
    " S 1 4711 4711 0 -1 4194304 100 0 0 0 5 6 0 0 20 0 3 0 194906 1000 200 18446744073709551615"
)


def make_process(
    proc: Path,
    *,
    command: bytes = b"qemu-system-x86",
    uid: int = 1000,
    exe: str | None = "/usr/bin/qemu-system-x86_64",
    cmdline: bytes = b"qemu\0",
) -> None:
    directory = proc / str(PID)
    directory.mkdir(parents=True)
    (directory / "stat").write_bytes(b"4711 (" + command + b")" + _STAT_TAIL.encode() + b"\n")
    (directory / "status").write_bytes(
        b"Name:\t" + command.replace(b"\n", b"\\n") + b"\nUid:\t%d\t0\t0\t0\n" % uid
    )
    (directory / "cmdline").write_bytes(cmdline)
    (directory / "cgroup").write_text("0::/system.slice/web.service\n")
    if exe is not None:
        (directory / "exe").symlink_to(exe)
    (proc / "1").mkdir()
    (proc / "1" / "cgroup").write_text("0::/init.scope\n")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (b"qemu-system-x86", "qemu-system-x86"),
        (b"a) R 0 0 0 (b", "a) R 0 0 0 (b"),
        (b")))", ")))"),
        (b"", ""),
        (b"two words", "two words"),
        (b"line\nbreak", "line\N{REPLACEMENT CHARACTER}break"),
        (b"\xff\xfe", "\N{REPLACEMENT CHARACTER}" * 2),
        (b"\x1b[31mred", "\N{REPLACEMENT CHARACTER}[31mred"),
    ],
)
def test_hostile_commands(tmp_path: Path, command: bytes, shown: str) -> None:
    make_process(tmp_path, command=command)
    identity = procfs.read_identity(PID, tmp_path)
    assert (identity.command, identity.state, identity.start_time) == (shown, "S", 194906)


def test_a_name_cannot_pass_for_a_uid_line(tmp_path: Path) -> None:
    make_process(tmp_path, command=b"x\nUid:\t0", uid=1000)
    assert procfs.read_uid(PID, tmp_path) == 1000


@pytest.mark.parametrize(
    ("exe", "expected"),
    [
        ("/usr/bin/qemu-system-x86_64", ("/usr/bin/qemu-system-x86_64", False)),
        ("/usr/bin/qemu-system-x86_64 (deleted)", ("/usr/bin/qemu-system-x86_64", True)),
        ("/x (deleted) (deleted)", ("/x (deleted)", True)),
        (None, ("", False)),
    ],
)
def test_executables(tmp_path: Path, exe: str | None, expected: tuple[str, bool]) -> None:
    make_process(tmp_path, exe=exe)
    assert procfs.read_executable(PID, tmp_path) == expected


def test_a_process_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        procfs.read_identity(PID, tmp_path)
    assert procfs.read_name_and_uuid(PID, tmp_path) == ("", "")
    assert procfs.read_unit(PID, tmp_path) == Unit()


def test_name_and_uuid_of_a_process(tmp_path: Path) -> None:
    uuid = "123E4567-E89B-12D3-A456-426614174000"
    make_process(
        tmp_path, cmdline=b"qemu\0-name\0evil\x1b[2J\nname\0-uuid\0" + uuid.encode() + b"\0"
    )
    name, found = procfs.read_name_and_uuid(PID, tmp_path)
    assert name == "evil\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}name"
    assert found == uuid.lower()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-name web", ("web", "")),
        ("--name web", ("web", "")),
        ("-name guest=web,debug-threads=on", ("web", "")),
        ("-name debug-threads=on,guest=web", ("web", "")),
        ("-name web,process=x", ("web", "")),
        ("-name a,,b", ("a,b", "")),
        ("-name one -name two", ("two", "")),
        ("-nodefaults -name web -uuid U", ("web", "U")),
        ("-S -enable-kvm -daemonize -name web", ("web", "")),
        # What another option takes as its value is no option of its own.
        ("-append -name evil -name web", ("web", "")),
        ("-name -uuid", ("-uuid", "")),
        ("-name", ("", "")),
        ("disk.img -name web", ("web", "")),
        ("", ("", "")),
    ],
)
def test_qemu_arguments(arguments: str, expected: tuple[str, str]) -> None:
    assert name_and_uuid(["qemu", *arguments.split()]) == expected


V1 = "12:pids:/x\n1:name=systemd:{}\n0::/\n"
V2 = "0::{}\n"


@pytest.mark.parametrize("form", [V1, V2])
@pytest.mark.parametrize(
    ("path", "init", "expected"),
    [
        ("/system.slice/web.service", "/init.scope", Unit("web.service")),
        ("/system.slice/web.service/sub", "/init.scope", Unit("web.service")),
        ("/machine.slice/machine-q.scope/libvirt/emulator", "/", Unit("machine-q.scope")),
        ("/a.slice/a-b.slice/web.service", "/init.scope", Unit("web.service")),
        ("/system.slice/_web.service", "/init.scope", Unit("web.service")),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/web.service",
            "/init.scope",
            Unit("user@1000.service", "web.service"),
        ),
        (
            "/user.slice/user-1000.slice/session-3.scope",
            "/init.scope",
            Unit("session-3.scope"),
        ),
        ("/box/system.slice/web.service", "/box/init.scope", Unit("web.service")),
        ("/box/system.slice/web.service", "/boxer/init.scope", Unit()),
        ("/", "/", Unit()),
        ("/docker/0123", "/", Unit()),
        ("/system.slice", "/init.scope", Unit()),
    ],
)
def test_units(form: str, path: str, init: str, expected: Unit) -> None:
    assert unit_of(form.format(path), form.format(init)) == expected


def test_unit_without_any_hierarchy() -> None:
    assert unit_of("", "") == Unit()
    assert unit_of("garbage", "more garbage\n::") == Unit()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("web", "web"),
        ("Größe 大", "Größe 大"),
        ("a\0b\tc", "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"),
        ("\N{RIGHT-TO-LEFT OVERRIDE}x", "\N{REPLACEMENT CHARACTER}x"),
        ("\N{ZERO WIDTH SPACE}", "\N{REPLACEMENT CHARACTER}"),
        ("\N{LINE SEPARATOR}", "\N{REPLACEMENT CHARACTER}"),
        ("\udcff", "\N{REPLACEMENT CHARACTER}"),
        ("x" * 11, "x" * 9 + "…"),
        ("x" * 10, "x" * 10),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text, 10) == shown
