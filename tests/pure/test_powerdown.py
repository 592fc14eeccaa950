"""When a guest is asked to shut down, and what its reaction means."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import pytest

from qkilld.decision import powerdown
from qkilld.decision.powerdown import ENDS, AskMethod, Attempt, Conclusion, Judgement
from qkilld.model.codec import from_json, to_json
from qkilld.model.constants import USEC_PER_SEC as S
from qkilld.model.constants import GuestAsked
from qkilld.model.guest_state import Button, GuestObservation, ShutdownSign

POWERDOWN = 60 * S
START = 1000 * S
IDLE = 0.02
"""The share of a processor that an idle Debian guest uses under tcg."""


@dataclass
class Moment:
    """The state of a guest in one second."""

    runstate: str | None = "running"
    button: Button = Button.LISTENED
    pending: bool | None = False
    requests: float | None = 0.0
    """Per second."""
    vcpus: float | None = IDLE
    waiting: float = 0.0
    """The share of a processor that the guest wanted and the host did not provide."""
    in_flight: float = 0.0
    """Requests to its disks."""
    signs: frozenset[ShutdownSign] = frozenset()
    agent: bool = False
    load: float | None = None
    """The kernel's average of the processor time that the virtual processors want."""


@dataclass
class Course:
    """A guest that is observed every second, and at each time when the conclusion may change."""

    moments: Callable[[float, float | None], Moment]
    """Returns the state, given the seconds since the start and since it was first asked."""
    idle_disks: bool = True
    step: float = 1.0
    attempt: Attempt = field(default_factory=lambda: powerdown.start(START))
    asked: list[tuple[float, AskMethod]] = field(default_factory=list)
    conclusions: list[tuple[float, Conclusion]] = field(default_factory=list)
    last: Judgement | None = None
    agent: bool = False

    def run(self, seconds: float) -> Course:
        requests, request_time, now, passed = 5000.0, 0.0, 0.0, self.step
        vcpu_time, vcpu_wait = 7 * S * 1.0, 0.0
        while now <= seconds:
            moment = self.moments(now, now - self.asked[0][0] if self.asked else None)
            requests += (moment.requests or 0) * passed
            request_time += moment.in_flight * passed * S
            vcpu_time += (moment.vcpus or 0) * passed * S
            vcpu_wait += moment.waiting * passed * S
            at = START + int(now * S)
            self.attempt = powerdown.observe(
                self.attempt,
                GuestObservation(
                    at=at,
                    runstate=moment.runstate,
                    button=moment.button,
                    press_pending=moment.pending,
                    requests=None if moment.requests is None else int(requests),
                    request_time=int(request_time),
                    disks_idle=9 * S if self.idle_disks and not self.asked else 0,
                    vcpu_time=None if moment.vcpus is None else int(vcpu_time),
                    vcpu_wait=int(vcpu_wait),
                    vcpus=1,
                    vcpu_load=moment.load,
                    signs=moment.signs if self.asked else frozenset(),
                ),
            )
            judgement = powerdown.judge(self.attempt, powerdown=POWERDOWN, agent=moment.agent)
            if not self.conclusions or self.conclusions[-1][1] is not judgement.conclusion:
                self.conclusions.append((now, judgement.conclusion))
            self.last = judgement
            assert judgement.reason
            if judgement.conclusion in ENDS:
                break
            assert judgement.until is None or judgement.until > at
            if judgement.conclusion is Conclusion.ASK:
                assert judgement.method is not None
                self.asked.append((now, judgement.method))
                self.attempt = powerdown.note_request(self.attempt, judgement.method, at)
            passed = self.step
            if judgement.conclusion is not Conclusion.ASK and judgement.until is not None:
                passed = min(passed, (judgement.until - at) / S)
            now += passed
        return self

    @property
    def ignored_at(self) -> float:
        """The time (s) at which asking ends, if the guest was asked once and does not react."""
        return min(self.asked[0][0] + 60, 60.7)

    @property
    def end(self) -> tuple[float, Conclusion]:
        return self.conclusions[-1]


