"""Connect to a guest of the lab, in the way of the daemon."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any, TypeVar

from qkilld.adapters.process import open_process
from qkilld.evidence.sockdiag import listening_unix
from qkilld.monitor.endpoints import GuestEndpoints, Role, find_endpoints
from qkilld.monitor.reach import ListenerTable, connect, read_process

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run in a new loop."""
    return run_for(60, work)


def run_for(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Run in a new loop, with a timeout."""
    return asyncio.run(asyncio.wait_for(work, seconds))


async def guest_endpoints_of(pid: int) -> GuestEndpoints:
    process = open_process(pid)
    try:
        return find_endpoints(*await read_process(process.guest.identity))
    finally:
        process.close()


async def connected(
    pid: int,
    role: Role = Role.QMP,
    *,
    guest_endpoints: GuestEndpoints | None = None,
    table: ListenerTable = listening_unix,
) -> socket.socket:
    """Connect to the first endpoint of that role.

    Without `guest_endpoints`, wait until nobody uses it, because QEMU may not know yet that the
    lab has closed its connection.
    """
    while guest_endpoints is None:
        found = await guest_endpoints_of(pid)
        if found.with_role(role) and not any(one.listener.in_use for one in found.endpoints):
            guest_endpoints = found
        await asyncio.sleep(0.01)
    process = open_process(pid)
    try:
        return await connect(process, guest_endpoints.with_role(role)[0], table)
    finally:
        process.close()
