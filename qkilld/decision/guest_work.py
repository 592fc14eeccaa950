"""Measure how much a guest works, and whether it works more than before it was asked. Pure.

The work that a load does varies with the share of processors and disks that the host gives it. But
two figures of a load stay about the same. One is the load's demand: the number of processors that
it uses or waits for, plus the number of its requests in flight. When the host's disk became slow,
the first number fell from 0.7 to 0.15 and the second rose from 0.3 to 1.2, so the demand changed
little (measured). The other figure is the number of requests per second of processor time, which
changes only if the host becomes more or less busy (share_growth).

The demand of a light load is not constant: on a busy host, the same work waits longer for
processors, but does not run longer on them (MORE_TIME).
"""

from __future__ import annotations

from typing import Final

from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.guest_state import GuestObservation

BASELINE: Final = 1 * USEC_PER_SEC
"""Before the guest is asked, its work is measured for at least this time (µs), for comparison."""
IDLE_DISKS: Final = 2 * USEC_PER_SEC
"""Disks count as idle if they have completed no request for this long (µs). A shorter time
proves nothing: a guest under load looked idle for 0.8 s (measured)."""
IDLE_SHARE: Final = 0.05
"""All virtual processors of an idle guest together use at most this share of one processor."""
GROWTH: Final = 3
"""An increase of the guest's work by more than this factor is new work."""
MORE_TIME: Final = 1.5
"""More demand for processors is new work only if the virtual processors also run longer, by more
than this factor."""
LEAST_REQUESTS: Final = 1
"""If there are fewer requests per second than this, assume that there are none."""
HALF_BUSY: Final = 0.5
"""A load with at least this demand counts as busy. The end of a smaller load cannot be detected."""
CALM: Final = 0.2
"""A guest is asked at once if its disks are idle and its virtual processors wanted at most this
share of one processor in the last tenth of a second. A tenth of a second is too short to measure a
rate, so later work is compared with CALM instead."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of work over some time. An unknown rate is None, and is not compared."""

    requests: float | None = None
    """Requests per second."""
    vcpus: float | None = None
    """How many of the host's processors the virtual processors ran on or waited for."""
    ran: float | None = None
    """How many processors the host gave to the virtual processors."""
    in_flight: float = 0.0
    """The average number of disk requests in flight; 0 if unknown."""

    @property
    def demand(self) -> float:
        """The demand of the guest's load: processors plus requests in flight. The demand hardly
        depends on how fast the host is."""
        return (self.vcpus or 0.0) + self.in_flight


CALM_RATES: Final = Rates(requests=0.0, vcpus=CALM)


def has_idle_disks(seen: GuestObservation) -> bool:
    return seen.requests == 0 or (seen.disks_idle is not None and seen.disks_idle >= IDLE_DISKS)


def measure(recent: tuple[GuestObservation, ...]) -> Rates:
    """Return the highest rates over periods of at least BASELINE. If there is no such period, idle
    disks count as 0 requests, and calm processors as CALM."""
    if not recent:
        return Rates()
    last = recent[-1]
    windows = [
        rates_between(earlier, last) for earlier in recent if last.at - earlier.at >= BASELINE
    ]
    requests = [one.requests for one in windows if one.requests is not None]
    vcpus = [one.vcpus for one in windows if one.vcpus is not None]
    if not requests and has_idle_disks(last):
        requests = [0.0]
        if last.vcpu_load is not None and last.vcpu_load <= CALM:
            vcpus = [CALM]
    return Rates(
        max(requests, default=None),
        max(vcpus, default=None),
        max((one.ran for one in windows if one.ran is not None), default=None),
        max((one.in_flight for one in windows), default=0.0),
    )


def rates_between(earlier: GuestObservation, later: GuestObservation) -> Rates:
    duration = later.at - earlier.at
    requests = difference(earlier.requests, later.requests)
    wanted = wanted_time(earlier, later)
    ran = difference(earlier.vcpu_time, later.vcpu_time)
    vcpus = None if wanted is None else wanted / duration
    if vcpus is not None and later.vcpus is not None:
        # The kernel counts a wait for a processor when the wait ends, so a short period may include
        # all of a long wait.
        vcpus = min(vcpus, float(later.vcpus))
    return Rates(
        None if requests is None else requests * USEC_PER_SEC / duration,
        vcpus,
        None if ran is None else ran / duration,
        max(difference(earlier.request_time, later.request_time) or 0, 0) / duration,
    )


def works(before: GuestObservation, after: GuestObservation, baseline: Rates) -> bool:
    """Return whether the guest did clearly more work between the two observations than in the
    baseline.

    A busy guest also makes more requests if the host gives it more processor time, but this growth
    does not count.
    """
    now = rates_between(before, after)
    if now.requests is not None and baseline.requests is not None:
        requests = baseline.requests
        if baseline.demand >= HALF_BUSY:
            requests = _requests_of_load(now, baseline)
        duration = (after.at - before.at) / USEC_PER_SEC
        limit = GROWTH * requests + LEAST_REQUESTS
        if now.requests * duration > limit * max(duration, 1.0):
            return True
    if now.vcpus is None or baseline.vcpus is None:
        return False
    # If the host gives the virtual processors less time, they wait longer for the same work, so
    # work counts only if they also ran longer.
    if now.ran is not None and baseline.ran is not None and now.ran <= MORE_TIME * baseline.ran:
        return False
    return now.vcpus > GROWTH * baseline.demand + IDLE_SHARE


def works_at_all(before: GuestObservation, after: GuestObservation) -> bool:
    """Return whether the guest did anything between the two observations.

    On a busy host, the processors of an idle guest wait, but do not run longer.
    """
    if difference(before.requests, after.requests):
        return True
    duration = after.at - before.at
    ran = difference(before.vcpu_time, after.vcpu_time) or 0
    wanted = wanted_time(before, after) or 0
    return ran > IDLE_SHARE * duration or wanted > HALF_BUSY * duration * (after.vcpus or 1)


def wanted_time(earlier: GuestObservation, later: GuestObservation) -> int | None:
    """Return how long (µs) the virtual processors ran or waited for a processor of the host."""
    time = difference(earlier.vcpu_time, later.vcpu_time)
    if time is None:
        return None
    return time + (difference(earlier.vcpu_wait, later.vcpu_wait) or 0)


def share_growth(now: Rates, baseline: Rates) -> float:
    """Return the factor by which the guest's share has grown since the baseline. The share is the
    processor time that the guest gets, divided by the time that it wants. The factor is at least 1,
    and is 1 if the guest wanted little in the baseline: its share is then too uncertain.

    The number of requests per second of processor time may grow by the same factor, because QEMU's
    threads that handle the requests wait less, too. A guest that wrote as fast as it could made 6
    times as many requests after its share had grown by a factor of 7 (measured).
    """
    if not (now.ran and now.vcpus and baseline.ran and baseline.vcpus):
        return 1.0
    if baseline.vcpus < HALF_BUSY:
        return 1.0
    return max(now.ran / now.vcpus / (baseline.ran / baseline.vcpus), 1.0)


def _requests_of_load(now: Rates, baseline: Rates) -> float:
    """Return how many requests per second the load of the baseline could make with the guest's
    present processor time."""
    requests = (baseline.requests or 0.0) * share_growth(now, baseline)
    more_time = max(now.ran / baseline.ran, 1.0) if now.ran and baseline.ran else 1.0
    # Add LEAST_REQUESTS: if a load makes few requests, the baseline may have missed one of them.
    return (requests + LEAST_REQUESTS) * more_time


def difference(earlier: int | None, later: int | None) -> int | None:
    return None if earlier is None or later is None else later - earlier
