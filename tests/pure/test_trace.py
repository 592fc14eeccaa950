"""The format of traces: round trips, and messages for files that are not traces."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from qkilld.model.constants import INFINITY, Flag, Phase, Result, Verdict
from qkilld.model.policy import Policy
from qkilld.model.sample import (
    Cgroup,
    Device,
    ImagePlace,
    Io,
    Memory,
    Mount,
    Node,
    Peer,
    Sample,
    Socket,
    Thread,
)
from qkilld.model.trace import (
    ChangeRecord,
    CutRecord,
    EndRecord,
    ExitRecord,
    Header,
    Record,
    RungRecord,
    Trace,
    VerdictRecord,
    decode,
    header_line,
    record_line,
)

S = 1_000_000
HOSTILE = 'a"\\\n\u2028\x00{}\U0001f600'
HEADER = Header(
    job=7,
    started=1_000 * S,
    pid=4711,
    start_time=99,
    command="qemu-system-x86",
    name=HOSTILE,
    flags=Flag.FORCE | Flag.FIXED,
    policy=Policy(grace=1_500_000, max=INFINITY, reap=0),
)
PEER = Peer(9, HOSTILE, (), 3, Io(1, 2, 3, 4, 5, 6, 7), (), False)
FULL = Sample(
    at=1_001 * S,
    state="S",
    term_pending=False,
    tracer=0,
    cpu=1,
    switches=2,
    io=Io(1, 2, 3, 4, 5, 6, 2**63),
    threads=(
        Thread(7, HOSTILE, "D", 75, True, "folio_wait_bit", "fsync", 3, "disk", ("8:0",), "", 9),
        Thread(8, "", "R", None, None, None),
    ),
    exiting=False,
    rings=0,
    direct=False,
    nodes=(Node("d", "nbd"),),
    formatted=0,
    images=(ImagePlace(("disk", HOSTILE), "0:53"),),
    pluggable=False,
    shared_memory=True,
    running=1,
    dumping=False,
    completions=5,
    devices=(Device("8:0", "sda", writes=1, sectors_written=2, reads=3, in_flight=4),),
    mounts=(Mount("nfs4", 10, None),),
    sockets=(Socket(11, "tcp", True, 1, 2, acked=3, role="storage", node="d", peer=PEER),),
    cgroup=Cgroup(True, 1, None, 3, None, False),
    host=Memory(1, 2),
)
EMPTY = Sample(at=1_002 * S, state="?")
RECORDS: tuple[Record, ...] = (
    RungRecord(1_000 * S + 5, Phase.TERMINATE, "SIGTERM"),
    FULL,
    EMPTY,
    VerdictRecord(1_002 * S, Verdict.STORAGE_WAIT, ("one", HOSTILE)),
    ChangeRecord(1_003 * S, Flag(0), Policy()),
    EndRecord(1_004 * S, Result.SURVIVED),
    ExitRecord(1_005 * S),
    CutRecord(1_006 * S, "why"),
)


def lines(*records: Record, header: Header = HEADER) -> str:
    return header_line(header) + "".join(record_line(header, record) for record in records)


def changed(line: str, **values: Any) -> str:
    """Return the line with other values. The value `...` removes a key."""
    document = json.loads(line) | values
    return json.dumps({k: v for k, v in document.items() if v is not ...}) + "\n"


def test_a_trace_is_decoded_as_it_was_encoded() -> None:
    assert all(getattr(FULL, field.name) is not None for field in fields(FULL))
    assert decode(lines(*RECORDS)) == Trace(HEADER, RECORDS)


def test_it_is_ascii_a_record_a_line() -> None:
    text = lines(*RECORDS)
    assert text.isascii()
    assert len(text.splitlines()) == 1 + len(RECORDS)


def test_times_count_from_the_start_and_what_is_not_known_is_null() -> None:
    document = json.loads(record_line(HEADER, EMPTY))
    assert document["at"] == 2 * S
    assert document["io"] is None
    assert document.keys() == {"kind", *(field.name for field in fields(Sample))}


def test_spans_and_flags_are_in_words() -> None:
    document = json.loads(header_line(HEADER))
    assert document["flags"] == ["force", "fixed"]
    assert document["policy"]["grace"] == "1.5s"
    assert document["policy"]["max"] == "infinity"


def test_a_line_that_was_being_written_does_not_count() -> None:
    text = lines(FULL, EMPTY)
    assert decode(text[:-1]).records == (FULL,)
    assert decode(text[: len(lines(FULL)) + 20]).records == (FULL,)


def test_fields_of_a_newer_version_are_ignored() -> None:
    header = changed(header_line(HEADER), colour="red")
    sample = changed(record_line(HEADER, FULL), weight={"kg": 3})
    other = '{"at":1,"kind":"omen"}\n{"at":1,"kind":[]}\n{}\n'
    assert decode(header + other + sample) == Trace(HEADER, (FULL,))


def test_missing_fields_of_an_older_version_have_defaults() -> None:
    header = changed(header_line(HEADER), policy={"grace": "3s"})
    sample = changed(record_line(HEADER, FULL), host=..., rings=...)
    trace = decode(header + sample)
    assert trace.header.policy == Policy(grace=3 * S)
    assert trace.records == (replace(FULL, host=None, rings=None),)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"version": 1}, "version of its format"),
        ({"version": 3}, "version of its format"),
        ({"version": 0}, "version of its format"),
        ({"version": True}, "version of its format"),
        ({"version": "1"}, "version of its format"),
        ({"format": "tar"}, "not the header"),
        ({"format": ...}, "not the header"),
        ({"pid": "4711"}, "the header, pid, is not of the type int"),
        ({"pid": True}, "the header, pid, is not of the type int"),
        ({"pid": ...}, "the header lacks pid"),
        ({"name": None}, "the header, name, is not of the type str"),
        ({"flags": "force"}, "the header, flags, is not a list"),
        ({"flags": ["brute"]}, "one of force, nowait, powerdown, fixed"),
        ({"flags": [[]]}, "one of force"),
        ({"policy": []}, "the header, policy, is not an object"),
        ({"policy": {"grace": "soon"}}, "the header, policy, grace, is not a time span"),
        ({"policy": {"grace": None}}, "the header, policy, grace, is not a time span"),
    ],
)
def test_wrong_headers(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^line 1: ") as caught:
        decode(changed(header_line(HEADER), **values))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("record", "values", "said"),
    [
        (FULL, {"at": 1.5}, "sample, at, is not of the type int"),
        (FULL, {"at": float("nan")}, "sample, at, is not of the type int"),
        (FULL, {"at": None}, "sample, at, is not of the type int"),
        (FULL, {"state": ...}, "sample lacks state"),
        (FULL, {"term_pending": 0}, "sample, term_pending, is not of the type bool"),
        (FULL, {"io": {"rchar": 1}}, "sample, io, lacks wchar"),
        (FULL, {"io": [1]}, "sample, io, is not an object"),
        (FULL, {"threads": {}}, "sample, threads, is not a list"),
        (FULL, {"threads": [None]}, "sample, threads, is not an object"),
        (FULL, {"threads": [{"tid": "1"}]}, "sample, threads, tid, is not of the type int"),
        (RECORDS[0], {"phase": "nap"}, "sent, phase, is not one of powerdown, "),
        (RECORDS[0], {"phase": {}}, "sent, phase, is not one of powerdown, "),
        (RECORDS[3], {"reasons": [1]}, "turned, reasons, is not of the type str"),
    ],
)
def test_wrong_records(record: Record, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^line 3: ") as caught:
        decode(lines(EMPTY) + changed(record_line(HEADER, record), **values))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "line", ["", "[]", "null", '"x"', "{", "[" * 100_000, "9" * 5_000, '{"a":' * 50_000]
)
def test_a_line_that_is_not_an_object_is_refused(line: str) -> None:
    for text, number in ((f"{line}\n", 1), (f"{lines(EMPTY)}{line}\n", 3)):
        with pytest.raises(ValueError, match=f"^line {number}: it is not a JSON object$"):
            decode(text)


@pytest.mark.parametrize("text", ["", "{}", header_line(HEADER)[:-1]])
def test_an_empty_trace_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^it is empty$"):
        decode(text)


def test_an_error_says_nothing_in_the_words_of_the_file() -> None:
    for key in json.loads(header_line(HEADER)):
        with pytest.raises(ValueError) as caught:
            decode(changed(header_line(HEADER), **{key: ["\x1b[2J"]}))
        assert "\x1b" not in str(caught.value)
