"""Ways to stop a guest: qkilld, and imitations of other programs.

`virsh destroy` and systemd with TimeoutStopSec=10 send SIGKILL 10 s after SIGTERM;
`virsh destroy --graceful` followed by `virsh destroy` does so 25 s after SIGTERM (measured,
tests/safety). FIXED is part of qkilld.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from qkilld.model.constants import JOB_INTERFACE, Flag
from tests.campaign.spec import Spec
from tests.lab.bare import BareGuest
from tests.lab.bus import Client, plain
from tests.lab.process import wait_gone

REAP_S: Final = 5.0
"""A process that still exists this many seconds after SIGKILL counts as survived."""
TICK_S: Final = 0.5
STALL_S: Final = 10.0


class Way(Protocol):
    job: str
    """The path of qkilld's job; "" if there is none."""

    def begin(self, guest: BareGuest, spec: Spec) -> None:
        """Begin to stop the guest."""

    def wait(self, seconds: float) -> tuple[str, dict[str, Any]] | None:
        """Return the result and the receipt; None if the stop takes longer than `seconds`."""

    def close(self) -> None: ...


class Qkilld:
    def __init__(self, address: str, flags: Flag = Flag.FORCE) -> None:
        self.job = ""
        self._client, self._flags = Client(address), flags
        self._serial = 0

    def begin(self, guest: BareGuest, spec: Spec) -> None:
        spans = {"grace": spec.grace, "stall": spec.stall, "storage_stall": spec.storage_stall}
        policy = {f"{name}_usec": ("t", int(span * 1e6)) for name, span in spans.items()}
        if Flag.FIXED in self._flags:
            policy = {}
        self.job = self._client.terminate(guest.pid, int(self._flags), **policy)
        self._serial = self._client.send("Wait", path=self.job, interface=JOB_INTERFACE)

    def wait(self, seconds: float) -> tuple[str, dict[str, Any]] | None:
        try:
            result, receipt = self._client.reply(self._serial, seconds)
        except TimeoutError:
            return None
        return result, plain(receipt)

    def close(self) -> None:
        self._client.close()


class Clock:
    """Send SIGTERM, and `seconds` later SIGKILL. With infinity, send no SIGKILL."""

    def __init__(self, seconds: float) -> None:
        self.job = ""
        self._seconds = seconds
        self._guest: BareGuest | None = None
        self._kill_at = 0.0
        self._killed = False

    def begin(self, guest: BareGuest, spec: Spec) -> None:
        self._guest = guest
        self._kill_at = time.monotonic() + self._seconds
        guest.signal(signal.SIGTERM)

    def wait(self, seconds: float) -> tuple[str, dict[str, Any]] | None:
        assert self._guest is not None
        until = time.monotonic() + seconds
        while True:
            due = self._kill_at + (REAP_S if self._killed else 0.0)
            remaining = min(until, due, time.monotonic() + TICK_S) - time.monotonic()
            if wait_gone(self._guest.pidfd, max(0.0, remaining)):
                return ("killed" if self._killed else "exited"), {}
            now = time.monotonic()
            self._look(now)
            if now >= due:
                if self._killed:
                    return "survived", {}
                self._killed = True
                with contextlib.suppress(ProcessLookupError):
                    self._guest.signal(signal.SIGKILL)
            if now >= until:
                return None

    def _look(self, now: float) -> None:
        """Do nothing. Subclasses may change the time of SIGKILL here. Called twice a second."""

    def close(self) -> None: ...


class OneCounter(Clock):
    """Send SIGTERM, and SIGKILL when wchar of /proc/PID/io has not changed for 10 s."""

    def __init__(self) -> None:
        super().__init__(STALL_S)
        self._before = 0

    def _look(self, now: float) -> None:
        assert self._guest is not None
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self._guest.pid}/io").read_text()
            counter = int(text.split("wchar: ")[1].split()[0])
            if counter != self._before and not self._killed:
                self._before, self._kill_at = counter, now + STALL_S


OURS: Final = "qkilld"
WAYS: Final[Mapping[str, tuple[str, Callable[[str], Way]]]] = {
    "clock": (
        "SIGKILL after 10 s (virsh destroy; systemd, TimeoutStopSec=10)",
        lambda address: Clock(10),
    ),
    "graceful": (
        "SIGKILL after 25 s (virsh destroy --graceful, then virsh destroy)",
        lambda address: Clock(25),
    ),
    "fixed": ("2012 clock (FIXED)", lambda address: Qkilld(address, Flag.FORCE | Flag.FIXED)),
    "wchar": ("wchar alone", lambda address: OneCounter()),
    "patience": ("SIGTERM and patience", lambda address: Clock(float("inf"))),
    OURS: ("qkilld, FORCE", Qkilld),
}
"""For each name: the title, and a function that makes the way to stop. The function gets the
address of qkilld's bus."""
