"""The columns: the ways to stop a guest. Each starts its guests in the way that is usual for it.

All are real programs except `wchar`, which no program implements.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qkilld.model.constants import JOB_INTERFACE, Flag, Verdict
from tests.lab.bus import Client, daemon, plain, private_bus
from tests.lab.process import end, spawn, wait_gone
from tests.safety import contained
from tests.safety.machine import Machine, Target
from tests.safety.outcome import Outcome, Policy, Stopper

TICK_S: Final = 0.5
PATIENCE_S: Final = 400
"""A time (s) that no policy exceeds in any row."""
_CONFIG: Final = "[Target]\nExecutables=/usr/bin/qemu-system-* /usr/local/bin/qemu-system-*\n"


class Direct:
    """A policy whose guests are children of this process."""

    def network(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def launch(self, machine: Machine) -> Iterator[Target]:
        with (machine.directory / "stderr").open("wb") as stderr:
            process = spawn(machine.argv(), stdout=stderr, stderr=stderr)
        pidfd = os.pidfd_open(process.pid)
        try:
            yield Target(machine, process.pid, pidfd)
        finally:
            end(process)
            os.close(pidfd)


class Qkilld(Direct):
    """qkilld over D-Bus, with these flags and default settings."""

    def __init__(self, client: Client, flags: Flag, log: Callable[[], str]) -> None:
        self._client, self._flags, self._log = client, flags, log

    def stop(self, target: Target) -> Outcome:
        client = self._client
        start = time.monotonic()
        job = client.terminate(target.pid, int(self._flags))
        serial = client.send("Wait", path=job, interface=JOB_INTERFACE)
        ticks: list[tuple[float, str]] = []
        while True:
            next_tick = start + TICK_S * (len(ticks) + 1)
            try:
                result, receipt = client.reply(serial, max(0.0, next_tick - time.monotonic()))
                break
            except TimeoutError:
                assert time.monotonic() < start + PATIENCE_S, f"the job goes on: {self._log()}"
            verdict = client.properties(job, JOB_INTERFACE)["Verdict"]
            # Skip the verdict if the guest had exited before the call.
            if verdict not in (Verdict.GONE, Verdict.ZOMBIE):
                ticks.append((round(time.monotonic() - start, 1), str(verdict)))
        seconds = time.monotonic() - start
        details = {"receipt": plain(receipt), "log": self._log()}
        return Outcome(result, seconds, ticks=ticks, details=details)


def _qkilld(flags: Flag, *, traced: bool) -> Policy:
    @contextlib.contextmanager
    def begin(traces: Path | None) -> Iterator[Stopper]:
        arguments = [f"--trace-dir={traces}"] if traced and traces else []
        with (
            private_bus() as bus,
            daemon(bus, *arguments, config=_CONFIG) as running,
            bus.client() as client,
        ):
            yield Qkilld(client, flags, running.stderr.text)

    return begin


class OneCounter(Direct):
    """Send SIGTERM. When wchar of /proc/PID/io has not changed for 10 s, send SIGKILL. Then wait
    another 5 s."""

    STALL_S: Final = 10
    REAP_S: Final = 5
    INTERVAL_S: Final = 0.5

    def stop(self, target: Target) -> Outcome:
        start = moved = time.monotonic()
        target.signal(signal.SIGTERM)
        before = self._wchar(target)
        while not wait_gone(target.pidfd, self.INTERVAL_S):
            now = time.monotonic()
            if (counter := self._wchar(target)) != before:
                before, moved = counter, now
            if now - moved >= self.STALL_S:
                with contextlib.suppress(ProcessLookupError):
                    target.signal(signal.SIGKILL)
                gone = wait_gone(target.pidfd, self.REAP_S)
                return Outcome("killed" if gone else "survived", time.monotonic() - start)
        return Outcome("exited", time.monotonic() - start)

    @staticmethod
    def _wchar(target: Target) -> int:
        try:
            text = Path(f"/proc/{target.pid}/io").read_text()
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            return -1  # the process is exiting
        return int(text.split("wchar: ")[1].split()[0])


@contextlib.contextmanager
def _one_counter(traces: Path | None) -> Iterator[Stopper]:
    yield OneCounter()


@dataclass(frozen=True)
class Column:
    name: str
    title: str
    policy: Policy
    of_qkilld: bool = False
    """Whether the outcome depends on qkilld's code."""


OURS: Final = "qkilld"

COLUMNS: Final[Mapping[str, Column]] = {
    column.name: column
    for column in (
        Column("virsh", "virsh destroy", contained.libvirt()),
        Column("virsh-graceful", "virsh destroy --graceful", contained.libvirt("--graceful")),
        Column("systemd", "systemd, TimeoutStopSec=10", contained.systemd),
        Column("fixed", "2012 clock (FIXED)", _qkilld(Flag.FORCE | Flag.FIXED, traced=False), True),
        Column("wchar", "wchar alone", _one_counter),
        Column(OURS, "qkilld, FORCE", _qkilld(Flag.FORCE, traced=True), True),
    )
}
