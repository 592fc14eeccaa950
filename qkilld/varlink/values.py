"""Convert the values of calls and replies, as dbus/org.qkilld1.varlink describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from qkilld.decision.unit_limits import Limits
from qkilld.engine.outlook import outlook, reasons
from qkilld.engine.report import may_see, receipt_values
from qkilld.engine.service import OPTION_TYPES, Option
from qkilld.model.constants import Flag
from qkilld.model.errors import InvalidArgs, QkilldError
from qkilld.model.guest import Guest

if TYPE_CHECKING:
    from qkilld.engine.ports import ObservedJob

_INT_END: Final = 1 << 63
"""Numbers in a reply must be less than this, because Varlink's int has 64 bits with a sign."""
_UNITS: Final = {"usec": "USec"}
_FLAG_BITS: Final = {str(flag.name).lower(): flag for flag in Flag}


def camel_case(name: str) -> str:
    """Convert `last-progress-usec` of the bus to lastProgressUSec."""
    first, *rest = name.split("-")
    return first + "".join(_UNITS.get(word, word.capitalize()) for word in rest)


_OPTIONS: Final = {camel_case(name): (name, kind) for name, kind in OPTION_TYPES.items()}


def flags_from(names: list[str] | None) -> int:
    bits = Flag(0)
    for name in names or ():
        bits |= _FLAG_BITS[name]
    return int(bits)


def flag_list(flags: Flag) -> list[str]:
    return [name for name, flag in _FLAG_BITS.items() if flag in flags]


def options_from(parameters: Mapping[str, Any]) -> dict[str, Option]:
    """Return the options for engine.service; null counts as missing. Raises InvalidArgs."""
    options = {}
    for name, value in parameters.items():
        if value is not None:
            option, kind = _OPTIONS[name]
            if kind == "t":
                check_span(name, value)
            options[option] = Option(kind, value)
    return options


def check_span(name: str, value: int) -> None:
    """Raises InvalidArgs."""
    if value < 0:
        raise InvalidArgs(f"{name} must not be negative")


def finite(number: int) -> int | None:
    """Return None for "never" and "unknown", which are 2^64-1, and for other numbers that are too
    large for Varlink."""
    return None if number >= _INT_END else number


def state(job: ObservedJob, uid: int) -> dict[str, Any]:
    """Return the State of a job, without values that this uid may not see."""
    identity, label, evidence = job.guest.identity, job.guest.label, job.assessment
    following = outlook(job)
    shown = {
        "job": job.number,
        "pid": identity.pid,
        "startTime": identity.start_time,
        "uid": identity.uid,
        "name": label.shown_name,
        "uuid": label.uuid,
        "unit": label.unit_name,
        "flags": flag_list(job.flags),
        "phase": job.phase.value,
        "verdict": job.verdict.value,
        "result": job.result.value if job.result else None,
        "startedUSec": job.started,
        "deadlineUSec": finite(job.deadline),
        "nextRung": following.rung.value,
        "nextRungStallUSec": following.standstill or None,
        "held": job.control.held,
        "notBeforeUSec": finite(job.control.not_before),
        "guestAsked": job.guest_asked.value,
        "powerdownOnly": job.request.powerdown_only,
        "requestedBy": job.request.uid,
        "reason": job.request.reason,
        "endedUSec": job.ended,
        "reasons": [],
    }
    if evidence is not None:
        shown["lastProgressUSec"] = evidence.progress_at
    if may_see(job, uid):
        shown["reasons"] = list(reasons(job))
        if evidence is not None:
            shown["bytesWritten"] = evidence.written
            shown["bytesPending"] = evidence.pending
            shown["rate"] = evidence.rate
    return shown


def receipt(job: ObservedJob, uid: int) -> dict[str, Any]:
    """Return the Receipt of an ended job, without values that this uid may not see."""
    values = receipt_values(job, private=may_see(job, uid))
    shown = {camel_case(name): value for name, value in values.items()}
    shown["rungs"] = [
        {"phase": phase, "action": action, "afterUSec": after}
        for phase, action, after in values["rungs"]
    ]
    shown["verdicts"] = [
        {"verdict": verdict, "afterUSec": after, "reasons": reasons}
        for verdict, after, reasons in values.get("verdicts", ())
    ]
    shown["atRisk"] = [{"code": code, "text": text} for code, text in values.get("at-risk", ())]
    return shown


def guest_value(guest: Guest) -> dict[str, Any]:
    identity, label = guest.identity, guest.label
    return {
        "pid": identity.pid,
        "startTime": identity.start_time,
        "uid": identity.uid,
        "name": label.shown_name,
        "uuid": label.uuid,
        "unit": label.unit_name,
    }


def limits_value(name: str, limits: Limits) -> dict[str, Any]:
    """Return UnitLimits."""
    return {
        "name": name,
        "force": limits.force,
        "extendable": limits.extendable,
        "stayUSec": finite(limits.stay),
        "askUSec": finite(limits.ask),
        "warnings": list(limits.warnings),
    }


def refusal(pid: int, error: QkilldError) -> dict[str, Any]:
    return {"pid": pid, "name": type_name(error), "message": str(error)}


def type_name(error: QkilldError) -> str:
    """Return the error's name, for example `NoSuchProcess`."""
    return error.bus_name.rpartition(".")[2]
