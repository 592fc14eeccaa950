"""The slow storage is slow, hangs, and leaves nothing behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab import process
from tests.lab.guest import make_disk
from tests.lab.storage import nbd_server, slow_disk


def is_disk_of(name: str, directory: Path) -> bool:
    """Return whether the loop device still uses a file below the directory. (The name of the device
    may be reused.)"""
    try:
        image = Path("/sys/block", name, "loop/backing_file").read_text()
    except FileNotFoundError:
        return False
    return Path(image).is_relative_to(directory)


WRITE = 'dd if=/dev/zero of="$1" bs=1M count=1 oflag=direct conv=fdatasync 2>&1'


def test_a_disk_is_as_slow_as_it_is_told_to_be() -> None:
    with slow_disk(mebibytes=64) as disk:
        directory = disk.directory
        assert directory is not None and os.path.ismount(directory)

        def write() -> float:
            writer = process.spawn(
                ["sh", "-c", f"read go; {WRITE}", "sh", directory / "file"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
            try:
                disk.join(writer.pid)
                began = time.monotonic()
                writer.communicate(b"\n", 60)
                assert writer.returncode == 0
                return time.monotonic() - began
            finally:
                process.end(writer)

        write()
        disk.slow(1 << 17)  # At this rate, the write of 1 MiB takes 8 s.
        slow = write()
        assert slow > 4
        disk.fast()
        assert write() < slow / 2
    assert not directory.exists()
    assert not is_disk_of(disk.device.name, directory.parent)


def test_a_bare_disk() -> None:
    with slow_disk(mebibytes=8, filesystem=None) as disk:
        assert disk.directory is None
        assert Path("/sys/dev/block", disk.number, "size").read_text() == f"{8 << 11}\n"
        assert disk.device.is_block_device()


KILLED = """
import signal
from tests.lab.storage import slow_disk
with slow_disk(1 << 16, mebibytes=8) as disk:
    print(disk.device.name, disk.directory.parent, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_disk_goes_with_the_one_who_asked_for_it(number: signal.Signals) -> None:
    if os.geteuid() != 0:
        with slow_disk():  # Raises needs.Missing.
            pass
    asking = process.spawn(
        [sys.executable, "-c", KILLED],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ) | {"PYTHONPATH": str(process.TOP)},
    )
    try:
        assert asking.stdout is not None
        name, directory = asking.stdout.readline().decode().split()
        # These are the keeper of the disk and, in cgroup v2, the keeper of the group.
        keepers = {pid: os.pidfd_open(pid) for pid in process.children(asking.pid)}
        assert keepers
        try:
            asking.send_signal(number)
            assert all(process.wait_gone(pidfd, 30) for pidfd in keepers.values())
        finally:
            process.close_and_reap(keepers)
    finally:
        process.end(asking)
    assert not is_disk_of(name, Path(directory))
    assert directory not in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize("tcp", [False, True])
def test_a_server_freezes_and_goes_on(lab_dir: Path, tcp: bool) -> None:
    image = make_disk(lab_dir / "image", "1M", "raw")
    with nbd_server(image, tcp=tcp, room=4 << 20) as server:
        read = ["qemu-io", "-f", "raw", "-c", "write 0 2M", "-c", "flush", server.uri]
        process.run(read, check=True)
        server.freeze()
        client = process.spawn(read, stdout=subprocess.DEVNULL)
        pidfd = os.pidfd_open(client.pid)
        try:
            assert not select.select([pidfd], [], [], 0.5)[0]
            server.thaw()
            assert process.wait_gone(pidfd, 30)
            assert client.wait() == 0
        finally:
            os.close(pidfd)
            process.end(client)
    assert image.stat().st_size == 4 << 20


def test_a_server_is_as_slow_as_it_is_told_to_be(lab_dir: Path) -> None:
    image = make_disk(lab_dir / "image", "4M", "raw")
    with nbd_server(image) as server:
        write = ["qemu-io", "-f", "raw", "-c", "write 0 64k", server.uri]
        process.run(write, check=True)
        server.rate("512K")
        began = time.monotonic()
        process.run(write, check=True)
        assert time.monotonic() - began > 0.4
        server.rate(None)
        process.run(write, check=True)
