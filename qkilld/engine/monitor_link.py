"""The connection of one job to its guest's monitor. All phases share it. It is opened again if it
is lost, and closed when the job ends.

After SIGTERM or `quit`, QEMU answers only out-of-band commands, and only on connections that were
open before (measured, QEMU 7.2 and 10.0). So the connection must also survive a restart of the
daemon: systemd keeps a copy for the next daemon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qkilld.foreign_descriptors import close_later
from qkilld.model.guest_state import KeptMonitor, ShutdownSign

if TYPE_CHECKING:
    from qkilld.engine.ports import GuestMonitor, Monitors, Process


class MonitorLink:
    __slots__ = (
        "_callback", "_cancel", "_kept_monitor", "_monitor", "_monitors", "_on_descriptor",
        "_passed_fd", "_process", "_qmp_socket",
    )  # fmt: skip

    def __init__(
        self,
        process: Process,
        monitors: Monitors | None,
        qmp_socket: str,
        on_descriptor: Callable[[int | None], None],
    ) -> None:
        """`on_descriptor` is called with the descriptor of each new connection before it is used,
        and with None when a connection was lost or cannot be kept (Collaborators.on_monitor)."""
        self._process, self._monitors = process, monitors
        self._qmp_socket = qmp_socket
        self._on_descriptor = on_descriptor
        self._monitor: GuestMonitor | None = None
        self._kept_monitor: KeptMonitor | None = None
        self._passed_fd: int | None = None
        self._cancel: Callable[[], None] | None = None
        self._callback: Callable[[GuestMonitor | str | Exception], None] = lambda outcome: None

    @property
    def monitor(self) -> GuestMonitor | None:
        """The open monitor; None if it is not open or was lost."""
        if self._monitor is not None and self._monitor.lost:
            return None
        return self._monitor

    @property
    def is_opening(self) -> bool:
        return self._cancel is not None

    @property
    def is_human(self) -> bool:
        """Whether the open monitor is HMP, which cannot report the state of disks."""
        return (monitor := self.monitor) is not None and not monitor.reads_disks

    @property
    def own_chardevs(self) -> tuple[str, ...]:
        """The labels of this connection, which the next daemon needs for its KeptMonitor."""
        if self._kept_monitor is not None:
            return self._kept_monitor.own_chardevs
        return self._monitor.own_chardevs if self._monitor is not None else ()

    @property
    def is_kept(self) -> bool:
        """Whether there is an unused connection of an earlier daemon."""
        return self._kept_monitor is not None

    @property
    def is_passed(self) -> bool:
        """Whether a caller has passed a connection that is not used yet."""
        return self._passed_fd is not None

    def offer(self, passed: int) -> None:
        """Use this connection, which a caller has passed. Call this before `open`."""
        self._passed_fd = passed

    def keep(self, kept: KeptMonitor) -> None:
        """Use this connection of an earlier daemon. Call this before `open`."""
        self._kept_monitor = kept

    def open(
        self,
        callback: Callable[[GuestMonitor | str | Exception], None],
        *,
        was_asked: bool,
        agent_was_open: bool | None = None,
    ) -> None:
        """See engine.ports.Monitors. Calls back at once if the monitor is already open.

        If an attempt to open it is in progress, this only replaces the callback: cancelling the
        attempt could lose the connection of an earlier daemon.
        """
        if (monitor := self.monitor) is not None:
            callback(monitor)
            return
        if self._monitors is None:
            callback("this qkilld does not talk to guests")
            return
        self._callback = callback
        if self._cancel is not None:
            return
        if self._monitor is not None:
            self._on_descriptor(None)
        self._close_monitor()

        def opened(outcome: GuestMonitor | str | Exception) -> None:
            self._cancel = None
            if not isinstance(outcome, str | Exception):
                self._monitor = outcome
                if not outcome.adopted:
                    self._on_descriptor(outcome.fileno())
            self._callback(outcome)

        kept, self._kept_monitor = self._kept_monitor, None
        passed, self._passed_fd = self._passed_fd, None
        self._cancel = self._monitors.open(
            self._process,
            self._qmp_socket,
            opened,
            kept=kept,
            passed=passed,
            was_asked=was_asked,
            agent_was_open=agent_was_open,
            on_lost=lambda: self._on_descriptor(None),
        )

    def read_rest(self) -> tuple[frozenset[ShutdownSign], bool]:
        """See engine.ports.GuestMonitor."""
        if self._monitor is not None:
            return self._monitor.read_rest()
        if self._kept_monitor is not None and self._monitors is not None:
            return self._monitors.read_rest(self._kept_monitor), False
        return frozenset(), False

    def close(self) -> None:
        """May be called twice."""
        if self._kept_monitor is not None:
            close_later(self._kept_monitor.fd)
            self._kept_monitor = None
        if self._passed_fd is not None:
            close_later(self._passed_fd)
            self._passed_fd = None
        self._close_monitor()

    def _close_monitor(self) -> None:
        if self._cancel is not None:
            self._cancel()
            self._cancel = None
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
