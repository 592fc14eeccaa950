"""Decide when and how to ask a guest to shut down, and judge what it does. Pure.

Call `start`, then `observe` for each observation, about once a second, and `note_request` after the
guest was asked. `judge` interprets the observations at any time. The decisions rely on these facts:

- QEMU drops a press of the power button if no operating system listens to it. Most machines show
  whether a system listens; on these, the button is pressed only if one does. A guest that does not
  listen may be booting if its processors or disks work; otherwise, it is called deaf.

- A guest that ignores the button may be busy forever, and a guest that shuts down may do no visible
  work for seconds, so neither work nor the lack of work proves anything. Work counts as a shutdown
  only if it exceeds the work before the press and lasts. Short work proves nothing, because an idle
  guest writes its log every few seconds. A shutdown whose work is too short to count ends within
  PowerdownSec= anyway.

- The work of a load varies with the processor time and disks that the host gives it
  (guest_work.py).

- If a load ends after the press, the guest may be shutting down, so all later work that exceeds
  that of an idle guest counts as a shutdown.

- After a sign that only a shutdown gives, all work counts as a shutdown until the sign disappears.
  (For example, the agent's port closes in a shutdown, but opens again if the agent was only
  restarted.) Without such a sign, work that began after the press counts as a shutdown for at most
  UNCERTAIN_MAX, because it may be an unrelated load.

- An agent that does not answer is not a sign, because it may be starved or stuck.
  x-query-virtio-status would show whether the guest has reset a device, but is not used: if QEMU
  cannot decode the features of the device's type, it aborts and loses all data that it holds
  (qmp_decode_features in hw/virtio/virtio-qmp.c).

- A guest that restarts has shut down and booted again, so it is asked once more, like a booting
  guest.

If the daemon restarts, an attempt continues (`go_on`): the counters before and after the gap show
what the guest did during the gap.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from itertools import pairwise
from typing import Final

from qkilld.decision.guest_work import (
    BASELINE,
    CALM,
    CALM_RATES,
    HALF_BUSY,
    IDLE_DISKS,
    IDLE_SHARE,
    LEAST_REQUESTS,
    Rates,
    difference,
    has_idle_disks,
    measure,
    rates_between,
    share_growth,
    wanted_time,
    works,
    works_at_all,
)
from qkilld.decision.verdict import can_be_continued, standstill
from qkilld.model.constants import USEC_PER_SEC, GuestAsked
from qkilld.model.dataclass import dataclass
from qkilld.model.guest_state import (
    PAUSED,
    POWERED_OFF,
    RUNNING,
    Button,
    GuestObservation,
    ShutdownSign,
)
from qkilld.model.sample import Sample

QUIET: Final = 3 * USEC_PER_SEC
"""A guest is deaf if it does not listen and has done no work for this long (µs). A few requests
(BURST) do not count as work."""
BURST: Final = 600_000
"""Within QUIET, an idle guest may spend up to this time (µs) on writing its log or journals.
Measured with Debian: two bursts of 4 requests, 1 s apart."""
BOOT_MAX: Final = 300 * USEC_PER_SEC
"""How long (µs) to wait for a working guest to begin to listen to the power button."""
SILENT: Final = 5 * USEC_PER_SEC
"""If the monitor has not answered for this long (µs), the guest cannot be asked."""
EFFECT: Final = 10 * USEC_PER_SEC
"""If a way of asking has no effect within this time (µs), the next way is tried."""
UNCERTAIN_MAX: Final = 300 * USEC_PER_SEC
"""Without a ShutdownSign, the guest's work counts as a shutdown for at most this long (µs) after
the guest was first asked. A longer PowerdownSec= replaces this limit."""
CLOSING: Final = 300_000
"""The time (µs) reserved between the end of asking and SIGTERM. An observation and the flush take
40 to 60 ms on a fast disk (measured). The rest is for a second reading of the disks."""
CUT: Final = 20
"""If a guest does not react, PowerdownSec= is shortened by at most 1/CUT of its length."""
BOOT_REPEAT: Final = 30 * USEC_PER_SEC
"""The time (µs) between presses while a guest boots."""
RECENT: Final = 10 * USEC_PER_SEC
"""How long (µs) observations are kept."""
LASTING: Final = RECENT // 2
"""Work is lasting if it takes at least this time (µs) in total within RECENT."""
SETTLE: Final = 10 * USEC_PER_SEC
"""How long (µs) a guest that was resumed or woken may be too busy to be measured."""


_LASTING_SIGNS: Final = frozenset({ShutdownSign.PVSHUTDOWN, ShutdownSign.POWERED_OFF})
"""Signs that are kept even if later observations do not show them."""


class AskMethod(StrEnum):
    AGENT = "agent"
    BUTTON = "button"


class Conclusion(StrEnum):
    MEASURE = "measure"
    """Observe longer before asking."""
    ASK = "ask"
    PRESSED = "pressed"
    """Somebody else has pressed the power button, for example an earlier ExecStop= line."""
    WAIT_FOR_LISTENER = "wait-for-listener"
    """The guest does not listen to the button, but does work, so it may be booting."""
    WATCH = "watch"
    """The guest was asked, and its reaction is not known yet."""
    SHUTTING_DOWN = "shutting-down"
    SHUT_DOWN = "shut-down"
    """The guest has powered off, but QEMU has not exited."""
    IGNORED = "ignored"
    DEAF = "deaf"
    UNREACHABLE = "unreachable"
    NOT_RUNNING = "not-running"


ENDS: Final = frozenset(
    {
        Conclusion.SHUT_DOWN,
        Conclusion.IGNORED,
        Conclusion.DEAF,
        Conclusion.UNREACHABLE,
        Conclusion.NOT_RUNNING,
    }
)
"""The conclusions that end the asking."""


@dataclass(frozen=True, slots=True)
class Judgement:
    conclusion: Conclusion
    reason: str
    """The reason in words, for STATUS= and the receipt."""
    until: int | None = None
    """The time (µs, CLOCK_MONOTONIC) at which the conclusion changes if the guest does nothing."""
    method: AskMethod | None = None
    """With ASK: how to ask."""


@dataclass(frozen=True, slots=True)
class AskRecord:
    method: AskMethod
    at: int
    """µs, CLOCK_MONOTONIC."""
    quiet: bool = False
    """Whether the guest did no work when it was asked, and so had finished booting."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Everything known about asking one guest. Times are CLOCK_MONOTONIC in µs."""

    started: int
    recent: tuple[GuestObservation, ...] = ()
    """The observations of the last RECENT µs."""
    asked: tuple[AskRecord, ...] = ()
    baseline: Rates = Rates()
    """The work before the guest was first asked; CALM_RATES after this work has ended."""
    boots: bool = False
    """Whether the guest has booted during this attempt: it has restarted, or did not listen at some
    time before it was asked."""
    helped_at: int | None = None
    """When the guest was resumed or woken."""
    signs: frozenset[ShutdownSign] = frozenset()
    """The signs in the last observation, and the lasting signs of earlier observations."""
    old_signs: frozenset[ShutdownSign] = frozenset()
    """Signs from before a restart, which no longer count."""
    agent_was_open: bool | None = None
    """Whether the agent had its port open when the guest was asked; None if unknown."""
    restarts: int = 0
    """The number of restarts since the guest was first asked."""
    answered_at: int | None = None
    """When the monitor last answered."""
    disk_work_at: int | None = None
    """When a request to a disk was last seen."""
    effect_at: int | None = None
    """When asking last had a visible effect, even a brief one."""
    progress_at: int | None = None
    """When the shutdown last made visible progress."""

    @property
    def last(self) -> GuestObservation | None:
        return self.recent[-1] if self.recent else None


