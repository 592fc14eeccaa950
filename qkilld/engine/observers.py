"""Report jobs to several observers. Implements engine.ports.Observer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qkilld.engine import events

if TYPE_CHECKING:
    from qkilld.engine.ports import Journal, ObservedJob, Observer


class Observers:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._observers: list[Observer] = []

    def add(self, observer: Observer) -> None:
        self._observers.append(observer)

    def remove(self, observer: Observer) -> None:
        self._observers.remove(observer)

    def job_new(self, job: ObservedJob) -> None:
        self._tell(lambda observer: observer.job_new(job))

    def job_changed(self, job: ObservedJob) -> None:
        self._tell(lambda observer: observer.job_changed(job))

    def job_ended(self, job: ObservedJob) -> None:
        self._tell(lambda observer: observer.job_ended(job))

    def job_forgotten(self, job: ObservedJob) -> None:
        self._tell(lambda observer: observer.job_forgotten(job))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        """Call all observers. An exception in one observer must not affect the others."""
        for observer in tuple(self._observers):
            try:
                what(observer)
            except Exception as error:
                self._journal.write(events.internal_error("reporting a job", error))
