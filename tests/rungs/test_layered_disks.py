"""An image on a device that has a layer below it: a loop device on a file of a disk."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qkilld.model.constants import Result
from tests.evidence.test_devices import loop_on, reading
from tests.lab import needs
from tests.lab.bare import BareGuest, bare_guest
from tests.lab.process import run
from tests.lab.storage import SlowDisk, slow_disk
from tests.rungs.stopping import S, actions
from tests.rungs.test_yank import stop

STALL = {"storage_stall": 4 * S, "stall": 2 * S, "grace": S, "max": 60 * S}
MIB = 1 << 20


@contextlib.contextmanager
def repeating(action: Callable[[], object]) -> Iterator[None]:
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.05):
            action()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def guest_on_loop(directory: Path) -> Iterator[tuple[BareGuest, Path, Path, SlowDisk]]:
    """Run a guest with its image on ext4; yield the mount point, the loop device and the disk."""
    mkfs = needs.program("mkfs.ext4", "e2fsprogs")
    with slow_disk() as disk, loop_on(disk) as (device, _):
        run([mkfs, "-q", device], check=True)
        point = directory / "inner"
        point.mkdir()
        run(["mount", device, point], check=True)
        try:
            image = point / "image.raw"
            with image.open("wb") as file:
                file.truncate(20 * MIB)
            with bare_guest(
                directory, ["-drive", f"file={image},if=none,id=image,format=raw"]
            ) as guest:
                yield guest, point, device, disk
                disk.fast()
        finally:
            run(["umount", point], check=True)


@pytest.mark.timeout(300)
def test_a_frozen_file_system_is_not_waited_for_without_end(lab_dir: Path) -> None:
    """The guest's write waits. Others read from the device and write to the disk below it, but
    neither counts as progress of the guest's write."""
    fsfreeze = needs.program("fsfreeze", "util-linux")
    with contextlib.ExitStack() as stack:
        guest, point, device, disk = stack.enter_context(guest_on_loop(lab_dir))
        assert disk.directory is not None
        neighbour = os.open(disk.directory / "neighbour", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        stack.callback(os.close, neighbour)
        page = mmap.mmap(-1, 4096)
        run([fsfreeze, "--freeze", point], check=True)
        stack.callback(run, [fsfreeze, "--unfreeze", point])
        guest.write_later("image", 0, 1)
        with reading(device), repeating(lambda: os.pwritev(neighbour, [page], 0)):
            job = stop(guest, STALL)
    assert actions(job) == ["SIGTERM", "SIGKILL"]
    # SIGKILL comes 33 to 42 s after SIGTERM on a busy machine. If qkilld waited without end,
    # SIGKILL would come after 60 s (MaxSec=).
    assert job.rungs[1].at - job.rungs[0].at < 14 * STALL["storage_stall"]


@pytest.mark.timeout(300)
def test_the_disk_below_a_device_that_counts_nothing_shows_progress(lab_dir: Path) -> None:
    with guest_on_loop(lab_dir) as (guest, _, device, disk):
        accounting = Path("/sys/block", device.name, "queue/iostats")
        accounting.write_text("0")
        try:
            guest.hmp(f'qemu-io image "write -q 0 {16 * MIB}"')
            disk.slow(MIB)
            job = stop(guest, STALL)
        finally:
            accounting.write_text("1")  # The next user of the device needs it.
    assert (actions(job), job.result) == (["SIGTERM"], Result.EXITED)
