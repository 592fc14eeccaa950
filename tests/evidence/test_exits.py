"""The reader of a process shows when an exit has begun, and whether it is over."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from qkilld.adapters.procfs import read_stat
from qkilld.evidence.process_reader import ProcessReader
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.fuse import fuse_store
from tests.lab.guest import FIRST_THREAD_EXITS, LARGE, Guest

Make = Callable[..., Guest]


def read(reader: ProcessReader) -> dict[str, Any]:
    found: dict[str, Any] = {}
    reader.read(found)
    return found


def test_exiting_takes_as_long_as_the_memory_does(qemu: Make) -> None:
    for _ in range(5):  # On a busy host, the exit may be over before the next reading.
        guest = qemu(arguments=LARGE)
        with closing(ProcessReader(guest.pid)) as reader:
            assert read(reader)["exiting"] is False
            guest.signal(signal.SIGTERM)
            while not (found := read(reader))["exiting"] and found["state"] != "Z":
                pass
            times = set()
            while found["exiting"]:
                times.add(found["cpu"])
                found = read(reader)
            os.waitid(os.P_PID, guest.pid, os.WEXITED | os.WNOWAIT)
            found = read(reader)
            assert (found["state"], found["threads"], found["exiting"]) == ("Z", (), False)
        if len(times) > 1:
            return
    raise needs.Missing("a QEMU that leaves its memory to the kernel when it exits")


def test_a_process_exits_while_a_thread_finishes_a_call(scripted_qemu: Make, lab_dir: Path) -> None:
    """The thread takes SIGKILL only after its call, like the thread in which QEMU 11 frees the
    guest's memory."""
    with fuse_store(lab_dir) as store:
        store.hang("lookup")
        guest = scripted_qemu(
            "import os, signal, threading\n"
            "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n"
            "print('ready', flush=True)\n"
            f"threading.Thread(target=os.stat, args=({str(store.directory / 'x')!r},)).start()\n"
            "while True: signal.pause()\n"
        )
        with closing(ProcessReader(guest.pid)) as reader:
            found = until(lambda: read(reader), lambda found: found["threads"])
            assert found["exiting"] is False
            guest.signal(signal.SIGTERM)
            until(lambda: read_stat(guest.pid), lambda stat: stat.state == "Z")
            found = read(reader)
            assert (found["state"], found["exiting"]) == ("Z", True)
            assert [thread.state for thread in found["threads"]] == ["D"]
            store.fast()
            assert guest.wait_gone() == 0


def test_a_process_whose_first_thread_has_exited_is_not_exiting(scripted_qemu: Make) -> None:
    guest = scripted_qemu(FIRST_THREAD_EXITS)
    until(lambda: read_stat(guest.pid), lambda stat: stat.state == "Z")
    with closing(ProcessReader(guest.pid)) as reader:
        found = until(lambda: read(reader), lambda found: found["state"] == "S")
        assert (found["exiting"], found["threads"]) == (False, ())
