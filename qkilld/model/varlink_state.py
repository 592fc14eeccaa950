"""Convert the State and the Receipt of a job from Varlink (org.qkilld1.varlink) to D-Bus."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from qkilld.model.constants import INFINITY, Flag
from qkilld.model.job_status import JobStatus

_CAPITAL: Final = re.compile("[A-Z]")
_FLAGS: Final = {str(flag.name).lower(): flag for flag in Flag}


def flags_of(names: Iterable[str]) -> Flag:
    """Return the flags with these names. Names that only a newer daemon knows are ignored."""
    flags = Flag(0)
    for name in names:
        flags |= _FLAGS.get(name, Flag(0))
    return flags


def status_of(state: Mapping[str, Any]) -> JobStatus:
    return JobStatus(
        id=state["job"],
        pid=state["pid"],
        start_time=state["startTime"],
        name=state["name"],
        uuid=state["uuid"],
        unit=state["unit"],
        uid=state["uid"],
        flags=flags_of(state["flags"]),
        phase=state["phase"],
        verdict=state["verdict"],
        result=state.get("result") or "",
        started=state["startedUSec"],
        deadline=_time(state.get("deadlineUSec")),
        last_progress=state.get("lastProgressUSec"),
        bytes_written=state.get("bytesWritten"),
        bytes_pending=state.get("bytesPending"),
        held=state["held"],
        not_before=_time(state.get("notBeforeUSec")),
        guest_asked=state["guestAsked"],
        powerdown_only=state["powerdownOnly"],
        next_rung=state["nextRung"],
        standstill=state.get("nextRungStallUSec") or 0,
        reasons=tuple(state["reasons"]),
        rate=state.get("rate"),
        reason=state["reason"],
        requested_by=state["requestedBy"],
        ended=state.get("endedUSec"),
    )


def receipt_of(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Return the receipt in the form in which Wait returns it on D-Bus. Values that are null are
    left out."""
    values = {
        _CAPITAL.sub(lambda word: f"-{word[0].lower()}", key.replace("USec", "Usec")): value
        for key, value in receipt.items()
        if value is not None
    }
    values["rungs"] = [
        [rung["phase"], rung["action"], rung["afterUSec"]] for rung in values.get("rungs", ())
    ]
    if "verdicts" in values:
        values["verdicts"] = [
            [turn["verdict"], turn["afterUSec"], turn["reasons"]] for turn in values["verdicts"]
        ]
    if "data-at-risk" in values:
        values["at-risk"] = [[risk["code"], risk["text"]] for risk in values.get("at-risk", ())]
    else:
        values.pop("at-risk", None)
    return values


def _time(usec: int | None) -> int:
    """Return the time; None (null) means never."""
    return INFINITY if usec is None else usec
