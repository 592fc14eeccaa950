"""Compare a unit as it is now with the unit after adoption: which data is kept at a stop, a restart
and a shutdown of the host. Give a verdict. Pure."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any, Final

from qkilld.model import timespan
from qkilld.model.constants import INFINITY
from qkilld.model.dataclass import dataclass
from qkilld.model.policy import is_qemu
from qkilld.model.unit import Command, UnitFacts
from qkilld.unitcheck.check import check
from qkilld.unitcheck.command import HELPER, is_helper
from qkilld.unitcheck.context import (
    Surroundings,
    can_ask,
    helper_in_unit,
    is_manager,
    main_is_qemu,
    may_trap,
    outlives,
    runs_container,
    started_qemus,
    starts_elsewhere,
    stop_lines,
    traps,
)
from qkilld.unitcheck.dropin import FILE_NAME, Change, Override, changes
from qkilld.unitcheck.execstop import has_helper, line_after_failure
from qkilld.unitcheck.finding import Finding, Line
from qkilld.unitcheck.stop_outcome import (
    Occasion,
    Outcome,
    StopSettings,
    outcomes,
    worse_occasions,
)
from qkilld.unitcheck.storage import is_ordered


class UnitVerdict(StrEnum):
    """The verdict, as in --json."""

    SAFE = "safe"
    """After adoption, every stop keeps the data that the guest's disks have acknowledged, and no
    stop keeps less data than now. If adopt would write nothing, the unit is safe already."""
    WORSE = "worse"
    """After adoption, a stop would keep less data, guests that are meant to keep running would end,
    or instances would lose settings of their own."""
    NO_BETTER = "no-better"
    """The unit is not safe, but adopt can write nothing that keeps more data."""
    UNKNOWN = "unknown"
    """It is unknown which data a stop keeps, or the unit has no known guest."""
    MANUAL = "manual"
    """After adoption, stops keep at least as much data as now. But further changes to the unit or
    to Executables= are needed, and only the owner can make them."""
    OTHER_UNIT = "other-unit"
    """The unit starts a guest that runs in another unit."""


@dataclass(frozen=True, slots=True)
class Comparison:
    word: UnitVerdict
    reason: str
    """A sentence without its full stop."""
    now: Mapping[Occasion, Outcome]
    adopted: Mapping[Occasion, Outcome]
    advice: str = ""
    """What the owner should do: a sentence without its full stop; "" for nothing."""
    other_unit: str = ""
    writes: bool = False
    """`adopt` has lines to write or a guard to start, and makes no stop worse."""
    has_guest: bool = True
    """The unit runs or would run a QEMU that qkilld recognises, and is not a manager of guests."""

    @property
    def keeps_data(self) -> bool:
        """Whether all stops keep the disks' data now."""
        return all(outcome.keeps_disks for outcome in self.now.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.word.value,
            "verdict_reason": self.reason,
            "advice": self.advice,
            "other_unit": self.other_unit or None,
            "now": {occasion.value: each.as_json() for occasion, each in self.now.items()},
            "adopted": {occasion.value: each.as_json() for occasion, each in self.adopted.items()},
        }


