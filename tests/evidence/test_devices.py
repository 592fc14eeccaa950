"""The structure of block devices, and their counters."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.evidence.devices import (
    COUNTS_FLUSHES,
    Counters,
    _counts_flushes,
    counts_requests,
    describe,
    of_btrfs,
    read_counters,
)
from tests.evidence.trees import disk, lay
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.process import end, run, spawn
from tests.lab.storage import SlowDisk, slow_disk

_BLKPG, _ADD, _DELETE = 0x1269, 1, 2


class _Partition(ctypes.Structure):
    """struct blkpg_partition of <linux/blkpg.h>; places in bytes."""

    _fields_ = (
        ("start", ctypes.c_longlong),
        ("length", ctypes.c_longlong),
        ("number", ctypes.c_int),
        ("names", ctypes.c_char * 128),
    )


class _Order(ctypes.Structure):
    """struct blkpg_ioctl_arg."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_int),
        ("partition", ctypes.POINTER(_Partition)),
    )


@contextlib.contextmanager
def partition(device: Path) -> Iterator[None]:
    """Add partition 1 to the device. Debian 13 has no addpart(8)."""
    part = _Partition(1 << 20, 4 << 20, 1, b"")

    def order(kind: int) -> None:
        with device.open("rb") as opened:
            fcntl.ioctl(opened, _BLKPG, _Order(kind, 0, ctypes.sizeof(part), ctypes.pointer(part)))

    order(_ADD)
    try:
        yield
    finally:
        order(_DELETE)


def test_a_partition_of_a_loop_device() -> None:
    needs.root("a partition")
    with slow_disk(mebibytes=8, filesystem=None) as loop:
        with partition(loop.device):
            name = f"{loop.device.name}p1"
            part = describe(Path(f"/sys/class/block/{name}/dev").read_text().strip())
            assert part is not None
            assert (part.name, part.below, part.backing) == (name, (loop.number,), None)
        whole = describe(loop.number)
        assert whole is not None
        assert (whole.name, whole.below) == (loop.device.name, ())
        assert whole.backing is not None
        assert Path(os.fsdecode(whole.backing)).samefile(
            Path(f"/sys/block/{loop.device.name}/loop/backing_file").read_text().strip()
        )


def test_counters_of_a_real_device() -> None:
    needs.root("a block device")
    with slow_disk(mebibytes=8, filesystem=None) as loop:
        block = describe(loop.number)
        assert block is not None
        before = read_counters(block.stats)
        device = os.open(loop.device, os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, 65536) as page:
            os.write(device, page)
            os.fsync(device)
        os.close(device)
        after = read_counters(block.stats)
        # udev may read the device and open it for writing, but the bytes are ours.
        assert after.sectors_written - before.sectors_written == 128
        assert after.writes - before.writes >= 1
        assert after.in_flight == 0


def test_the_layers_of_each_device(tmp_path: Path) -> None:
    sys = lay(
        tmp_path,
        disk("sda", "8:0")
        | disk("sda/sda1", "8:1", partition=True)
        | disk("sdb", "8:16")
        | disk("md0", "9:0", below={"sda1": "8:1", "sdb": "8:16"})
        | disk("dm-0", "253:0", below={"md0": "9:0"})
        | disk("loop0", "7:0", loop__backing_file="/var/a b (deleted)\n"),
    )

    def made_of(number: str) -> tuple[str, ...] | None:
        block = describe(number, sys)
        return None if block is None else block.below

    assert made_of("8:0") == ()
    assert made_of("8:1") == ("8:0",)
    assert made_of("9:0") == ("8:1", "8:16")
    assert made_of("253:0") == ("9:0",)
    assert made_of("9:9") is None
    assert made_of("../8:0") is None
    loop = describe("7:0", sys)
    assert loop is not None
    assert loop.backing == b"/var/a b"
    (sys / "devices/md0/slaves/sdb/dev").write_text("nonsense\n")
    assert made_of("9:0") is None


def test_the_paths_of_a_multipath_nvme(tmp_path: Path) -> None:
    """Older kernels count I/O only on the paths, and the paths have no device numbers."""
    sys = lay(
        tmp_path,
        disk("virtual/nvme-subsystem/nvme-subsys0/nvme0n1", "259:0")
        | disk("nvme/nvme7n1", "259:9")
        | {
            f"block/{name}/stat": "1 0 0 0 10 0 80 0 4 0 0\n"
            for name in ("nvme0c0n1", "nvme0c1n1", "nvme0c1n2", "nvme1c1n1")
        },
    )
    block = describe("259:0", sys)
    assert block is not None
    assert block.name == "nvme0n1"
    assert read_counters(block.stats) == Counters(2, 20, 160, 8)
    single = describe("259:9", sys)
    assert single is not None
    assert read_counters(single.stats).writes == 11


