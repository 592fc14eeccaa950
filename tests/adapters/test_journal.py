"""Events are written to journald or stderr without ever delaying the caller."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.adapters import journal, journal_stream
from qkilld.engine.events import internal_error
from qkilld.model.event import Event, MessageId, Priority
from qkilld.model.guest import Guest, Identity, Label, Unit

IDENTITY = Identity(17, 99, 1000, "qemu", "S", "/usr/bin/qemu-system-x86_64", False)


def event(text: str = "Something happened.", **more: object) -> Event:
    return Event(MessageId.JOB_STARTED, Priority.INFO, text, **more)  # type: ignore[arg-type]


def test_a_journal_that_blocks_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "QUEUE_LENGTH", 3)
    entered, release = threading.Event(), threading.Event()
    written: list[Event] = []

    def sink(what: Event) -> None:
        entered.set()
        release.wait()
        written.append(what)

    queued = journal.QueuedJournal(sink)
    queued.write(event("0"))
    entered.wait()
    for number in range(1, 10):
        queued.write(event(str(number)))  # If this blocked, the test would never end.
    release.set()
    queued.close()
    # One event was being written and three waited. The others were dropped and counted.
    *kept, count = written
    assert [what.message for what in kept] == ["0", "1", "2", "3"]
    assert (count.id, count.fields) == (MessageId.ENTRIES_DROPPED, {"QKILLD_DROPPED": "6"})


def test_a_journal_that_fails_is_survived() -> None:
    written: list[str] = []

    def sink(what: Event) -> None:
        if what.message == "bad":
            raise OSError("no journal")
        written.append(what.fields.get("QKILLD_DROPPED", what.message))

    queued = journal.QueuedJournal(sink)
    for text in ("bad", "bad", "good"):
        queued.write(event(text))
    queued.close()
    assert sorted(written) == ["2", "good"]


class JournaldStandIn:
    """A socket like journald's, which is read only by calls of `read`."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "socket"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(os.fsencode(self.path))
        self._socket.settimeout(30)

    def read(self) -> dict[str, str]:
        """Return the next entry."""
        data, fds, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        if fds:
            assert not data
            with os.fdopen(fds[0], "rb") as file:
                seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
                assert seals == 0xF, "all four of them, or journald does not take it"
                file.seek(0)
                data = file.read()
        return parse(data)

    def close(self) -> None:
        self._socket.close()
        self.path.unlink()


def parse(data: bytes) -> dict[str, str]:
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(data[:8], "little")
            value, end, data = (
                data[8 : 8 + length],
                data[8 + length : 9 + length],
                data[9 + length :],
            )
            assert end == b"\n"
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[JournaldStandIn]:
    stand_in = JournaldStandIn(tmp_path)
    yield stand_in
    stand_in.close()


def test_an_entry_as_journald_reads_it(journald: JournaldStandIn) -> None:
    sink = journal.Journald("program", journald.path)
    guest = Guest(IDENTITY, Label("web", unit=Unit("web.service")))
    hostile = "one\nPRIORITY=0\n\udcff"
    sink(event(guest=guest, fields={"QKILLD_GUEST": hostile}))
    assert journald.read() == {
        "MESSAGE": "Something happened.",
        "MESSAGE_ID": MessageId.JOB_STARTED.value,
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "program",
        "QKILLD_GUEST": "one\nPRIORITY=0\n\\udcff",
        "OBJECT_PID": "17",
        "OBJECT_SYSTEMD_UNIT": "web.service",
    }
    sink.close()


def test_an_entry_of_any_size(journald: JournaldStandIn) -> None:
    sink = journal.Journald("program", journald.path)
    for length in (1, 100_000, 10_000_000):
        text = "x" * length
        sink(event(text))
        assert journald.read()["MESSAGE"] == text
    sink.close()


def test_another_journald_in_the_place_of_one(tmp_path: Path) -> None:
    first = JournaldStandIn(tmp_path)
    sink = journal.Journald("program", first.path)
    sink(event("to the first"))
    first.close()
    with pytest.raises(OSError):
        sink(event("to nobody"))
    second = JournaldStandIn(tmp_path)
    sink(event("to the second"))
    assert second.read()["MESSAGE"] == "to the second"
    second.close()
    sink.close()


