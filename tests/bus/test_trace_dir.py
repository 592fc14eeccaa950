"""qkilld --trace-dir, and qkillctl replay of its traces."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qkilld.model.constants import Flag
from tests.lab.bus import Daemon, lab_config
from tests.lab.guest import Guest
from tests.lab.process import TOP

Start = Callable[..., Daemon]
Make = Callable[..., Guest]


def stop(daemon: Daemon, guest: Guest) -> str:
    """Stop the guest with FORCE; return the result."""
    with daemon.bus.client() as client:
        job = client.terminate(guest.pid, Flag.FORCE)
        result, _ = client.wait(job)
    return result


def replay(path: Path, *options: str) -> Any:
    command = [sys.executable, "-m", "qkilld.ctl", "replay", "--json", str(path), *options]
    return json.loads(subprocess.run(command, cwd=TOP, check=True, stdout=subprocess.PIPE).stdout)


def test_a_job_is_recorded(start_daemon: Start, lab_dir: Path, fake_qemu: Make) -> None:
    config = "GraceSec=1s"
    daemon = start_daemon("--trace-dir", str(lab_dir), config=lab_config(config))
    guest = fake_qemu(stubborn=True)
    pid, start_time = guest.pid, guest.start_time
    assert stop(daemon, guest) == "killed"
    assert daemon.stop() == 0
    (path,) = lab_dir.iterdir()
    assert path.name == f"job1-pid{pid}-start{start_time}.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = replay(path)
    assert found["recorded"]["result"] == found["replayed"]["result"] == "killed"
    assert 1_000_000 <= found["replayed"]["sigkill_usec"] <= found["recorded"]["sigkill_usec"]
    assert replay(path, "--grace", "1min")["replayed"]["result"] is None


def test_a_trace_that_cannot_be_written_stops_no_job(
    start_daemon: Start, lab_dir: Path, fake_qemu: Make
) -> None:
    (lab_dir / "traces").mkdir()
    daemon = start_daemon("--trace-dir", str(lab_dir / "traces"))
    (lab_dir / "traces").rmdir()
    assert [stop(daemon, fake_qemu()) for _ in range(2)] == ["exited", "exited"]
    assert daemon.stop() == 0
    assert daemon.stderr.text().count("warning: Traces cannot be written to ") == 1


def test_a_directory_that_is_not_there_is_said_at_once(start_daemon: Start, lab_dir: Path) -> None:
    daemon = start_daemon("--trace-dir", str(lab_dir / "missing"), ready=False)
    assert daemon.wait_gone() == 2
    assert "--trace-dir must be a directory" in daemon.stderr.text()
