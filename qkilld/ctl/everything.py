"""terminate --all: every guest of this host that the caller may stop."""

from __future__ import annotations

import os

from qkilld.ctl import planning
from qkilld.ctl.session import Session
from qkilld.ctl.stopping import How, Order, carry_out
from qkilld.ctl.targets import Guest
from qkilld.model.errors import Failed
from qkilld.model.jobview import label


async def terminate(session: Session, how: How) -> int:
    """What polkit allows beyond one's own, the daemon finds out."""
    before = await _guests(session)
    jobs = dict(await session.manager.terminate_all(how.flags, how.options))
    left = [guest for guest in await _guests(session) if guest in before and guest.pid not in jobs]
    names = {guest.pid: guest.name for guest in before}
    orders = [Order(str(pid), pid, names.get(pid, ""), path) for pid, path in jobs.items()]
    orders += [Order(str(guest.pid), guest.pid, guest.name) for guest in left if _is_own(guest)]
    if others := [guest for guest in left if not _is_own(guest)]:
        session.output.error(f"left alone, as they are not yours: {_named(others)}")
    if not orders and not session.json:
        session.output.line("No QEMU guests to stop.")

    async def start(order: Order) -> None:
        if order.job is None:
            raise Failed(
                "it was not stopped, and qkilld's journal tells why: `journalctl -u qkilld`"
            )

    return await carry_out(session, orders, how, start)


async def plan(session: Session, how: How) -> int:
    """For each of one's own; those that need more than that are named."""
    guests = await _guests(session)
    orders = [Order(str(guest.pid), guest.pid, guest.name) for guest in guests if _is_own(guest)]
    if others := [guest for guest in guests if not _is_own(guest)]:
        session.output.error(f"only with authorization, as they are not yours: {_named(others)}")
    if not orders and not session.json:
        session.output.line("No QEMU guests of yours to stop.")
    return await planning.plan(session, orders, how)


async def _guests(session: Session) -> list[Guest]:
    return [Guest(*row) for row in await session.manager.list_guests()]


def _is_own(guest: Guest) -> bool:
    return os.geteuid() in (0, guest.uid)


def _named(guests: list[Guest]) -> str:
    return ", ".join(label(guest.pid, guest.name) for guest in guests)
