"""Pidfiles: their syntax, their writers, and whether the process is still the same."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from qkilld.adapters import pidfile, procfs
from qkilld.adapters.blockable import Unanswered
from qkilld.adapters.pidfile import Content, PathStep
from qkilld.model.errors import (
    AccessDenied,
    Failed,
    InvalidArgs,
    NoSuchProcess,
    ProcessChanged,
    UnknownIdentity,
)
from tests.lab import needs
from tests.lab.log import wait_for_path
from tests.lab.process import OTHER_UID, children, end, spawn


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that exits when its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        yield process


@pytest.mark.parametrize(
    ("data", "pid"),
    [
        (b"4711\n", 4711),
        (b"4711", 4711),
        (b"  4711 \r\n\n", 4711),
        (b"0004711\n", 4711),
        (b"4294967295", 2**32 - 1),
        (b"1".rjust(pidfile.MAX_BYTES), 1),
    ],
)
def test_content(data: bytes, pid: int) -> None:
    assert pidfile.parse_pid(data, "FILE") == pid


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\n", b"0", b"-1", b"+1", b"1.5", b"0x10", b"1_000", b"4294967296"),
        *(b"1 2", b"1\n2\n", b"1\0", b"\xff\xfe1\x00", "٤٧".encode(), b"web"),
        b"1".rjust(pidfile.MAX_BYTES + 1),
        b"9" * pidfile.MAX_BYTES,
    ],
)
def test_no_content(data: bytes) -> None:
    with pytest.raises(InvalidArgs, match="FILE is not a pidfile"):
        pidfile.parse_pid(data, "FILE")


PROCESS, CALLER, STRANGER = 107, 1000, 1001


def step(uid: int, mode: int, gid: int = 0, kind: int = stat.S_IFDIR) -> PathStep:
    return PathStep("STEP", uid, gid, kind | mode)


def check(*steps: PathStep) -> None:
    pidfile.check_writers(Content(b"1", 0.0, steps), PROCESS, CALLER, "FILE")


@pytest.mark.parametrize(
    ("uid", "gid", "mode", "good"),
    [
        (0, 0, 0o644, True),
        (CALLER, STRANGER, 0o600, True),
        (PROCESS, STRANGER, 0o644, True),
        (PROCESS, PROCESS, 0o664, True),  # a group of the user's own
        (0, 0, 0o664, True),
        (PROCESS, STRANGER, 0o664, False),
        (0, 100, 0o664, False),
        (STRANGER, 0, 0o644, False),
        (0, 0, 0o666, False),
        (CALLER, 0, 0o602, False),
    ],
)
@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFDIR])
def test_writer(uid: int, gid: int, mode: int, good: bool, kind: int) -> None:
    steps = [step(0, 0o755), step(uid, mode, gid, kind)]
    if kind == stat.S_IFDIR:
        steps.append(step(0, 0o644, kind=stat.S_IFREG))
    if good:
        check(*steps)
        return
    with pytest.raises(AccessDenied, match="Pidfile FILE"):
        check(*steps)


def test_a_symbolic_link_must_belong_to_root_the_caller_or_the_process() -> None:
    file = step(0, 0o644, kind=stat.S_IFREG)
    for uid in (0, CALLER, PROCESS):
        check(step(0, 0o1777), step(uid, 0o777, kind=stat.S_IFLNK), file)
    with pytest.raises(AccessDenied, match="reached through symbolic link STEP"):
        check(step(0, 0o1777), step(STRANGER, 0o777, kind=stat.S_IFLNK), file)


def test_the_process_it_was_written_for(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    path = tmp_path / "pid"
    path.write_text(f"{child.pid}\n")
    path.chmod(0o644)
    named = pidfile.read(str(path))
    assert named.pid == child.pid
    assert named.start_time == procfs.read_stat(child.pid).start_time


def test_a_process_that_is_unreadable_for_a_moment(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy host, a process may be unreadable during execve(2)."""
    stat = procfs.read_stat(child.pid)
    (tmp_path / "pid").write_text(str(child.pid))
    (tmp_path / "pid").chmod(0o644)
    reads = Mock(side_effect=[Unanswered(), Unanswered(), stat])
    monkeypatch.setattr(procfs, "read_stat", reads)
    assert pidfile.read(str(tmp_path / "pid")).start_time == stat.start_time
    monkeypatch.setattr(procfs, "PATIENT_S", 0)
    reads.side_effect = Unanswered()
    with pytest.raises(UnknownIdentity, match="Try again later"):
        pidfile.read(str(tmp_path / "pid"))


