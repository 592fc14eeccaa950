"""Simulate the stop of a unit, and what happens to the guest's data. Pure.

If facts are unknown (what a program does, whether the guest can be asked), the stop is simulated
with every possible value. An `Assumption` is a set of such values. Two ways to stop a guest are
compared under each assumption. Sources: systemd.service(5), systemd.kill(5), systemd.scope(5);
systemd, src/core/service.c.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import field, replace
from enum import IntEnum, StrEnum, auto
from itertools import product

from qkilld.model.constants import INFINITY
from qkilld.model.dataclass import dataclass
from qkilld.model.timespan import format_usec
from qkilld.unitcheck.programs import IGNORED, POLITE
from qkilld.unitcheck.stop_act import Act, ActKind, act
from qkilld.unitcheck.stop_line import StopLine


class Patience(IntEnum):
    """How long a stop waits for data to be written."""

    NONE = 0
    TIMED = 1
    """The stop waits until a fixed timeout."""
    PATIENT = 2
    """The stop waits as long as the guest makes progress, or without a limit."""
    UNTOUCHED = 3
    """The guest keeps running, as intended."""


@dataclass(frozen=True, slots=True)
class StopStep:
    by: str
    """The actor: a line of the unit, systemd, or another unit."""
    does: str
    """A value of ActKind, or `signals`, `kills`, `leaves` and others."""

    def as_json(self) -> dict[str, str]:
        return {"by": self.by, "does": self.does}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How long a stop waits for each kind of data."""

    guest: Patience
    """How long the stop waits for data that is only in the memory of the guest's operating
    system."""
    disks: Patience
    """How long the stop waits for data that the guest's disks have acknowledged."""
    steps: tuple[StopStep, ...] = ()

    def __ge__(self, other: Outcome) -> bool:
        return self.guest >= other.guest and self.disks >= other.disks

    @property
    def keeps_disks(self) -> bool:
        return self.disks >= Patience.PATIENT

    def as_json(self) -> dict[str, object]:
        return {
            "guest": self.guest.name.lower(),
            "disks": self.disks.name.lower(),
            "steps": [step.as_json() for step in self.steps],
        }


class UnknownProgram(StrEnum):
    NOTHING = auto()
    FAILS = auto()
    ASKS = auto()
    ASKS_AND_WAITS = auto()
    TERMINATES = auto()
    KILLS = auto()
    HANGS = auto()


class Wrapper(StrEnum):
    """What a main process other than QEMU may do when it gets KillSignal=."""

    ENDS = auto()
    PASSES_ON = auto()
    ASKS = auto()


@dataclass(frozen=True, slots=True)
class Assumption:
    program: UnknownProgram = UnknownProgram.NOTHING
    wrapper: Wrapper = Wrapper.ENDS
    can_ask: bool = False
    """Whether qkilld-stop can ask the guest to shut down."""
    helper_fails: bool = False
    """Whether qkilld-stop fails or is cancelled. If its line has the prefix `-`, systemd then runs
    the lines after it."""


class Helper(StrEnum):
    """How well qkilld-stop works in the unit."""

    EXTENDS = auto()
    """systemd extends the timeout whenever qkilld-stop asks."""
    TIMED = auto()
    """systemd ignores qkilld-stop's extensions of the timeout."""
    KILLS = auto()
    """qkilld-stop sends SIGKILL after a fixed time."""
    INEFFECTIVE = auto()
    """qkilld-stop sees no guest, or cannot be started."""


