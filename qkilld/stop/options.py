"""The options of qkilld-stop. Imports nothing, to start fast: see stop.main."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from qkilld.model.policy import Policy


class Options:
    """With these defaults, qkilld-stop stops the main process of the unit that systemd is
    stopping."""

    def __init__(
        self,
        *,
        pid: int | None = None,
        pidfile: str | None = None,
        unit: str | None = None,
        all_guests: bool = False,
        force: bool | None = None,
        powerdown: bool | None = None,
        spans: Mapping[str, int] | None = None,
        reason: str | None = None,
        socket: str | None = None,
        dry_run: bool = False,
        json: bool = False,
        debug: bool = False,
    ) -> None:
        self.pid = pid
        """0: `--pid $MAINPID` was given, but the main process is gone."""
        self.pidfile = pidfile
        self.unit = unit
        self.all_guests = all_guests
        """--all: stop every guest that its own unit does not stop."""
        self.force = force
        """Whether to use FORCE. None: use it only if systemd would also send SIGKILL."""
        self.powerdown = powerdown
        """Whether to ask the guest first; None: as Powerdown= in qkilld.conf."""
        self.spans = spans or {}
        """Time spans (µs), keyed by the field names of Policy."""
        self.reason = reason
        self.socket = socket
        """The daemon's socket; None for that of the installed daemon."""
        self.dry_run = dry_run
        self.json = json
        self.debug = debug

    def spare_others(self, configured: Policy) -> None:
        """Prepare to stop guests that the command line does not name: be at least as patient as for
        the named one, and as configured."""
        self.force = None if self.force else self.force
        self.powerdown = self.powerdown or None
        self.spans = {
            name: max(usec, getattr(configured, name)) for name, usec in self.spans.items()
        }

    @property
    def names_one(self) -> bool:
        """Whether an option names a single process."""
        return self.pid is not None or self.pidfile is not None

    @property
    def names_process(self) -> bool:
        """False with --unit or --all, which may select several processes."""
        return self.unit is None and not self.all_guests
