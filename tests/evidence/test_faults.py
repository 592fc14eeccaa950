"""A bug in one reader is reported, and the results of the others are kept."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qkilld import debug_log
from qkilld.decision.verdict import assess
from qkilld.decision.waits import blind_to
from qkilld.evidence import sampler, sockdiag
from qkilld.evidence.cgroup import CgroupReader
from qkilld.evidence.command_line import GraphReader
from qkilld.evidence.faults import FaultGuard
from qkilld.evidence.kept_file import KeptFile
from qkilld.evidence.process_reader import ProcessReader
from qkilld.evidence.rings import RingReader
from qkilld.evidence.sampler import EvidenceSampler, HostTables, Reader
from qkilld.evidence.sockets import SocketReader
from qkilld.evidence.storage import StorageReader
from qkilld.evidence.threads import ThreadReader
from qkilld.model.constants import Verdict
from qkilld.model.sample import Sample
from tests.engine.conftest import FakeProcess
from tests.lab.guest import Guest

Make = Callable[..., Guest]
FIELDS = set(Sample.__slots__) - {"completions"}  # Only in detailed samples.
THREADS = {"switches", "threads", "exiting", "running"}


def fail(*arguments: object) -> Any:
    raise LookupError("a fault of the reader")


@pytest.mark.parametrize(
    ("place", "name", "costs"),
    [
        (
            ProcessReader,
            "_read_stat",
            {"state", "cpu", "switches", "threads", "exiting", "running"},
        ),
        (ProcessReader, "_read_status", {"tracer", "term_pending", "dumping"}),
        (ProcessReader, "_read_io", {"io"}),
        (ThreadReader, "read", THREADS),
        (RingReader, "read", {"rings", "direct"}),
        (StorageReader, "read", {"devices", "mounts"}),
        (StorageReader, "refresh", {"devices", "mounts", "formatted", "images"}),
        (SocketReader, "read", {"sockets"}),
        (SocketReader, "refresh", {"sockets"}),
        (CgroupReader, "read", {"cgroup"}),
        (GraphReader, "read", {"nodes", "formatted", "pluggable", "shared_memory"}),
        (HostTables, "recent", {"host"}),
    ],
)
def test_a_fault_costs_the_fields_of_its_reader(
    place: type, name: str, costs: set[str], qemu: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, fail)
    reports: list[tuple[str, Exception]] = []
    reader = Reader(
        qemu().pid,
        HostTables(),
        FaultGuard(lambda doing, error: reports.append((doing, error))),
    )
    samples = [reader.read() for _ in range(3)]
    reader.close()
    for sample in samples:
        unknown = {field for field in FIELDS if getattr(sample, field) in (None, "?")}
        assert unknown == costs
    ((doing, error),) = reports
    assert doing.startswith(("reading", "finding"))
    assert isinstance(error, LookupError)


def test_each_cause_is_reported_once() -> None:
    reports: list[tuple[str, str]] = []
    guard = FaultGuard(lambda doing, error: reports.append((doing, str(error))))

    def other(text: str) -> None:
        raise LookupError(text)

    for number in range(3):
        assert guard.call("reading a", fail) is None
        assert guard.call("reading b", other, f"as the target likes {number}") is None
    assert reports == [
        ("reading a", "a fault of the reader"),
        ("reading b", "as the target likes 0"),
    ]


def test_a_process_that_cannot_be_looked_at_is_unknown_and_that_is_told_in_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler, "Reader", fail)
    reports: list[tuple[str, asyncio.AbstractEventLoop]] = []

    async def take() -> Sample:
        loop = asyncio.get_running_loop()
        taken: asyncio.Future[Sample] = loop.create_future()
        evidence = EvidenceSampler(
            lambda doing, error: reports.append((doing, asyncio.get_running_loop()))
        )
        watch = evidence.watch(FakeProcess())
        try:
            watch.take_sample(taken.set_result)
            async with asyncio.timeout(30):
                sample = await taken
            assert reports == [("taking a sample", loop)]
            return sample
        finally:
            watch.close()
            evidence.close()

    sample = asyncio.run(take())
    assert blind_to(sample)
    assert assess(assess(None, sample), sample).verdict is Verdict.UNKNOWN


@pytest.mark.parametrize("kind", [sockdiag._UNIX_PEER, sockdiag._UNIX_QUEUES])
def test_a_netlink_message_that_is_cut_off_is_unreadable(
    kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = bytes(sockdiag._UNIX_MESSAGE.size) + struct.pack("=HH", 4, kind)
    monkeypatch.setattr(sockdiag, "_dump_unix", lambda: ({7: (message, 0, len(message))}, {}))
    with pytest.raises(sockdiag.Unreadable):
        sockdiag.SocketTable().unix(7)
    monkeypatch.setattr(sockdiag, "_dump_tcp", lambda: ({7: (bytes(20), 0, 20)}, set()))
    with pytest.raises(sockdiag.Unreadable):
        sockdiag.SocketTable().tcp(7)


ASK = (
    lambda table: table.unix(7),
    lambda table: table.listens_at(7),
    lambda table: table.listens(b"/s".__eq__),
    lambda table: table.has_unix(7),
)


@pytest.mark.parametrize("ask", ASK, ids=["unix", "listens_at", "listens", "has_unix"])
@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize(
    "attribute",
    [
        struct.pack("=HH", 4, sockdiag._UNIX_QUEUES),
        struct.pack("=HH", 4, sockdiag._UNIX_SHUTDOWN),
        struct.pack("=HH", 60, sockdiag._UNIX_NAME) + b"/s",
        struct.pack("=HH", 0, sockdiag._UNIX_NAME),
    ],
    ids=["queues", "shutdown", "long-name", "no-length"],
)
def test_a_malformed_table_of_unix_sockets_is_unknown(
    ask: Callable[[sockdiag.SocketTable], object],
    crowded: bool,
    attribute: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An unreadable answer does not show that nothing listens."""
    state = sockdiag._LISTEN if ask in ASK[1:3] else sockdiag._ESTABLISHED
    message = sockdiag._UNIX_MESSAGE.pack(socket.AF_UNIX, sockdiag._SOCK_STREAM, state, 7)
    message += attribute

    def answer(request: bytes, flags: int, seconds: float | None = None) -> Iterator[object]:
        yield message, 0, len(message)

    monkeypatch.setattr(sockdiag, "_request", answer)
    crowd = sockdiag.CrowdedTables()
    if crowded:
        crowd.note(socket.AF_UNIX)
    with pytest.raises(sockdiag.Unreadable):
        ask(sockdiag.SocketTable(crowd))