def compare(
    facts: UnitFacts,
    surroundings: Surroundings,
    findings: Sequence[Finding],
    overrides: Sequence[Override] = (),
    instances: Sequence[str] = (),
) -> Comparison:
    """Return the verdict. `findings`: from check(). `overrides`: the later drop-ins that override
    lines of adopt's drop-in. `instances`: the instances of a template whose own settings adopt
    would override."""
    planned_changes = changes(findings)
    after, surroundings_after = adopted(facts, surroundings, planned_changes, overrides)
    before_settings = settings_of(facts, surroundings)
    after_settings = settings_of(after, surroundings_after)
    now, then = outcomes(before_settings), outcomes(after_settings)
    comparison = Comparison(UnitVerdict.UNKNOWN, "", now, then)
    if (refused := _refused(comparison, facts, surroundings)) is not None:
        return replace(refused, has_guest=False)
    # If one drop-in replaces adopt's ExecStop= lines, the lines that other drop-ins add follow the
    # lines of that drop-in, not adopt's lines.
    replaces = any("ExecStop=" in each.keys and not each.adds_stop for each in overrides)
    adding = next((each for each in overrides if each.adds_stop and not replaces), None)
    if adding is not None:
        return replace(
            comparison,
            word=UnitVerdict.MANUAL,
            adopted=now,
            reason=f"systemd would run the ExecStop= lines of {adding.path} after those that adopt"
            " writes",
            advice=f"move them into a drop-in whose name sorts before {FILE_NAME}, run `systemctl"
            " daemon-reload`, and check it again",
        )
    worse = worse_occasions(after_settings, before_settings)
    if worse:
        return _worse(comparison, facts, surroundings, worse)
    if instances:
        shown = ", ".join(instances)
        return replace(
            comparison,
            word=UnitVerdict.WORSE,
            reason=f"a drop-in for the template would override settings of {shown} itself",
            advice=f"adopt {shown} first",
        )
    if surroundings.is_template and any(
        line.is_resolved for change in planned_changes for line in change.lines
    ):
        return replace(
            comparison,
            word=UnitVerdict.UNKNOWN,
            reason="the drop-in would repeat its ExecStop= for all instances, but systemd has other"
            " commands for the instance than the unit's files, or they cannot be read",
            advice="run `systemctl daemon-reload`, correct the lines that systemd ignores, and"
            " check it again",
        )
    rewrites = any(line.text == "ExecStop=" for each in planned_changes for line in each.lines)
    if rewrites and (skipped := line_after_failure(facts, surroundings)) is not None:
        is_known = all(line.is_understood for line in before_settings.lines)
        return replace(
            comparison,
            word=UnitVerdict.WORSE if is_known else UnitVerdict.UNKNOWN,
            reason=f"with the drop-in, {skipped.shown} of its ExecStop= would run although a line"
            " before it has failed and the guest may still run; now systemd skips it",
            advice="put a - before the lines whose failure does not matter, or the lines into one"
            " script, and check it again",
        )
    if traps(facts, surroundings) and planned_changes and not has_helper(facts):
        return replace(
            comparison,
            word=UnitVerdict.UNKNOWN,
            reason="its main process handles SIGTERM itself (`trap`) and may still work when the"
            f" guest is gone, for example copy its image; after {HELPER}, systemd would interrupt"
            " that",
            advice="if it does nothing of this kind, start QEMU without the shell around it",
        )
    changes_unit = bool(planned_changes) and not facts.is_scope
    # A safe scope gets no guard, because the guard would only send the same signals as systemd.
    starts_guard = surroundings_after.is_guarded != surroundings.is_guarded and (
        any(finding.is_unsafe for finding in findings) or not comparison.keeps_data
    )
    comparison = replace(comparison, writes=changes_unit or starts_guard)
    unsafe = [each for each in check(after, surroundings_after) if each.is_unsafe]
    if all(outcome.keeps_disks for outcome in then.values()) and not unsafe:
        reason = "every stop waits for the guest as long as it makes progress"
        return replace(comparison, word=UnitVerdict.SAFE, reason=reason)
    if any(not line.is_understood for line in after_settings.lines):
        shown = next(line.shown for line in after_settings.lines if not line.is_understood)
        return replace(
            comparison,
            word=UnitVerdict.UNKNOWN,
            reason=f"it is not known what {shown} of its ExecStop= does to the guest",
            advice=f"if {HELPER} does all that this line does, remove the line",
        )
    if unseen := _unseen(surroundings):
        return replace(comparison, word=UnitVerdict.UNKNOWN, reason=unseen)
    if any(line.by_hand for each in unsafe for line in each.fixes):
        return replace(
            comparison,
            word=UnitVerdict.MANUAL,
            reason="only its owner can decide about the remaining changes",
            advice="see the lines marked (by hand)",
        )
    if overrides:
        return replace(
            comparison,
            word=UnitVerdict.MANUAL,
            reason=f"{overrides[-1].path} overrides what adopt writes",
            advice=f"rename that file so that it sorts before {FILE_NAME}, or remove those lines"
            " from it; run `systemctl daemon-reload`, and check it again",
        )
    # A longer timeout does not change the outcomes, but it gives QEMU more time before SIGKILL.
    longer = before_settings.is_cut and after_settings.timeout > before_settings.timeout
    if longer or _keep_more(then, now):
        return replace(
            comparison,
            word=UnitVerdict.MANUAL,
            reason="with the drop-in, it keeps more of the guest's data than now, but is not safe",
            advice="to make it safe, its owner must change what the other findings are about",
        )
    return replace(
        comparison,
        word=UnitVerdict.NO_BETTER,
        reason="adopt can write nothing that keeps more of the guest's data",
        writes=False,
    )


def _unseen(surroundings: Surroundings) -> str:
    """Return why a unit that serves the guest's disks is not known; "" if all are known."""
    whys = [place.unseen for place in surroundings.storage if place.unseen]
    return f"it is not known which unit serves its disks: {whys[0]}" if whys else ""


def _keep_more(then: Mapping[Occasion, Outcome], now: Mapping[Occasion, Outcome]) -> bool:
    """Return whether, on at least one occasion, `then` keeps more of the guest's or the disks' data
    than `now`."""
    return any(not now[occasion] >= then[occasion] for occasion in Occasion)