def start(at: int) -> Attempt:
    return Attempt(started=at, answered_at=at)


def go_on(attempt: Attempt, at: int) -> Attempt:
    """Continue the previous daemon's attempt; `at` is the current time. The time without a daemon
    does not count as silence of the monitor."""
    return replace(attempt, answered_at=at)


def go_on_unseen(asked: tuple[AskRecord, ...], at: int, *, shutting_down: bool) -> Attempt:
    """Make an attempt from only the times of asking and the last conclusion.

    With `shutting_down`, assume that the guest has made progress until now.
    """
    return Attempt(
        started=at, asked=asked, answered_at=at, progress_at=at if shutting_down else None
    )


def still_counts(attempt: Attempt, at: int, powerdown: int) -> bool:
    """Return whether the requests of an ended attempt may still take effect at the time `at`, so
    that the guest must not be asked again. `powerdown` is PowerdownSec= in µs."""
    if not attempt.asked:
        return False
    requested_at = attempt.asked[-1].at
    if attempt.signs or attempt.progress_at is not None:
        return at < max(requested_at, attempt.progress_at or 0) + powerdown
    return at < requested_at + min(EFFECT, powerdown)


def note_request(attempt: Attempt, method: AskMethod, at: int) -> Attempt:
    ask = AskRecord(method, at, quiet=_is_quiet(attempt.recent))
    if attempt.asked:
        return replace(attempt, asked=(*attempt.asked, ask))
    return replace(
        attempt,
        asked=(ask,),
        baseline=measure(attempt.recent),
        agent_was_open=attempt.last.agent_open if attempt.last is not None else None,
    )


