"""The command replay: make the decisions of a recorded job again, and print them. Needs no bus."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qkilld.ctl.output import Output
from qkilld.decision.ladder import Action
from qkilld.decision.replay import Overrides, RealOutcome, Replay, Step, replay
from qkilld.model import trace
from qkilld.model.constants import USEC_PER_SEC, ExitCode, Flag, Result
from qkilld.model.errors import InvalidArgs
from qkilld.model.job_status import flag_names, known, label, rounded
from qkilld.model.policy import Policy
from qkilld.model.text import printable
from qkilld.model.timespan import format_usec
from qkilld.model.trace import Trace


def run(output: Output, path: str, overrides: Overrides, *, json: bool) -> int:
    """Replay the trace at `path` and print it. Raises InvalidArgs if it is not a trace."""
    recording = read(path)
    replayed = replay(recording, overrides)
    if json:
        output.json(as_json(recording, replayed))
        return ExitCode.OK
    header = recording.header
    output.line(f"{label(header.pid, header.name)}, job {header.job}")
    output.fields(
        [
            ("recorded with", _terms(header.flags, header.policy)),
            ("replayed with", _terms(replayed.flags, replayed.policy)),
        ]
    )
    rows = _story(replayed)
    if rows:
        output.line()
        output.table(("AFTER", "VERDICT", "DONE", "WHY"), rows)
        output.line()
    for line in _summary(replayed):
        output.line(line)
    return ExitCode.OK


def read(path: str) -> Trace:
    """Read a trace. Raises InvalidArgs if it cannot be read."""
    shown = printable(path)
    try:
        with open(path, "rb") as file:  # noqa: PTH123  a path may be any bytes
            data = file.read(trace.MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "this is not a path"
        raise InvalidArgs(f"The trace {shown} cannot be read: {why}") from None
    try:
        if len(data) > trace.MAX_BYTES:
            raise ValueError(f"it is longer than {trace.MAX_BYTES} bytes")
        return trace.decode(data.decode(errors="replace"))
    except ValueError as error:
        raise InvalidArgs(f"{shown} is not a trace that can be replayed: {error}") from None


def as_json(recording: Trace, replayed: Replay) -> dict[str, Any]:
    """Times are µs since the job's start; null means unknown or never."""
    header, recorded = recording.header, replayed.recorded
    last = replayed.steps[-1] if replayed.steps else None
    evidence = last.assessment if last else None
    return {
        "guest": {
            "pid": header.pid,
            "start_time": header.start_time,
            "command": header.command,
            "name": header.name,
        },
        "recorded": {
            "flags": flag_names(header.flags),
            "policy": _spans(header.policy),
            "result": recorded.result,
            "ended_usec": _since(recorded, recorded.ended),
            "sigkill_usec": _since(recorded, recorded.killed),
        },
        "replayed": {
            "flags": flag_names(replayed.flags),
            "policy": _spans(replayed.policy),
            "result": replayed.result,
            "ended_usec": _since(recorded, replayed.at),
            "sigkill_usec": (
                _since(recorded, replayed.at) if replayed.result is Result.KILLED else None
            ),
            "verdict": evidence.verdict if evidence else None,
            "reasons": list(evidence.reasons) if evidence else [],
            "unseen_usec": last.since_sample if last else None,
            "data_at_risk": replayed.data_at_risk,
            "bytes_written": evidence.written if evidence else None,
            "bytes_written_later": replayed.written_later,
        },
        "steps": [_step(recorded, step) for step in replayed.steps],
    }


def _step(recorded: RealOutcome, step: Step) -> dict[str, Any]:
    evidence = step.assessment
    deadline = known(step.decision.deadline)
    return {
        "at_usec": _since(recorded, step.at),
        "action": step.decision.action.name.lower().replace("_", "-"),
        "deadline_usec": _since(recorded, deadline),
        "verdict": evidence.verdict if evidence else None,
        "reasons": list(evidence.reasons) if evidence else [],
        "outstanding": evidence.outstanding if evidence else None,
        "last_progress_usec": _since(recorded, evidence.progress_at) if evidence else None,
        "bytes_written": evidence.written if evidence else None,
        "bytes_pending": evidence.pending if evidence else None,
        "bytes_per_second": evidence.rate if evidence else None,
    }


def _story(replayed: Replay) -> list[tuple[str, str, str, str]]:
    """Return a row for each change of the verdict, each SIGCONT, each SIGKILL, and the decision to
    give up."""
    action_names = {Action.KILL: "SIGKILL", Action.CONTINUE: "SIGCONT", Action.GIVE_UP: "gave up"}
    rows = []
    before = None
    for step in replayed.steps:
        evidence = step.assessment
        verdict = evidence.verdict if evidence else None
        if verdict is not before or step.decision.action in action_names:
            rows.append(
                (
                    f"{(step.at - replayed.recorded.started) / USEC_PER_SEC:.3f} s",
                    verdict or "",
                    action_names.get(step.decision.action, ""),
                    "; ".join(evidence.reasons) if evidence else "no sample yet",
                )
            )
        before = verdict
    return rows


def _summary(replayed: Replay) -> list[str]:
    recorded = replayed.recorded
    after = _span(replayed.at - recorded.started)
    match replayed.result:
        case Result.EXITED:
            return [f"The guest exits after {after}, before any further step."]
        case Result.SIGNALLED:
            return ["Only one signal would have been sent."]
        case Result.SURVIVED:
            return [
                f"The job would have given up after {after}, without SIGKILL.",
                _truth(recorded),
            ]
        case Result.KILLED:
            risk = "with data at risk" if replayed.data_at_risk else "with nothing outstanding"
            lines = [f"SIGKILL would have been sent after {after}, {risk}."]
            unsampled = replayed.steps[-1].since_sample
            if unsampled:
                lines.append(
                    f"The last sample is {_span(unsampled)} older: the trace does not show what a "
                    "later sample would have found."
                )
            if replayed.written_later:
                lines.append(f"The guest wrote {replayed.written_later} bytes after this time.")
            return [*lines, _truth(recorded)]
        case _:
            return [
                f"The trace ends after {after}, before any further step.",
                _truth(recorded),
            ]


def _truth(recorded: RealOutcome) -> str:
    if recorded.ended is None:
        return "The trace does not show how the job really ended."
    after = _span(recorded.ended - recorded.started)
    killed = (
        f", with SIGKILL after {_span(recorded.killed - recorded.started)}"
        if recorded.killed is not None
        else ""
    )
    return f"The job really ended as {recorded.result} after {after}{killed}."


def _terms(flags: Flag, policy: Policy) -> str:
    spans = [f"{name.replace('_', ' ')} {format_usec(usec)}" for name, usec in _fields(policy)]
    return ", ".join([*flag_names(flags), *spans])


def _spans(policy: Policy) -> dict[str, int | None]:
    return {f"{name}_usec": known(usec) for name, usec in _fields(policy)}


def _fields(policy: Policy) -> list[tuple[str, int]]:
    return list(asdict(policy).items())


def _since(recorded: RealOutcome, at: int | None) -> int | None:
    return None if at is None else at - recorded.started


def _span(usec: int) -> str:
    return format_usec(rounded(usec))