def _refused(
    comparison: Comparison, facts: UnitFacts, surroundings: Surroundings
) -> Comparison | None:
    """Return the verdict for a manager of guests, or for a unit in which qkilld would stop no
    guest. Return None for other units."""
    if is_manager(facts, surroundings) or (outlives(facts, surroundings) and surroundings.guests):
        return replace(
            comparison,
            word=UnitVerdict.WORSE,
            reason="it manages guests that are meant to outlive it: with the drop-in, a restart or"
            " an upgrade would stop them all",
            advice="leave it as it is; qkilld-guests.service stops its guests at host shutdown",
        )
    if runs_container(facts, surroundings):
        return replace(
            comparison,
            word=UnitVerdict.WORSE,
            reason="it runs a container, which shuts down its own programs, and guests among them:"
            " with the drop-in, systemd would signal each of them at once",
            advice="leave it as it is; adopt the unit of the guest in the container",
        )
    if surroundings.guests:
        return None
    uncovered = [
        *surroundings.uncovered,
        *(path for path in started_qemus(facts) if not is_qemu(path, surroundings.executables)),
    ]
    if uncovered:
        return replace(
            comparison,
            word=UnitVerdict.MANUAL,
            reason=f"its QEMU is {uncovered[0]}, which Executables= does not cover, so {HELPER}"
            " would stop nothing",
            advice="if only root can write to that path, write into [Target] of"
            f" /etc/qkilld/qkilld.conf: {coverage_line(surroundings.executables, uncovered[0])}",
        )
    if surroundings.other_unit or starts_elsewhere(facts):
        named = f" {surroundings.other_unit}" if surroundings.other_unit else ""
        return replace(
            comparison,
            word=UnitVerdict.OTHER_UNIT,
            other_unit=surroundings.other_unit,
            reason=f"the guest that it starts runs in another unit{named}",
            advice=f"check {surroundings.other_unit}"
            if surroundings.other_unit
            else "check that unit",
        )
    if surroundings.special_instances and not started_qemus(facts):
        shown = ", ".join(surroundings.special_instances)
        return replace(
            comparison,
            reason="all running instances have settings of their own, and its ExecStart= does not"
            " show whether a QEMU will run in others",
            advice=f"check {shown} instead",
        )
    if not surroundings.are_all_seen and (surroundings.is_running or not started_qemus(facts)):
        return replace(
            comparison,
            reason="no QEMU can be seen in it, but not all of its processes can be seen",
            advice="run this as root",
        )
    if surroundings.is_running or not started_qemus(facts):
        return replace(
            comparison,
            reason="no QEMU runs in it"
            if surroundings.is_running or facts.is_scope
            else "it does not run, and its ExecStart= does not show whether a QEMU will run in it",
            advice=""
            if surroundings.is_running or facts.is_scope
            else "start it and check it again",
        )
    return None


def coverage_line(executables: Iterable[str], path: str) -> str:
    """Return the Executables= line for qkilld.conf. The line includes the current globs, because it
    replaces them."""
    return f"Executables={' '.join((*executables, path))}"


def _worse(
    comparison: Comparison, facts: UnitFacts, surroundings: Surroundings, worse: Sequence[Occasion]
) -> Comparison:
    occasions = " and ".join(_OCCASIONS[each] for each in worse)
    lines = stop_lines(facts, surroundings)
    word = UnitVerdict.WORSE
    if any(not line.is_understood for line in lines):
        shown = next(line.shown for line in lines if not line.is_understood)
        word, reason = UnitVerdict.UNKNOWN, f"it is not known what {shown} does to the guest"
    elif can_ask(facts, surroundings) is None:
        word, reason = UnitVerdict.UNKNOWN, f"it is not known whether {HELPER} can ask its guest"
    elif may_trap(facts, surroundings) and facts.kill_mode in ("mixed", "process"):
        word, reason = (
            UnitVerdict.UNKNOWN,
            "it is not known what its main process does on its KillSignal=",
        )
    elif unseen := _unseen(surroundings):
        word, reason = UnitVerdict.UNKNOWN, unseen
    elif any(place.server and not is_ordered(facts, place) for place in surroundings.storage):
        reason = "its disks are served by a process that may be stopped at the same time"
    elif not can_ask(facts, surroundings):
        reason = f"its guest is asked to shut down now, but {HELPER} cannot ask it"
    else:
        reason = "the existing ExecStop= keeps more"
    return replace(
        comparison,
        word=word,
        reason=f"with the drop-in, {occasions} could lose data that is kept now: {reason}",
        advice=_ADVICE_FOR_WORSE,
    )


