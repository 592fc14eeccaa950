"""An image on FUSE. The FUSE server stores it on a disk of this host.

While QEMU waits for one answer, the disk shows the progress of the server's call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.model.constants import Result
from tests.lab.bare import BareGuest, bare_guest
from tests.lab.fuse import FuseStore, fuse_store
from tests.lab.storage import SlowDisk, slow_disk
from tests.rungs.stopping import S, actions
from tests.rungs.test_yank import stop

STALL = {"storage_stall": 4 * S, "stall": 2 * S, "grace": S}
MIB = 1 << 20


@contextlib.contextmanager
def guest_on_fuse(directory: Path) -> Iterator[tuple[BareGuest, FuseStore, SlowDisk]]:
    """Run a guest that has 30 MiB in the page cache of the server's disk."""
    with slow_disk() as disk:
        assert disk.directory is not None
        files = disk.directory / "files"
        files.mkdir()
        with (files / "image.raw").open("wb") as image:
            image.truncate(64 * MIB)
        with fuse_store(files) as store:
            drive = f"file={store.directory / 'image.raw'},if=none,id=image,format=raw"
            with bare_guest(directory, ["-drive", drive]) as guest:
                guest.hmp(f'qemu-io image "write -q 0 {30 * MIB}"')
                yield guest, store, disk
                store.fast()
                disk.fast()


@pytest.mark.timeout(300)
def test_a_server_that_writes_to_a_slow_disk_is_waited_for(lab_dir: Path) -> None:
    with guest_on_fuse(lab_dir) as (guest, _, disk):
        disk.slow(2 * MIB)
        job = stop(guest, STALL)
    assert (actions(job), job.result) == (["SIGTERM"], Result.EXITED)


@pytest.mark.timeout(300)
def test_a_server_that_hangs_beside_others_on_its_disk_is_not(lab_dir: Path) -> None:
    with guest_on_fuse(lab_dir) as (guest, store, disk):
        store.hang("fsync")
        disk.slow(2 * MIB)  # Meanwhile, the kernel writes the page cache back.
        job = stop(guest, STALL)
    assert actions(job) == ["SIGTERM", "SIGKILL"]
    assert job.rungs[1].at - job.rungs[0].at < 3 * STALL["storage_stall"]
