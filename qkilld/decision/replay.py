"""Judge a recorded trace again: what would qkilld have done, and when? Pure.

`assess` folds the samples into an assessment. `decide` is called at each sample, and at each
deadline between two samples. A decision at a deadline needs a new sample, which the recorded job
may not have taken. If the trace has a sample within SAMPLE_DURATION after the deadline, that sample
is used. Otherwise, the previous sample is used again, as if nothing had moved. So a replay may send
SIGKILL too early; `Step.since_sample` shows how old the sample was.

A replay ends when it reaches a result, and at the latest when the recorded process exited or got
SIGKILL, or when the recording ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from qkilld.decision.gap import unsampled_assessment
from qkilld.decision.ladder import Action, Decision, JobFacts, decide, policy_for
from qkilld.decision.risk import risks_of_kill
from qkilld.decision.verdict import Assessment, assess
from qkilld.model.constants import Flag, Result, Verdict
from qkilld.model.dataclass import dataclass
from qkilld.model.policy import Policy
from qkilld.model.sample import Sample
from qkilld.model.trace import ChangeRecord, EndRecord, RungRecord, Trace

_Moment = Sample | ChangeRecord | RungRecord

SAMPLE_DURATION: Final = 250_000
"""A sample recorded within this time (µs) after a deadline is used for the decision at that
deadline."""

_NONE: Final = Flag(0)
_ENDS: Final = {
    Action.KILL: Result.KILLED,
    Action.GIVE_UP: Result.SURVIVED,
    Action.LEAVE: Result.SIGNALLED,
}


@dataclass(frozen=True, slots=True)
class Overrides:
    """Flags and time spans that override the recorded ones."""

    add: Flag = _NONE
    remove: Flag = _NONE
    spans: Mapping[str, int] | None = None
    """Fields of Policy, in µs."""

    def override(self, flags: Flag, policy: Policy) -> tuple[Flag, Policy]:
        new_flags = (flags | self.add) & ~self.remove
        if Flag.FIXED in new_flags and Flag.FIXED not in flags:
            policy = policy_for(new_flags, policy, {})
        return new_flags, replace(policy, **(self.spans or {}))


@dataclass(frozen=True, slots=True)
class Step:
    at: int
    """CLOCK_MONOTONIC, µs."""
    decision: Decision
    assessment: Assessment | None
    """The assessment at that time; None before the first sample."""

    @property
    def since_sample(self) -> int | None:
        """µs since the last sample; None before the first."""
        return None if self.assessment is None else self.at - self.assessment.last.at


@dataclass(frozen=True, slots=True)
class RealOutcome:
    """How the job really ended. Times are CLOCK_MONOTONIC in µs."""

    started: int
    until: int
    """When SIGKILL was sent; if it was not, when the job or the trace ended."""
    ended: int | None
    """When the job ended; None if its end is not in the trace."""
    result: Result | None
    killed: int | None
    """When SIGKILL was sent."""


@dataclass(frozen=True, slots=True)
class Replay:
    recorded: RealOutcome
    flags: Flag
    """The flags at the end of the replay, including those that later requests have added."""
    policy: Policy
    steps: tuple[Step, ...]
    """One step for each sample, and one for each action."""
    result: Result | None
    """`killed` if SIGKILL would have been sent, whatever its effect; None if the recording ends
    before a result."""
    at: int
    """When the job would have had this result; if there is none, the end of the recording.
    CLOCK_MONOTONIC, µs."""
    data_at_risk: bool
    """Whether the replay's SIGKILL may have lost data."""
    written_later: int | None
    """How many bytes the process really wrote after the sample on which the replay's SIGKILL was
    based; None if unknown, or if the replay sent no SIGKILL."""


