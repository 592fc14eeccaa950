"""A disk that can be slow or hang for good.

    hung_disk    ext4 on a loop device whose file is on FUSE, so that it hangs when FUSE hangs

The kernel's throttle (storage.py) cannot make a disk hang, because writes of ext4's journal bypass
it.

    python -m tests.lab.hung_disk IMAGE MOUNTPOINT

This command makes the device, prints a line, waits for the end of its input and removes the device.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab import needs
from tests.lab.fuse import FuseStore, fuse_store
from tests.lab.process import TOP, run
from tests.lab.scratch import scratch


@dataclass
class HungDisk:
    directory: Path
    """The mount point."""
    fuse: FuseStore
    """The file system that contains the disk's image. It must not hang when the disk is removed."""


@contextlib.contextmanager
def hung_disk(mebibytes: int = 512) -> Iterator[HungDisk]:
    """Within the context, mount a disk that is fast at first. Raises needs.Missing without root or
    FUSE."""
    needs.root("a loop device")
    for name in ("losetup", "mount", "umount"):
        needs.program(name, "mount")
    needs.program("mkfs.ext4", "e2fsprogs")
    with scratch("h") as directory:
        files, mounted = directory / "files", directory / "mnt"
        files.mkdir()
        mounted.mkdir()
        image = files / "image"
        image.touch()
        os.truncate(image, mebibytes << 20)
        with fuse_store(files) as fuse:
            # The keeper has its own session and no parent-death signal, because it must outlive
            # this process.
            keeper = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.lab.hung_disk"),
                    *(str(fuse.directory / image.name), str(mounted)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=TOP,
                start_new_session=True,
            )
            try:
                assert keeper.stdout is not None
                assert keeper.stdout.readline() == b"mounted\n", "failed to make the disk"
                yield HungDisk(mounted, fuse)
            finally:
                keeper.communicate()


def _keep(image: str, mounted: str) -> None:
    device = run(["losetup", "--find", "--show", image], check=True).stdout.strip()
    try:
        # Limit the size of requests. A request needs one call to FUSE for every 128 KiB, so a slow
        # disk would not complete a large request for seconds.
        Path(f"/sys/block/{Path(device).name}/queue/max_sectors_kb").write_text("256")
        run(["mkfs.ext4", "-q", device], check=True)
        run(["mount", device, mounted], check=True)
        print("mounted", flush=True)
        sys.stdin.read()
    finally:
        # Unmount lazily: if the lab was killed, nothing serves the file system any more.
        run(["umount", "--lazy", mounted])
        run(["losetup", "--detach", device], check=True)


if __name__ == "__main__":
    _keep(sys.argv[1], sys.argv[2])
