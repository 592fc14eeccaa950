"""Compare a run with its truth. Find what was wrong, and whether the run can be judged at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qkilld.decision.waits import server_depth
from qkilld.model.constants import USEC_PER_SEC, Verdict
from qkilld.model.sample import Sample
from qkilld.model.trace import Trace, VerdictRecord, decode
from tests.campaign.run import Outcome
from tests.campaign.spec import Change, Disk, Spec
from tests.campaign.truth import BOUNDED, RETRY_S, RIGHT, Span, State, Truth, truth

LATE_S: Final = 0.5
"""If a sample is later than this, the run is not judged, because the host was too busy."""
INTERVAL_S: Final = 1.0
"""The longest interval between samples, except with many jobs."""
COUNTER_STALL_S: Final = 10.0
DETECTION_S: Final = 1.0
"""SIGKILL must be sent within this time after the policy's limit."""
SETTLED_S: Final = 6.0 + 1.1
"""For this time after a change, the verdict from before the change is right, too: disks write back
in bursts up to 5 s apart, and the next sample may come a second later."""
_BEFORE: Final = 0.3
"""SIGKILL may be this much too early by the lab's clock, because changes of storage take effect
just before they are recorded."""
_SLOW_REQUEST: Final = 1.0
"""The longest time (s) that a request takes if the storage has slowness 1: two writes of 128 KiB,
each answered after 0.25 s, and a sync before and after. So a standstill may begin up to this
much later than the last movement."""
_QUOTA_S: Final = 2.0
"""If QEMU has a quota of processor time, it reads the last answers of its storage up to this much
later."""
FOUND_S: Final = 2.0
"""qkilld has found the servers this long (s) after the start of the job. If one ends before that,
qkilld may not know that it served the guest."""
MAX_DEPTH: Final = 9
_BYTES: Final = 512
"""The minimum number of bytes that count as a write of QEMU. Fewer bytes are a keepalive."""


FALSE_KILL: Final = "false kill"
FALSE_WAIT: Final = "false wait"
WRONG_RISK: Final = "wrong risk"
WRONG_VERDICT: Final = "wrong verdict"
UNEXPECTED: Final = "unexpected end"
"""The result of a case written by hand is wrong."""
UNSEEN: Final = "unseen error"
"""QEMU dropped records that the storage refused, and exited with 0 without a message, so qkilld
cannot know of the loss. Such a run is counted, but is not wrong."""


@dataclass(frozen=True)
class Finding:
    kind: str
    text: str


@dataclass
class Judgement:
    findings: list[Finding]
    late: float
    """The greatest delay of a sample, s."""
    detection: float | None
    """For a correct SIGKILL: how long (s) it came after the policy's limit, which counts from the
    last progress."""
    ticks: int
    right_ticks: int
    """The number of right verdicts. `ticks` is the number of all verdicts that were checked."""
    counter_kill: float
    """The time (s) at which a policy that only reads wchar would have sent SIGKILL."""

    @property
    def right(self) -> bool:
        return all(finding.kind == UNSEEN for finding in self.findings)

    @property
    def too_late(self) -> bool:
        return self.late > LATE_S


def judge(spec: Spec, outcome: Outcome) -> Judgement:
    found = truth_of(spec, outcome)
    trace = decode(Path(outcome.trace).read_text()) if outcome.trace else None
    killed = kill_time(outcome)
    end = killed if killed is not None else outcome.seconds - outcome.delay
    findings = [
        *_kill(found, outcome, killed),
        *_wait(found, outcome, killed, end, trace),
        *_risk(found, outcome, killed),
    ]
    wrong, ticks = _verdicts(found, trace, end)
    findings += [
        Finding(WRONG_VERDICT, f"{verdict} at {at:.1f} s ({count} ticks) while {state.value}")
        for (verdict, state), (at, count) in wrong.items()
    ]
    return Judgement(
        findings,
        _lateness(trace, found, end),
        _detection(found, killed),
        ticks,
        ticks - sum(count for _, count in wrong.values()),
        _counter_kill(trace),
    )


def truth_of(spec: Spec, outcome: Outcome) -> Truth:
    """Return the truth of a run. Its times count from the start of the job, as qkilld's times
    do."""
    return truth(spec, [(at - outcome.delay, change) for at, change in outcome.applied])


def kill_time(outcome: Outcome) -> float | None:
    """Return the time (s) at which SIGKILL was sent; None if it was not sent."""
    for _, number, at in outcome.receipt.get("rungs", ()):
        if number == "SIGKILL":
            return float(at) / USEC_PER_SEC
    return None