def note_helped(attempt: Attempt, at: int) -> Attempt:
    """Note that the guest was resumed or woken: earlier work, and earlier silence of the monitor,
    no longer count."""
    return replace(attempt, started=at, recent=(), helped_at=at, answered_at=at)


def observe(attempt: Attempt, observation: GuestObservation) -> Attempt:
    """Return the attempt after one more observation, which must be newer than all others."""
    before = attempt.last
    old_signs = attempt.old_signs & observation.signs
    # Keep lasting signs: a monitor that was opened again does not report earlier events.
    signs = (observation.signs | attempt.signs & _LASTING_SIGNS) - old_signs
    if ShutdownSign.RESTARTED in signs and ShutdownSign.POWERED_OFF not in signs:
        return _begin_again(attempt, observation)
    if _is_unsettled(attempt, before, observation):
        attempt, before = replace(attempt, started=observation.at, recent=()), None
    # Keep the previous observation for comparison, even if it is older than RECENT.
    recent = (one for one in attempt.recent if one is before or one.at > observation.at - RECENT)
    after = replace(
        attempt,
        recent=(*recent, observation),
        boots=attempt.boots or (observation.button is Button.NOT_LISTENED and not attempt.asked),
        signs=signs,
        old_signs=old_signs,
        answered_at=attempt.answered_at if observation.runstate is None else observation.at,
    )
    if before is None:
        return after
    requests = difference(before.requests, observation.requests)
    if requests:
        after = replace(after, disk_work_at=observation.at)
    if not attempt.asked:
        return after
    requested_at = attempt.asked[0].at
    if signs - attempt.signs:
        after = replace(after, effect_at=observation.at, progress_at=observation.at)
    elif after.signs and works_at_all(before, observation):
        after = replace(after, progress_at=observation.at)
    elif _is_after(requested_at, before, observation) and works(
        before, observation, attempt.baseline
    ):
        after = replace(after, effect_at=observation.at)
        if _is_lasting(after):
            after = replace(after, progress_at=observation.at)
    elif _load_ended(after):
        at = observation.at
        after = replace(after, effect_at=at, progress_at=at, baseline=CALM_RATES)
    return after


def _begin_again(attempt: Attempt, observation: GuestObservation) -> Attempt:
    """Return a new attempt after a restart: the guest is booting.

    Further resets belong to the same restart until the guest is asked again: Linux tries several
    ways to reset a machine (five resets in 0.3 s were measured), and firmware may reset it, too.
    """
    return Attempt(
        started=observation.at if attempt.asked else attempt.started,
        recent=(observation,),
        boots=True,
        old_signs=observation.signs - {ShutdownSign.RESTARTED},
        restarts=attempt.restarts + bool(attempt.asked),
        answered_at=observation.at,
        disk_work_at=observation.at,
    )


def judge(attempt: Attempt, *, powerdown: int, agent: bool) -> Judgement:
    """Interpret the observations. `powerdown` is PowerdownSec= in µs.

    `agent`: whether the guest's agent can be asked, and was not asked yet.
    """
    last = attempt.last
    if last is None:
        return Judgement(Conclusion.MEASURE, "nothing was seen yet")
    if last.runstate == POWERED_OFF or ShutdownSign.POWERED_OFF in attempt.signs:
        return Judgement(Conclusion.SHUT_DOWN, "the guest has powered off")
    if attempt.restarts > 1:
        return Judgement(Conclusion.IGNORED, "it restarts instead of shutting down")
    if last.runstate is None:
        return _judge_silence(attempt, last, powerdown)
    if last.runstate != RUNNING:
        return _judge_pause(attempt, last, powerdown)
    if not attempt.asked:
        return _judge_before(attempt, last, powerdown, agent)
    return _judge_after(attempt, last, powerdown)


