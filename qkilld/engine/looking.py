"""Looking at a process: one sample at a time, and always an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qkilld.model.evidence import Sample

if TYPE_CHECKING:
    from qkilld.engine.ports import Clock, Process, Sampler, Timer, Watch

TIMEOUT: Final = 1_000_000
"""A sample that takes longer (µs) is one that blocks: nothing is known then, and that is known."""


class Looking:
    """Begins to watch the process with the first look; to be closed."""

    def __init__(self, process: Process, sampler: Sampler | None, clock: Clock) -> None:
        """Without a sampler nothing is ever seen."""
        self._process = process
        self._sampler = sampler
        self._clock = clock
        self._watch: Watch | None = None
        self._timeout: Timer | None = None

    def look(self, seen: Callable[[Sample], None]) -> None:
        """Ask for a sample; nothing where one is awaited. One that comes after its time was up is
        still given to `seen`, behind the one that stood in for it."""
        if self._timeout is not None:
            return

        def answer(sample: Sample) -> None:
            if self._timeout is not None:
                self._timeout.cancel()
                self._timeout = None
            seen(sample)

        def not_seen() -> None:
            answer(Sample(self._clock.now(), "?"))

        if self._watch is None and self._sampler is not None:
            self._watch = self._sampler.watch(self._process)
        self._timeout = self._clock.call_at(self._clock.now() + TIMEOUT, not_seen)
        if self._watch is not None:
            self._watch.look(answer)
        else:
            not_seen()

    def close(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