_OCCASIONS: Final = {
    Occasion.STOP: "systemctl stop",
    Occasion.RESTART: "systemctl restart",
    Occasion.SHUTDOWN: "host shutdown",
}
_ADVICE_FOR_WORSE: Final = (
    f"leave it as it is, or start its guest with a monitor that {HELPER} can use (-qmp"
    " unix:PATH,server=on,wait=off) and check it again"
)


# ---- the unit after adopting ----


def settings_of(facts: UnitFacts, surroundings: Surroundings) -> StopSettings:
    unordered = [place for place in surroundings.storage if not is_ordered(facts, place)]
    return StopSettings(
        lines=stop_lines(facts, surroundings),
        kill_mode=facts.kill_mode,
        kill_signal=facts.kill_signal,
        restart_kill_signal=facts.restart_kill_signal,
        # Assume that FinalKillSignal= is SIGKILL, the worst case. adopt does not change this
        # setting.
        sends_sigkill=facts.sends_sigkill,
        timeout=facts.timeout_stop,
        kills_on_timeout=facts.timeout_failure_mode != "terminate",
        # A scope has no main process, so KillMode=process signals nothing.
        main_is_qemu=main_is_qemu(facts, surroundings) and not facts.is_scope,
        main_may_trap=may_trap(facts, surroundings),
        outlives=outlives(facts, surroundings),
        helper=helper_in_unit(facts, surroundings),
        guard=surroundings.guard if surroundings.is_guarded else "",
        keepers=tuple(keeper.unit for keeper in surroundings.keepers),
        keeper_timeout=min((keeper.timeout for keeper in surroundings.keepers), default=INFINITY),
        guests_service=surroundings.guests_service and not facts.cares_for_guests,
        unordered_server=any(place.server or place.unseen for place in unordered),
        storage_goes_first=any(not (place.server or place.unseen) for place in unordered)
        or not facts.default_dependencies,
        can_ask=can_ask(facts, surroundings),
    )


def adopted(
    facts: UnitFacts,
    surroundings: Surroundings,
    wanted: Iterable[Change],
    overrides: Sequence[Override] = (),
) -> tuple[UnitFacts, Surroundings]:
    """Return the unit as it would be after adoption: with the wanted lines, except those that are
    overridden."""
    if facts.is_scope:
        return facts, replace(surroundings, is_guarded=bool(surroundings.guard))
    ours = {key for each in overrides for key in each.keys}
    lines = [
        line
        for change in wanted
        for line in change.lines
        if f"{line.text.partition('=')[0]}=" not in ours
    ]
    after = facts
    for line in lines:
        after = _with_line(after, line)
    stops = [line for line in lines if line.text.startswith("ExecStop=")]
    written = {line.text for line in lines}
    ordered = [each.unit or each.server for each in surroundings.storage if each.line in written]
    return (
        replace(
            after,
            exec_stop=_stops_with(facts.exec_stop, stops),
            after=(*after.after, *(name for name in ordered if name)),
        ),
        surroundings,
    )


def _with_line(facts: UnitFacts, line: Line) -> UnitFacts:
    key, _, value = line.text.partition("=")
    match key:
        case "KillMode":
            return replace(facts, kill_mode=value)
        case "KillSignal":
            return replace(facts, kill_signal=int(signal.Signals[value]))
        case "RestartKillSignal":
            return replace(facts, restart_kill_signal=int(signal.Signals[value]))
        case "FinalKillSignal":
            return replace(facts, final_kill_signal=int(signal.Signals[value]))
        case "SendSIGKILL":
            return replace(facts, sends_sigkill=value == "yes")
        case "TimeoutStopSec":
            return replace(facts, timeout_stop=timespan.parse(value))
        case "TimeoutStopFailureMode":
            return replace(facts, timeout_failure_mode=value)
        case "NotifyAccess":
            return replace(facts, notify_access=value)
        case "DefaultDependencies":
            return replace(facts, default_dependencies=value == "yes")
        case "JobTimeoutSec" | "JobRunningTimeoutSec":
            return replace(facts, job_timeout=INFINITY)
        case "After":
            return replace(facts, after=(*facts.after, *value.split()))
    return facts


def _stops_with(own: Sequence[Command], lines: Iterable[Line]) -> tuple[Command, ...]:
    commands = list(own)
    for line in lines:
        value = line.text.partition("=")[2]
        path = value.lstrip("-@:+!|")
        prefixes = value[: len(value) - len(path)]
        flags = ("privileged",) if "+" in prefixes else ()
        if not value:
            commands = []
        elif line.repeats is None:
            commands.append(Command(path, (path,), "-" in prefixes, flags))
        else:
            repeated = replace(own[line.repeats], ignores_failure="-" in prefixes)
            commands.append(replace(repeated, flags=flags) if is_helper(repeated) else repeated)
    return tuple(commands)
