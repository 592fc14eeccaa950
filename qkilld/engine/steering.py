"""Steer a running job: hold, release, extend. Pure.

The requester of a job is root, a user whom polkit authorized, or the owner of the process. Root and
authorized users may steer every job. The owner of the process may steer a job that the owner
requested. The owner can steer any other job only by extending it up to a limit. Otherwise, owners
could prevent root from stopping their guests.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qkilld.model.access import Rank, Steerer
from qkilld.model.constants import INFINITY, USEC_PER_SEC
from qkilld.model.job import Control, Request
from qkilld.model.policy import Policy

OWNER_EXTENSION: Final = 10 * 60 * USEC_PER_SEC
"""If MaxSec= is infinite, the owner can extend somebody else's job to at most this time (µs) after
the start of the job."""


def owner_limit(started: int, policy: Policy) -> int:
    """Return the latest time (CLOCK_MONOTONIC, µs) to which the owner may extend somebody else's
    job."""
    longest = policy.max if policy.max < INFINITY else OWNER_EXTENSION
    return min(started + longest, INFINITY)


def may_steer(rank: Rank, job: Rank) -> bool:
    """Return whether a caller of rank `rank` may steer a job of rank `job` without limits."""
    return rank > Rank.OWNER or job is Rank.OWNER


def extended(control: Control, until: int, rank: Rank) -> Control:
    """Delay SIGKILL until `until` (CLOCK_MONOTONIC, µs), unless it is delayed for longer
    already."""
    outranking = until if rank > Rank.OWNER else 0
    return replace(
        control,
        not_before=max(control.not_before, until),
        outranking=max(control.outranking, outranking),
    )


def hold(control: Control, by: Steerer, started: int, policy: Policy) -> Control:
    """Hold the job until it is released. A hold by the owner also ends when MaxSec= has passed."""
    outranks = by.rank > Rank.OWNER
    until = INFINITY if outranks else min(started + policy.max, INFINITY)
    if control.held and until <= control.held_until and (control.hold_outranks or not outranks):
        return control
    return replace(control, held=True, held_until=until, hold_outranks=outranks)


def release(control: Control) -> Control:
    return replace(control, held=False, held_until=INFINITY, hold_outranks=False)


def take_over(control: Control, limit: int) -> Control:
    """Return the new Control of a job that a caller of higher rank takes over from the owner: the
    owner's hold ends, and the owner's extensions are cut to `limit` (see owner_limit)."""
    new_control = control if control.hold_outranks else release(control)
    return replace(new_control, not_before=max(control.outranking, min(control.not_before, limit)))


def replace_request(before: Request, request: Request) -> Request:
    """Return a copy of `request` that also allows the orders (`help`) of the former request,
    `before`. If `request` names no `qmp_socket`, the copy has the one of `before`."""
    return replace(
        request,
        help=tuple(dict.fromkeys((*before.help, *request.help))),
        qmp_socket=request.qmp_socket or before.qmp_socket,
    )
