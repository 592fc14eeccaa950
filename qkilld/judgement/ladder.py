"""The ladder: from where a job stands to what it does next.

Pure: the time comes in as an argument and nothing is remembered. Times are CLOCK_MONOTONIC in µs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

from qkilld.model.policy import Policy
from qkilld.model.words import INFINITY, USEC_PER_SEC, Flag

FIXED_POLICY: Final = Policy(grace=10 * USEC_PER_SEC, reap=5 * USEC_PER_SEC, max=INFINITY)
"""The clock that libvirt has had since 2012 (virProcessKillPainfully): SIGKILL at 10 s with force,
15 s in all."""


class Action(Enum):
    TERMINATE = auto()
    """Send SIGTERM."""
    KILL = auto()
    """Send SIGKILL."""
    WAIT = auto()
    """Nothing until the decision's deadline."""
    GIVE_UP = auto()
    """The process outlived the ladder."""
    LEAVE = auto()
    """NOWAIT: the one signal is sent, look no further."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job stands on its ladder."""

    flags: Flag
    policy: Policy
    term_at: int | None = None
    """When SIGTERM was sent."""
    kill_at: int | None = None
    """When SIGKILL was sent."""


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action
    deadline: int = INFINITY
    """With WAIT: when to decide again, INFINITY for only when something happens."""


def policy_for(flags: Flag, configured: Policy, grace: int | None) -> Policy:
    """The policy of a job: FIXED stands over the configuration, the caller's grace over both."""
    policy = FIXED_POLICY if Flag.FIXED in flags else configured
    return policy if grace is None else replace(policy, grace=grace)


def decide(standing: Standing, now: int) -> Decision:
    """The next step for a process that is still there at `now`."""
    flags, policy = standing.flags, standing.policy
    if standing.kill_at is not None:
        if Flag.NOWAIT in flags:
            return Decision(Action.LEAVE)
        return _wait_until(standing.kill_at, policy.reap, now, Action.GIVE_UP)
    if Flag.NOWAIT in flags and Flag.FORCE in flags:
        return Decision(Action.KILL)
    if standing.term_at is None:
        return Decision(Action.TERMINATE)
    if Flag.NOWAIT in flags:
        return Decision(Action.LEAVE)
    if Flag.FORCE in flags:
        return _wait_until(standing.term_at, min(policy.grace, policy.max), now, Action.KILL)
    return _wait_until(standing.term_at, _add(policy.grace, policy.reap), now, Action.GIVE_UP)


def _wait_until(since: int, span: int, now: int, then: Action) -> Decision:
    due = _add(since, span)
    return Decision(then) if due <= now else Decision(Action.WAIT, due)


def _add(time: int, span: int) -> int:
    """A point in time or a span that much later; INFINITY stays INFINITY."""
    return min(time + span, INFINITY)
