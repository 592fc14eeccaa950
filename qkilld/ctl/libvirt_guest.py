"""terminate --powerdown for a libvirt guest: ask it through libvirt, and wait for its exit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import field
from typing import Any, Final

from qkilld.adapters.loop_thread import run_in_thread
from qkilld.ctl.session import Session
from qkilld.model.constants import INFINITY, USEC_PER_SEC, GuestAsked, Phase, Result
from qkilld.model.dataclass import dataclass
from qkilld.model.job_status import label
from qkilld.monitor.libvirt import Domain, domain_of, shut_down

METHOD: Final = "virsh"


@dataclass(frozen=True, slots=True)
class LibvirtShutdown:
    was_asked: bool
    result: str = ""
    """A value of Result; "" if a job of qkilld must follow."""
    receipt: dict[str, Any] = field(default_factory=dict)


NO_SHUTDOWN: Final = LibvirtShutdown(False)


async def shut_down_by_libvirt(
    session: Session, pid: int, *, wait: bool, span: int | None, only: bool
) -> LibvirtShutdown:
    """If libvirt manages the guest, ask the guest through libvirt to shut down, and wait for its
    exit.

    libvirt occupies the monitor, so qkilld cannot watch the shutdown there. The guest therefore
    gets a fixed time: `span` (µs) or, if that is None, its PowerdownSec=. If the guest has not
    exited in this time, a job follows, unless `only` is set. Without `wait`, return as soon as
    libvirt has asked the guest, and no job follows.
    """
    if session.bus.is_remote or (domain := domain_of(pid)) is None:
        return NO_SHUTDOWN
    title = label(pid, domain.name)
    with contextlib.ExitStack() as stack:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return NO_SHUTDOWN
        stack.callback(os.close, pidfd)
        start = time.monotonic_ns() // 1000
        # Read the domain again, because the pid may have been reused before the pidfd was opened.
        why = "libvirt does not manage it any more"
        if domain_of(pid) == domain:
            why = await run_in_thread(lambda: shut_down(domain))
        if why:
            session.output.error(f"{title}: cannot be asked to shut down: {why}")
            return NO_SHUTDOWN
        rungs = [(Phase.POWERDOWN.value, METHOD, time.monotonic_ns() // 1000 - start)]
        has_exited = False
        if wait:
            if not session.json:
                session.output.line(f"{title}: libvirt has asked it to shut down")
            if span is None:
                span = await _configured_span(session, domain)
            has_exited = await _exits_within(pidfd, span)
    if wait and not has_exited and not only:
        return LibvirtShutdown(True)
    result, outcome = Result.SIGNALLED, GuestAsked.ASKED
    if has_exited:
        result, outcome = Result.EXITED, GuestAsked.SHUT_DOWN
    elif wait:
        result, outcome = Result.SURVIVED, GuestAsked.IGNORED
    elapsed = time.monotonic_ns() // 1000 - start
    receipt = {"elapsed-usec": elapsed, "rungs": rungs, "guest-asked": outcome.value}
    return LibvirtShutdown(True, result.value, receipt)


async def _configured_span(session: Session, domain: Domain) -> int:
    """Return PowerdownSec= (µs) of the guest."""
    from qkilld.ctl.unit_context import config_of  # Imported late: most stops do not need it.

    return (await config_of(session)).policy_for(domain.name).powerdown


async def _exits_within(pidfd: int, usec: int) -> bool:
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    loop.add_reader(pidfd, exited.set)
    try:
        async with asyncio.timeout(None if usec == INFINITY else usec / USEC_PER_SEC):
            await exited.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True