def obstacle_to_asking(sample: Sample) -> str:
    """If the guest's process cannot run, explain why the guest cannot be asked; otherwise, ""."""
    if not (reason := standstill(sample)):
        return ""
    hint = "; the option resume continues it first" if can_be_continued(sample) else ""
    return f"{reason}, so its guest cannot be asked to shut down{hint}"


def judge_exit(
    attempt: Attempt, signs: frozenset[ShutdownSign], *, all_heard: bool
) -> GuestAsked | None:
    """Return the result of asking a guest whose QEMU exited before qkilld sent a signal; None if
    the guest was not asked.

    `signs`: the signs up to the exit. With `all_heard`, it is certain that no sign was missed, so
    an exit without POWERED_OFF was not a shutdown: QEMU crashed, or somebody else ended it.
    """
    if not attempt.asked and attempt.restarts == 0:
        return None
    if ShutdownSign.POWERED_OFF in attempt.signs | signs:
        return GuestAsked.SHUT_DOWN
    if attempt.last is not None and attempt.last.runstate == POWERED_OFF:
        return GuestAsked.SHUT_DOWN
    if all_heard:
        return GuestAsked.ASKED
    reacted = attempt.signs or attempt.effect_at is not None or attempt.progress_at is not None
    return GuestAsked.SHUT_DOWN if reacted else GuestAsked.ASKED


def _judge_before(
    attempt: Attempt, last: GuestObservation, powerdown: int, agent: bool
) -> Judgement:
    if last.press_pending and last.button in (Button.LISTENED, Button.NO_REGISTER):
        return Judgement(Conclusion.PRESSED, "somebody has pressed its power button already")
    if not agent and last.button is Button.NOT_LISTENED:
        return _judge_deafness(attempt, last, powerdown)
    until = _measure_until(attempt)
    if not _is_measured(attempt) and last.at < until:
        return Judgement(Conclusion.MEASURE, "measuring what the guest does", until)
    if agent:
        return Judgement(Conclusion.ASK, "the agent answers", method=AskMethod.AGENT)
    if last.button is Button.UNKNOWN and last.at < attempt.started + QUIET:
        reason = "the state of its power button cannot be read yet"
        return Judgement(Conclusion.MEASURE, reason, attempt.started + QUIET)
    reasons = {
        Button.LISTENED: "the guest listens to the power button",
        Button.NO_REGISTER: "its machine does not show whether it listens to the power button",
        Button.UNKNOWN: "the state of its power button cannot be read",
    }
    return Judgement(Conclusion.ASK, reasons[last.button], method=AskMethod.BUTTON)


def _judge_deafness(attempt: Attempt, last: GuestObservation, powerdown: int) -> Judgement:
    deaf = Conclusion.DEAF if attempt.restarts == 0 else Conclusion.IGNORED
    if _is_idle(attempt.recent):
        reason = "no operating system listens to the power button, and the guest is idle"
        return Judgement(deaf, reason)
    since = max(attempt.started, attempt.disk_work_at or 0)
    until = min(since + powerdown, attempt.started + BOOT_MAX)
    if last.at >= until:
        return Judgement(deaf, "no operating system has begun to listen to the power button")
    reason = "no operating system listens to the power button yet: the guest may be booting"
    return Judgement(Conclusion.WAIT_FOR_LISTENER, reason, until)


def _judge_after(attempt: Attempt, last: GuestObservation, powerdown: int) -> Judgement:
    last_ask = attempt.asked[-1]
    until = _progress_until(attempt, powerdown)
    if not attempt.signs and attempt.progress_at is None:
        until = _unanswered_until(attempt, powerdown)
    if not attempt.signs:
        until = min(until, attempt.asked[0].at + max(UNCERTAIN_MAX, powerdown))
    if last.at >= until:
        reacted = attempt.signs or attempt.progress_at is not None
        reason = "it began to shut down, but stands still" if reacted else "it does not shut down"
        return Judgement(Conclusion.IGNORED, reason)
    if attempt.signs:
        signs = ", ".join(sorted(attempt.signs))
        return Judgement(Conclusion.SHUTTING_DOWN, f"it is shutting down ({signs})", until)
    if attempt.progress_at is not None:
        return Judgement(Conclusion.SHUTTING_DOWN, "it has worked since it was asked", until)
    if method := _next_method(attempt, last):
        reason = f"the {last_ask.method} had no effect"
        return Judgement(Conclusion.ASK, reason, method=method)
    reason = "it was asked"
    if last_ask.method is AskMethod.BUTTON and last.press_pending is not None:
        reaction = "has not noticed" if last.press_pending else "has noticed"
        reason = f"the guest {reaction} the power button"
    return Judgement(Conclusion.WATCH, reason, until)


