"""Read the receipts of past stops from the journal.

systemd-python holds Python's lock while it reads from the disk, so the daemon must not use this
module.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from qkilld.model.dataclass import dataclass
from qkilld.model.event import MessageId

_DIRECTORIES: Final = (Path("/var/log/journal"), Path("/run/log/journal"))


@dataclass(frozen=True, slots=True)
class Receipt:
    """How a job ended. Pass its texts through `printable` before you display them."""

    time: int
    """µs since the epoch."""
    pid: int | None
    guest: str
    """The guest's name; "" for none."""
    unit: str
    result: str
    elapsed: int | None
    """µs from the start of the job to its end."""
    verdict: str
    data_at_risk: bool
    guest_asked: str
    """The result of asking the guest's operating system to shut down; "" if the entry lacks it."""
    gone_after: int | None
    """For a process that survived the job: µs from the start of the job to the exit of the
    process."""
    program: str
    """qkilld, or qkilld-stop if it worked without the daemon."""


def read_receipts(since: int | None, directory: Path | None = None) -> list[Receipt]:
    """Return the receipts of jobs that ended after `since` (µs since the epoch), oldest first.

    `directory` holds the journal. None means the journal of this system. Raises OSError.
    """
    from systemd import journal

    with journal.Reader(path=None if directory is None else str(directory)) as reader:
        for message in (MessageId.JOB_ENDED, MessageId.SURVIVOR_GONE):
            reader.add_match(MESSAGE_ID=message.value)
        if since is not None:
            reader.seek_realtime(since / 1_000_000)
        return receipts_of(iter(reader.get_next, {}))


def receipts_of(entries: Iterable[Mapping[str, Any]]) -> list[Receipt]:
    """Return the receipts in journal entries, oldest first. Entries that may be forged are left
    out."""
    receipts: dict[tuple[str, ...], Receipt] = {}
    for number, entry in enumerate(entries):
        if not _is_credible(entry):
            continue
        names = ("_BOOT_ID", "OBJECT_PID", "QKILLD_JOB", "SYSLOG_IDENTIFIER")
        job = tuple(_text(entry, name) for name in names)
        if _text(entry, "MESSAGE_ID").replace("-", "") != MessageId.SURVIVOR_GONE.value:
            if job in receipts:  # A daemon lost its state, and used the number again.
                receipts[(*job, str(number))] = receipts.pop(job)
            receipts[job] = _receipt(entry)
        elif job in receipts:
            gone_after = _number(entry, "QKILLD_ELAPSED_USEC")
            receipts[job] = replace(receipts[job], gone_after=gone_after)
    return sorted(receipts.values(), key=lambda receipt: receipt.time)


@dataclass(frozen=True, slots=True)
class JobEntry:
    """Pass its texts through `printable` before you display them."""

    message: MessageId
    at: int
    """CLOCK_MONOTONIC, µs."""
    job: int
    pid: int
    guest: str
    flags: int
    elapsed: int | None
    """µs since the start of the job; None if the entry lacks it."""
    action: str
    """The signal, or the method by which the guest was asked to shut down."""
    verdict: str
    reasons: str
    result: str


def read_job(number: int, directory: Path | None = None) -> list[JobEntry]:
    """Return the entries of the newest job with that number, from its start on. Raises OSError."""
    from systemd import journal

    with journal.Reader(path=None if directory is None else str(directory)) as reader:
        reader.add_match(QKILLD_JOB=str(number))
        return entries_of(iter(reader.get_next, {}))


def entries_of(entries: Iterable[Mapping[str, Any]]) -> list[JobEntry]:
    """Return the entries of the newest job, if several jobs have the same number. (A daemon that
    has lost its state counts from 1 again.) Entries that may be forged are left out."""
    job_entries: list[JobEntry] = []
    boot = ""
    for entry in entries:
        message = _MESSAGES.get(_text(entry, "MESSAGE_ID").replace("-", ""))
        if message is None or not _is_credible(entry):
            continue
        begins = message in (MessageId.JOB_STARTED, MessageId.JOB_RESUMED)
        same = job_entries and job_entries[0].pid == _number(entry, "OBJECT_PID")
        if message is MessageId.JOB_STARTED or (begins and not same):
            job_entries, boot = [], _text(entry, "_BOOT_ID")
        elif not (same and boot == _text(entry, "_BOOT_ID")):
            continue
        job_entries.append(_job_entry(message, entry))
    return job_entries


_MESSAGES: Final = {message.value: message for message in MessageId}


def _job_entry(message: MessageId, entry: Mapping[str, Any]) -> JobEntry:
    monotonic = entry["__MONOTONIC_TIMESTAMP"]
    return JobEntry(
        message=message,
        at=round(getattr(monotonic, "timestamp", monotonic).total_seconds() * 1_000_000),
        job=_number(entry, "QKILLD_JOB") or 0,
        pid=_number(entry, "OBJECT_PID") or 0,
        guest=_text(entry, "QKILLD_GUEST"),
        flags=_number(entry, "QKILLD_FLAGS") or 0,
        elapsed=_number(entry, "QKILLD_ELAPSED_USEC"),
        action=_text(entry, "QKILLD_SIGNAL") or _text(entry, "QKILLD_METHOD"),
        verdict=_text(entry, "QKILLD_VERDICT"),
        reasons=_text(entry, "QKILLD_REASONS"),
        result=_text(entry, "QKILLD_RESULT"),
    )


def _is_credible(entry: Mapping[str, Any]) -> bool:
    """Return whether a trustworthy sender wrote the entry.

    Anyone can write to the journal, but only journald sets fields that begin with an underscore.
    These fields show the writer. Trusted writers are root, the user who reads the entry, and
    processes of the unit that the entry is about, such as qkilld-stop in a unit with User=.
    """
    unit = _unit(entry)
    writer = _number(entry, "_UID")
    in_unit = bool(unit) and unit == _text(entry, "_SYSTEMD_UNIT")
    return in_unit or (writer is not None and writer in (0, os.geteuid()))


def _receipt(entry: Mapping[str, Any]) -> Receipt:
    return Receipt(
        time=round(entry["__REALTIME_TIMESTAMP"].timestamp() * 1_000_000),
        pid=_number(entry, "OBJECT_PID"),
        guest=_text(entry, "QKILLD_GUEST"),
        unit=_unit(entry),
        result=_text(entry, "QKILLD_RESULT"),
        elapsed=_number(entry, "QKILLD_ELAPSED_USEC"),
        verdict=_text(entry, "QKILLD_VERDICT"),
        data_at_risk=_text(entry, "QKILLD_DATA_AT_RISK") == "1",
        guest_asked=_text(entry, "QKILLD_GUEST_ASKED"),
        gone_after=None,
        program=_text(entry, "SYSLOG_IDENTIFIER"),
    )


def may_read_all() -> bool:
    """Return whether this user can read the journal of system services."""
    files = (file for directory in _DIRECTORIES for file in directory.glob("*/system.journal"))
    return os.geteuid() == 0 or any(os.access(file, os.R_OK) for file in files)


def _unit(entry: Mapping[str, Any]) -> str:
    return _text(entry, "OBJECT_SYSTEMD_USER_UNIT") or _text(entry, "OBJECT_SYSTEMD_UNIT")


def _text(entry: Mapping[str, Any], name: str) -> str:
    """Return the first value of a field; "" if the field is missing."""
    value = entry.get(name, "")
    if isinstance(value, list | tuple):
        value = value[0]
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _number(entry: Mapping[str, Any], name: str) -> int | None:
    text = _text(entry, name)
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else None