def test_a_pidfile_behind_a_symbolic_link(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    (tmp_path / "pid").write_text(str(child.pid))
    (tmp_path / "pid").chmod(0o644)
    (tmp_path / "link").symlink_to("pid")
    assert pidfile.read(str(tmp_path / "link")).pid == child.pid


def test_a_process_that_proc_hides_is_not_gone(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """hidepid= and ProtectProc= hide /proc/PID of other users' processes."""
    (tmp_path / "pid").write_text(str(child.pid))
    (tmp_path / "pid").chmod(0o644)
    monkeypatch.setattr(procfs, "PROC", tmp_path)
    read_stat = procfs.read_stat
    monkeypatch.setattr(procfs, "read_stat", lambda pid: read_stat(pid, tmp_path))
    with pytest.raises(UnknownIdentity, match="is hidden"):
        pidfile.read(str(tmp_path / "pid"))
    child.kill()
    child.wait()
    with pytest.raises(NoSuchProcess, match="is gone"):
        pidfile.read(str(tmp_path / "pid"))


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that all users may traverse, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="qkilld-pidfile-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("through", ["link", "directory link", "directory"])
def test_a_way_that_another_user_chose(
    open_directory: Path, child: subprocess.Popen[bytes], through: str, relative: bool
) -> None:
    """The owner of the directory or link could make the caller stop another user's process."""
    needs.root("to give files away")
    theirs, ours = open_directory / "theirs", open_directory / "ours"
    ours.mkdir()
    theirs.mkdir()
    (ours / "vm.pid").write_text(str(child.pid))
    (ours / "vm.pid").chmod(0o644)
    to = Path("../ours") if relative else ours
    if through == "link":
        path = theirs / "vm.pid"
        path.symlink_to(to / "vm.pid")
    elif through == "directory link":
        (theirs / "link").symlink_to(to)
        path = theirs / "link/vm.pid"
    else:
        path = theirs / "../ours/vm.pid" if relative else theirs / "vm.pid"
        (theirs / "vm.pid").hardlink_to(ours / "vm.pid")
    assert pidfile.read(str(path)).pid == child.pid
    for each in (theirs, *theirs.iterdir()):
        if each.is_dir() or each.is_symlink():
            os.lchown(each, OTHER_UID, OTHER_UID)
    with pytest.raises(AccessDenied, match=f"belongs to uid {OTHER_UID}"):
        pidfile.read(str(path))
    assert pidfile.read(str(ours / "vm.pid")).pid == child.pid


def test_a_link_of_another_user_in_a_directory_for_all(
    open_directory: Path, child: subprocess.Popen[bytes]
) -> None:
    needs.root("to give files away")
    (open_directory / "vm.pid").write_text(str(child.pid))
    (open_directory / "vm.pid").chmod(0o644)
    (open_directory / "link").symlink_to("vm.pid")
    open_directory.chmod(0o1777)
    assert pidfile.read(str(open_directory / "link")).pid == child.pid
    os.lchown(open_directory / "link", OTHER_UID, OTHER_UID)
    with pytest.raises(AccessDenied, match="symbolic link link"):
        pidfile.read(str(open_directory / "link"))


def test_no_descriptor_is_left_open(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    (tmp_path / "pid").write_text(str(child.pid))
    (tmp_path / "pid").chmod(0o644)
    (tmp_path / "link").symlink_to(tmp_path / "pid")
    (tmp_path / "loop").symlink_to("loop")
    before = psutil.Process().num_fds()
    pidfile.read(str(tmp_path / "link"))
    for name in ("none", "loop", "pid/x"):
        with pytest.raises(InvalidArgs):
            pidfile.read(str(tmp_path / name))
    assert psutil.Process().num_fds() == before


def test_an_older_file_than_the_process(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    path = tmp_path / "pid"
    path.write_text(str(child.pid))
    path.chmod(0o644)
    before = time.time() - 60
    os.utime(path, (before, before))
    with pytest.raises(ProcessChanged, match=rf"Process {child.pid} .*{path}"):
        pidfile.read(str(path))


def test_a_process_that_is_gone(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    path = tmp_path / "pid"
    path.write_text(str(child.pid))
    path.chmod(0o644)
    child.communicate(b"\n")
    with pytest.raises(NoSuchProcess, match="stale"):
        pidfile.read(str(path))


def test_unreadable_paths_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # without a writer: opening it must not block
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero"), Path("/dev/tty")):
        with pytest.raises(InvalidArgs, match="pidfile"):
            pidfile.read(str(path))
    for path in (tmp_path / "none", tmp_path / "loop", tmp_path / "none\x1b[2J/x"):
        with pytest.raises(InvalidArgs, match="Cannot read pidfile") as caught:
            pidfile.read(str(path))
        assert str(caught.value).isprintable()
    with pytest.raises(InvalidArgs, match="Cannot read pidfile"):
        pidfile.read("/a\0b")


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidArgs, match="is not a pidfile"):
        pidfile.read(str(path))


def test_name_with_parentheses_and_blanks_in_stat(tmp_path: Path) -> None:
    """Field 2 of /proc/PID/stat is a name that the owner of the process chooses."""
    program = "import ctypes; ctypes.CDLL(None).prctl(15, b') R 1 (', 0, 0, 0); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert b") R 1 (" in Path(f"/proc/{process.pid}/stat").read_bytes()
        started = pidfile.boot_time() + procfs.read_stat(process.pid).start_time / os.sysconf(
            "SC_CLK_TCK"
        )
        assert abs(time.time() - started) < 30
        process.communicate(b"\n")


def end_namespace(unshare: subprocess.Popen[bytes]) -> None:
    """Kill the first process of the namespace, for which unshare waits. When that process ends, the
    kernel kills all others in the namespace."""
    for pid in children(unshare.pid):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        unshare.wait(10)
    end(unshare)


def test_a_qemu_in_another_pid_namespace(tmp_path: Path) -> None:
    """The pidfile has the process's id in its namespace. The lock on the pidfile shows which
    process it is."""
    needs.root("a PID namespace")
    qemu = needs.program("qemu-system-x86_64", "qemu-system-x86")
    path = tmp_path / "pid"
    unshare = [str(needs.program("unshare", "util-linux")), "--fork", "--pid", "--kill-child"]
    idle = [str(qemu), "-M", "none", "-nodefaults", "-display", "none", "-pidfile", str(path)]
    process = spawn([*unshare, *idle])
    try:
        wait_for_path(path, 30)
        deadline = time.monotonic() + 30
        while not path.read_bytes().strip():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert path.read_text().strip() == "1"
        (inside,) = children(process.pid)
        assert pidfile.read(str(path)).pid == inside
    finally:
        end_namespace(process)


def test_process_ids_of_another_namespace_are_not_confused(tmp_path: Path) -> None:
    needs.root("a PID namespace")
    unshare = [str(needs.program("unshare", "util-linux")), "--fork", "--pid", "--kill-child"]
    # Choose an id in the namespace that does not exist in ours.
    last = int(Path("/proc/sys/kernel/pid_max").read_text()) - 2
    while Path(f"/proc/{last}").exists():
        last -= 1
    script = f"echo {last - 1} >/proc/sys/kernel/ns_last_pid; sleep 60 & wait"
    process = spawn([*unshare, "--mount-proc", "sh", "-c", script])
    try:
        deadline = time.monotonic() + 30
        while not any(last in procfs.read_namespaced_pids(pid)[1:] for pid in procfs.pids()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        path = tmp_path / "pid"
        path.write_text(str(last))
        with pytest.raises(Failed, match="another PID namespace"):
            pidfile.read(str(path))
    finally:
        end_namespace(process)
