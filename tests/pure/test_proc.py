"""Reading a fake /proc, with processes that try to deceive qkilld."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkilld.adapters import procfs
from qkilld.adapters.cgroup_unit import unit_of
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


@pytest.mark.parametrize("end", [b"\n", b"\r"])
def test_a_name_cannot_pass_for_another_line(tmp_path: Path, end: bytes) -> None:
    make_process(tmp_path, command=end + b"Uid:\t0", uid=1000)
    assert procfs.read_uid(PID, tmp_path) == 1000


@pytest.mark.parametrize("end", [b"\n", b"\r"])
def test_a_name_cannot_pass_for_a_pending_signal_or_an_id(tmp_path: Path, end: bytes) -> None:
    make_process(tmp_path, command=end + b"ShdPnd:\t100")
    assert not procfs.is_dying(PID, tmp_path)
    name = end.replace(b"\n", b"\\n") + b"NSpid:\t1"
    (tmp_path / str(PID) / "status").write_bytes(b"Name:\t" + name + b"\nNSpid:\t4711\t9\n")
    assert procfs.read_namespaced_pids(PID, tmp_path) == (4711, 9)


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
    assert procfs.read_names(PID, tmp_path) == (None, "", False, True)
    assert procfs.read_unit(PID, tmp_path) is None


def test_a_unit_that_cannot_be_read_is_not_no_unit(tmp_path: Path) -> None:
    make_process(tmp_path)
    (tmp_path / str(PID) / "cgroup").write_text("0::/\n")
    assert procfs.read_unit(PID, tmp_path) == Unit()
    # With ProtectProc=invisible or hidepid=2, process 1 is missing.
    (tmp_path / "1" / "cgroup").unlink()
    assert procfs.read_unit(PID, tmp_path) is None


def test_a_cgroup_that_a_user_named_is_nobody_elses_unit(tmp_path: Path) -> None:
    make_process(tmp_path)
    path = "/user.slice/user-7.slice/user@7.service/a b.service"
    (tmp_path / str(PID) / "cgroup").write_text(f"0::{path}\n")
    assert procfs.read_unit(PID, tmp_path) == Unit("user@7.service", "?")


@pytest.mark.parametrize("end", ["\r", "\x0b", "\x1c", "\x85", "\u2028"])
def test_a_cgroup_cannot_pass_for_another_line(tmp_path: Path, end: str) -> None:
    make_process(tmp_path)
    path = f"/user.slice/user-7.slice/user@7.service/x{end}0::/system.slice/web.service"
    (tmp_path / str(PID) / "cgroup").write_bytes(f"0::{path}\n".encode())
    unit = procfs.read_unit(PID, tmp_path)
    assert unit is not None
    assert unit.system == "user@7.service"


def test_a_mount_cannot_pass_for_another_line(tmp_path: Path) -> None:
    make_process(tmp_path)
    other = b"36 25 8:1 / /disk rw - ext4 /dev/sda1 rw"
    (tmp_path / str(PID) / "mountinfo").write_bytes(
        b"30 25 0:30 / /tmp/x\r" + other + b" rw - tmpfs tmpfs rw\n"
    )
    assert procfs.Mounts(PID, tmp_path).get(36) is None


@pytest.mark.parametrize(
    ("cmdline", "name"),
    [
        (b"qemu\0-M\0none\0", ""),
        # A process that is exiting, or that hides its arguments.
        (b"", None),
        (b"qemu\0" + (1 << 20) * b"x" + b"\0-name\0web\0", None),
        (b"qemu\0-name\0web\0" + (1 << 20) * b"x", "web"),
    ],
    ids=["none", "empty", "cut off before", "cut off after"],
)
def test_an_unknown_name_is_not_no_name(tmp_path: Path, cmdline: bytes, name: str | None) -> None:
    make_process(tmp_path, cmdline=cmdline)
    assert procfs.read_names(PID, tmp_path)[0] == name


def test_name_and_uuid_of_a_process(tmp_path: Path) -> None:
    uuid = "123E4567-E89B-12D3-A456-426614174000"
    make_process(
        tmp_path, cmdline=b"qemu\0-name\0evil\x1b[2J\nname\0-uuid\0" + uuid.encode() + b"\0"
    )
    name, found, *_ = procfs.read_names(PID, tmp_path)
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
        # A word like an option is not one if it is the value of another option.
        ("-append -name evil -name web", ("web", "")),
        ("-name -uuid", ("-uuid", "")),
        ("-name", ("", "")),
        ("disk.img -name web", ("web", "")),
        ("", ("", "")),
    ],
)
def test_qemu_arguments(arguments: str, expected: tuple[str, str]) -> None:
    assert name_and_uuid(["qemu", *arguments.split()]) == expected


V1 = "12:pids:/x\n1:name=systemd:{}\n"
V1_BESIDE_V2 = "12:pids:/x\n1:name=systemd:{}\n0::/\n"
V2 = "0::{}\n"
V2_BESIDE_V1 = "1:name=systemd:/\n0::{}\n"


@pytest.mark.parametrize(
    ("form", "uses_v2"),
    [(V1, None), (V2, None), (V1_BESIDE_V2, False), (V2_BESIDE_V1, True)],
)
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
def test_units(form: str, uses_v2: bool | None, path: str, init: str, expected: Unit) -> None:
    assert unit_of(form.format(path), form.format(init), lambda: uses_v2) == expected


def test_unit_without_any_hierarchy() -> None:
    assert unit_of("", "", lambda: None) == Unit()
    assert unit_of("garbage", "more garbage\n::", lambda: None) == Unit()


def test_a_unit_in_one_of_two_hierarchies_is_unknown() -> None:
    own = "1:name=systemd:/\n0::/system.slice/web.service\n"
    assert unit_of(own, own, lambda: None) is None


UNIFIED = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
ELSEWHERE = "40 23 0:37 / /mnt/systemd rw - cgroup cgroup rw,name=systemd\n"
LEGACY = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
)
HYBRID = LEGACY + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
HYBRID_232 = LEGACY.replace("- cgroup cgroup", "- cgroup2 cgroup2")


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        (UNIFIED, Unit("v2.service")),
        (UNIFIED + ELSEWHERE, Unit("v2.service")),
        (HYBRID, Unit("v2.service")),
        (HYBRID_232, Unit("v2.service")),
        (LEGACY, Unit("v1.service")),
        ("", None),
    ],
)
def test_the_hierarchy_that_systemd_uses(
    tmp_path: Path, mounts: str, expected: Unit | None
) -> None:
    make_process(tmp_path)
    text = "2:name=systemd:/system.slice/v1.service\n0::/system.slice/v2.service\n"
    (tmp_path / str(PID) / "cgroup").write_text(text)
    (tmp_path / "1" / "cgroup").write_text("2:name=systemd:/init.scope\n0::/init.scope\n")
    (tmp_path / "self").mkdir()
    root = "23 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
    (tmp_path / "self/mountinfo").write_text(root + mounts)
    assert procfs.read_unit(PID, tmp_path) == expected


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


@pytest.mark.parametrize("cmdline", [b"qemu\0" + (256 << 10) * b"x", 10_001 * b"x\0"])
def test_a_command_line_that_is_too_long_is_refused(tmp_path: Path, cmdline: bytes) -> None:
    make_process(tmp_path, cmdline=cmdline)
    with pytest.raises(OSError, match="too long"):
        procfs.read_command_line(PID, tmp_path)
    assert procfs.read_names(PID, tmp_path)[0] is None


@pytest.mark.parametrize(
    ("threads", "children"),
    [(2, [1, 2]), (100, [*range(1, 101)]), (procfs.MAX_PARENTS + 1, [])],
)
def test_children_of_all_threads_but_not_of_thousands(
    tmp_path: Path, threads: int, children: list[int]
) -> None:
    for tid in range(1, threads + 1):
        task = tmp_path / str(PID) / "task" / str(tid)
        task.mkdir(parents=True)
        (task / "children").write_text(f"{tid} ")
    assert sorted(procfs.read_children(PID, tmp_path)) == children
    assert procfs.read_children(PID + 1, tmp_path) == []
