"""The command lines of storage servers."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.adapters.target_threads import MAX_OF_TARGET
from qkilld.evidence import exports
from qkilld.evidence.exports import (
    TIMEOUT_S,
    ExportReader,
    WaitBudget,
    exported_files,
    leaves_with_client,
)
from tests.evidence.until import until

QSD = [
    "qemu-storage-daemon",
    *("--blockdev", "driver=file,node-name=f0,filename=/images/one"),
    *("--blockdev", '{"driver": "qcow2", "node-name": "q0", "file": "f0"}'),
    *("--blockdev", "driver=raw,node-name=r1,file.driver=file,file.filename=two"),
    *("--export", "type=nbd,id=e0,node-name=q0,name=disk,writable=on"),
    *("--export", '{"type": "nbd", "id": "e1", "node-name": "r1"}'),
    *("--export", "nbd,id=e2,node-name=missing,name=other"),
]


def test_which_file_is_exported_under_a_name() -> None:
    assert exported_files(QSD) == {"disk": "/images/one", "r1": "two"}
    assert exported_files(["--blockdev", "driver=raw,node-name=a,file=a", "--export", "nbd"]) == {}
    loop = ["--blockdev", "driver=raw,node-name=a,file=a", "--export", "nbd,node-name=a"]
    assert exported_files(["qemu-storage-daemon", *loop]) == {}


@pytest.mark.parametrize(
    ("command_line", "leaves"),
    [
        ("/usr/bin/qemu-nbd -f raw -k /t disk", True),
        ("qemu-nbd -e 3 disk", True),
        ("qemu-nbd -t disk", False),
        ("qemu-nbd -rtk /socket disk", False),
        ("qemu-nbd -kt disk", True),
        ("qemu-nbd --persistent disk", False),
        ("qemu-nbd --pers disk", False),
        ("qemu-nbd --port 1 disk", True),
        ("nbdkit -U /socket file disk", False),
        ("nbdkit -fs file disk", True),
        ("nbdkit -sU - file disk", True),
        ("nbdkit -rst 5 file disk", True),
        ("nbdkit -i localhost file disk", False),
        ("nbdkit -Us file disk", False),
        ("nbdkit --single file disk", True),
        ("nbdkit --si file disk", True),
        ("nbdkit --stdin file disk", True),
        ("nbdkit --swap --short-options --selinux-label=s file disk", False),
        ("nbdkit -f file disk --run qemu", True),
        ("nbdkit --run=qemu file disk", True),
        ("nbdkit --ru qemu file disk", True),
        ("nbdkit --filter=exitlast file disk", True),
        ("nbdkit --filter cow --filter exitlast file disk", True),
        ("nbdkit --fi=exitlast file disk", True),
        ("nbdkit --filter=/lib/nbdkit/nbdkit-exitlast-filter.so file disk", True),
        ("nbdkit --filter=exitwhen file disk exit-when-process-exits=7", True),
        ("nbdkit --filter=cow file exitlast", False),
        ("nbdkit -r file disk", False),
        ("nbdkit --readonly file disk", False),
        ("nbdkit eval open=--running", False),
        ("socat UNIX-LISTEN:/a UNIX:/b", True),
        ("qemu-storage-daemon -t", False),
        ("", False),
    ],
)
def test_servers_that_exit_with_their_client(command_line: str, leaves: bool) -> None:
    assert leaves_with_client(command_line.split(" ")) is leaves


@pytest.fixture
def blocked(tmp_path: Path) -> Iterator[Path]:
    """Yield a directory like /proc. Reading the command line of server 7 or 8 blocks until a test
    writes "nbdkit --single" to it."""
    for name in ("7", "8"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status").write_text("Name:\tnbdkit\nUid:\t4321\t4321\t4321\t4321\n")
        (tmp_path / name / "cwd").symlink_to("/")
        os.mkfifo(tmp_path / name / "cmdline")
    yield tmp_path
    for pid in (7, 8):
        write_command_line(tmp_path, pid)


def threads_of(pid: int) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"target-{pid}"]


def write_command_line(proc: Path, pid: int) -> None:
    """Let all threads read a command line, and wait for their end."""
    path = proc / str(pid) / "cmdline"
    while threads := threads_of(pid):
        with contextlib.suppress(OSError):  # ENXIO: no thread has opened it yet.
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            os.write(fd, b"nbdkit\0--single\0")
            os.close(fd)
        threads[0].join(0.1)


def test_command_lines_that_block_take_few_threads_and_little_time(blocked: Path) -> None:
    budget = WaitBudget()
    readers = [ExportReader(7, budget, blocked) for _ in range(10)]
    readers.append(ExportReader(8, budget, blocked))
    start = time.monotonic()
    assert [reader.leaves() for reader in readers] == [None] * 11
    assert [reader.path_of("") for reader in readers] == [""] * 11
    assert time.monotonic() - start < 4 * TIMEOUT_S
    assert (len(threads_of(7)), len(threads_of(8))) == (MAX_OF_TARGET, 1)
    write_command_line(blocked, 7)
    # Readers that already had a thread do not need a new one. Those without get one.
    assert any(reader.leaves() for reader in readers[:MAX_OF_TARGET])
    write_command_line(blocked, 7)  # Those that read nothing try again.
    (blocked / "7/cmdline").unlink()
    (blocked / "7/cmdline").write_bytes(b"nbdkit\0")
    budget.renew()
    assert until(readers[9].leaves, lambda leaves: leaves is not None) is False


def test_a_command_line_that_is_unreadable_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is empty during execve(2), and when the process is exiting."""
    monkeypatch.setattr(exports, "_RETRY_S", 0.0)
    write_process(tmp_path, 7, 1, "nbdkit")
    reader = ExportReader(7, WaitBudget(), tmp_path)
    exiting = ExportReader(7, WaitBudget(), tmp_path)

    def leaves(reader: ExportReader) -> bool | None:
        found = reader.leaves()
        until(lambda: threads_of(7), lambda threads: not threads)
        return found

    assert leaves(reader) is None
    assert [leaves(exiting) for _ in range(exports._MAX_TRIES)] == [None] * exports._MAX_TRIES
    (tmp_path / "7/cmdline").write_bytes(b"nbdkit\0--single\0")
    assert until(reader.leaves, lambda leaves: leaves is not None) is True
    assert exiting.leaves() is None