def constantly(moment: Moment) -> Callable[[float, float | None], Moment]:
    return lambda now, since: moment


def test_an_idle_guest_is_asked_at_once() -> None:
    course = Course(constantly(Moment())).run(0)
    assert course.asked == [(0, AskMethod.BUTTON)]


@pytest.mark.parametrize(
    ("moment", "idle_disks", "at"),
    [
        (Moment(requests=50), False, 1),
        # A request to a slow disk may be in flight.
        (Moment(), False, 2),
        (Moment(requests=None), False, 2),
        (Moment(load=0.1), True, 0),
        (Moment(load=0.9, vcpus=0.9), True, 1),
        (Moment(button=Button.NO_REGISTER), True, 0),
        (Moment(button=Button.UNKNOWN), True, 3),
        (Moment(agent=True), True, 0),
        (Moment(agent=True, button=Button.NOT_LISTENED), True, 0),
        (Moment(agent=True, button=Button.UNKNOWN), True, 0),
    ],
)
def test_when_it_is_asked(moment: Moment, idle_disks: bool, at: float) -> None:
    course = Course(constantly(moment), idle_disks=idle_disks).run(5)
    assert course.asked == [(at, AskMethod.AGENT if moment.agent else AskMethod.BUTTON)]


@pytest.mark.parametrize(
    "runstate",
    ["paused", "suspended", "io-error", "prelaunch", "inmigrate", "guest-panicked", "postmigrate"],
)
def test_only_a_running_guest_is_asked(runstate: str) -> None:
    course = Course(constantly(Moment(runstate=runstate, agent=True))).run(9)
    assert (course.asked, course.end) == ([], (0, Conclusion.NOT_RUNNING))
    assert course.last is not None and runstate in course.last.reason


@pytest.mark.parametrize(
    ("runstate", "seconds", "end"),
    [
        ("paused", 20, (30, Conclusion.SHUT_DOWN)),
        ("io-error", 20, (30, Conclusion.SHUT_DOWN)),
        ("finish-migrate", 20, (30, Conclusion.SHUT_DOWN)),
        ("paused", 100, (60, Conclusion.NOT_RUNNING)),
        ("postmigrate", 20, (5, Conclusion.NOT_RUNNING)),
        ("guest-panicked", 20, (5, Conclusion.NOT_RUNNING)),
    ],
)
def test_a_guest_that_is_paused_while_it_shuts_down(
    runstate: str, seconds: float, end: tuple[float, Conclusion]
) -> None:
    """Somebody may take a snapshot, or a disk may be full for a moment."""

    def goes_down(now: float, since: float | None) -> Moment:
        if since is not None and 5 <= since < 5 + seconds:
            return Moment(runstate=runstate)
        return Moment(runstate="shutdown" if since is not None and since >= 30 else "running")

    course = Course(goes_down).run(200)
    assert (course.end, len(course.asked)) == (end, 1)


def test_a_guest_that_has_powered_off() -> None:
    assert Course(constantly(Moment(runstate="shutdown"))).run(9).end == (0, Conclusion.SHUT_DOWN)


def test_an_idle_deaf_guest_is_known_in_under_five_seconds() -> None:
    course = Course(constantly(Moment(button=Button.NOT_LISTENED)), step=0.5).run(60)
    assert (course.asked, course.end) == ([], (3.0, Conclusion.DEAF))


@pytest.mark.parametrize("at", [0.25, 1.0, 1.9, 2.6, 3.0])
@pytest.mark.parametrize("apart", [0.25, 1.0, 1.75])
def test_a_deaf_guest_that_writes_its_journals_is_known_in_under_five_seconds(
    at: float, apart: float
) -> None:
    def writes(now: float, since: float | None) -> Moment:
        writes = at <= now < at + 0.25 or at + apart <= now < at + apart + 0.25
        return Moment(button=Button.NOT_LISTENED, requests=16 if writes else 0)

    course = Course(writes, step=0.25).run(60)
    assert course.end[1] is Conclusion.DEAF and course.end[0] < 4


