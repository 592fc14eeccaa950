"""What a job records of itself, for people and for a replay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkilld.model.trace import Header, Record

if TYPE_CHECKING:
    from qkilld.engine.job import Job
    from qkilld.engine.ports import Recorder, Traces


class JobTrace:
    """The trace of one job; nothing happens where none are kept."""

    def __init__(self, job: Job, traces: Traces | None) -> None:
        self._recorder: Recorder | None = traces.begin(_header(job)) if traces else None

    def record(self, record: Record) -> None:
        if self._recorder is not None:
            self._recorder.record(record)

    def end(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None


def _header(job: Job) -> Header:
    identity = job.guest.identity
    return Header(
        job=job.number,
        started=job.started,
        pid=identity.pid,
        start_time=identity.start_time,
        command=identity.command,
        name=job.guest.label.name,
        flags=job.flags,
        policy=job.policy,
    )
