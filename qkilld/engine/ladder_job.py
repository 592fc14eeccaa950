"""The members of a job that its phases use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from qkilld.decision.verdict import Assessment
from qkilld.engine.ports import ObservedJob
from qkilld.model.constants import GuestAsked, Phase, Result, Verdict
from qkilld.model.job import Control, FlushReport, Risk
from qkilld.model.policy import Policy


class LadderJob(ObservedJob, Protocol):
    """See engine.job for the members."""

    phase: Phase
    verdict: Verdict
    assessment: Assessment | None
    guest_asked: GuestAsked
    risks: tuple[Risk, ...]
    flush: FlushReport
    error: str
    error_name: str
    deadline: int
    control: Control

    @property
    def running(self) -> bool: ...
    @property
    def policy(self) -> Policy: ...
    def note_rung(self, action: str, at: int) -> None: ...
    def turn_to(self, verdict: Verdict, reasons: tuple[str, ...], at: int) -> None: ...
    def enter(self, phase: Phase) -> None: ...
    def note_sample(self) -> None: ...
    def wait_until(self, deadline: int, wake: int) -> None: ...
    def advance(self) -> None: ...
    def note_gone(self) -> None: ...
    def finish(self, result: Result) -> None: ...
    def note_signal(self) -> None:
        """Call this after each signal."""

    def note_unsent(self) -> None:
        """Call this when a signal cannot be sent yet."""

    def write_down(self, go_on: Callable[[], None]) -> None:
        """Save the job, and call back when this is done or takes too long."""

    def note_processors_running(self) -> None: ...
