"""Pidfiles: what is one, who may have written it, and whether its process is still the same."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.adapters import pidfile
from qkilld.adapters.pidfile import Content
from qkilld.model.errors import AccessDenied, InvalidArgs, NoSuchProcess, ProcessChanged


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with its standard input."""
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


@pytest.mark.parametrize(
    ("uid", "mode", "good"),
    [
        (0, 0o644, True),
        (CALLER, 0o600, True),
        (PROCESS, 0o644, True),
        (PROCESS, 0o664, True),
        (STRANGER, 0o644, False),
        (0, 0o666, False),
        (CALLER, 0o602, False),
    ],
)
def test_writer(uid: int, mode: int, good: bool) -> None:
    content = Content(b"1", 0.0, uid, stat.S_IFREG | mode)
    if good:
        pidfile.check_writer(content, PROCESS, CALLER, "FILE")
    else:
        with pytest.raises(AccessDenied, match="FILE"):
            pidfile.check_writer(content, PROCESS, CALLER, "FILE")


def test_the_process_it_was_written_for(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    path = tmp_path / "pid"
    path.write_text(f"{child.pid}\n")
    path.chmod(0o644)
    named = pidfile.read(str(path))
    assert named.pid == child.pid
    assert named.start_time == pidfile.start_time_of(child.pid)


def test_a_symbolic_link_to_it(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    (tmp_path / "pid").write_text(str(child.pid))
    (tmp_path / "pid").chmod(0o644)
    (tmp_path / "link").symlink_to("pid")
    assert pidfile.read(str(tmp_path / "link")).pid == child.pid


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


def test_what_cannot_be_read(tmp_path: Path) -> None:
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
    """Field 2 of /proc/PID/stat is a name that its owner chooses."""
    program = "import ctypes; ctypes.CDLL(None).prctl(15, b') R 1 (', 0, 0, 0); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert b") R 1 (" in Path(f"/proc/{process.pid}/stat").read_bytes()
        started = pidfile.boot_time() + pidfile.start_time_of(process.pid) / os.sysconf(
            "SC_CLK_TCK"
        )
        assert abs(time.time() - started) < 30
        process.communicate(b"\n")
