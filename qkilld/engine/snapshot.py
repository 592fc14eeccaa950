"""All that a job needs to go on elsewhere: in the daemon's next life, or in another program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from signal import SIGKILL, SIGTERM, Signals
from typing import TYPE_CHECKING, Any, Final

from qkilld.judgement.gap import after_gap, unseen
from qkilld.judgement.verdict import Assessment
from qkilld.model.codec import from_json, to_json
from qkilld.model.guest import Guest
from qkilld.model.job import UNCONTROLLED, Control, Request, Rung, Turn
from qkilld.model.policy import Policy
from qkilld.model.words import INFINITY, Flag, Phase, Result, Verdict

if TYPE_CHECKING:
    from qkilld.engine.job import Job

FORMAT: Final = "qkilld-job"
VERSION: Final = 2
"""Version 1 had no control and no Sample.exiting."""
MAX_NUMBER: Final = 10**9 - 1
"""Of a job: nine digits in its path."""


class SnapshotError(ValueError):
    """What was read is no snapshot that this program can go on from. The text says why, with
    nothing in it of what was read."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A job at one moment. Times are CLOCK_MONOTONIC in µs: good for one boot only."""

    number: int
    guest: Guest
    request: Request
    """The first one."""
    flags: Flag
    """With what others have added since."""
    policy: Policy
    control: Control
    phase: Phase
    verdict: Verdict
    result: Result | None
    """None while it runs."""
    error: str
    data_at_risk: bool
    rungs: tuple[Rung, ...]
    """What was sent is not sent again."""
    history: tuple[Turn, ...]
    assessment: Assessment | None
    """What the judgement remembers."""
    started: int
    ended: int | None

    @classmethod
    def of_job(cls, job: Job) -> Snapshot:
        return cls(
            number=job.number,
            guest=job.guest,
            request=job.request,
            flags=job.flags,
            policy=job.policy,
            control=job.control,
            phase=job.phase,
            verdict=job.verdict,
            result=job.result,
            error=job.error,
            data_at_risk=job.data_at_risk,
            rungs=tuple(job.rungs),
            history=tuple(job.history),
            assessment=job.assessment,
            started=job.started,
            ended=job.ended,
        )

    @classmethod
    def of_signals(
        cls,
        guest: Guest,
        request: Request,
        policy: Policy,
        *,
        number: int,
        term_at: int,
        kill_at: int | None = None,
        verdict: Verdict = Verdict.UNKNOWN,
        progress_at: int | None = None,
        control: Control = UNCONTROLLED,
    ) -> Snapshot:
        """Of a job of which no more is known than what a caller sees of it (StartedUSec, Verdict,
        LastProgressUSec, Held): SIGTERM was sent at `term_at`, and SIGKILL perhaps.

        `policy` is the job's, with the request's spans. Where `progress_at` is None, it may have
        made progress until the job is resumed, and is given the time that follows from that.
        """
        rungs = [Rung(Phase.TERMINATE, SIGTERM, term_at)]
        if kill_at is not None:
            rungs.append(Rung(Phase.KILL, SIGKILL, kill_at))
        return cls(
            number=number,
            guest=guest,
            request=request,
            flags=request.flags,
            policy=policy,
            control=control,
            phase=Phase.TERMINATE if kill_at is None else Phase.REAP,
            verdict=verdict,
            result=None,
            error="",
            # It was not told, and silence would be taken for "no".
            data_at_risk=kill_at is not None,
            rungs=tuple(rungs),
            history=(),
            assessment=None if progress_at is None else unseen(term_at, verdict, progress_at),
            started=term_at,
            ended=None,
        )

    @property
    def latest(self) -> int:
        """The newest point in time in it."""
        return max(
            self.started,
            self.ended or 0,
            *(rung.at for rung in self.rungs),
            *(turn.at for turn in self.history),
            self.assessment.last.at if self.assessment else 0,
            (self.assessment and self.assessment.progress_at) or 0,
        )

    def sent_at(self, signal: Signals) -> int | None:
        """When that signal was sent last."""
        return max((rung.at for rung in self.rungs if rung.signal == signal), default=None)

    def assessment_at(self, now: int) -> Assessment | None:
        """What is known at `now` of a job that goes by evidence."""
        if self.result is not None or self.flags & (Flag.FIXED | Flag.NOWAIT):
            return self.assessment
        return after_gap(self.assessment, self.started, now)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        evidence = self.assessment
        if evidence is not None:
            # What was written is all that anybody wants of the first, and a page each adds up.
            first = replace(
                evidence.first, threads=None, devices=None, mounts=None, host=None, rings=None
            )
            evidence = replace(evidence, first=first)
        fields = to_json(replace(self, assessment=evidence))
        return {"format": FORMAT, "version": VERSION, **fields}


def decode(document: object) -> Snapshot:
    """The snapshot that `to_json` gave. Raises SnapshotError."""
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise SnapshotError("it is not a job of qkilld's")
    version = document.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise SnapshotError("it is of a version that this program does not know")
    fields = {key: document[key] for key in document if key not in ("format", "version")}
    if version == 1:
        fields.setdefault("control", to_json(UNCONTROLLED))
    try:
        snapshot: Snapshot = from_json(Snapshot, fields, "the job", strict=version == VERSION)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(str(error)) from None
    if problem := _problem(snapshot):
        raise SnapshotError(problem)
    return snapshot


def _problem(snapshot: Snapshot) -> str:
    """What cannot be so; "" where all can."""
    ended = snapshot.result is not None
    if not 1 <= snapshot.number <= MAX_NUMBER:
        return "the job's number cannot be"
    if snapshot.guest.identity.pid <= 0:
        return "the process id cannot be"
    if not snapshot.rungs:
        return "the job has not sent a signal"
    if not ended == (snapshot.phase is Phase.DONE) == (snapshot.ended is not None):
        return "it says both that the job has ended and that it has not"
    if not min(snapshot.started, *(rung.at for rung in snapshot.rungs)) >= 0:
        return "a point in time cannot be"
    if snapshot.latest >= INFINITY or not 0 <= snapshot.control.not_before <= INFINITY:
        return "a point in time cannot be"
    return ""