def test_tries_are_not_used_up_by_one_sample(tmp_path: Path) -> None:
    write_process(tmp_path, 7, 1, "nbdkit")
    reader = ExportReader(7, WaitBudget(), tmp_path)
    for _ in range(2 * exports._MAX_TRIES):
        reader.path_of("")
    (tmp_path / "7/cmdline").write_bytes(b"nbdkit\0--single\0")
    assert until(reader.leaves, lambda leaves: leaves is not None) is True


def write_process(proc: Path, pid: int, parent: int, command: str, *argv: str) -> None:
    (proc / f"{pid}").mkdir()
    (proc / f"{pid}/stat").write_text(f"{pid} ({command}) S {parent} " + "0 " * 48)
    (proc / f"{pid}/status").write_text(f"Name:\t{command}\nUid:\t4321\t4321\t4321\t4321\n")
    (proc / f"{pid}/cmdline").write_text("".join(f"{word}\0" for word in argv))
    (proc / f"{pid}/cwd").symlink_to("/")


@pytest.mark.parametrize("option", ["--exit-with-parent", "--exi"])
@pytest.mark.parametrize(
    ("parent", "leaves"),
    [
        (9, True),  # QEMU itself: the server was started, and then its parent became QEMU.
        (5, True),  # The script that runs QEMU.
        (4, False),  # The script's service manager.
        (1, False),
        (8, False),
    ],
)
def test_a_server_that_exits_with_its_parent(
    tmp_path: Path, option: str, parent: int, leaves: bool
) -> None:
    """This is an ordinary end only if the parent exits when the guest does."""
    for pid, above, command in ((1, 0, "init"), (4, 1, "systemd"), (5, 4, "sh"), (8, 1, "sh")):
        write_process(tmp_path, pid, above, command)
    write_process(tmp_path, 9, 5, "qemu")
    write_process(tmp_path, 7, parent, "nbdkit", "nbdkit", option, "file", "disk")
    assert ExportReader(7, WaitBudget(), tmp_path, guest=9).leaves() is leaves