def _unanswered_until(attempt: Attempt, powerdown: int) -> int:
    """Return when to stop waiting for a guest that has not reacted.

    SIGTERM should follow within PowerdownSec= + BASELINE after the start, even if measuring took
    longer than BASELINE. So the wait ends CLOSING before the end of that time, unless the guest has
    booted, or PowerdownSec= would be cut by more than CUT allows.
    """
    until = attempt.asked[-1].at + powerdown
    early = attempt.started + BASELINE + powerdown - CLOSING
    may_cut = not attempt.boots and early >= until - powerdown // CUT
    return min(early, until) if may_cut else until


def _next_method(attempt: Attempt, last: GuestObservation) -> AskMethod | None:
    """Return how to ask again after asking had no effect; None if the guest should not be asked
    now.

    The power button is tried after the agent. A second press cancels the shutdown of some systems
    (illumos), so the button is pressed again only on machines that do not show whether the guest
    has noticed the first press. But while a guest boots, it is pressed repeatedly, because the
    kernel listens seconds before a program is ready to act on a press.
    """
    last_ask = attempt.asked[-1]
    if attempt.boots and last.button is Button.LISTENED and not last_ask.quiet:
        is_quiet = _is_quiet(tuple(one for one in attempt.recent if one.at >= last_ask.at))
        repeat = last.at >= last_ask.at + BOOT_REPEAT and last.at < attempt.started + BOOT_MAX
        return AskMethod.BUTTON if is_quiet or repeat else None
    if last.at < last_ask.at + EFFECT:
        return None
    presses = sum(one.method is AskMethod.BUTTON for one in attempt.asked)
    if presses == 0:
        return None if last.button is Button.NOT_LISTENED else AskMethod.BUTTON
    if presses > 1 or last.button is not Button.NO_REGISTER:
        return None
    silent = attempt.effect_at is None or last.at >= attempt.effect_at + EFFECT
    return AskMethod.BUTTON if silent else None


def _judge_pause(attempt: Attempt, last: GuestObservation, powerdown: int) -> Judgement:
    """Judge a guest that is not running. If it was asked and is paused, it may go on with its
    shutdown later."""
    reason = f"the guest is not running: {last.runstate}"
    until = _progress_until(attempt, powerdown)
    if not attempt.asked or last.runstate not in PAUSED or last.at >= until:
        return Judgement(Conclusion.NOT_RUNNING, reason)
    return Judgement(_reaction(attempt), reason, until)


def _progress_until(attempt: Attempt, powerdown: int) -> int:
    asked_at = attempt.asked[-1].at if attempt.asked else 0
    return max(asked_at, attempt.progress_at or 0) + powerdown


def _reaction(attempt: Attempt) -> Conclusion:
    reacted = attempt.signs or attempt.progress_at is not None
    return Conclusion.SHUTTING_DOWN if reacted else Conclusion.WATCH


def _judge_silence(attempt: Attempt, last: GuestObservation, powerdown: int) -> Judgement:
    answered = attempt.answered_at or attempt.started
    if not attempt.asked:
        if last.at >= answered + SILENT:
            end = Conclusion.UNREACHABLE if attempt.restarts == 0 else Conclusion.IGNORED
            return Judgement(end, "its monitor does not answer")
        return Judgement(Conclusion.MEASURE, "its monitor does not answer", answered + SILENT)
    until = max(_progress_until(attempt, powerdown), answered + powerdown)
    if last.at >= until:
        return Judgement(Conclusion.IGNORED, "its monitor no longer answers")
    return Judgement(_reaction(attempt), "its monitor does not answer", until)


def _is_unsettled(
    attempt: Attempt, before: GuestObservation | None, observation: GuestObservation
) -> bool:
    """Return whether a guest is still busy because it was resumed or woken (SETTLE)."""
    if before is None or attempt.helped_at is None or attempt.asked:
        return False
    time = wanted_time(before, observation)
    busy = time is not None and time > HALF_BUSY * (observation.at - before.at)
    return busy and observation.at < attempt.helped_at + SETTLE


