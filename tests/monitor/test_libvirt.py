"""virsh, which asks the guests of libvirt to shut down."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from qkilld.monitor import libvirt
from tests.evidence.until import until
from tests.lab.groups import temporary_group

FREEZER = Path("/sys/fs/cgroup/freezer")


def virsh(directory: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ask with a virsh that is this script, and return why this has failed."""
    program = directory / "virsh"
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return libvirt.shut_down(libvirt.Domain("web", "qemu:///system"))


@pytest.mark.parametrize(
    ("lines", "why"),
    [("exit 0", ""), ("echo no >&2; exit 1", "no"), ("exit 1", "virsh failed")],
)
def test_what_virsh_says(
    tmp_path: Path, lines: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert virsh(tmp_path, lines, monkeypatch) == why


def test_a_virsh_that_even_sigkill_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In cgroup v2, SIGKILL ends a frozen process."""
    if not FREEZER.is_dir():
        pytest.skip("needs the freezer of cgroup v1")
    monkeypatch.setattr(libvirt, "TIMEOUT_S", 0.5)
    with temporary_group(FREEZER) as group:
        freeze = f"echo $$ >{group}/cgroup.procs; echo FROZEN >{group}/freezer.state; sleep 9"
        before, start = threading.active_count(), time.monotonic()
        assert "does not return" in virsh(tmp_path, freeze, monkeypatch)
        assert time.monotonic() - start < 5
        (group / "freezer.state").write_text("THAWED")
        until(threading.active_count, lambda count: count == before)
