"""QEMU's main loop hangs in a call, so QEMU does not handle SIGTERM, and the guest continues to
write to other disks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evidence.until import until
from tests.lab.bare import bare_guest
from tests.lab.fuse import fuse_store
from tests.lab.storage import slow_disk
from tests.rungs.stopping import S, actions
from tests.rungs.test_yank import stop

STALL = {"storage_stall": 4 * S, "stall": 2 * S, "grace": S, "max": 100 * S}
MIB = 1 << 20


@pytest.mark.timeout(300)
def test_other_disks_do_not_delay_sigkill_for_ever(lab_dir: Path) -> None:
    files = lab_dir / "files"
    files.mkdir()
    (files / "late.raw").write_bytes(bytes(MIB))
    with slow_disk() as disk, fuse_store(files) as store:
        assert disk.directory is not None
        image = disk.directory / "local.raw"
        with image.open("wb") as file:
            file.truncate(200 * MIB)
        drive = f"file={image},if=none,id=local,format=raw,cache=none"
        with bare_guest(lab_dir, ["-drive", drive]) as guest:
            disk.slow(MIB)
            guest.write_later("local", 0, 60, 3 * MIB)
            store.hang()
            guest.begin_hmp(f"drive_add 0 if=none,id=late,file={store.directory / 'late.raw'}")
            wchan = Path(f"/proc/{guest.pid}/task/{guest.pid}/wchan")
            until(wchan.read_text, lambda function: function == "request_wait_answer")
            job = stop(guest, STALL)
            disk.fast()
            store.fast()
    assert actions(job) == ["SIGTERM", "SIGKILL"]
    assert 12 * S < job.rungs[1].at - job.rungs[0].at < 50 * S
