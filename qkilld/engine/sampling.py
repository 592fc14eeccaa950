"""Take samples of one process for a job, one at a time. The callback is always called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qkilld.model.sample import Sample

if TYPE_CHECKING:
    from qkilld.engine.ports import Clock, ObservedJob, Process, Sampler, Timer, Watch

TIMEOUT: Final = 1_000_000
"""A sample that takes longer than this (µs) counts as blocked, and is replaced by an empty one."""


class JobSampler:
    """Watches the process from the first sample on. The caller must close this object."""

    __slots__ = ("_clock", "_job", "_process", "_sampler", "_timeout", "_watch")

    def __init__(
        self, job: ObservedJob, process: Process, sampler: Sampler | None, clock: Clock
    ) -> None:
        """If `sampler` is None, all samples are empty."""
        self._job = job
        self._process = process
        self._sampler = sampler
        self._clock = clock
        self._watch: Watch | None = None
        self._timeout: Timer | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a requested sample is outstanding and not yet late."""
        return self._timeout is not None

    def take_sample(
        self, callback: Callable[[Sample], None], *, detail: bool, urgent: bool = False
    ) -> None:
        """Request a sample, unless a request is pending. With `detail`, the sample is expensive
        (evidence.sampler). With `urgent`, it is taken before the samples of other jobs.

        After TIMEOUT, `callback` gets an empty sample. If the real sample comes later, `callback`
        gets it, too.
        """
        if self._timeout is not None:
            return

        def answer(sample: Sample) -> None:
            if self._timeout is not None:
                self._timeout.cancel()
                self._timeout = None
            callback(sample)

        def give_up() -> None:
            missed = self._watch is not None and self._watch.lacks_thread
            answer(Sample(self._clock.now(), "?", missed=missed))

        if self._watch is None and self._sampler is not None:
            self._watch = self._sampler.watch(self._process)
        self._timeout = self._clock.call_at(
            self._clock.now() + TIMEOUT, give_up, self._job.request.uid
        )
        if self._watch is not None:
            self._watch.take_sample(answer, detail=detail, urgent=urgent)
        else:
            give_up()

    def close(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
