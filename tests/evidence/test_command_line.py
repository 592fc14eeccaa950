"""The storage on a real QEMU's command line and in its -readconfig files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qkilld.adapters.process import open_process
from qkilld.adapters.target_threads import shared
from qkilld.evidence import command_line
from qkilld.evidence.command_line import GraphReader
from qkilld.evidence.storage import FilePlace
from qkilld.monitor.reach import read_options
from tests.evidence.until import until
from tests.lab.guest import Guest

Make = Callable[..., Guest]


def test_a_real_qemu_with_a_config_file(qemu: Make, lab_dir: Path) -> None:
    """The reader finds the image that is named only in the -readconfig file."""
    image = lab_dir / "a.raw"
    image.write_bytes(bytes(1 << 16))
    config = lab_dir / "more.cfg"
    config.write_text(f'[drive "d"]\n  file = "{image}"\n  format = "raw"\n  if = "none"\n')
    guest = qemu(arguments=["-readconfig", str(config)])
    reader = GraphReader(guest.pid)
    until(reader.read, lambda graph: graph is not None)
    assert reader.formatted([str(image)]) == 0
    assert reader.formatted([str(image), "/elsewhere/b.qcow2"]) == 1
    assert reader.formatted(None) is None
    there = FilePlace(("7:1", "254:0"), "")
    assert reader.ringless({str(image): there}) == ("254:0", "7:1")
    unknown = {"/elsewhere/b.qcow2": FilePlace(("254:0",), "")}
    assert reader.ringless({str(image): there, **unknown}) == ("7:1",)


def test_a_config_file_that_is_gone_leaves_everything_unknown(qemu: Make, lab_dir: Path) -> None:
    config = lab_dir / "more.cfg"
    config.write_text('[name]\n  guest = "lab"\n')
    guest = qemu(arguments=["-readconfig", str(config)])
    config.unlink()
    reader = GraphReader(guest.pid)
    assert [reader.read() for _ in range(3)] == [None, None, None]
    assert reader.formatted([]) is None
    assert reader.ringless({"/a": FilePlace(("7:1",), "")}) == ()


def test_a_thread_that_begins_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy host, the first sample of an idle guest lacked its command line, and so SIGKILL
    came after StorageStallSec=."""
    start = shared.start

    def start_late(pid: int, uid: int, target: Callable[[], None]) -> threading.Thread:
        def late() -> None:
            time.sleep(0.2)
            target()

        return start(pid, uid, late)

    monkeypatch.setattr(shared, "start", start_late)
    assert GraphReader(os.getpid()).read() is not None


def test_a_blocked_read_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()

    def read_late(pid: int, proc: Path) -> list[str]:
        goes_on.wait()
        return ["qemu-system-x86_64", ""]

    monkeypatch.setattr(command_line, "read_command_line", read_late)
    blocked = GraphReader(os.getpid())
    try:
        began = time.monotonic()
        assert blocked.read() is None
        assert time.monotonic() - began < command_line.START_TIMEOUT_S
    finally:
        goes_on.set()
    until(blocked.read, lambda graph: graph is not None)


def test_very_much_in_config_files_takes_no_memory(lab_dir: Path) -> None:
    """An earlier qkilld kept all content: 40 files of half a megabyte took 1.4 GB and 40 s."""
    (lab_dir / "big").write_text('[drive]\nfile="y"\n' * 30_000)
    code = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, *("-readconfig", "big") * 40]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=lab_dir, stdin=pipe, stdout=pipe) as target:
        try:
            assert target.stdout is not None and target.stdout.readline()
            reader = GraphReader(target.pid)
            assert [reader.read() for _ in range(20)] == [None] * 20
            process = open_process(target.pid)
            assert len(read_options(process.guest.identity)) < 100_000
            process.close()
        finally:
            target.kill()
