"""Ask a libvirt guest to shut down through libvirt, and wait before any signal is sent."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from typing import Final

from qkilld.adapters import config
from qkilld.debug_log import note
from qkilld.model.errors import ConfigError
from qkilld.model.guest import Guest
from qkilld.model.policy import Config
from qkilld.monitor.libvirt import Domain, domain_of, shut_down
from qkilld.stop.guest_stop import GuestStop
from qkilld.stop.helper_events import asked_by_libvirt, libvirt_refused
from qkilld.stop.log import Log, say
from qkilld.stop.mailbox import Mailbox

TICK_S: Final = 1.0


def domain_to_ask(stop: GuestStop) -> Domain | None:
    """Return the domain that libvirt should ask to shut down, if any."""
    if stop.powerdown is False:
        return None
    domain = domain_of(stop.process.pid)
    if domain is None or (stop.powerdown is None and not _config().asks(domain.name)):
        return None
    return domain


def shut_down_by_libvirt(
    stop: GuestStop,
    domain: Domain,
    *,
    guest: Guest,
    span: int | None,
    log: Log,
    mailbox: Mailbox,
    go_on: Callable[[GuestStop], None],
) -> None:
    """Ask the guest in a thread. If the stop still runs afterwards, `mailbox` calls `go_on`.

    libvirt uses the monitor, so the shutdown cannot be observed, and the guest gets a fixed time:
    `span` (µs), or PowerdownSec= of qkilld.conf if `span` is None.
    """
    timeout = _config().policy_for(domain.name).powerdown if span is None else span
    began = time.monotonic()
    # The job that follows must not ask the guest again.
    stop.powerdown = False
    log.open()

    def work() -> None:
        try:
            if why := shut_down(domain):
                log.write(libvirt_refused(guest, domain.name, why))
                say(f"{stop.title}: {why}")
            else:
                log.write(asked_by_libvirt(guest, domain.name))
                _wait(stop, began, timeout)
        finally:
            proceed()

    def proceed() -> None:
        mailbox.put(lambda: go_on(stop) if stop.running else None)

    try:
        threading.Thread(target=work, name="libvirt", daemon=True).start()
    except RuntimeError as error:  # The system allows no more threads.
        note("starting a thread to ask libvirt", error)
        proceed()


def _wait(stop: GuestStop, began: float, timeout: int) -> None:
    """Wait until the process is gone, or until its unit or the policy allows no more time."""
    poll = select.poll()
    poll.register(stop.process.pidfd, select.POLLIN)
    asked_at = time.monotonic()
    while stop.running:
        until = asked_at + timeout / 1e6
        # Compute the end of the wait again in each round, because the unit's limits may have become
        # known.
        if stop.ask_at_most is not None:
            until = min(until, began + stop.ask_at_most / 1e6)
        remaining = until - time.monotonic()
        if remaining <= 0 or poll.poll(min(remaining, TICK_S) * 1000):
            return


def _config() -> Config:
    """Load qkilld.conf. If the file is invalid, use the defaults."""
    try:
        return config.load()
    except ConfigError:
        return Config()