@dataclass(frozen=True, slots=True)
class StopSettings:
    """The settings that matter for stopping a unit, current or planned."""

    lines: tuple[StopLine, ...] = ()
    kill_mode: str = "control-group"
    kill_signal: int = signal.SIGTERM
    restart_kill_signal: int = 0
    """RestartKillSignal=; 0 if it equals KillSignal=."""
    sends_sigkill: bool = True
    timeout: int = INFINITY
    """TimeoutStopSec=, µs."""
    kills_on_timeout: bool = False
    """TimeoutStopFailureMode= is not "terminate", so processes get no SIGTERM if ExecStop= times
    out."""
    main_is_qemu: bool = False
    main_may_trap: bool = False
    """The main process is not QEMU, and may do anything when it gets KillSignal=."""
    outlives: bool = False
    """The unit manages guests that are meant to keep running when it is stopped."""
    helper: Helper = Helper.EXTENDS
    """How well qkilld-stop works in an ExecStop= of the unit, or in its guard."""
    guard: str = ""
    """The guard of a scope, which stops the guest with qkilld-stop before systemd stops the scope;
    "" for none."""
    keepers: tuple[str, ...] = ()
    """The units that shut the guest down at host shutdown, before this unit is stopped."""
    keeper_timeout: int = INFINITY
    """The shortest TimeoutStopSec= of the keepers, µs."""
    guard_waits: bool = True
    """The guard or qkilld-guests.service waits until the keepers have shut the guest down."""
    guests_service: bool = False
    """At shutdown, qkilld-guests.service stops the guest before systemd stops this unit."""
    unordered_server: bool = False
    """A server on this host that serves the guest's disks may be stopped at the same time as the
    unit."""
    storage_goes_first: bool = False
    """At shutdown, the storage may be gone before the unit is stopped."""
    can_ask: bool | None = None
    """Whether qkilld-stop can ask the guest to shut down; None if unknown."""

    @property
    def is_cut(self) -> bool:
        """Whether the timeout ends in SIGKILL."""
        return self.timeout != INFINITY and self.sends_sigkill

    @property
    def goes_on_without_helper(self) -> bool:
        """Whether a line of qkilld-stop ignores failures, and other lines follow it."""
        last = max(
            (n for n, line in enumerate(self.lines) if not line.has(ActKind.HELPER)), default=-1
        )
        return any(
            line.has(ActKind.HELPER) and line.ignores_failure for line in self.lines[: last + 1]
        )


class Occasion(StrEnum):
    STOP = "stop"
    RESTART = "restart"
    SHUTDOWN = "shutdown"
    """The host powers off or reboots."""


def assumptions(*all_settings: StopSettings) -> list[Assumption]:
    """Return all assumptions that can affect an outcome."""
    unknown = any(not line.is_understood for each in all_settings for line in each.lines)
    wrapped = any(
        each.main_may_trap and each.kill_mode in ("mixed", "process") for each in all_settings
    )
    answers = {each.can_ask for each in all_settings}
    goes_on = any(each.goes_on_without_helper for each in all_settings)
    return [
        Assumption(program, wrapper, can_ask, helper_fails)
        for program, wrapper, can_ask, helper_fails in product(
            UnknownProgram if unknown else (UnknownProgram.NOTHING,),
            Wrapper if wrapped else (Wrapper.ENDS,),
            (False, True) if None in answers else (True in answers,),
            (False, True) if goes_on else (False,),
        )
    ]


def stop(settings: StopSettings, occasion: Occasion, assumed: Assumption) -> Outcome:
    if occasion is Occasion.RESTART and settings.restart_kill_signal:
        settings = replace(settings, kill_signal=settings.restart_kill_signal)
    return _Stop(settings, occasion, assumed).run()


def worst(settings: StopSettings, occasion: Occasion) -> Outcome:
    """Return the worst outcome under any assumption, separately for each kind of data."""
    outcomes = [stop(settings, occasion, each) for each in assumptions(settings)]
    low = min(outcomes, key=lambda outcome: (outcome.disks, outcome.guest))
    return replace(low, guest=min(each.guest for each in outcomes))


