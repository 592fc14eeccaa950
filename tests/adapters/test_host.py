"""An unreadable command line delays nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from qkilld.adapters import names as names_module
from qkilld.adapters import procfs
from qkilld.adapters.host import LocalHost, _identities
from qkilld.model.errors import Failed
from qkilld.model.guest import Identity

QEMU = Identity(17, 99, 0, "qemu", "S", "/usr/bin/qemu-system-x86_64", False)


@pytest.fixture
def never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BinaryIO]:
    """Make a FIFO in tmp_path the command line of process 17; yield its end for writing. Reads of
    the command line block until this end is closed."""
    monkeypatch.setattr(names_module, "TIMEOUT_S", 0.05)
    (tmp_path / "17").mkdir()
    os.mkfifo(tmp_path / "17/cmdline")
    before = set(threading.enumerate())
    # Open the FIFO for reading, too, because open(2) only for writing would wait for a reader.
    with os.fdopen(os.open(tmp_path / "17/cmdline", os.O_RDWR), "wb") as writer:
        yield writer
    for thread in set(threading.enumerate()) - before:
        thread.join()


def test_a_blocked_read_costs_a_moment_and_one_thread(never_ends: BinaryIO, tmp_path: Path) -> None:
    async def ask() -> None:
        host = LocalHost(tmp_path)
        threads = threading.active_count()
        for _ in range(5):
            assert (await host.label(QEMU)).name is None
        assert threading.active_count() == threads + 1
        # The late result is cached.
        never_ends.write(b"qemu\0-name\0web\0")
        never_ends.close()
        for _ in range(3000):
            if (await host.label(QEMU)).name == "web":
                break
            await asyncio.sleep(0.01)
        (tmp_path / "17/cmdline").unlink()
        assert (await host.label(QEMU)).name == "web"

    asyncio.run(ask())


def test_another_program_of_the_process_is_read_anew(tmp_path: Path) -> None:
    async def ask() -> list[str | None]:
        host = LocalHost(tmp_path)
        (tmp_path / "17").mkdir()
        (tmp_path / "17/cmdline").write_bytes(b"qemu\0-name\0one\0")
        names = [(await host.label(QEMU)).name]
        (tmp_path / "17/cmdline").write_bytes(b"qemu\0-name\0two\0")
        names.append((await host.label(QEMU)).name)
        other = Identity(17, 99, 0, "qemu", "S", "/usr/bin/qemu-kvm", False)
        names.append((await host.label(other)).name)
        return names

    assert asyncio.run(ask()) == ["one", "one", "two"]


def test_a_path_that_the_kernel_does_not_show_hides_no_other_process(tmp_path: Path) -> None:
    """readlink(2) of /proc/PID/exe fails if the path has 4096 bytes or more."""
    name, before = "d" * 250, os.open(".", os.O_PATH)
    os.chdir(tmp_path)
    try:
        for _ in range(20):
            Path(name).mkdir()
            os.chdir(name)
        shutil.copy("/bin/sleep", "sleep")
        child = subprocess.Popen(["./sleep", "100"])
    finally:
        os.fchdir(before)
        os.close(before)
    try:
        while True:
            try:
                path = Path(f"/proc/{child.pid}/exe").readlink()
            except OSError as error:
                assert error.errno == errno.ENAMETOOLONG
                break
            assert "python" in str(path), "the child has not executed it yet"

        async def ask() -> list[Identity]:
            return (await LocalHost().identities())[0]

        pids = {identity.pid for identity in asyncio.run(ask())}
        assert os.getpid() in pids
        assert child.pid not in pids
    finally:
        child.kill()
        child.wait()
        subprocess.run(["rm", "-r", tmp_path / name], check=True)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_only_our_own_want_of_resources_fails_the_list(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identities(pids: object, proc: Path) -> list[tuple[int, Identity | Exception]]:
        return [(17, QEMU), (18, OSError(number, os.strerror(number)))]

    monkeypatch.setattr(procfs, "read_identities", identities)
    if number == errno.EMFILE:
        with pytest.raises(Failed, match="Too many open files"):
            _identities(procfs.PROC)
    else:
        assert _identities(procfs.PROC) == ([QEMU], [])
