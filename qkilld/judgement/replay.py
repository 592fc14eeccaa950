"""What would have been done, and when: a recorded trace through the judgement once more.

Pure. The samples are folded by `assess`, and `decide` is asked at each of them and at each deadline
that falls between two. A deadline asks for a look that the recorded job may not have taken. Where
a sample was taken right after it, that is the look; where none was, the look is taken to have shown
the same as the sample before. So a replay errs towards SIGKILL, and says how old that sample was.

A replay goes as far as the recording tells of a process that was left alone but for SIGTERM and
SIGCONT: to its end, to the SIGKILL that it really got, or to the end of the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from qkilld.judgement.ladder import Action, Decision, Standing, at_risk, decide, policy_for
from qkilld.judgement.verdict import Assessment, assess
from qkilld.model.evidence import Sample
from qkilld.model.policy import Policy
from qkilld.model.trace import Changed, Ended, Sent, Trace
from qkilld.model.words import Flag, Result

LOOK_TAKES: Final = 250_000
"""A sample so soon (µs) after a deadline is the look that the deadline asked for."""

_NONE: Final = Flag(0)
_ENDS: Final = {
    Action.KILL: Result.KILLED,
    Action.GIVE_UP: Result.SURVIVED,
    Action.LEAVE: Result.SIGNALLED,
}


@dataclass(frozen=True, slots=True)
class Terms:
    """What a replay puts in place of what was recorded."""

    add: Flag = _NONE
    remove: Flag = _NONE
    spans: Mapping[str, int] | None = None
    """Fields of Policy, in µs."""

    def over(self, flags: Flag, policy: Policy) -> tuple[Flag, Policy]:
        """The flags and the policy that count."""
        chosen = (flags | self.add) & ~self.remove
        if Flag.FIXED in chosen and Flag.FIXED not in flags:
            policy = policy_for(chosen, policy, {})
        return chosen, replace(policy, **(self.spans or {}))


@dataclass(frozen=True, slots=True)
class Step:
    """What would have been decided at one moment."""

    at: int
    """CLOCK_MONOTONIC, µs."""
    decision: Decision
    assessment: Assessment | None
    """What was known then; None before the first sample."""

    @property
    def unseen(self) -> int | None:
        """µs since the last sample; None before the first."""
        return None if self.assessment is None else self.at - self.assessment.last.at


@dataclass(frozen=True, slots=True)
class Recorded:
    """What really came of the job. Points in time are CLOCK_MONOTONIC in µs."""

    started: int
    until: int
    """How far the trace tells of a process that got no SIGKILL."""
    ended: int | None
    """The end of the job; None where that is not in the trace."""
    result: Result | None
    killed: int | None
    """When SIGKILL was sent."""


@dataclass(frozen=True, slots=True)
class Replay:
    recorded: Recorded
    flags: Flag
    """Those at the end of the replay: a request that joined the job may have added one."""
    policy: Policy
    steps: tuple[Step, ...]
    """One a sample, and one each time that something would have been done."""
    result: Result | None
    """`killed` where SIGKILL would have been sent, whatever would have come of that; None where the
    recording ends before anything would have been done."""
    at: int
    """When that would have been, else the end of the recording; CLOCK_MONOTONIC, µs."""
    data_at_risk: bool
    """SIGKILL would have met I/O that was outstanding or moving, or could not be seen."""
    written_later: int | None
    """Bytes that the guest still wrote after the SIGKILL that it did not really get, as far as its
    samples tell; None where there was no such SIGKILL or no sample after it."""


def replay(trace: Trace, terms: Terms | None = None) -> Replay:
    """The recorded job under other terms; None for its own."""
    recorded = recorded_of(trace)
    walk = _Walk(trace, terms or Terms())
    moments: list[Sample | Changed] = [*trace.of(Sample), *trace.of(Changed)]
    for moment in sorted(moments, key=lambda moment: moment.at):
        if moment.at > recorded.until or walk.result is not None:
            break
        walk.wait_until(moment.at, sees=isinstance(moment, Sample))
        if walk.result is None:
            walk.take(moment)
    exited = recorded.result is Result.EXITED
    # An exit comes before the deadline of the same µs; what was really done there was due.
    walk.wait_until(recorded.until + (0 if exited else 1))
    result, at = walk.result, walk.now
    if result is None:
        result, at = Result.EXITED if exited else None, recorded.until
    evidence = walk.standing.assessment
    killed = result is Result.KILLED
    return Replay(
        recorded=recorded,
        flags=walk.standing.flags,
        policy=walk.standing.policy,
        steps=tuple(walk.steps),
        result=result,
        at=at,
        data_at_risk=killed and at_risk(evidence, walk.standing.policy, at),
        written_later=_written_later(trace, evidence, recorded.until) if killed else None,
    )


def recorded_of(trace: Trace) -> Recorded:
    """What the trace says of the job itself."""
    end = next(iter(trace.of(Ended)), None)
    kills = [rung.at for rung in trace.of(Sent) if rung.signal == "SIGKILL"]
    last = max((record.at for record in trace.records), default=trace.header.started)
    return Recorded(
        started=trace.header.started,
        until=min([end.at if end is not None else last, *kills]),
        ended=end.at if end is not None else None,
        result=end.result if end is not None else None,
        killed=min(kills, default=None),
    )


class _Walk:
    """A job that goes through its time with nobody to signal."""

    def __init__(self, trace: Trace, terms: Terms) -> None:
        header = trace.header
        self._terms = terms
        self.now = header.started
        self.steps: list[Step] = []
        self.result: Result | None = None
        sent = [rung.at for rung in trace.of(Sent) if rung.signal == "SIGTERM"]
        self.standing = Standing(
            *terms.over(header.flags, header.policy), term_at=min(sent, default=header.started)
        )

    def take(self, moment: Sample | Changed) -> None:
        """What is known or asked for as of a moment, and what is decided on it at once."""
        self.now = moment.at
        if isinstance(moment, Changed):
            flags, policy = self._terms.over(moment.flags, moment.policy)
            self.standing = replace(
                self.standing, flags=flags, policy=policy, control=moment.control
            )
        else:
            evidence = assess(self.standing.assessment, moment)
            self.standing = replace(self.standing, assessment=evidence)
            self._do(decide(self.standing, self.now))

    def wait_until(self, end: int, *, sees: bool = False) -> None:
        """What falls due before `end`, when a sample is taken if `sees`."""
        while self.result is None:
            decision = decide(self.standing, self.now)
            if decision.action is Action.LOOK:
                if sees and self.now + LOOK_TAKES >= end:
                    return
                decision = decide(_seen_again(self.standing, self.now), self.now)
            if decision.action is not Action.WAIT:
                self._do(decision)
            elif decision.deadline < end:
                self.now = decision.deadline
            else:
                return

    def _do(self, decision: Decision) -> None:
        self.steps.append(Step(self.now, decision, self.standing.assessment))
        if decision.action is Action.CONTINUE:
            self.standing = replace(
                self.standing, continued_at=self.now, continues=self.standing.continues + 1
            )
        self.result = _ENDS.get(decision.action)


def _seen_again(standing: Standing, now: int) -> Standing:
    """As it stands after a look that has shown nothing new."""
    evidence = standing.assessment
    if evidence is None:
        return replace(standing, assessment=assess(None, Sample(now, "?")))
    return replace(standing, assessment=replace(evidence, last=replace(evidence.last, at=now)))


def _written_later(trace: Trace, evidence: Assessment | None, until: int) -> int | None:
    samples = [sample for sample in trace.of(Sample) if sample.at <= until]
    if evidence is None or evidence.written is None:
        return None
    latest = max(samples, key=lambda sample: sample.at)
    if latest.at <= evidence.last.at:
        return None
    in_all = replace(evidence, last=latest).written
    return None if in_all is None else max(0, in_all - evidence.written)