@pytest.mark.parametrize("every", [0.75, 1.0, 1.75])
def test_a_guest_that_boots_from_a_slow_disk_is_not_deaf(every: float) -> None:
    """Between its requests, the guest waits for the disk, so its processors are idle."""

    def boots(now: float, since: float | None) -> Moment:
        if now >= 30:
            return Moment()
        requests = 0 if now % every else 8
        return Moment(button=Button.NOT_LISTENED, requests=requests, in_flight=0.9)

    course = Course(boots, step=0.25).run(40)
    assert course.asked[0] == (30, AskMethod.BUTTON)


@pytest.mark.parametrize(
    ("moment", "end"),
    [
        # The guest works, but not on its disks: the limit is PowerdownSec.
        (Moment(button=Button.NOT_LISTENED, vcpus=1.0), 60),
        # Unknown is not idle.
        (Moment(button=Button.NOT_LISTENED, vcpus=None), 60),
        (Moment(button=Button.NOT_LISTENED, requests=None), 60),
        # The guest works on its disks forever: the limit is five minutes.
        (Moment(button=Button.NOT_LISTENED, requests=5), 300),
    ],
)
def test_a_deaf_guest_that_works(moment: Moment, end: float) -> None:
    course = Course(constantly(moment)).run(400)
    assert (course.asked, course.end) == ([], (end, Conclusion.DEAF))


def test_a_guest_that_boots_is_asked_when_it_listens() -> None:
    def boots(now: float, since: float | None) -> Moment:
        if now < 40:
            return Moment(button=Button.NOT_LISTENED, vcpus=1.0, requests=3 if now < 20 else 0)
        return Moment(vcpus=0.5)

    course = Course(boots).run(50)
    assert course.asked == [(40, AskMethod.BUTTON)]
    assert course.conclusions[0] == (0, Conclusion.WAIT_FOR_LISTENER)


def test_a_press_that_comes_before_the_program_that_acts_on_it() -> None:
    """The kernel listens at 20 s, logind runs at 60 s, and the boot ends at 65 s."""
    asked: list[tuple[float, AskMethod]] = []

    def boots(now: float, since: float | None) -> Moment:
        if now < 65:
            button = Button.NOT_LISTENED if now < 20 else Button.LISTENED
            return Moment(button=button, vcpus=1.0, requests=9)
        return Moment(runstate="shutdown" if len(asked) > 2 else "running")

    course = Course(boots, asked=asked).run(100)
    assert [at for at, _ in asked] == [20, 50, 67]
    assert course.end[1] is Conclusion.SHUT_DOWN


def test_a_guest_that_has_booted_and_ignores_it() -> None:
    def boots(now: float, since: float | None) -> Moment:
        if now < 40:
            button = Button.NOT_LISTENED if now < 20 else Button.LISTENED
            return Moment(button=button, vcpus=1.0)
        return Moment()

    course = Course(boots).run(200)
    assert [at for at, _ in course.asked] == [20, 42]
    assert course.end == (102, Conclusion.IGNORED)


def test_a_guest_that_boots_for_ever() -> None:
    def boots(now: float, since: float | None) -> Moment:
        return Moment(button=Button.NOT_LISTENED if now < 20 else Button.LISTENED, vcpus=1.0)

    course = Course(boots).run(900)
    assert course.end[1] is Conclusion.IGNORED and course.end[0] <= 360


def test_an_idle_guest_that_ignores_it() -> None:
    course = Course(constantly(Moment())).run(100)
    assert course.end == (60, Conclusion.IGNORED)
    assert course.asked == [(0, AskMethod.BUTTON)]
    assert [one for _, one in course.conclusions] == [
        Conclusion.ASK,
        Conclusion.WATCH,
        Conclusion.IGNORED,
    ]