@pytest.mark.parametrize("crowded", [False, True])
def test_a_malformed_answer_about_one_socket_is_unknown(
    crowded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockdiag, "_request", lambda *arguments, **more: iter([(b"", 0, 0)]))
    monkeypatch.setattr(sockdiag, "_dump_tcp", lambda: ({7: (b"", 0, 0)}, set()))
    crowd = sockdiag.CrowdedTables()
    for family in (socket.AF_UNIX, socket.AF_INET) if crowded else ():
        crowd.note(family)
    table = sockdiag.SocketTable(crowd)
    for ask in (
        lambda: table.listens_at(7),
        lambda: table.is_listening(7),
        lambda: table.tcp(7),
        lambda: table.tcp_peer(bytes(49)),
    ):
        with pytest.raises(sockdiag.Unreadable):
            ask()


def test_each_field_that_is_unknown_has_a_line_and_a_reason(
    qemu: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(debug_log, "_is_on", True)
    monkeypatch.setattr(debug_log, "_logged_keys", set())
    caplog.set_level(logging.DEBUG, "qkilld")

    def refuse(file: KeptFile, most: int = 0) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    pid = qemu().pid
    reader = Reader(pid, HostTables())
    reader.read()
    before = len(caplog.messages)
    monkeypatch.setattr(KeptFile, "read", refuse)
    samples = [reader.read() for _ in range(3)]
    reader.close()
    unknown = {field for field in FIELDS if getattr(samples[-1], field) is None}
    assert {"io", "cpu", "cgroup"} <= unknown
    lines = caplog.messages[before:]
    for field in ("io", "cpu", "cgroup"):
        assert lines.count(f"not known of process {pid}: {field}") == 1
    for name in ("stat", "io", "cgroup"):
        reason = "PermissionError: [Errno 13] Permission denied"
        assert lines.count(f"ignored while reading {name} of process {pid}: {reason}") == 1