def _early(found: Truth, span: Span) -> float:
    """Return by how many seconds SIGKILL may precede the policy's limit."""
    before = [other for other in found.spans if other.until == span.since]
    if not any(other.state in (State.SLOW, State.GAPS) for other in before):
        return _BEFORE
    levels = [change.value for change in found.spec.changes if change.what == "slow"]
    delays = [change.value for change in found.spec.changes if change.what == "hang"]
    return max([_SLOW_REQUEST * level for level in levels] + delays, default=_BEFORE)


def rightly_killed(found: Truth, at: float) -> Span | None:
    """Return the span that justifies a SIGKILL at that time; None if no span does."""
    for span in found.spans:
        if span.state in BOUNDED and span.since <= at < span.until + LATE_S:
            stood = found.looked(found.stands_since(span), at)
            if stood >= found.earliest_kill(span) - _early(found, span):
                return span
    return None


def _kill(found: Truth, outcome: Outcome, killed: float | None) -> Iterator[Finding]:
    if killed is not None and rightly_killed(found, killed) is None:
        span = found.at(killed)
        stood = f" for {found.looked(span.since, killed):.1f} s" if span.state in BOUNDED else ""
        lost = f", {outcome.lost} of {outcome.records} records lost" if outcome.lost else ""
        yield Finding(FALSE_KILL, f"at {killed:.1f} s, while {span.state.value}{stood}{lost}")


def _wait(
    found: Truth, outcome: Outcome, killed: float | None, end: float, trace: Trace | None
) -> Iterator[Finding]:
    """Find false waits: the job waited too long after the last movement, or while nothing kept QEMU
    from exiting."""
    for span in found.spans:
        since, until = span.since, min(span.until, end)
        allowed = found.spec.longest_stall + DETECTION_S + LATE_S + _starved(found.spec)
        if span.state in (State.BROKEN, State.FAST):
            # Allow time for QEMU to find a server that is back.
            allowed += RETRY_S
        elif span.state not in BOUNDED or since >= end or (span.mixed and not span.reconnects):
            continue
        elif any(other.reconnects for other in found.spans):
            since = _last_moved(trace, found.stands_since(span), until)
        waited = found.looked(since, until)
        if waited > allowed:
            how = "killed" if killed is not None else outcome.result
            text = f"{span.state.value} from {since:.1f} s on"
            policy = f"{found.spec.longest_stall:.0f} s"
            yield Finding(FALSE_WAIT, f"{text}, {how} after {waited:.1f} s, not {policy}")
            return


def _starved(spec: Spec) -> float:
    return _QUOTA_S if "quota" in spec.noises else 0.0


def _last_moved(trace: Trace | None, since: float, until: float) -> float:
    """Return the time of QEMU's last write or read between these times; `since` if none."""
    moved, before = since, None
    for sample in trace.of(Sample) if trace else ():
        at = (sample.at - trace.header.started) / USEC_PER_SEC if trace else 0.0
        if sample.io is None:
            continue
        now = sample.io.write_bytes + sample.io.read_bytes
        now += sum((socket.acked or 0) + (socket.received or 0) for socket in sample.sockets or ())
        if before is not None and abs(now - before) >= _BYTES and since < at <= until:
            moved = at
        before = now
    return moved


def _detection(found: Truth, killed: float | None) -> float | None:
    span = rightly_killed(found, killed) if killed is not None else None
    if span is None or killed is None or span.state is not State.STILL or span.mixed:
        return None
    return found.looked(span.since, killed) - found.spec.storage_stall


def _risk(found: Truth, outcome: Outcome, killed: float | None) -> Iterator[Finding]:
    lost = f"{outcome.lost} of {outcome.records} records"
    if outcome.bitmap_lost:
        lost += " and the bitmap"
    if outcome.result == "running":
        return
    something = outcome.lost > 0 or outcome.bitmap_lost
    broken = any(span.state is State.BROKEN for span in found.spans)
    end = outcome.seconds - outcome.delay
    left = [(at - outcome.delay, change) for at, change in outcome.applied if _ends_server(change)]
    if outcome.result == "exited" and not outcome.at_risk:
        for at, change in left:
            if FOUND_S < at < end - LATE_S and _is_followed(found.spec.disks[change.of]):
                text = f"a server ended at {at:.1f} s, {lost} lost, and no data at risk"
                yield Finding(WRONG_RISK, text)
                return
    if something and broken and not outcome.at_risk:
        yield Finding(UNSEEN, f"{lost} lost to errors of the storage, and no data at risk")
    elif something and not outcome.at_risk:
        yield Finding(WRONG_RISK, f"{lost} lost, {outcome.result}, and no data at risk")
    elif killed is not None and not outcome.at_risk and _owes(found.spec):
        yield Finding(WRONG_RISK, "killed with writes outstanding, and no data at risk")
    known = something or broken or any(at < end for at, _ in left)
    if outcome.at_risk and outcome.result == "exited" and not known:
        yield Finding(WRONG_RISK, "exited and lost nothing, but data at risk")