@pytest.mark.parametrize(
    "moment",
    [Moment(vcpus=1.0), Moment(vcpus=1.0, requests=200), Moment(vcpus=0.3, requests=20)],
)
def test_a_busy_guest_that_ignores_it(moment: Moment) -> None:
    """Constant work is not a sign of a shutdown."""
    course = Course(constantly(moment), idle_disks=False).run(200)
    assert course.asked == [(1 if moment.requests else 2, AskMethod.BUTTON)]
    assert course.end == (60.7, Conclusion.IGNORED)


def test_a_busy_guest_that_begins_to_shut_down_late_has_all_of_its_time() -> None:
    def goes_down(now: float, since: float | None) -> Moment:
        return Moment(vcpus=1.0, requests=500 if 50 <= now < 60 else 50)

    course = Course(goes_down, idle_disks=False).run(200)
    assert course.asked == [(1, AskMethod.BUTTON)]
    assert course.end == (59 + 60, Conclusion.IGNORED)


def test_a_guest_that_was_asked_late_has_all_of_its_time() -> None:
    attempt = replace(powerdown.start(START), started=START - 30 * S)
    course = Course(constantly(Moment()), attempt=attempt).run(200)
    assert course.end == (60, Conclusion.IGNORED)


def test_an_ignoring_guest_that_writes_its_log() -> None:
    def logs(now: float, since: float | None) -> Moment:
        burst = now % 5 == 4
        return Moment(requests=12 if burst else 0, vcpus=0.3 if burst else IDLE)

    assert Course(logs).run(200).end == (60, Conclusion.IGNORED)


def test_a_shutdown_without_an_agent() -> None:
    """As measured, the guest works in bursts with pauses of some seconds, and then powers off."""

    def goes_down(now: float, since: float | None) -> Moment:
        if since is not None and since >= 9:
            return Moment(runstate="shutdown")
        return Moment(requests={1: 25, 4: 15, 8: 60}.get(int(since or 0), 0))

    course = Course(goes_down).run(100)
    assert course.end == (9, Conclusion.SHUT_DOWN)


def test_a_stop_job_that_writes_for_longer_than_powerdown_sec() -> None:
    def goes_down(now: float, since: float | None) -> Moment:
        if since is not None and since >= 150:
            return Moment(runstate="shutdown")
        return Moment(requests=30 if since else 0)

    course = Course(goes_down).run(300)
    assert course.end == (150, Conclusion.SHUT_DOWN)
    assert (5, Conclusion.SHUTTING_DOWN) in course.conclusions


def test_a_stop_job_that_computes_for_long() -> None:
    def goes_down(now: float, since: float | None) -> Moment:
        if since is not None and since >= 150:
            return Moment(runstate="shutdown")
        return Moment(vcpus=1.0 if since else IDLE)

    course = Course(goes_down, idle_disks=False).run(300)
    assert course.end[1] is Conclusion.SHUT_DOWN


def test_work_that_begins_in_a_guest_that_was_asked_at_once() -> None:
    """The baseline is the kernel's average for the virtual processors."""

    def goes_down(now: float, since: float | None) -> Moment:
        if since is not None and since >= 150:
            return Moment(runstate="shutdown")
        return Moment(vcpus=0.1, waiting=0.8) if since else Moment(load=0.02)

    course = Course(goes_down).run(300)
    assert course.asked == [(0, AskMethod.BUTTON)]
    assert course.end == (150, Conclusion.SHUT_DOWN)


@pytest.mark.parametrize("vcpus", [0.1, 0.4])
def test_an_ignoring_guest_that_was_asked_at_once(vcpus: float) -> None:
    """The average covers only a short time. A moment without work before the press must not make
    later work a sign of a shutdown."""
    course = Course(constantly(Moment(vcpus=vcpus, load=0.01))).run(200)
    assert course.end == (60, Conclusion.IGNORED)


