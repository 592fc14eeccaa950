"""A lab whose process is killed leaves nothing behind, even if its children are stuck."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.lab import needs
from tests.lab.process import close_and_reap, end, spawn, wait_gone

LAB = """
import os, sys, time
from pathlib import Path
from tests.lab.fuse import fuse_store
from tests.lab.keeper import Keeper
with Keeper(grace=0.5) as keeper:
    if os.fork():
        time.sleep(600)
    keeper.leave()
    files = Path(sys.argv[1])
    (files / "disk").write_bytes(b"x" * 4096)
    with fuse_store(files) as store:
        store.freeze()
        print(store.process.pid, os.getpid(), keeper.pid, flush=True)
        # Nothing but the server can end this.
        (store.directory / "disk").read_bytes()
"""


def test_a_reader_of_a_server_that_stands_still(lab_dir: os.PathLike[str]) -> None:
    needs.root("FUSE")
    lab = spawn([sys.executable, "-c", LAB, lab_dir], stdout=subprocess.PIPE)
    try:
        assert lab.stdout is not None
        pids = [int(pid) for pid in lab.stdout.readline().split()]
        pidfds = {pid: os.pidfd_open(pid) for pid in pids}
        lab.send_signal(signal.SIGKILL)
        for pidfd in pidfds.values():
            assert wait_gone(pidfd, 40)
        close_and_reap(pidfds)
    finally:
        end(lab)