def _measure_until(attempt: Attempt) -> int:
    """Return the time at which measuring ends if the guest does nothing. Measuring takes BASELINE
    if the disks are idle or have completed a request; otherwise, it takes IDLE_DISKS."""
    first, last = attempt.recent[0], attempt.recent[-1]
    until, baseline = attempt.started + IDLE_DISKS, first.at + BASELINE
    needs_baseline = bool(difference(first.requests, last.requests)) or has_idle_disks(last)
    return min(until, baseline) if needs_baseline and last.at < baseline else until


def _is_measured(attempt: Attempt) -> bool:
    """Return whether the baseline is known. One observation is enough for a calm guest (CALM) with
    idle disks, unless the guest was resumed or woken."""
    rates = measure(attempt.recent)
    if rates.requests is None:
        return False
    first, last = attempt.recent[0], attempt.recent[-1]
    if rates.requests == 0 and not has_idle_disks(last):
        return False
    if last.at - first.at >= BASELINE:
        return True
    calm = last.vcpu_load is None or last.vcpu_load <= CALM
    return calm and attempt.helped_at is None


def _is_lasting(attempt: Attempt) -> bool:
    """Return whether, since it was asked, the guest has done more work than in the baseline for at
    least LASTING in total."""
    asked_at, times = attempt.asked[0].at, 0
    for a, b in pairwise(attempt.recent):
        if _is_after(asked_at, a, b) and works(a, b, attempt.baseline):
            times += b.at - max(a.at, asked_at)
    return times >= LASTING


def _load_ended(attempt: Attempt) -> bool:
    """Return whether a load has ended: the guest was busy in the baseline, but its demand in the
    last LASTING µs was less than half of its demand in the baseline. The end of a boot does not
    count.

    If the guest still makes as many requests as before, its load has not ended: perhaps the demand
    has fallen just because the host's disks have become faster.
    """
    baseline = attempt.baseline
    if attempt.boots or baseline.vcpus is None or baseline.demand < HALF_BUSY:
        return False
    last = attempt.recent[-1]
    for earlier in reversed(attempt.recent):
        if earlier.at < attempt.asked[0].at:
            return False
        if last.at - earlier.at >= LASTING:
            now = rates_between(earlier, last)
            before = (baseline.requests or 0.0) * share_growth(now, baseline)
            fewer = before < LEAST_REQUESTS or (now.requests or 0.0) * 2 < before
            return now.vcpus is not None and now.demand * 2 < baseline.demand and fewer
    return False


def _is_after(asked_at: int, before: GuestObservation, after: GuestObservation) -> bool:
    """Return whether the time between two observations is after the request. A tenth of a long
    time may be earlier, because the last daemon may have ended right after the request."""
    duration, earlier = after.at - before.at, asked_at - before.at
    return earlier <= 0 or (duration >= LASTING and earlier * 10 <= duration)


def _is_idle(recent: tuple[GuestObservation, ...]) -> bool:
    """Return whether the guest has done no work for QUIET, apart from disk requests that took at
    most BURST. If they took longer, the result is False, because the guest may have waited for its
    disks. The result is also False if the work is unknown."""
    busy = 0
    for before, after in reversed(tuple(pairwise(recent))):
        requests = difference(before.requests, after.requests)
        busy += after.at - before.at if requests else 0
        if requests is None or busy > BURST:
            return False
        duration = recent[-1].at - before.at
        if duration - busy >= QUIET:
            waited = difference(before.request_time, recent[-1].request_time) if busy else 0
            time = wanted_time(before, recent[-1])
            at_rest = waited is not None and waited <= BURST
            return at_rest and time is not None and time < IDLE_SHARE * duration
    return False


def _is_quiet(recent: tuple[GuestObservation, ...]) -> bool:
    """Return whether the guest has done no work at all for QUIET; False if unknown."""
    for earlier in reversed(recent):
        last = recent[-1]
        duration = last.at - earlier.at
        if duration >= QUIET:
            time = wanted_time(earlier, last)
            requests = difference(earlier.requests, last.requests)
            return requests == 0 and time is not None and time < IDLE_SHARE * duration
    return False