def resumed(busy_s: float, asked_at: list[float]) -> Attempt:
    """Return an attempt for a guest that was resumed at START, was busy for `busy_s`, and was then
    asked. Append the time of asking to `asked_at`."""
    attempt = powerdown.start(START - 9 * S)
    for second in range(-9, 1):
        seen = GuestObservation(
            at=START + second * S,
            runstate="paused",
            button=Button.LISTENED,
            requests=7,
            disks_idle=60 * S,
            vcpu_time=0,
            vcpu_load=0.0,
        )
        attempt = powerdown.observe(attempt, seen)
    attempt = powerdown.note_helped(attempt, START)
    for quarter in range(1, 80):
        at = START + quarter * S // 4
        busy = min(quarter / 4, busy_s)
        seen = replace(seen, at=at, runstate="running", vcpu_time=int(busy * S))
        attempt = powerdown.observe(attempt, seen)
        if powerdown.judge(attempt, powerdown=POWERDOWN, agent=False).method is not None:
            asked_at.append(quarter / 4)
            return powerdown.note_request(attempt, AskMethod.BUTTON, at)
    raise AssertionError("it is never asked")


@pytest.mark.parametrize(("busy_s", "asked"), [(0, 1.25), (4, 5.0), (100, 11.0)])
def test_a_guest_that_was_resumed_is_measured_first(busy_s: float, asked: float) -> None:
    """qkilld waits until the guest has caught up, though not forever. Then it measures the
    guest."""
    asked_at: list[float] = []
    resumed(busy_s, asked_at)
    assert asked - 0.5 <= asked_at[0] <= asked + 0.5


@pytest.mark.parametrize("busy_s", [0, 4])
def test_the_shutdown_of_a_guest_that_was_resumed_shows(busy_s: float) -> None:
    """The host gives the guest hardly any processor time, and the guest's disks are not used for a
    long time."""
    attempt = resumed(busy_s, [])
    last = attempt.last
    assert last is not None and last.vcpu_time is not None
    for second in range(1, 100):
        vcpu_time, vcpu_wait = last.vcpu_time + second * S // 10, second * S * 8 // 10
        seen = replace(
            last, at=last.at + second * S, vcpu_time=vcpu_time, vcpu_wait=vcpu_wait, vcpu_load=None
        )
        attempt = powerdown.observe(attempt, replace(seen, disks_idle=0))
    judgement = powerdown.judge(attempt, powerdown=POWERDOWN, agent=False)
    assert judgement.conclusion is Conclusion.SHUTTING_DOWN


def test_a_shutdown_on_a_host_that_gives_it_hardly_any_processor() -> None:
    def moments(now: float, since: float | None) -> Moment:
        return Moment() if since is None else Moment(vcpus=0.1, waiting=0.8)

    assert Course(moments, idle_disks=False).run(120).end[1] is Conclusion.SHUTTING_DOWN


def test_a_stop_job_that_stands_still_at_last() -> None:
    def hangs(now: float, since: float | None) -> Moment:
        return Moment(requests=30 if since and since < 80 else 0)

    at, conclusion = Course(hangs).run(300).end
    # For some seconds after the last request, the work still counts as lasting, which delays the
    # conclusion.
    assert conclusion is Conclusion.IGNORED and 139 <= at <= 145


def test_after_a_sign_every_work_counts() -> None:
    def goes_down(now: float, since: float | None) -> Moment:
        signs = frozenset({ShutdownSign.AGENT_CLOSED} if since and since >= 2 else ())
        if since is not None and since >= 400:
            return Moment(runstate="shutdown")
        return Moment(requests=1 if now % 50 == 0 else 0, signs=signs)

    course = Course(goes_down).run(500)
    assert course.end == (400, Conclusion.SHUT_DOWN)
    assert (2, Conclusion.SHUTTING_DOWN) in course.conclusions


def test_a_sign_and_then_nothing() -> None:
    def hangs(now: float, since: float | None) -> Moment:
        return Moment(signs=frozenset({ShutdownSign.AGENT_CLOSED} if since and since >= 2 else ()))

    course = Course(hangs).run(500)
    assert course.end == (62, Conclusion.IGNORED)
    assert course.last is not None and "stands still" in course.last.reason