def test_a_journald_that_does_not_read_holds_nothing_up(journald: JournaldStandIn) -> None:
    """journald delays neither the loop nor another thread. Afterwards, each entry is written or
    counted."""
    asyncio.run(_write_unread(journald))


async def _write_unread(journald: JournaldStandIn) -> None:
    sink = journal.Journald("program", journald.path)
    queued = journal.QueuedJournal(sink)
    loop = asyncio.get_running_loop()
    total = 2 * journal.QUEUE_LENGTH
    for number in range(total):
        queued.write(event(str(number)))
    late = []
    for _ in range(20):
        began = loop.time()
        await asyncio.sleep(0.01)
        late.append(loop.time() - began - 0.01)
    # If a blocked call held Python's lock, this would wait for ever.
    await asyncio.to_thread(time.sleep, 0.01)
    assert min(late) < 0.05

    found: list[int] = []
    dropped = 0
    while len(found) + dropped < total:
        entry = await asyncio.to_thread(journald.read)
        if entry["MESSAGE_ID"] == MessageId.ENTRIES_DROPPED.value:
            dropped += int(entry["QKILLD_DROPPED"])
        else:
            found.append(int(entry["MESSAGE"]))
    assert len(found) >= journal.QUEUE_LENGTH
    assert dropped > 0
    assert found == sorted(set(found))
    queued.close()
    sink.close()


@pytest.mark.parametrize("reads", [True, False])
def test_the_end_waits_until_entries_are_processed(
    journald: JournaldStandIn, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    """journald looks up the unit of the sender only while the sender runs."""
    monkeypatch.setattr(journal, "PROCESSING_TIMEOUT_S", 30 if reads else 0.05)
    sink = journal.Journald("program", journald.path)
    queued = journal.QueuedJournal(sink, sink.wait_until_processed)
    queued.write(event())
    ended = threading.Event()

    def close() -> None:
        queued.close()
        ended.set()

    thread = threading.Thread(target=close)
    thread.start()
    if reads:
        assert journald.read()["MESSAGE"] == "Something happened."
        # journald has received the entry, but perhaps not processed it yet.
        assert not ended.wait(0.1)
        assert journald.read() == {}
    assert ended.wait(30)
    thread.join()
    sink.close()


def test_stderr_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    journal.to_stderr(event(fields={"QKILLD_JOB": "7", "QKILLD_PHASE": "kill", "QKILLD_X": "y"}))
    journal.to_stderr(Event(MessageId.JOB_ENDED, Priority.WARNING, "Watch out."))
    journal.to_stderr(internal_error("testing", ValueError("why")))
    plain, warning, error, *trace = capsys.readouterr().err.splitlines()
    assert plain == "Something happened. [job=7 phase=kill]"
    assert warning == "warning: Watch out."
    assert error == "error: Internal error while testing: ValueError."
    assert trace == ["ValueError: why"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (Unit(), {"OBJECT_PID": "17"}),
        (None, {"OBJECT_PID": "17"}),
        (
            Unit("web.service"),
            {"OBJECT_PID": "17", "OBJECT_SYSTEMD_UNIT": "web.service"},
        ),
        (
            Unit("user@1000.service", "web.service"),
            {
                "OBJECT_PID": "17",
                "OBJECT_SYSTEMD_UNIT": "user@1000.service",
                "OBJECT_SYSTEMD_USER_UNIT": "web.service",
                "OBJECT_UID": "1000",
            },
        ),
    ],
)
def test_the_unit_is_named_for_journald_cannot_always_look_it_up(
    unit: Unit, expected: dict[str, str]
) -> None:
    assert journal._object_fields(Guest(IDENTITY, Label("web", unit=unit))) == expected


def test_journald_only_where_stderr_is_connected_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "1:2", "nonsense", ":"):
        monkeypatch.setenv("JOURNAL_STREAM", value)
        assert not journal_stream.stderr_is_journal()
