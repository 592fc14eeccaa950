"""Guests that are asked to shut down, on a host that becomes faster or slower meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from qkilld.decision.powerdown import Conclusion
from qkilld.model.guest_state import ShutdownSign
from tests.pure.test_powerdown import Course, Moment


@pytest.mark.parametrize("waiting", [0.9, 0.6])
def test_a_busy_guest_that_ignores_it_on_a_host_that_becomes_less_busy(waiting: float) -> None:
    """The guest makes more requests because the host is less busy. It does not shut down."""

    def works(now: float, since: float | None) -> Moment:
        if since is None or since < 20:
            return Moment(vcpus=1 - waiting, waiting=waiting, requests=100 * (1 - waiting))
        return Moment(vcpus=1.0, requests=140)

    course = Course(works, idle_disks=False).run(400)
    assert course.end == (course.ignored_at, Conclusion.IGNORED)


def seconds(*rows: tuple[float, float, float, float]) -> Sequence[Moment]:
    return [
        Moment(requests=requests, vcpus=vcpus, waiting=waiting, in_flight=in_flight)
        for requests, vcpus, waiting, in_flight in rows
    ]


FAST: Moment = Moment(requests=18, vcpus=0.35, waiting=0.35, in_flight=0.3)
SLOW = seconds(
    (1, 0.005, 0.003, 0.383),
    (0, 0.005, 0.004, 0),
    (2.9, 0.049, 0.073, 2.498),
    (0, 0.079, 0.131, 0),
    (4.9, 0.100, 0.040, 1.149),
    (5.0, 0.104, 0.185, 1.314),
    (1.0, 0.005, 0.009, 1.086),
    (4.0, 0.084, 0.045, 0.135),
    (4.9, 0.099, 0.090, 1.275),
    (5.0, 0.039, 0.110, 1.320),
)
"""Measured values, one for each second: a Debian guest that writes and syncs forever, on a fast or
a slow disk of the host."""
STARVED_WRITER = seconds(
    (96, 0.107, 0.795, 0.061),
    (84, 0.100, 0.812, 0.009),
    (109, 0.096, 0.813, 0.010),
    (102, 0.094, 0.844, 0.009),
    (50, 0.113, 0.933, 0.007),
    (102, 0.124, 0.837, 0.005),
)
FREE_WRITER = seconds(
    (4016, 0.618, 0.250, 0.197),
    (2818, 0.637, 0.283, 0.164),
    (2473, 0.658, 0.276, 0.200),
    (2230, 0.698, 0.244, 0.143),
    (2472, 0.645, 0.266, 0.165),
)
"""The same for a guest that writes as fast as possible, on a busy host (a load of 35) or an idle
one."""
STARVED_LOAD = seconds(
    (0, 0.054, 0.986, 0),
    (0, 0.041, 1.057, 0),
    (1, 0.050, 0.886, 0),
    (4, 0.053, 1.013, 0.022),
    (0, 0.046, 0.975, 0),
    (0, 0.048, 0.905, 0),
)
FREE_STOP_JOB = seconds(
    (5, 0.190, 0.033, 0.009),
    (4.9, 0.229, 0.074, 0.040),
    (9.9, 0.278, 0.040, 0.020),
    (5, 0.244, 0.098, 0.008),
    (5.9, 0.282, 0.065, 0.012),
    (8.9, 0.203, 0.071, 0.013),
)
"""The same for a guest that shuts down. At first it writes and syncs as usual, on a busy host (a
load of 45). Then a service writes while it stops, on an idle host."""
STARVED_IDLE = seconds(
    (0, 0.003, 0.076, 0),
    (0, 0.004, 0.112, 0),
    (0, 0.003, 0.030, 0),
    (0, 0.002, 0.087, 0),
    (0, 0.003, 0.112, 0),
    (0, 0.003, 0.102, 0),
)
"""The same for an idle guest on a busy host. On an idle host, its processors ran for 0.003 s of
each second, and waited for 0.001 s."""


@pytest.mark.parametrize("start", range(len(SLOW)))
def test_a_busy_guest_that_ignores_it_on_a_disk_that_becomes_slow(start: int) -> None:
    def works(now: float, since: float | None) -> Moment:
        return FAST if now < 20 else SLOW[(start + int(now)) % len(SLOW)]

    course = Course(works, idle_disks=False).run(400)
    assert course.end == (course.ignored_at, Conclusion.IGNORED)


def test_a_busy_guest_that_ignores_it_on_a_disk_that_becomes_fast() -> None:
    """On a slow disk, the guest may do so little work in a second that later work seems new. In
    this case, qkilld waits too long."""
    seconds = []
    for start in range(len(SLOW)):

        def works(now: float, since: float | None, start: int = start) -> Moment:
            return SLOW[(start + int(now)) % len(SLOW)] if now < 20 else FAST

        course = Course(works, idle_disks=False).run(400)
        at, conclusion = course.end
        assert conclusion is Conclusion.IGNORED
        assert at <= course.asked[0][0] + 300
        seconds.append(at - course.ignored_at)
    assert seconds.count(0) >= 8


def changing(
    earlier: Sequence[Moment], later: Sequence[Moment], start: int, at: float
) -> Callable[[float, float | None], Moment]:
    """Return a guest that behaves like `earlier` and, from the time `at` on, like `later`."""

    def moments(now: float, since: float | None) -> Moment:
        rows = earlier if now < at else later
        return rows[(start + int(now)) % len(rows)]

    return moments


@pytest.mark.parametrize("start", range(len(STARVED_WRITER)))
@pytest.mark.parametrize("at", [3, 20])
def test_a_guest_that_writes_on_a_host_that_becomes_idle(start: int, at: float) -> None:
    """On the idle host, the guest makes up to 80 times as many requests, and gets 6 times as much
    processor time."""
    course = Course(changing(STARVED_WRITER, FREE_WRITER, start, at), idle_disks=False).run(400)
    assert course.end == (course.ignored_at, Conclusion.IGNORED)


@pytest.mark.parametrize("start", range(len(FREE_WRITER)))
@pytest.mark.parametrize("at", [3, 20])
def test_a_guest_that_writes_on_a_host_that_becomes_busy(start: int, at: float) -> None:
    course = Course(changing(FREE_WRITER, STARVED_WRITER, start, at), idle_disks=False).run(400)
    assert course.end == (course.ignored_at, Conclusion.IGNORED)


@pytest.mark.parametrize("later", [0.05, 0.5])
@pytest.mark.parametrize("earlier", [0.05, 0.5, 1.0])
def test_a_guest_that_computes_on_a_host_whose_load_changes(earlier: float, later: float) -> None:
    """The guest always wants the same processor time, no matter how much it gets."""

    def computes(now: float, since: float | None) -> Moment:
        share = earlier if now < 20 else later
        return Moment(vcpus=share, waiting=1 - share)

    course = Course(computes, idle_disks=False).run(400)
    assert course.end == (course.ignored_at, Conclusion.IGNORED)


def test_a_wait_that_began_before_the_guest_was_measured() -> None:
    """The kernel counts a wait when the wait ends. So the guest seems to want more than its one
    processor at first, and less afterwards."""

    def computes(now: float, since: float | None) -> Moment:
        if since is None:
            return Moment(vcpus=0.05, waiting=2.2, requests=4)
        return Moment(vcpus=0.8, waiting=0.1, in_flight=0.1, requests=1)

    course = Course(computes, idle_disks=False).run(400)
    assert course.end == (course.ignored_at, Conclusion.IGNORED)


def test_an_idle_guest_that_ignores_it_on_a_host_that_becomes_busy() -> None:
    """The guest does the same as before, but waits longer for the processors."""
    idle = seconds((0, 0.003, 0.001, 0))
    # The guest was measured before it was asked, because its disks had just been used.
    course = Course(changing(idle, STARVED_IDLE, 0, 20), idle_disks=False).run(400)
    assert course.end == (course.ignored_at, Conclusion.IGNORED)


def signing(earlier: Moment, later: Sequence[Moment]) -> Callable[[float, float | None], Moment]:
    """Return a guest that stops its agent when it is asked, and never powers off."""

    def closes(now: float, since: float | None) -> Moment:
        if not since:
            return earlier
        signs = frozenset({ShutdownSign.AGENT_CLOSED})
        return replace(later[int(now) % len(later)], signs=signs)

    return closes


def test_a_shutdown_that_hangs_on_a_busy_host() -> None:
    """The idle guest's processors wait for a processor of the host. This is not progress."""
    course = Course(signing(Moment(), STARVED_IDLE)).run(400)
    assert course.end == (61, Conclusion.IGNORED)