def test_an_agent_that_is_only_restarted() -> None:
    """The guest writes to its log every few seconds. This is not a shutdown."""

    def restarts(now: float, since: float | None) -> Moment:
        closed = since is not None and 2 <= since < 5
        signs = frozenset({ShutdownSign.AGENT_CLOSED} if closed else ())
        return Moment(requests=1 if now % 20 == 0 else 0, signs=signs)

    at, conclusion = Course(restarts).run(500).end
    assert conclusion is Conclusion.IGNORED and 60 <= at < 70


def test_a_guest_that_restarts_is_asked_once_more() -> None:

    def restarts(now: float, since: float | None) -> Moment:
        if now < 10:
            return Moment()
        if now < 40:
            signs = {ShutdownSign.AGENT_CLOSED} | ({ShutdownSign.RESTARTED} if now == 10 else set())
            return Moment(button=Button.NOT_LISTENED, requests=50, vcpus=1, signs=frozenset(signs))
        # The agent is back. The guest writes to its log, and ignores the request.
        return Moment(requests=1 if now % 20 == 0 else 0)

    course = Course(restarts).run(1000)
    again = [at for at, _ in course.asked if at >= 10]
    assert 40 <= again[0] <= 43 and len(course.asked) <= 3
    at, conclusion = course.end
    assert conclusion is Conclusion.IGNORED and 100 <= at < 140


def restarting_at(*times: float, then: Moment) -> Callable[[float, float | None], Moment]:
    """Return a guest that restarts at these times, and then behaves like `then`."""

    def restarts(now: float, since: float | None) -> Moment:
        if now < times[0]:
            return Moment()
        signs = frozenset({ShutdownSign.RESTARTED} if now in times else ())
        boots = any(time <= now < time + 20 for time in times)
        if now > times[-1]:
            return then
        return Moment(
            button=Button.NOT_LISTENED if boots else Button.LISTENED, signs=signs, vcpus=1
        )

    return restarts


def test_a_guest_that_restarts_each_time_is_not_asked_a_third_time() -> None:
    course = Course(restarting_at(10, 40, then=Moment())).run(200)
    assert [at for at, _ in course.asked] == [0, 30]
    assert course.end == (40, Conclusion.IGNORED)
    assert course.last is not None and "restarts" in course.last.reason


def test_the_resets_of_one_restart() -> None:
    """Linux tries several ways to reset the machine."""
    course = Course(restarting_at(10, 11, 12, then=Moment())).run(200)
    assert [at for at, _ in course.asked][:2] == [0, 13]
    assert course.end[1] is Conclusion.IGNORED and course.end[0] > 13 + 60


def test_a_guest_that_restarts_for_ever_before_it_listens() -> None:
    course = Course(restarting_at(*range(10, 1000, 5), then=Moment())).run(900)
    assert course.end == (310, Conclusion.IGNORED)


@pytest.mark.parametrize("then", [Moment(runstate=None), Moment(button=Button.NOT_LISTENED)])
def test_a_guest_that_restarted_was_reached(then: Moment) -> None:
    """The guest was asked and did not shut down. Later events do not change this outcome."""
    assert Course(restarting_at(10, then=then)).run(200).end[1] is Conclusion.IGNORED


def test_a_load_that_began_by_chance_is_no_shutdown_for_ever() -> None:
    """The load begins after the press, and grows."""

    def builds(now: float, since: float | None) -> Moment:
        return Moment(vcpus=0.1 * now if since else IDLE, requests=now)

    at, conclusion = Course(builds).run(2000).end
    assert conclusion is Conclusion.IGNORED and 300 <= at <= 302


