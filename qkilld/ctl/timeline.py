"""The command timeline: draw one stop, from its trace or from the journal. Needs no bus."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qkilld.ctl.replay import read
from qkilld.ctl.timeline_svg import Milestone, Stretch, Timeline, draw
from qkilld.decision.replay import replay
from qkilld.model.constants import (
    INFINITY,
    JOB_PATH_PREFIX,
    USEC_PER_SEC,
    ExitCode,
    Flag,
    NextRung,
    Result,
)
from qkilld.model.errors import Failed, NoSuchJob
from qkilld.model.event import MessageId
from qkilld.model.job import UNCONTROLLED
from qkilld.model.job_status import flag_names, label, rounded
from qkilld.model.policy import SPANS, Policy
from qkilld.model.sample import Sample
from qkilld.model.timespan import format_usec
from qkilld.model.trace import ChangeRecord, EndRecord, ExitRecord, RungRecord, Trace, VerdictRecord

if TYPE_CHECKING:
    from qkilld.adapters.journal_reader import JobEntry
    from qkilld.ctl.output import Output

_JOB: Final = re.compile(rf"(?:job:|{JOB_PATH_PREFIX})([1-9][0-9]{{0,8}})")
_DRASTIC: Final = ("SIGKILL", "yank")
_LABELS: Final = {
    MessageId.JOB_JOINED: "joined",
    MessageId.JOB_HELD: "held",
    MessageId.JOB_RELEASED: "released",
    MessageId.JOB_EXTENDED: "extended",
    MessageId.JOB_FORCED: "forced",
    MessageId.JOB_RESUMED: "qkilld restarted",
    MessageId.SURVIVOR_GONE: "gone",
}
"""The labels of callers' actions and other events, by journal entry."""


def timeline(output: Output, source: str, path: str | None) -> int:
    """Write the SVG to a file or to standard output. Raises InvalidArgs, NoSuchJob, Failed."""
    if match := _JOB.fullmatch(source):
        svg = draw(of_journal(_entries(int(match[1]))))
    else:
        svg = draw(of_trace(read(source)))
    if path is None:
        output.line(svg.rstrip("\n"))
        return ExitCode.OK
    try:
        with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123  a path may be any bytes
            file.write(svg)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "this is not a path"
        raise Failed(f"The picture cannot be written: {why}") from None
    return ExitCode.OK


def of_trace(trace: Trace) -> Timeline:
    """Convert a trace. A replay with the recorded flags and policy computes the deadlines."""
    header = trace.header
    length = max((_seconds(trace, record.at) for record in trace.records), default=0.0)
    changes = trace.of(ChangeRecord)
    end = next(iter(trace.of(EndRecord)), None)
    marks = [
        Milestone(_seconds(trace, rung.at), rung.signal, rung.signal in _DRASTIC)
        for rung in trace.of(RungRecord)
    ]
    if end is not None:
        killed = end.result is Result.KILLED
        marks.append(Milestone(_seconds(trace, end.at), end.result.value, killed))
    marks += [
        Milestone(_seconds(trace, exit_record.at), "gone") for exit_record in trace.of(ExitRecord)
    ]
    marks += _changes(trace)
    steps = replay(trace).steps
    turns = [
        (_seconds(trace, turn.at), turn.verdict.value, "; ".join(turn.reasons))
        for turn in trace.of(VerdictRecord)
    ]
    written = [
        (_seconds(trace, step.at), step.assessment.written)
        for step in steps
        if step.assessment is not None and step.assessment.written is not None
    ]
    pending = [
        (_seconds(trace, step.at), step.assessment.pending)
        for step in steps
        if step.assessment is not None and step.assessment.pending is not None
    ]
    remaining = [
        (_seconds(trace, step.at), _time_left(step.decision.deadline, step.at)) for step in steps
    ]
    flags = changes[-1].flags if changes else header.flags
    ended = end.result.value if end is not None else "not ended"
    return Timeline(
        title=_title(label(header.pid, header.name), header.job, ended, length),
        subtitle=_terms(header.flags, header.policy),
        length=length,
        marks=_sorted(marks),
        verdicts=_spans(turns, _seconds(trace, end.at) if end is not None else length),
        held=_held(trace, length),
        written=tuple(written) if trace.of(Sample) else None,
        pending=tuple(pending),
        time_left=tuple(remaining),
        next_rung=NextRung.KILL.value if Flag.FORCE in flags else "giving up",
    )