@pytest.mark.parametrize("later", [STARVED_LOAD, STARVED_WRITER, FREE_STOP_JOB])
def test_a_shutdown_that_works_on_a_busy_host(later: Sequence[Moment]) -> None:
    course = Course(signing(Moment(), later)).run(400)
    assert course.end[1] is Conclusion.SHUTTING_DOWN


@pytest.mark.parametrize("start", range(len(STARVED_LOAD)))
def test_a_long_shutdown_on_a_host_that_becomes_idle(start: int) -> None:
    """The service makes more requests than the load did, but far fewer than the load would make on
    the idle host."""
    moments = changing(STARVED_LOAD, FREE_STOP_JOB, start, 10)

    def goes_down(now: float, since: float | None) -> Moment:
        return Moment(runstate="shutdown") if now >= 150 else moments(now, since)

    course = Course(goes_down, idle_disks=False).run(400)
    assert course.end == (150, Conclusion.SHUT_DOWN)


def test_a_guest_with_many_requests_in_flight_on_a_disk_that_becomes_fast() -> None:
    def works(now: float, since: float | None) -> Moment:
        if now < 20:
            return Moment(requests=50, vcpus=0.1, in_flight=8)
        return Moment(requests=800, vcpus=0.9, in_flight=0.8)

    course = Course(works, idle_disks=False).run(400)
    assert course.end == (course.ignored_at, Conclusion.IGNORED)


