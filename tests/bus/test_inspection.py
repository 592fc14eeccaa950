"""Stops by evidence: real guests with real storage that is slow, frozen or gone."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qkilld.model.constants import INFINITY, JOB_INTERFACE, UNKNOWN
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bus import Client, plain
from tests.lab.guest import LARGE, Guest, make_disk
from tests.lab.process import end, run, spawn
from tests.lab.storage import nbd_server

FORCE, FIXED = 1, 8
Make = Callable[..., Guest]
S = 1_000_000


def signals(receipt: dict[str, Any]) -> list[str]:
    return [name for _, name, _ in receipt["rungs"]]


def verdicts(receipt: dict[str, Any]) -> list[str]:
    return [verdict for verdict, _, _ in receipt["verdicts"]]


def test_a_guest_that_was_merely_stopped_is_continued(client: Client, qemu: Make) -> None:
    guest = qemu()
    guest.signal(signal.SIGSTOP)
    result, receipt = client.wait(client.terminate(guest.pid, FORCE))
    assert (result, signals(receipt)) == ("exited", ["SIGTERM", "SIGCONT"])
    assert verdicts(receipt) == ["stopped"]
    assert guest.wait_gone() == 0


def test_a_large_guest_that_exits_is_not_killed(client: Client, qemu: Make) -> None:
    """QEMU has written everything. If it got SIGKILL, the receipt would say that data may be
    lost."""
    spans = {"grace_usec": ("t", S // 10), "stall_usec": ("t", S // 10)}
    for _ in range(5):  # On a busy host, the exit may be over before the first sample.
        guest = qemu(arguments=LARGE)
        result, receipt = client.wait(client.terminate(guest.pid, FORCE, **spans))
        assert (result, signals(receipt)) == ("exited", ["SIGTERM"])
        if receipt["verdicts"]:
            break
    assert "flushing" in verdicts(receipt)
    reasons = [reason for *_, reasons in receipt["verdicts"] for reason in reasons]
    assert "it has begun to exit" in reasons


def test_a_guest_that_a_debugger_holds_is_named_and_killed(client: Client, qemu: Make) -> None:
    gdb = str(needs.program("gdb", "gdb"))
    guest = qemu()
    debugger = spawn(
        [gdb, "-q", "-nx", "-p", str(guest.pid), "-ex", "echo HELD\\n"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert debugger.stdout is not None
        for line in debugger.stdout:
            if b"HELD" in line:
                break
        job = client.terminate(guest.pid, FORCE, grace_usec=("t", 1 * S))
        result, receipt = client.wait(job)
    finally:
        end(debugger)
    assert (result, signals(receipt)) == ("killed", ["SIGTERM", "SIGKILL"])
    assert verdicts(receipt)[0] == "stopped"
    assert f"process {debugger.pid}" in receipt["verdicts"][0][2][0]
    # The guest has not handled SIGTERM, so its data is at risk.
    assert receipt["data-at-risk"] is True
    assert "it had not taken SIGTERM" in str(receipt["at-risk"])


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_storage_that_stands_still_and_then_is_given_up(
    client: Client, linux_guest: Make, lab_dir: Path, tcp: bool
) -> None:
    """An NBD server stops answering. Nothing moves, but the process is not idle."""
    image = make_disk(lab_dir / "disk")
    with nbd_server(image, tcp=tcp, room=1 << 30) as server:
        guest = linux_guest(job="writer", disk=server.uri, records=100_000, stride=4096)
        guest.wait_for(r"\b20\b", 60)
        server.freeze()
        spans = {"storage_stall_usec": ("t", 4 * S), "grace_usec": ("t", 0)}
        job = client.terminate(guest.pid, FORCE, **spans)
        result, receipt = client.wait(job)
        server.thaw()
    assert (result, signals(receipt)) == ("killed", ["SIGTERM", "SIGKILL"])
    assert "storage-wait" in verdicts(receipt)
    assert "idle" not in verdicts(receipt)
    assert receipt["data-at-risk"] is True
    assert 4 * S <= receipt["elapsed-usec"] < 40 * S


def test_storage_that_comes_back_in_time_loses_nothing(
    client: Client, linux_guest: Make, lab_dir: Path
) -> None:
    image = make_disk(lab_dir / "disk")
    client.subscribe()
    with nbd_server(image, room=1 << 30) as server:
        guest = linux_guest(job="writer", disk=server.uri, records=100_000, stride=4096)
        guest.wait_for(r"\b20\b", 60)
        server.freeze()
        job = client.terminate(guest.pid, FORCE, grace_usec=("t", 0), stall_usec=("t", 1 * S))
        # With a fixed timeout, the guest would be killed before this is reported.
        while True:
            _, (_, changed, _) = client.signal("PropertiesChanged", path=job)
            if changed.get("Verdict") == ("s", "storage-wait"):
                break
        server.thaw()
        result, receipt = client.wait(job)
    assert (result, signals(receipt)) == ("exited", ["SIGTERM"])
    assert guest.wait_gone() == 0


@pytest.fixture
def disk_dir() -> Iterator[Path]:
    """A directory on a disk. /tmp may be a tmpfs, and writes to a tmpfs are not counted."""
    with tempfile.TemporaryDirectory(prefix="qkl-", dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_progress_over_nbd_is_told_in_bytes(
    client: Client, linux_guest: Make, disk_dir: Path, tcp: bool
) -> None:
    """For a unix socket, QEMU has no counter, so the server's writes count as writes of the guest.
    For TCP, the bytes that the server has acknowledged count."""
    image = disk_dir / "disk"
    create = ("create", "-q", "-f", "qcow2", "-o", "cluster_size=4K", str(image), "11G")
    run([needs.program("qemu-img", "qemu-utils"), *create], check=True)
    client.subscribe()
    with nbd_server(image, tcp=tcp, room=64 << 20) as server:
        # A clean exit writes a table of 4 KiB for every three records.
        guest = linux_guest(job="writer", disk=server.uri, records=300, stride=32 << 20, passes=3)
        guest.wait_for("WRITER DONE", 60)
        server.rate("100K")
        job = client.terminate(guest.pid, FORCE)
        values = client.properties(job, JOB_INTERFACE)
        while not values["Result"] and values["BytesWritten"] in (0, UNKNOWN):
            client.signal("PropertiesChanged", path=job)
            values = client.properties(job, JOB_INTERFACE)
        assert values["Verdict"] == "flushing"
        assert 0 < values["Rate"] < 1_000_000
        server.rate(None)
        result, receipt = client.wait(job)
    assert result == "exited" and receipt["bytes-written"] >= values["BytesWritten"]


@pytest.mark.each_library
def test_inspect_shows_what_is_seen(client: Client, linux_guest: Make, lab_dir: Path) -> None:
    image = make_disk(lab_dir / "disk")
    with nbd_server(image, tcp=True, room=1 << 30) as server:
        guest = linux_guest(job="writer", disk=server.uri, records=100_000, stride=4096)
        guest.wait_for(r"\b20\b", 60)
        # On a busy host, the guest may not run between the samples of one call.
        found = until(
            lambda: plain(client.call("Inspect", "u", guest.pid)[0]),
            lambda found: found["verdict"] == "flushing",
        )
        assert found["unseen"] == []
        assert ("tcp", True) in [(family, its) for family, its, _, _ in found["sockets"]]
        server.freeze()
        found = plain(client.call("Inspect", "u", guest.pid)[0])
        server.thaw()
    assert found["reasons"]


def test_plan_says_what_would_be_done_and_does_nothing(client: Client, qemu: Make) -> None:
    guest = qemu()

    def plan(flags: int, **options: Any) -> dict[str, Any]:
        (found,) = client.call("Plan", "uta{sv}", guest.pid, flags, options)
        return dict(plain(found))

    # Storage may have been added through the guest's monitor, and nothing would show it. So the
    # verdict is unknown, not idle.
    spans = {"storage-stall-usec": ("t", 3 * S), "stall-usec": ("t", 2 * S)}
    found = plan(FORCE, **spans, **{"grace-usec": ("t", 2 * S)})
    assert found["pid"] == guest.pid
    assert [tuple(r) for r in found["rungs"]] == [
        ("terminate", "SIGTERM", 0),
        ("kill", "SIGKILL", 3 * S),
    ]
    assert found["gives-up-usec"] == 8 * S
    found = plan(0)
    assert [tuple(r) for r in found["rungs"]] == [("terminate", "SIGTERM", 0)]
    assert found["warnings"] == ["without FORCE no SIGKILL is sent: a guest that is stuck remains"]
    found = plan(FORCE | FIXED)
    assert [r[2] for r in found["rungs"]] == [0, 10 * S]
    found = plan(FORCE, **{"grace-usec": ("t", INFINITY)})
    assert (len(found["rungs"]), found["gives-up-usec"]) == (1, INFINITY)
    guest.signal(signal.SIGSTOP)
    assert any("SIGSTOP" in warning for warning in plan(FORCE)["warnings"])
    assert client.call("ListJobs") == ([],)
    assert guest.alive
