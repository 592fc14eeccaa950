"""The stop of one process, and its progress. Imports little, to start fast: see stop.main."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from qkilld.stop.process import ProcessHandle


ENDINGS = {
    "exited": "is gone, without SIGKILL",
    "killed": "is gone, but only by SIGKILL: data may be lost",
    "survived": "is still there, and gets no more signals",
    "cancelled": "is still there: its job was cancelled",
    "failed": "could not be stopped, see the journal",
}
"""Messages by the result of the job."""


class GuestStop:
    def __init__(
        self,
        process: ProcessHandle,
        *,
        forced: bool,
        powerdown: bool | None,
        ask_at_most: int | None,
    ) -> None:
        """`powerdown`: whether to ask the guest first; None: as configured. `ask_at_most`: the
        longest time for asking the guest, µs; None for no limit."""
        self.process = process
        self.forced = forced
        self.powerdown = powerdown
        self.ask_at_most = ask_at_most
        self.monitor = -1
        """A connection to the guest's monitor that is passed to the daemon; -1 for none."""
        self.state: dict[str, Any] | None = None
        """The last State (org.qkilld1.varlink) of the guest's job, which runs in the daemon or in
        this process."""
        self.code: int | None = None
        """The exit code; None while the stop is running."""
        self.denial = ""
        self.is_exit_noted = False
        self.leave_at: float | None = None
        """When to give up (time.monotonic()), if the process is exiting and nothing more can be
        done."""

    def force_if_allowed(self) -> None:
        """Send FORCE with further calls, unless the daemon would refuse them because another user
        owns the process and this program does not run as root."""
        if self.state is None or os.geteuid() in (0, self.state["uid"]):
            self.forced = True

    def close_monitor(self) -> None:
        """Close the connection, so that others can connect to the monitor."""
        if self.monitor >= 0:
            os.close(self.monitor)
            self.monitor = -1

    def close(self) -> None:
        self.close_monitor()
        self.process.close()

    @property
    def flags(self) -> list[str]:
        force = ["force"] if self.forced else []
        return force if self.powerdown is False else [*force, "powerdown"]

    @property
    def options(self) -> dict[str, Any]:
        """The fields of Options (org.qkilld1.varlink) that differ between stops."""
        options: dict[str, Any] = {}
        if self.powerdown is None:
            options["powerdownAsConfigured"] = True
        if self.ask_at_most is not None:
            options["powerdownMaxUSec"] = self.ask_at_most
        return options

    @property
    def running(self) -> bool:
        return self.code is None

    @property
    def title(self) -> str:
        from qkilld.model.job_status import label

        return label(self.process.pid, self.state["name"] if self.state else "")
