"""Traces on disk: their content, and that a slow disk delays nobody."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qkilld.adapters import trace_file
from qkilld.adapters.trace_file import TraceDirectory
from qkilld.model.constants import Flag, Phase, Result
from qkilld.model.policy import Policy
from qkilld.model.sample import Sample
from qkilld.model.trace import CutRecord, EndRecord, Header, Record, RungRecord, Trace, decode
from tests.lab import needs
from tests.lab.process import OTHER_UID

T0 = 1_000_000_000
HEADER = Header(7, T0, 4711, 99, "qemu", "../../etc/passwd\n", Flag.FORCE, Policy())
SENT = RungRecord(T0 + 1, Phase.TERMINATE, "SIGTERM")
NAME = "job7-pid4711-start99.jsonl"

Open = Callable[..., TraceDirectory]


def sample(number: int) -> Sample:
    return Sample(T0 + number, "S")


@pytest.fixture
def errors() -> list[str]:
    return []


@pytest.fixture
def open_traces(tmp_path: Path, errors: list[str]) -> Iterator[Open]:
    """A function that opens traces in tmp_path. They are closed after the test."""
    opened: list[TraceDirectory] = []

    def make(**options: int) -> TraceDirectory:
        opened.append(TraceDirectory(tmp_path, errors.append, **options))
        return opened[-1]

    yield make
    for traces in opened:
        traces.close()


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def read(path: Path) -> Trace:
    return decode(path.read_text())


def test_a_trace(open_traces: Open, tmp_path: Path) -> None:
    traces = open_traces()
    recorder = traces.begin(HEADER)
    records: tuple[Record, ...] = (SENT, sample(2), EndRecord(T0 + 3, Result.EXITED))
    for record in records:
        recorder.record(record)
    recorder.close()
    traces.close()
    assert names(tmp_path) == [NAME]
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600
    assert read(tmp_path / NAME) == Trace(HEADER, records)


def test_nothing_is_made_before_the_first_record(open_traces: Open, tmp_path: Path) -> None:
    traces = open_traces()
    traces.begin(HEADER)
    traces.begin(HEADER).close()
    traces.close()
    assert names(tmp_path) == []


def test_existing_files_are_not_overwritten(open_traces: Open, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / NAME).symlink_to(victim)
    (tmp_path / NAME.replace(".", ".2.")).symlink_to(tmp_path / "missing")
    traces = open_traces()
    traces.begin(HEADER).record(SENT)
    traces.close()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "missing").exists()
    assert read(tmp_path / NAME.replace(".", ".3.")).records == (SENT,)


def test_the_directory_is_held(open_traces: Open, tmp_path: Path) -> None:
    """Traces are not written to another directory that later gets the same name."""
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    traces = open_traces()
    tmp_path.rename(moved)
    tmp_path.mkdir()
    traces.begin(HEADER).record(SENT)
    traces.close()
    assert (names(tmp_path), names(moved)) == ([], [NAME])


def test_a_trace_ends_at_its_limit(open_traces: Open, tmp_path: Path) -> None:
    traces = open_traces(max_bytes=4096)
    recorder = traces.begin(HEADER)
    for number in range(100):
        recorder.record(sample(number))
    recorder.record(EndRecord(T0 + 100, Result.EXITED))
    recorder.close()
    traces.close()
    assert (tmp_path / NAME).stat().st_size <= 4096
    records = read(tmp_path / NAME).records
    assert records[:-1] == tuple(sample(number) for number in range(len(records) - 1))
    cut = records[-1]
    assert isinstance(cut, CutRecord)
    assert "limit of 4096 bytes" in cut.why


def test_a_disk_that_stands_still_holds_nothing_up(
    open_traces: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_file, "QUEUE_LENGTH", 3)
    entered, release = threading.Event(), threading.Event()
    create = trace_file._create

    def slow(directory: int, header: Header) -> int:
        entered.set()
        release.wait()
        return create(directory, header)

    monkeypatch.setattr(trace_file, "_create", slow)
    traces = open_traces()
    recorder = traces.begin(HEADER)
    recorder.record(sample(0))
    entered.wait()
    for number in range(1, 100):
        recorder.record(sample(number))  # returns at once, or this test never ends
    recorder.close()
    release.set()
    traces.close()
    # One record was being written and three waited. A note reports that the others are missing.
    records = read(tmp_path / NAME).records
    assert records[:-1] == tuple(sample(number) for number in range(4))
    assert isinstance(records[-1], CutRecord)
    assert records[-1].at == T0 + 4


def test_a_failing_directory_is_reported_once(
    open_traces: Open, tmp_path: Path, errors: list[str]
) -> None:
    traces = open_traces()
    tmp_path.rmdir()
    for _ in range(3):
        recorder = traces.begin(HEADER)
        recorder.record(SENT)
        recorder.record(sample(2))
        recorder.close()
    traces.close()
    assert errors == [f"Traces cannot be written to {tmp_path}: No such file or directory"]


def test_a_failed_write_ends_that_trace_alone(
    open_traces: Open, tmp_path: Path, errors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = open_traces()
    bad, good = traces.begin(HEADER), traces.begin(HEADER)
    create = trace_file._create
    created: list[int] = []

    def full(directory: int, header: Header) -> int:
        """The disk of the first file is full."""
        created.append(create(directory, header) if created else os.open("/dev/full", os.O_WRONLY))
        return created[-1]

    monkeypatch.setattr(trace_file, "_create", full)
    for recorder in (bad, good):
        recorder.record(SENT)
        recorder.record(sample(2))
        recorder.close()
    traces.close()
    assert errors == [f"Traces cannot be written to {tmp_path}: No space left on device"]
    assert read(tmp_path / NAME).records == (SENT, sample(2))


def test_a_path_that_is_not_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(OSError):
            TraceDirectory(path, print)


def test_a_directory_of_others_is_refused_at_once(tmp_path: Path) -> None:
    needs.root("to be another user")
    os.seteuid(OTHER_UID)
    try:
        with pytest.raises(OSError, match="Permission denied"):
            TraceDirectory(tmp_path, print)
    finally:
        os.seteuid(0)