def of_journal(entries: Sequence[JobEntry]) -> Timeline:
    """Convert the journal entries of one job, oldest first.

    The journal has rungs, verdicts and callers' actions, but no byte counts and no deadlines.
    """
    first, last = entries[0], entries[-1]
    started = first.at - (first.elapsed or 0)
    end = next((entry for entry in entries if entry.message is MessageId.JOB_ENDED), None)

    def seconds(entry: JobEntry) -> float:
        return max(0.0, (entry.at - started) / USEC_PER_SEC)

    marks, turns, hold_changes = [], [], []
    for entry in entries:
        at = seconds(entry)
        if entry.message in (MessageId.SIGNAL_SENT, MessageId.GUEST_ASKED):
            marks.append(Milestone(at, entry.action, entry.action in _DRASTIC))
        elif entry.message is MessageId.VERDICT_TURNED:
            turns.append((at, entry.verdict, entry.reasons))
        elif entry.message is MessageId.JOB_ENDED:
            marks.append(Milestone(at, entry.result, entry.result == Result.KILLED))
        elif entry.message in _LABELS:
            marks.append(Milestone(at, _LABELS[entry.message]))
        if entry.message is MessageId.JOB_HELD:
            hold_changes.append(Stretch(at, seconds(last), "held"))
        elif entry.message is MessageId.JOB_RELEASED and hold_changes:
            hold_changes[-1] = replace(hold_changes[-1], end=at)
    length = seconds(last)
    result = end.result if end is not None else "not ended"
    return Timeline(
        title=_title(label(first.pid, first.guest), first.job, result, length),
        subtitle=f"{', '.join(flag_names(first.flags)) or 'without force'}; from the journal",
        length=length,
        marks=_sorted(marks),
        verdicts=_spans(turns, seconds(end or last)),
        held=tuple(hold_changes),
    )


def _entries(number: int) -> list[JobEntry]:
    """Read the entries of the newest job with this number. Raises NoSuchJob, Failed."""
    from qkilld.adapters.journal_reader import read_job

    try:
        entries = read_job(number)
    except OSError as error:
        raise Failed(f"the journal cannot be read: {error.strerror}") from None
    if not entries:
        raise NoSuchJob(
            f"The journal (as far as you may read it) has no job {number}: see `qkillctl history`"
        )
    return entries


def _changes(trace: Trace) -> list[Milestone]:
    marks = []
    flags, policy, control = trace.header.flags, trace.header.policy, UNCONTROLLED
    for change in trace.of(ChangeRecord):
        at = _seconds(trace, change.at)
        if change.control.held != control.held:
            marks.append(Milestone(at, "held" if change.control.held else "released"))
        if change.control.not_before > control.not_before:
            marks.append(Milestone(at, "extended"))
        if (change.flags, change.policy) != (flags, policy):
            marks.append(Milestone(at, "joined"))
        flags, policy, control = change.flags, change.policy, change.control
    return marks


def _held(trace: Trace, length: float) -> tuple[Stretch, ...]:
    stretches: list[Stretch] = []
    before = False
    for change in trace.of(ChangeRecord):
        now, at = change.control.held, _seconds(trace, change.at)
        if now and not before:
            stretches.append(Stretch(at, length, "held"))
        elif before and not now:
            stretches[-1] = replace(stretches[-1], end=at)
        before = now
    return tuple(stretches)


def _seconds(trace: Trace, at: int) -> float:
    return (at - trace.header.started) / USEC_PER_SEC


def _spans(turns: Sequence[tuple[float, str, str]], length: float) -> tuple[Stretch, ...]:
    if not turns:
        return ()
    ends = [at for at, *_ in turns[1:]] + [length]
    return tuple(
        Stretch(at, end, word, text) for (at, word, text), end in zip(turns, ends, strict=True)
    )


def _time_left(deadline: int, at: int) -> float | None:
    return None if deadline == INFINITY else max(0, deadline - at) / USEC_PER_SEC


def _sorted(marks: Sequence[Milestone]) -> tuple[Milestone, ...]:
    return tuple(sorted(marks, key=lambda mark: mark.at))


def _title(who: str, job: int, result: str, length: float) -> str:
    after = format_usec(rounded(int(length * USEC_PER_SEC)))
    return f"{who}, job {job}: {result} after {after}"


def _terms(flags: Flag, policy: Policy) -> str:
    spans = (f"{span.words} {format_usec(getattr(policy, span.field))}" for span in SPANS)
    return f"{', '.join(flag_names(flags)) or 'without force'}; {', '.join(spans)}"