@pytest.mark.parametrize(
    ("signs", "all_heard", "outcome"),
    [
        ({ShutdownSign.POWERED_OFF}, True, GuestAsked.SHUT_DOWN),
        ({ShutdownSign.POWERED_OFF}, False, GuestAsked.SHUT_DOWN),
        ({ShutdownSign.AGENT_CLOSED}, True, GuestAsked.ASKED),
        ((), True, GuestAsked.ASKED),
        ((), False, GuestAsked.ASKED),
    ],
)
def test_the_end_of_qemu_is_not_always_a_shutdown(
    signs: Collection[ShutdownSign], all_heard: bool, outcome: GuestAsked
) -> None:
    course = Course(constantly(Moment())).run(5)
    found = powerdown.judge_exit(course.attempt, frozenset(signs), all_heard=all_heard)
    assert found is outcome


def test_the_end_of_a_guest_that_shut_down_unheard() -> None:
    """The human monitor has no events."""

    def goes_down(now: float, since: float | None) -> Moment:
        return Moment(requests=30 if since else 0)

    course = Course(goes_down).run(9)
    outcome = powerdown.judge_exit(course.attempt, frozenset(), all_heard=False)
    assert outcome is GuestAsked.SHUT_DOWN
    nobody = powerdown.start(START)
    assert powerdown.judge_exit(nobody, frozenset(), all_heard=False) is None


def test_an_attempt_goes_on_in_the_next_daemon() -> None:
    """The next daemon has the baseline, and the counters show what the guest did meanwhile."""

    def goes_down(now: float, since: float | None) -> Moment:
        if since is not None and since >= 150:
            return Moment(runstate="shutdown")
        return Moment(requests=30 if since else 0)

    course = Course(goes_down).run(20)
    kept = from_json(Attempt, to_json(course.attempt), "the attempt", strict=True)
    assert kept == course.attempt
    at = START + 90 * S
    after = powerdown.go_on(kept, at)
    assert powerdown.judge(after, powerdown=POWERDOWN, agent=False).conclusion in (
        Conclusion.WATCH,
        Conclusion.SHUTTING_DOWN,
    )
    last = kept.last
    assert last is not None and last.requests is not None
    seen = replace(last, at=at, requests=last.requests + 70 * 30)
    after = powerdown.observe(after, seen)
    judgement = powerdown.judge(after, powerdown=POWERDOWN, agent=False)
    assert (judgement.conclusion, judgement.until) == (Conclusion.SHUTTING_DOWN, at + POWERDOWN)
    # A guest that did nothing meanwhile is not shutting down.
    idle = powerdown.observe(powerdown.go_on(kept, at), replace(last, at=at))
    assert powerdown.judge(idle, powerdown=POWERDOWN, agent=False).conclusion is Conclusion.IGNORED