def test_a_busy_guest_that_ignores_it_on_a_starved_host() -> None:
    """The guest makes so few requests that there may be none in the second before the press."""
    requests = (0, 3.8, 1.6, 2.9, 7.7, 0, 2.6, 1.8, 4.4, 0.9, 3.6, 0, 1.9, 3.8, 3.7, 0.9, 3.5, 4.5)

    def works(now: float, since: float | None) -> Moment:
        made = 0 if since is None else requests[int(now) % len(requests)]
        return Moment(requests=made, vcpus=0.05, waiting=0.9)

    course = Course(works, idle_disks=False).run(400)
    assert course.end == (course.ignored_at, Conclusion.IGNORED)


@pytest.mark.parametrize("work", [Moment(requests=5, vcpus=0.1), Moment(vcpus=0.9)])
@pytest.mark.parametrize("load", [Moment(vcpus=1.0), FAST, Moment(vcpus=0.1, waiting=0.9)])
def test_a_long_shutdown_at_full_load(load: Moment, work: Moment) -> None:
    """The load ends at once, and a service needs 150 s to stop."""

    def goes_down(now: float, since: float | None) -> Moment:
        if since is None or since < 3:
            return load
        if since < 12:
            return Moment()
        return work if since < 150 else Moment(runstate="shutdown")

    course = Course(goes_down, idle_disks=False).run(400)
    assert course.end == (course.asked[0][0] + 150, Conclusion.SHUT_DOWN)


def test_a_busy_guest_whose_requests_grow_on_a_starved_host() -> None:
    def works(now: float, since: float | None) -> Moment:
        requests = 5 if since is None else 40
        return Moment(vcpus=0.2, waiting=0.8, requests=requests)

    course = Course(works, idle_disks=False).run(120)
    assert course.end[1] is Conclusion.SHUTTING_DOWN
