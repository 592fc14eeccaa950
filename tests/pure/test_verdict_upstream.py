"""Verdicts on servers that are waiting for servers of their own, perhaps on other hosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qkilld.decision.ladder import JobFacts, kill_due
from qkilld.decision.verdict import Assessment
from qkilld.model.constants import Flag, Verdict
from qkilld.model.policy import Policy
from qkilld.model.sample import Mount, Peer
from tests.pure.test_verdict import FUSE, IDLE, NO_IO, ON_MOUNT, UNIX, WRITING, S, follow, served

UPLOADER = Peer(90, "s3fs", (), 1_000, NO_IO, (), exchanged=5_000)
IN_CACHE = replace(UPLOADER, place=("7:1",))
"""A server that also has a file with the name of the image."""
FRONT = Peer(80, "qemu-storage-da", (), 1_000, NO_IO, (), shared=False, exchanged=5_000)
BEHIND = Peer(90, "nbdkit", (), 1_000, NO_IO, (), shared=False)
STALL = 20 * S
POLICY = Policy(grace=2 * S, stall=8 * S, storage_stall=STALL)


def mounted(server: Peer) -> dict[str, Any]:
    mount: Mount = replace(FUSE, servers=(server,), certain=True)
    return {"threads": (ON_MOUNT,), "mounts": (mount,)}


def unknown(server: Peer) -> dict[str, Any]:
    return {"sockets": (replace(UNIX, node="", role="unknown", peer=server),)}


def watch(seconds: int, show: Callable[[int], dict[str, Any]]) -> Assessment:
    return follow([replace(IDLE, at=n * S, **show(n)) for n in range(1, seconds + 1)])


def due(now: Assessment) -> int:
    facts = JobFacts(flags=Flag.FORCE, policy=POLICY, started=S, term_at=S, assessment=now)
    return kill_due(facts)


@pytest.mark.parametrize("server", [UPLOADER, IN_CACHE])
def test_an_upload_of_a_file_system_is_waited_for(server: Peer) -> None:
    """Perhaps it is the upload of another user's file, so the wait has an end."""

    def show(second: int) -> dict[str, Any]:
        return mounted(replace(server, exchanged=5_000 + 1_000_000 * second))

    now = watch(90, show)
    assert (now.verdict, now.progress_at, now.doubt_at) == (Verdict.UNKNOWN, None, 90 * S)
    assert due(now) > now.last.at
    assert due(watch(900, show)) < 6 * STALL


@pytest.mark.parametrize("show", [mounted, served, unknown])
@pytest.mark.parametrize("amount", [0, 96])
def test_keepalives_of_a_server_are_no_progress(
    show: Callable[[Peer], dict[str, Any]], amount: int
) -> None:
    """96 bytes every 5 s, as for iSCSI."""
    server = UPLOADER if show is mounted else FRONT
    now = watch(60, lambda n: show(replace(server, exchanged=5_000 + n // 5 * amount)))
    assert (now.verdict, now.progress_at, now.doubt_at) == (Verdict.STORAGE_WAIT, None, None)


@pytest.mark.parametrize("show", [mounted, served, unknown])
def test_unreadable_connections_of_a_server_show_nothing(
    show: Callable[[Peer], dict[str, Any]],
) -> None:
    server = UPLOADER if show is mounted else FRONT
    now = watch(60, lambda n: show(replace(server, exchanged=5_000 if n % 2 else None)))
    assert (now.progress_at, now.doubt_at) == (None, None)


STUCK = replace(WRITING, switches=7)


@pytest.mark.parametrize(
    ("front", "show", "is_sure"),
    [
        (FRONT, served, True),
        # One of its calls is stuck.
        (replace(FRONT, threads=(STUCK,)), served, False),
        # A server that it uses is stuck.
        (replace(FRONT, behind=(replace(BEHIND, threads=(STUCK,)),)), served, False),
        # It works for others, too.
        (replace(FRONT, shared=True), served, False),
        (replace(FRONT, shared=None), served, False),
        # Its connections break, so perhaps it sends the same request again and again.
        (replace(FRONT, ended=2), served, True),
        (replace(FRONT, ended=3), served, False),
        # It may be no storage, but forward the guest's network.
        (FRONT, unknown, False),
    ],
)
def test_a_server_that_sends_a_request_every_4_s(
    front: Peer, show: Callable[[Peer], dict[str, Any]], is_sure: bool
) -> None:
    now = watch(60, lambda n: show(replace(front, exchanged=5_000 + n // 4 * 4_140)))
    moved = now.progress_at if is_sure else now.doubt_at
    assert moved == 60 * S
    if not is_sure:
        assert now.progress_at is None


@pytest.mark.parametrize("show", [mounted, served])
@pytest.mark.parametrize(
    ("front_runs", "behind_runs", "special", "moved"),
    [
        (True, True, {}, 60 * S),
        (True, False, {}, None),
        (False, True, {}, None),
        # The guest's request may be stuck, while the server works for others.
        (True, True, {"shared": True}, None),
        (True, True, {"threads": (STUCK,)}, None),
    ],
)
def test_replies_to_a_server_on_unix_sockets(
    show: Callable[[Peer], dict[str, Any]],
    front_runs: bool,
    behind_runs: bool,
    special: dict[str, Any],
    moved: int | None,
) -> None:
    """A reply every 4 s wakes the server and the one behind it once. QEMU does not run."""

    def seen(second: int) -> dict[str, Any]:
        woken = second // 4
        behind = replace(BEHIND, switches=1_000 + woken * behind_runs)
        shared = None if show is mounted else False
        front = replace(FRONT, switches=1_000 + woken * front_runs, shared=shared, behind=(behind,))
        return show(replace(front, **special))

    now = watch(60, seen)
    assert (now.progress_at, now.doubt_at) == (None, moved)
