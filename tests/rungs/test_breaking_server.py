"""A server that breaks each connection. QEMU connects again, and repeats the requests that were not
answered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.model.constants import Result
from tests.lab.bare import BareGuest, bare_guest
from tests.lab.breaking_nbd import breaking_nbd
from tests.rungs.stopping import S, actions
from tests.rungs.test_yank import stop

STALL = {"storage_stall": 4 * S, "stall": 2 * S, "grace": S, "max": 100 * S}
MIB = 1 << 20


@contextlib.contextmanager
def guest_on(directory: Path, *, replies: int, seconds: float, tcp: bool) -> Iterator[BareGuest]:
    file = directory / "remote.raw"
    with file.open("wb") as image:
        image.truncate(64 * MIB)
    with breaking_nbd(file, replies=replies, seconds=seconds, tcp=tcp) as server:
        parts = ",".join(f"server.{key}={value}" for key, value in server.items())
        drive = f"driver=nbd,{parts},if=none,id=remote,reconnect-delay=300"
        with bare_guest(directory, ["-drive", drive]) as guest:
            yield guest


@pytest.mark.timeout(300)
@pytest.mark.parametrize("tcp", [False, True])
def test_a_server_that_takes_the_same_bytes_again_is_not_waited_for(
    lab_dir: Path, tcp: bool
) -> None:
    with guest_on(lab_dir, replies=0, seconds=5, tcp=tcp) as guest:
        guest.write_later("remote", 0, 1, 16 * MIB)
        job = stop(guest, STALL)
    assert actions(job) == ["SIGTERM", "SIGKILL"]
    assert job.rungs[1].at - job.rungs[0].at < 70 * S


@pytest.mark.timeout(300)
def test_a_server_that_answers_some_requests_each_time_is_waited_for(lab_dir: Path) -> None:
    with guest_on(lab_dir, replies=3, seconds=6, tcp=True) as guest:
        for number in range(24):
            guest.write_later("remote", number * MIB, 1, MIB)
        job = stop(guest, STALL)
    assert (actions(job), job.result) == (["SIGTERM"], Result.EXITED)