@dataclass
class _Stop:
    settings: StopSettings
    occasion: Occasion
    assumed: Assumption
    was_asked: bool = False
    waited: Patience = Patience.NONE
    """How long the stop waited for the guest after asking it to shut down."""
    exiting: bool = False
    """Whether QEMU was asked to exit."""
    steps: list[StopStep] = field(default_factory=list)

    def run(self) -> Outcome:
        shutdown = self.occasion is Occasion.SHUTDOWN
        if self.settings.outlives and not shutdown and not self.settings.lines:
            return self._end(Patience.UNTOUCHED, Patience.UNTOUCHED, "systemd", "leaves")
        if shutdown and (end := self._before_unit()) is not None:
            return self._on_storage(end)
        if not shutdown and self.settings.guard:
            return self._on_storage(self._helper(self.settings.guard))
        for line in self.settings.lines:
            end, goes_on = self._line(line)
            if end is not None:
                return self._on_storage(end)
            if not goes_on:
                break
        return self._on_storage(self._signals())

    def _before_unit(self) -> Outcome | None:
        """Simulate what happens at host shutdown before the unit is stopped. Return the outcome if
        qkilld-stop stops the guest in that time; otherwise None."""
        settings = self.settings
        stopper = settings.guard or ("qkilld-guests.service" * settings.guests_service)
        if stopper and settings.keepers and not settings.guard_waits:
            return self._helper(stopper)
        for keeper in settings.keepers:
            self.steps.append(StopStep(keeper, "asks-guest-and-waits"))
            self.was_asked = True
            patient = settings.keeper_timeout == INFINITY
            self.waited = Patience.PATIENT if patient else Patience.TIMED
        return self._helper(stopper) if stopper else None

    def _line(self, line: StopLine) -> tuple[Outcome | None, bool]:
        """Simulate one line. Return the outcome if the stop ends in this line, and whether systemd
        continues with the next line."""
        settings, program = self.settings, self.assumed.program
        title = f"ExecStop={line.shown}"
        if not line.is_understood and program is UnknownProgram.FAILS:
            self.steps.append(StopStep(title, "fails"))
            return None, line.ignores_failure
        if (
            self.assumed.helper_fails
            and settings.goes_on_without_helper
            and line.has(ActKind.HELPER)
        ):
            self.steps.append(StopStep(title, "fails"))
            return None, line.ignores_failure
        for each in self._assumed_acts(line.acts):
            # Of the acts before `||`, assume that only waiting can fail.
            if each.if_failed and self.steps and self.steps[-1].does != ActKind.WAITS:
                continue
            self.steps.append(StopStep(title, each.kind.value))
            match each.kind:
                case ActKind.HELPER if settings.helper is not Helper.INEFFECTIVE:
                    return self._helper(""), True
                case ActKind.ASKS:
                    self.was_asked = True
                case ActKind.SLEEPS:
                    self._wait(Patience.TIMED)
                    if each.usec >= settings.timeout:
                        return None, False
                case ActKind.WAITS:
                    if self._wait_for_end(each.usec):
                        return None, False
                case ActKind.TERMINATES:
                    self.exiting = True
                case ActKind.KILLS:
                    patience = max(self.waited, Patience.NONE)
                    return Outcome(patience, patience, tuple(self.steps)), True
        return None, True

    def _wait(self, patience: Patience) -> None:
        if self.was_asked:
            self.waited = max(self.waited, patience)

    def _wait_for_end(self, usec: int) -> bool:
        """Record that a line waits. Return whether TimeoutStopSec= ends this wait."""
        timeout = self.settings.timeout
        endless = timeout == INFINITY and usec == INFINITY
        self._wait(Patience.PATIENT if endless else Patience.TIMED)
        return usec >= timeout and not endless

    def _assumed_acts(self, acts: Iterable[Act]) -> Iterable[Act]:
        for each in acts:
            if each.kind is not ActKind.UNKNOWN:
                yield each
                continue
            match self.assumed.program:
                case UnknownProgram.ASKS:
                    yield from act(ActKind.ASKS)
                case UnknownProgram.ASKS_AND_WAITS:
                    yield from (*act(ActKind.ASKS), *act(ActKind.WAITS))
                case UnknownProgram.TERMINATES:
                    yield from act(ActKind.TERMINATES)
                case UnknownProgram.KILLS:
                    yield from act(ActKind.KILLS)
                case UnknownProgram.HANGS:
                    yield from act(ActKind.WAITS)

    def _helper(self, by: str) -> Outcome:
        if by:
            self.steps.append(StopStep(by, ActKind.HELPER.value))
        settings = self.settings
        patient = Patience.TIMED
        is_timed = settings.helper is Helper.KILLS or (
            settings.helper is Helper.TIMED and settings.is_cut
        )
        if by or not is_timed:
            patient = Patience.PATIENT
        guest = self.waited
        if self.assumed.can_ask and not self.exiting:
            guest = max(guest, patient)
        return Outcome(guest, patient, tuple(self.steps))

    # ---- systemd's own signals ----

    def _signals(self) -> Outcome:
        settings, number = self.settings, self.settings.kill_signal
        if settings.kill_mode == "none":
            return self._leave()
        if settings.kills_on_timeout and self.waited is Patience.TIMED:
            return self._end(self.waited, self.waited, "systemd", "kills")
        reached = settings.kill_mode == "control-group" or settings.main_is_qemu
        if not reached:
            return self._main_alone()
        self.steps.append(StopStep(f"KillSignal={_name(number)}", "signals"))
        if number in POLITE or (self.exiting and number in IGNORED):
            return self._flush()
        if number in IGNORED:
            return self._silence()
        # This signal kills a guest that is still shutting down, so only the earlier waiting
        # matters. A guest that has exited before this signal loses nothing.
        return Outcome(self.waited, self.waited, tuple(self.steps))

    def _main_alone(self) -> Outcome:
        """Simulate KillMode=process or mixed for a main process that is not QEMU."""
        settings = self.settings
        self.steps.append(
            StopStep(f"KillSignal={_name(settings.kill_signal)}", "signals-main-process")
        )
        wrapper = self.assumed.wrapper
        if settings.kill_signal in IGNORED:
            return self._silence()
        if wrapper is Wrapper.PASSES_ON:
            return self._flush()
        if wrapper is Wrapper.ASKS:
            self.was_asked = True
            self._wait(Patience.TIMED if settings.is_cut else Patience.PATIENT)
            return self._flush()
        if settings.kill_mode == "mixed" and settings.sends_sigkill:
            return self._end(self.waited, self.waited, "SendSIGKILL=", "kills")
        return self._leave()

    def _flush(self) -> Outcome:
        """Simulate that QEMU is asked to exit."""
        if not self.settings.is_cut:
            return Outcome(self.waited, Patience.PATIENT, tuple(self.steps))
        limit = format_usec(self.settings.timeout)
        return self._end(self.waited, Patience.TIMED, f"SIGKILL after {limit}", "kills")

    def _silence(self) -> Outcome:
        """Simulate a signal that QEMU ignores. A guest that was asked to shut down can do so until
        systemd sends SIGKILL."""
        if not self.settings.is_cut:
            self._wait(Patience.PATIENT)
            return Outcome(self.waited, Patience.PATIENT, tuple(self.steps))
        self._wait(Patience.TIMED)
        limit = format_usec(self.settings.timeout)
        return self._end(self.waited, self.waited, f"SIGKILL after {limit}", "kills")

    def _leave(self) -> Outcome:
        """Simulate that systemd leaves the guest running."""
        if self.occasion is not Occasion.SHUTDOWN:
            patience = Patience.UNTOUCHED if self.settings.outlives else self.waited
            return self._end(patience, patience, "systemd", "leaves")
        # systemd-shutdown sends SIGTERM to all processes, and SIGKILL after DefaultTimeoutStopSec=.
        return self._end(self.waited, Patience.TIMED, "systemd-shutdown", "signals-and-kills")

    def _end(self, guest: Patience, disks: Patience, by: str, does: str) -> Outcome:
        return Outcome(guest, disks, (*self.steps, StopStep(by, does)))

    def _on_storage(self, end: Outcome) -> Outcome:
        """Lower an outcome if the storage may disappear before the guest exits."""
        settings = self.settings
        if end.disks is Patience.UNTOUCHED:
            return end
        if self.occasion is Occasion.SHUTDOWN and settings.storage_goes_first:
            step = StopStep("storage", "may-be-gone-first")
            return Outcome(end.guest, Patience.NONE, (*end.steps, step))
        if settings.unordered_server and self.occasion is not Occasion.RESTART:
            # If systemd signals QEMU and the server at the same time, QEMU usually exits first. If
            # a line or another unit stops QEMU, that takes longer, so the server may exit first.
            prompt = not settings.lines and not settings.guard and not settings.guests_service
            disks = min(end.disks, Patience.TIMED if prompt else Patience.NONE)
            return Outcome(
                end.guest, disks, (*end.steps, StopStep("storage", "may-stop-meanwhile"))
            )
        return end


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def outcomes(settings: StopSettings) -> dict[Occasion, Outcome]:
    return {occasion: worst(settings, occasion) for occasion in Occasion}


def worse_occasions(
    after: StopSettings, before: StopSettings, occasions: Sequence[Occasion] = tuple(Occasion)
) -> tuple[Occasion, ...]:
    """Return the occasions on which `after` keeps less than `before` under at least one
    assumption."""
    worse = []
    for occasion in occasions:
        pairs = (
            (stop(after, occasion, assumed), stop(before, occasion, assumed))
            for assumed in assumptions(after, before)
        )
        if not all(new >= old for new, old in pairs):
            worse.append(occasion)
    return tuple(worse)
