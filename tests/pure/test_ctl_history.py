"""Times that qkillctl history accepts, and receipts that it trusts."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from qkilld.adapters.journal_reader import Receipt, receipts_of
from qkilld.ctl.history import parse_time
from qkilld.model.errors import InvalidArgs
from qkilld.model.event import MessageId

NOW = datetime(2026, 11, 25, 18, 30)
HOUR = 3600 * 1_000_000


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-11-24", datetime(2026, 11, 24)),
        ("2026-11-24 06:07", datetime(2026, 11, 24, 6, 7)),
        ("2026-11-24T06:07:08", datetime(2026, 11, 24, 6, 7, 8)),
        ("2026-11-24 06:07+00:00", datetime(2026, 11, 24, 6, 7, tzinfo=UTC)),
        ("today", datetime(2026, 11, 25)),
        ("yesterday", datetime(2026, 11, 24)),
        ("2h", NOW - timedelta(hours=2)),
        ("-2h", NOW - timedelta(hours=2)),
        ("1h 30min ago", NOW - timedelta(minutes=90)),
    ],
)
def test_times(text: str, at: datetime) -> None:
    assert parse_time(text, NOW) == int(at.timestamp()) * 1_000_000


def test_before_there_was_time() -> None:
    assert parse_time("infinity", NOW) == parse_time("999y", NOW) == 0


@pytest.mark.parametrize("text", ["", "soon", "2026-13-01", "25.11.2026", "\x1b[2J"])
def test_malformed_times_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgs) as caught:
        parse_time(text, NOW)
    assert str(caught.value).isprintable()


def receipt_of(entry: dict[str, Any]) -> Receipt | None:
    return next(iter(receipts_of([entry])), None)


def entry(**fields: Any) -> dict[str, Any]:
    usual = {
        "__REALTIME_TIMESTAMP": datetime.fromtimestamp(1_700_000_000.25, UTC),
        "MESSAGE_ID": UUID(MessageId.JOB_ENDED.value),
        "_UID": 0,
        "OBJECT_PID": "4711",
        "OBJECT_SYSTEMD_UNIT": "web.service",
        "QKILLD_GUEST": "web",
        "QKILLD_RESULT": "killed",
        "QKILLD_ELAPSED_USEC": "12000000",
        "QKILLD_VERDICT": "storage-wait",
        "QKILLD_DATA_AT_RISK": "1",
        "SYSLOG_IDENTIFIER": "qkilld",
    }
    return usual | fields


def test_a_receipt() -> None:
    receipt = receipt_of(entry())
    assert receipt is not None
    assert (receipt.time, receipt.pid, receipt.unit) == (1_700_000_000_250_000, 4711, "web.service")
    assert (receipt.result, receipt.elapsed, receipt.data_at_risk) == ("killed", 12_000_000, True)


@pytest.mark.parametrize(
    "fields",
    [
        {"QKILLD_GUEST": b"\xff\xfe"},
        {"QKILLD_GUEST": ["one", "two"], "OBJECT_PID": ["1", "2"]},
        {"QKILLD_ELAPSED_USEC": "-1", "OBJECT_PID": "x" * 100},
        {"QKILLD_ELAPSED_USEC": "9" * 5000},
        {"OBJECT_SYSTEMD_UNIT": b"\xff.service"},
    ],
)
def test_a_field_may_be_anything(fields: dict[str, Any]) -> None:
    assert receipt_of(entry(**fields)) is not None


@pytest.mark.parametrize(
    ("writer", "counts"),
    [
        ({"_UID": 0}, True),
        ({"_UID": os.geteuid()}, True),
        ({"_UID": 4242, "_SYSTEMD_UNIT": "web.service"}, True),
        ({"_UID": 4242, "_SYSTEMD_UNIT": "user@4242.service"}, False),
        ({"_UID": 4242}, False),
        ({"_UID": b"0"}, True),
        ({"_UID": "", "_SYSTEMD_UNIT": ""}, False),
        ({"_UID": 4242, "OBJECT_SYSTEMD_UNIT": "", "_SYSTEMD_UNIT": ""}, False),
    ],
)
def test_only_trusted_senders_count(writer: dict[str, Any], counts: bool) -> None:
    assert (receipt_of(entry(**writer)) is not None) is counts


def test_a_survivor_that_was_gone_at_last() -> None:
    ended = entry(QKILLD_RESULT="survived", QKILLD_JOB="7", _BOOT_ID=UUID(int=1))
    gone = ended | {
        "MESSAGE_ID": UUID(MessageId.SURVIVOR_GONE.value),
        "QKILLD_ELAPSED_USEC": "99000000",
    }
    other = ended | {"_BOOT_ID": UUID(int=2)}
    forged = gone | {"_UID": 4242, "QKILLD_ELAPSED_USEC": "1"}
    first, second = receipts_of([ended, other, gone, forged])
    assert (first.result, first.gone_after, second.gone_after) == ("survived", 99_000_000, None)
    assert receipts_of([gone]) == []


def test_a_daemon_may_begin_its_numbers_anew() -> None:
    ended = entry(QKILLD_JOB="7", _BOOT_ID=UUID(int=1))
    later = ended | {"__REALTIME_TIMESTAMP": datetime.fromtimestamp(1_700_000_100, UTC)}
    assert [receipt.time for receipt in receipts_of([ended, later])] == [
        1_700_000_000_250_000,
        1_700_000_100_000_000,
    ]