def replay(trace: Trace, overrides: Overrides | None = None) -> Replay:
    recorded = recorded_of(trace)
    walk = _Walk(trace, overrides or Overrides())
    yanks = [rung for rung in trace.of(RungRecord) if rung.signal == "yank"]
    moments: list[_Moment] = [*trace.of(Sample), *trace.of(ChangeRecord), *yanks]
    for moment in sorted(moments, key=lambda moment: moment.at):
        if moment.at > recorded.until or walk.result is not None:
            break
        walk.wait_until(moment.at, with_sample=isinstance(moment, Sample))
        if walk.result is None:
            walk.take(moment)
    exited = recorded.result is Result.EXITED
    # If a deadline is in the same µs as the end of the recorded job, an exit counts as earlier than
    # the deadline, and a SIGKILL as later.
    walk.wait_until(recorded.until + (0 if exited else 1))
    result, at = walk.result, walk.now
    if result is None:
        result, at = Result.EXITED if exited else None, recorded.until
    evidence = walk.facts.assessment
    killed = result is Result.KILLED
    return Replay(
        recorded=recorded,
        flags=walk.facts.flags,
        policy=walk.facts.policy,
        steps=tuple(walk.steps),
        result=result,
        at=at,
        data_at_risk=killed and bool(risks_of_kill(evidence)),
        written_later=_written_later(trace, evidence, recorded.until) if killed else None,
    )


def recorded_of(trace: Trace) -> RealOutcome:
    end = next(iter(trace.of(EndRecord)), None)
    kills = [rung.at for rung in trace.of(RungRecord) if rung.signal == "SIGKILL"]
    last = max((record.at for record in trace.records), default=trace.header.started)
    return RealOutcome(
        started=trace.header.started,
        until=min([end.at if end is not None else last, *kills]),
        ended=end.at if end is not None else None,
        result=end.result if end is not None else None,
        killed=min(kills, default=None),
    )


class _Walk:
    """A simulated job."""

    def __init__(self, trace: Trace, overrides: Overrides) -> None:
        header = trace.header
        self._overrides = overrides
        self.now = header.started
        self.steps: list[Step] = []
        self.result: Result | None = None
        sigterm_times = [rung.at for rung in trace.of(RungRecord) if rung.signal == "SIGTERM"]
        flags, policy = overrides.override(header.flags, header.policy)
        self.facts = JobFacts(
            flags=flags, policy=policy, term_at=min(sigterm_times, default=header.started)
        )

    def take(self, moment: _Moment) -> None:
        """Apply one record of the trace. After a sample, decide."""
        self.now = moment.at
        if isinstance(moment, ChangeRecord):
            flags, policy = self._overrides.override(moment.flags, moment.policy)
            self.facts = replace(self.facts, flags=flags, policy=policy, control=moment.control)
        elif isinstance(moment, RungRecord):
            self.facts = replace(self.facts, yank_at=moment.at)
        else:
            evidence = assess(self.facts.assessment, moment)
            self.facts = replace(self.facts, assessment=evidence)
            self._do(self._decide(self.facts))

    def wait_until(self, end: int, *, with_sample: bool = False) -> None:
        """Decide at the deadlines before `end`. With `with_sample`, a sample follows at `end`."""
        while self.result is None:
            decision = self._decide(self.facts)
            if decision.action is Action.SAMPLE:
                if with_sample and self.now + SAMPLE_DURATION >= end:
                    return
                decision = self._decide(_resampled(self.facts, self.now))
            if decision.action is not Action.WAIT:
                self._do(decision)
            elif decision.deadline < end:
                self.now = decision.deadline
            else:
                return

    def _decide(self, facts: JobFacts) -> Decision:
        decision = decide(facts, self.now)
        self.facts = replace(self.facts, promise=decision.promise or self.facts.promise)
        return decision

    def _do(self, decision: Decision) -> None:
        self.steps.append(Step(self.now, decision, self.facts.assessment))
        if decision.action is Action.CONTINUE:
            self.facts = replace(
                self.facts, continued_at=self.now, continues=self.facts.continues + 1
            )
        self.result = _ENDS.get(decision.action)


def _resampled(facts: JobFacts, now: int) -> JobFacts:
    """Return the facts after an assumed sample at `now` that shows no movement."""
    evidence = facts.assessment
    if evidence is None:
        start = facts.term_at or 0
        evidence = unsampled_assessment(start, Verdict.UNKNOWN, start)
    return replace(facts, assessment=replace(evidence, last=replace(evidence.last, at=now)))


def _written_later(trace: Trace, evidence: Assessment | None, until: int) -> int | None:
    samples = [sample for sample in trace.of(Sample) if sample.at <= until]
    if evidence is None or evidence.written is None:
        return None
    latest = max(samples, key=lambda sample: sample.at)
    if latest.at <= evidence.last.at:
        return None
    in_all = replace(evidence, last=latest).written
    return None if in_all is None else max(0, in_all - evidence.written)
