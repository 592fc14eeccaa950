"""One target of the helper, and how far its stop has come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkilld.model.guest import Guest, Identity, Label, Unit
from qkilld.model.words import Flag

if TYPE_CHECKING:
    from qkilld.engine.job import Job
    from qkilld.model.jobview import JobView
    from qkilld.stop.daemonic import DaemonJob
    from qkilld.stop.target import Target


class Order:
    def __init__(self, target: Target, unit: Unit) -> None:
        self.target = target
        self.view: JobView | None = None
        """What was heard last of its job, whoever does it."""
        self.daemon: DaemonJob | None = None
        self.job: Job | None = None
        """Where it is stopped by this process itself."""
        self.forced = False
        self.running = True
        self._unit = unit

    @property
    def flags(self) -> Flag:
        return Flag.FORCE if self.forced else Flag(0)

    def changed(self, view: JobView) -> None:
        self.view = view

    @property
    def title(self) -> str:
        from qkilld.model.jobview import label

        return label(self.target.pid, self.view.name if self.view else "")

    @property
    def guest(self) -> Guest:
        """For what is logged of it."""
        pid, start_time = self.target.pid, self.target.start_time or 0
        identity = Identity(pid, start_time, self.view.uid if self.view else 0, "", "", "", False)
        return Guest(identity, Label(self.view.name if self.view else "", "", self._unit))