@pytest.mark.parametrize(
    ("text", "writes"),
    [
        ("1 0 2 0 30 0 4 0 5 0 0", 30),  # before Linux 4.18
        ("1 0 2 0 30 0 4 0 5 0 0 7 0 9 0", 37),
        ("1 0 2 0 30 0 4 0 5 0 0 7 0 9 0 200 0", 237),
    ],
)
def test_columns_of_stat(tmp_path: Path, text: str, writes: int) -> None:
    (tmp_path / "stat").write_text(f"   {text}\n")
    assert read_counters((str(tmp_path / "stat"),)) == Counters(1, writes, 4, 5)


@pytest.mark.parametrize("text", ["", "1 2 3", "a b c d e f g h i j k"])
def test_malformed_counters_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "stat").write_text(text)
    with pytest.raises(ValueError):
        read_counters((str(tmp_path / "stat"),))


def test_the_devices_of_a_btrfs(tmp_path: Path) -> None:
    sys = lay(
        tmp_path,
        {
            "fs/btrfs/features/raid1c34": "0\n",
            "fs/btrfs/aaaa/devices/sda1/dev": "8:1\n",
            "fs/btrfs/aaaa/devices/sdb1/dev": "8:17\n",
            "fs/btrfs/bbbb/devices/dm-0/dev": "253:0\n",
            "fs/btrfs/bbbb/devices/dm-0/dm/name": "vg-a b\n",
        },
    )
    assert of_btrfs(b"/dev/sdb1", sys) == ("8:1", "8:17")
    assert of_btrfs(b"/dev/mapper/vg-a\\040b", sys) == ("253:0",)
    assert of_btrfs(b"/dev/root", sys) is None
    (sys / "fs/btrfs/bbbb").rename(sys / "gone")
    assert of_btrfs(b"/dev/root", sys) == ("8:1", "8:17")
    assert of_btrfs(b"/dev/sda1", tmp_path / "none") is None


def test_whether_requests_are_counted(tmp_path: Path) -> None:
    """An administrator can switch the counting off. For a partition, the setting of its disk's
    queue applies."""
    files = disk("sda", "8:0", queue__iostats="1\n")
    files |= disk("sda/sda1", "8:1", partition=True)
    files |= disk("sdb", "8:16", queue__iostats="0\n")
    files |= disk("sdc", "8:32")
    sys = lay(tmp_path, files)
    blocks = [describe(number, sys) for number in ("8:0", "8:1", "8:16", "8:32")]
    assert [block and counts_requests(block) for block in blocks] == [True, True, False, None]


@pytest.mark.parametrize(
    ("release", "counts"),
    [
        ("6.1.0-37-amd64", False),
        ("6.12.57+deb13-amd64", False),
        ("6.15", False),
        ("6.16-rc1", True),
        ("6.18.44-fc-v657", True),
        ("7.0.0", True),
        ("5.14.0-570.el9", False),
    ],
)
def test_whether_flushes_are_counted(release: str, counts: bool) -> None:
    assert _counts_flushes(release) is counts


@contextlib.contextmanager
def loop_on(disk: SlowDisk) -> Iterator[tuple[Path, str]]:
    """Make a loop device on a file of the disk; yield its path and number."""
    assert disk.directory is not None
    file = disk.directory / "inner"
    with file.open("wb") as inner:
        inner.truncate(32 << 20)
    device = run(["losetup", "--find", "--show", file], check=True).stdout.strip()
    try:
        yield Path(device), Path("/sys/block", Path(device).name, "dev").read_text().strip()
    finally:
        run(["losetup", "--detach", device], check=True)


_READER = """
import mmap, os, sys
file, page = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20)
while True:
    for number in range(16):
        os.preadv(file, [page], number << 20)
"""


@contextlib.contextmanager
def reading(device: Path) -> Iterator[None]:
    """Read from the device all the time."""
    process = spawn([sys.executable, "-c", _READER, device])
    try:
        yield
    finally:
        end(process)


def seen(stats: tuple[str, ...]) -> list[bool]:
    """Return `only_reads` of up to 20 readings with requests in flight, taken within a minute."""
    found: list[bool] = []
    end = time.monotonic() + 60
    while len(found) < 20 and time.monotonic() < end:
        counters = read_counters(stats, layered=True)
        if counters.in_flight:
            found.append(counters.only_reads)
        time.sleep(0.001)
    return found


def test_a_flush_is_told_from_reads() -> None:
    if not COUNTS_FLUSHES:
        pytest.skip("the kernel does not count flushes")
    needs.root("a block device")
    with slow_disk() as disk, loop_on(disk) as (device, number):
        block = describe(number)
        assert block is not None
        with reading(device):
            # On a busy host, a read may wait for its dispatch.
            assert True in seen(block.stats)
        file = os.open(device, os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, 1 << 20) as page:
            for index in range(8):
                os.pwritev(file, [page], index << 20)
        disk.slow(2 << 20)
        flush = threading.Thread(target=os.fsync, args=(file,))
        flush.start()
        until(lambda: read_counters(block.stats), lambda counters: counters.in_flight)
        assert set(seen(block.stats)) == {False}
        disk.fast()
        flush.join()
        os.close(file)
