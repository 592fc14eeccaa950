"""The command history: receipts of past stops, from the journal. Needs no bus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, Final

from qkilld.adapters.journal_reader import Receipt, may_read_all, read_receipts
from qkilld.ctl.output import Output
from qkilld.ctl.targets import GuestRow, Target, TargetKind, matches
from qkilld.model import timespan
from qkilld.model.constants import USEC_PER_SEC, ExitCode
from qkilld.model.errors import Failed, InvalidArgs
from qkilld.model.job_status import rounded
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec

_COLUMNS: Final = ("TIME", "PID", "NAME", "UNIT", "RESULT", "TOOK", "GUEST ASKED", "DATA AT RISK")


def history(output: Output, target: Target | None, since: str | None, *, json: bool) -> int:
    """Raises InvalidArgs, Failed."""
    if target is not None and target.kind in (TargetKind.PIDFILE, TargetKind.UUID):
        raise InvalidArgs(f'"{target.shown}" is not the name, unit or process id of a guest')
    after = None if since is None else parse_time(since, datetime.now())
    try:
        rows = [each for each in read_receipts(after) if target is None or _is_of(each, target)]
    except OSError as error:
        raise Failed(f"the journal cannot be read: {error.strerror}") from None
    if not may_read_all():
        output.error(
            "you may not read the system journal, so stops by the system's daemon are missing: be "
            "root or in the group systemd-journal"
        )
    if json:
        output.json([_as_json(each) for each in rows])
    elif rows:
        output.table(_COLUMNS, _cells(rows))
    else:
        output.line("No stop of a guest is recorded.")
    return ExitCode.OK


def parse_time(text: str, now: datetime) -> int:
    """Parse a date, a date and time, "today", "yesterday", or a time span before `now`. Return µs
    since the epoch. Raises InvalidArgs."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    days = {"today": midnight, "yesterday": midnight - timedelta(days=1)}
    try:
        at = days.get(text) or datetime.fromisoformat(text)
        return int(at.timestamp() * USEC_PER_SEC)
    except (ValueError, OverflowError, OSError):
        pass
    try:
        span = timespan.parse(text.removeprefix("-").removesuffix(" ago"))
    except ValueError:
        raise InvalidArgs(
            f'"{printable(text)}" is not a time: a date such as 2026-11-25, "2026-11-25 18:00", '
            "today, yesterday, or a span before now such as 2h is needed"
        ) from None
    return max(0, int(now.timestamp() * USEC_PER_SEC) - span)


def _is_of(receipt: Receipt, target: Target) -> bool:
    if target.kind is TargetKind.PID:
        return receipt.pid == int(target.value)
    guest = GuestRow(pid=0, name=receipt.guest, uuid="", uid=0, unit=receipt.unit)
    return matches(target, guest)


def _cells(rows: list[Receipt]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        yield (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.time // USEC_PER_SEC)),
            "" if row.pid is None else str(row.pid),
            row.guest,
            row.unit,
            _result(row),
            "" if row.elapsed is None else format_usec(rounded(row.elapsed)),
            row.guest_asked,
            "yes" if row.data_at_risk else "no",
        )


def _result(receipt: Receipt) -> str:
    if receipt.gone_after is None:
        return receipt.result
    return f"{receipt.result}, gone after {format_usec(rounded(receipt.gone_after))}"


def _as_json(receipt: Receipt) -> dict[str, Any]:
    return {
        "time_usec": receipt.time,
        "pid": receipt.pid,
        "name": receipt.guest,
        "unit": receipt.unit,
        "result": receipt.result,
        "elapsed_usec": receipt.elapsed,
        "verdict": receipt.verdict,
        "data_at_risk": receipt.data_at_risk,
        "guest_asked": receipt.guest_asked or None,
        "gone_after_usec": receipt.gone_after,
        "program": receipt.program,
    }
