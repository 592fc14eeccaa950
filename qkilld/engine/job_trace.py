"""Record a job, so that people can read what happened and `replay` can judge it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkilld.model.trace import Header, Record

if TYPE_CHECKING:
    from qkilld.engine.ports import ObservedJob, Recorder, Traces


class JobTrace:
    """The trace of one job. If traces are off, its methods do nothing."""

    __slots__ = ("_recorder",)

    def __init__(self, job: ObservedJob, traces: Traces | None) -> None:
        self._recorder: Recorder | None = traces.begin(_trace_header(job)) if traces else None

    def record(self, record: Record) -> None:
        if self._recorder is not None:
            self._recorder.record(record)

    def end(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None


def _trace_header(job: ObservedJob) -> Header:
    identity = job.guest.identity
    return Header(
        job=job.number,
        started=job.started,
        pid=identity.pid,
        start_time=identity.start_time,
        command=identity.command,
        name=job.guest.label.shown_name,
        flags=job.flags,
        policy=job.policy,
    )