@pytest.mark.parametrize(("requests", "works"), [(30, True), (0, False)])
def test_the_daemon_ends_right_after_the_guest_was_asked(requests: int, works: bool) -> None:
    """No observation follows the press. Most of the time since the last one is after the press."""
    course = Course(constantly(Moment())).run(0)
    (ask,), last = course.attempt.asked, course.attempt.last
    assert last is not None and last.requests is not None
    kept = replace(course.attempt, asked=(replace(ask, at=last.at + S // 5),))
    for gap in (6, 59, 61, 299):
        seen = replace(last, at=START + gap * S, requests=last.requests + gap * requests)
        after = powerdown.observe(powerdown.go_on(kept, seen.at), seen)
        judgement = powerdown.judge(after, powerdown=POWERDOWN, agent=False)
        assert (judgement.conclusion is Conclusion.SHUTTING_DOWN) is works
    # Short work proves nothing.
    seen = replace(last, at=START + 4 * S, requests=last.requests + 4 * requests)
    judgement = powerdown.judge(powerdown.observe(kept, seen), powerdown=POWERDOWN, agent=False)
    assert judgement.conclusion is Conclusion.WATCH


def test_a_load_that_ends_when_it_is_asked() -> None:
    def goes_down(now: float, since: float | None) -> Moment:
        return Moment(vcpus=1.0 if since is None or since < 20 else 0.1)

    course = Course(goes_down, idle_disks=False).run(500)
    at, conclusion = course.end
    assert conclusion is Conclusion.IGNORED and 80 < at < 90


def test_an_agent_that_does_nothing_is_followed_by_the_button() -> None:
    course = Course(constantly(Moment(agent=True))).run(200)
    assert course.asked == [(0, AskMethod.AGENT), (10, AskMethod.BUTTON)]
    assert course.end == (70, Conclusion.IGNORED)


def test_an_agent_alone() -> None:
    course = Course(constantly(Moment(agent=True, button=Button.NOT_LISTENED))).run(200)
    assert course.asked == [(0, AskMethod.AGENT)]
    assert course.end == (60, Conclusion.IGNORED)


def test_an_agent_that_works_is_not_followed_by_the_button() -> None:
    def goes_down(now: float, since: float | None) -> Moment:
        signs = frozenset({ShutdownSign.AGENT_CLOSED} if since and since >= 2 else ())
        return Moment(agent=True, signs=signs)

    assert Course(goes_down).run(50).asked == [(0, AskMethod.AGENT)]


@pytest.mark.parametrize(
    ("button", "presses"),
    [(Button.LISTENED, 1), (Button.NO_REGISTER, 2), (Button.UNKNOWN, 1)],
)
def test_a_second_press(button: Button, presses: int) -> None:
    """The button is pressed again only if the machine does not show whether the guest noticed the
    first press."""
    assert len(Course(constantly(Moment(button=button))).run(200).asked) == presses


def test_no_second_press_while_something_happens() -> None:
    def works(now: float, since: float | None) -> Moment:
        return Moment(button=Button.NO_REGISTER, requests=9 if since and since % 6 == 0 else 0)

    assert len(Course(works).run(200).asked) == 1


def test_a_monitor_that_does_not_answer() -> None:
    course = Course(constantly(Moment(runstate=None))).run(100)
    assert (course.asked, course.end) == ([], (5, Conclusion.UNREACHABLE))


def test_a_monitor_that_falls_silent_after_it_was_asked() -> None:
    """QEMU's main loop may be busy with the shutdown."""

    def falls_silent(now: float, since: float | None) -> Moment:
        silent = since is not None and since > 10
        return Moment(runstate=None if silent else "running")

    at, conclusion = Course(falls_silent).run(200).end
    assert conclusion is Conclusion.IGNORED and at == 70


def test_a_press_of_somebody_else_is_not_repeated() -> None:
    for button in (Button.LISTENED, Button.NO_REGISTER):
        course = Course(constantly(Moment(pending=True, agent=True, button=button))).run(5)
        assert (course.asked, course.end) == ([], (0, Conclusion.PRESSED))
    # Under the firmware, the bit may have any value.
    course = Course(constantly(Moment(pending=True, button=Button.NOT_LISTENED))).run(5)
    assert course.end == (3, Conclusion.DEAF)


def test_whether_the_press_was_taken_is_said() -> None:
    course = Course(lambda now, since: Moment(pending=since is not None)).run(5)
    assert course.last is not None and "has not noticed" in course.last.reason


def test_a_guest_that_the_host_starves_is_not_idle() -> None:
    """The guest is ready to run, and gets no processor."""
    attempt = powerdown.start(START)
    for second in range(10):
        seen = GuestObservation(
            at=START + second * S,
            runstate="running",
            button=Button.NOT_LISTENED,
            requests=7,
            vcpu_time=second * S // 25,
            vcpu_wait=second * S // 2,
        )
        attempt = powerdown.observe(attempt, seen)
    judgement = powerdown.judge(attempt, powerdown=POWERDOWN, agent=False)
    assert judgement.conclusion is Conclusion.WAIT_FOR_LISTENER


def test_an_attempt_keeps_little() -> None:
    course = Course(constantly(Moment(agent=True)), step=0.1).run(30)
    assert len(course.attempt.recent) <= 101