def _ends_server(change: Change) -> bool:
    return change.of >= 0 and change.what == "leave"


def _is_followed(disk: Disk) -> bool:
    """Return whether the end of the disk's server must be reported, whatever QEMU does. If the
    connection is TCP, the kernel may prove that QEMU had closed it before."""
    is_named = disk.syntax not in ("added", "mirror")
    is_local = disk.kind == "nbd" and disk.transport != "tcp"
    return is_named and (is_local or (disk.kind == "file" and disk.store == "fuse"))


def _owes(spec: Spec) -> bool:
    return any(disk.kind != "vhost" for disk in spec.disks)


def _verdicts(
    found: Truth, trace: Trace | None, end: float
) -> tuple[dict[tuple[str, State], tuple[float, int]], int]:
    """Return the wrong verdicts, as (verdict, state) → (first time, count), and the number of
    verdicts that were checked."""
    wrong: dict[tuple[str, State], tuple[float, int]] = {}
    ticks = 0
    settles = SETTLED_S + _starved(found.spec)
    for at, verdict in verdicts(trace):
        settled = all(not 0 <= at - changed < settles for changed in (0.0, *found.changes))
        if not 0 <= at < end - 0.1 or not settled:
            continue
        span = found.at(at)
        if span.mixed or span.state not in RIGHT:
            continue
        ticks += 1
        if verdict not in _right(found.spec, span.state):
            key = (verdict.value, span.state)
            first, count = wrong.get(key, (at, 0))
            wrong[key] = (first, count + 1)
    return wrong, ticks


def _right(spec: Spec, state: State) -> frozenset[Verdict]:
    """Return the right verdicts. If the storage is unreadable, the verdict may be unknown, but
    never idle."""
    unread = {"threads", "netns"} & set(spec.noises)
    unread |= {disk.syntax for disk in spec.disks} & {"added", "mirror"}
    # If a server has other clients, qkilld may not see for whom it works.
    unknown = {Verdict.UNKNOWN} if (unread and state in BOUNDED) or spec.doubtful else set()
    return RIGHT[state] | unknown


def verdicts(trace: Trace | None) -> Iterator[tuple[float, Verdict]]:
    """Yield the verdict at each sample of a trace."""
    if trace is None:
        return
    turns: Sequence[VerdictRecord] = trace.of(VerdictRecord)
    for sample in trace.of(Sample):
        known = [turn.verdict for turn in turns if turn.at <= sample.at]
        if known and known[-1] not in (Verdict.GONE, Verdict.ZOMBIE):
            yield (sample.at - trace.header.started) / USEC_PER_SEC, known[-1]


def _counter_kill(trace: Trace | None) -> float:
    """Return the time (s) at which the policy `wchar` of tests.safety would have sent SIGKILL.
    Assume that its counter does not change after the end of the trace."""
    moved, before = 0.0, None
    for sample in trace.of(Sample) if trace else ():
        at = (sample.at - trace.header.started) / USEC_PER_SEC if trace else 0.0
        if at - moved >= COUNTER_STALL_S:
            break
        if sample.io is not None and sample.io.wchar != before:
            moved, before = at, sample.io.wchar
    return moved + COUNTER_STALL_S


def _lateness(trace: Trace | None, found: Truth, end: float) -> float:
    if trace is None:
        return 0.0
    times = [(sample.at - trace.header.started) / USEC_PER_SEC for sample in trace.of(Sample)]
    times = [0.0, *(at for at in times if at <= end), end]
    gaps = [found.looked(one, other) for one, other in itertools.pairwise(times)]
    return max(0.0, max(gaps) - INTERVAL_S, _search(trace, found) - INTERVAL_S)


def _search(trace: Trace, found: Truth) -> float:
    """Return how long the search for a server took (s). On a busy host, it takes long.

    Everything that the server did before it was found may count as progress, and delay SIGKILL.
    """
    returns = any(change.what == "back" for change in found.spec.changes)
    first: dict[int | str, float] = {}
    depths: dict[int | str, int] = {}
    longest = 0.0
    for sample in trace.of(Sample):
        at = sample.at / USEC_PER_SEC
        for socket in sample.sockets or ():
            begun = first.setdefault(socket.inode, at)
            # A client that QEMU serves may connect to others at any time.
            alone = returns or socket.accepted
            depth = min(server_depth(socket.peer), 1 if alone else MAX_DEPTH)
            if depth > depths.get(socket.inode, 0):
                depths[socket.inode] = depth
                longest = max(longest, at - begun)
        for mount in sample.mounts or ():
            begun = first.setdefault(mount.number, at)
            depth = max(map(server_depth, mount.servers or ()), default=0)
            if depth > depths.get(mount.number, 0):
                depths[mount.number] = depth
                longest = max(longest, at - begun)
    return longest
