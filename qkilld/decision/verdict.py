"""Turn samples into a verdict. Pure.

`assess` folds one sample after another into an Assessment. `open_waits` (waits.py) lists what the
process waits for, and each wait has its own signs of progress. The verdict:

- zombie, stopped: the process has exited, or cannot run;
- flushing: something moved since the last sample or, if the process waits for storage, recently;
- storage-wait: the process waits for storage, and nothing moved recently;
- blocked: the process waits in a system call that is not for storage, or does not take SIGTERM;
- unknown: a source that would show waits is unreadable, the process is starved or spins, or other
  processes may have caused the movement;
- idle: the process waits for nothing.

Measurements show that no single counter is enough. During fdatasync of a full page cache, no
counter of the process moves for half a minute; only those of the disk do. While qcow2 metadata is
sent to a slow NBD server, only the number of context switches moves. A standstill does not prove a
hang: nothing moves while a server is frozen. Movement does not prove progress: timers, consoles and
other guests move counters forever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Final

from qkilld.decision.amounts import (
    NOTHING_COUNTED,
    Amounts,
    count_amounts,
    counts_of,
    pending,
    written_since,
)
from qkilld.decision.clients import has_client, is_own
from qkilld.decision.open_wait import OpenWait, calls_of, new_wait, update_wait
from qkilld.decision.signs import CACHE_NOISE, OWN_IO
from qkilld.decision.waits import (
    WaitKind,
    is_held_still,
    may_be_hidden,
    open_waits,
    tells_nothing,
)
from qkilld.model.constants import USEC_PER_SEC, Verdict
from qkilld.model.dataclass import dataclass
from qkilld.model.sample import Io, Sample

FLUSHING_FOR: Final = 6 * USEC_PER_SEC
"""Progress within this time (µs) is recent: disks write data back in bursts up to 5 s apart."""
SAMPLE_INTERVAL: Final = USEC_PER_SEC
"""The default interval of samples (µs)."""
SLACK: Final = 1_500_000
"""A sample may be this late (µs); any further delay counts as time without samples."""
LOG_LINE: Final = 32
"""A line of a log adds at least this many bytes to wchar. If wchar grows by less, only the event
loop wrote (8 to 16 bytes a second) and no log line was written. So a page that write_bytes counts
at that time does not come from a log."""
STUCK: Final = 30 * USEC_PER_SEC
"""If a certain wait (Wait.certain) has not moved for this time (µs), it may never end. Single
requests to slow servers take up to 25 s (measured)."""
DETAIL_AFTER: Final = 250_000
"""Waits older than this (µs) are sampled in detail."""

MAX_HIDDEN: Final = 256
"""At most this many hidden waits are kept."""
_NO_THREAD: Final = "the threads of qkilld are blocked by processes of other users"
_OUTSTANDING: Final = (WaitKind.STORAGE, WaitKind.EXIT, WaitKind.CALL)
_ELSEWHERE: Final = ("at", "devices", "mounts", "host", "cgroup")
"""Fields of a sample that change with time or because of other processes. These changes do not
matter while no wait has signs. The guest's own control group is compared separately."""
_READINGS: Final = attrgetter(*(f.name for f in fields(Sample) if f.name not in _ELSEWHERE))
_NEWS: Final = attrgetter(
    *("verdict", "reasons", "progress_at", "doubt_at", "outstanding", "pending", "rate"),
    *("unsampled", "written"),
)


@dataclass(frozen=True, slots=True)
class Assessment:
    """The meaning of the samples so far. Times are CLOCK_MONOTONIC in µs, sizes in bytes."""

    first: Sample
    last: Sample
    seen: Sample
    """The last usable sample, with which the next one is compared."""
    waits: tuple[OpenWait, ...]
    """The open waits in the last usable sample."""
    verdict: Verdict
    reasons: tuple[str, ...]
    """Descriptions, the most important first."""
    progress_at: int | None
    """When progress was last seen; None for never."""
    outstanding: bool | None
    """Whether the process waits for something; None if unknown."""
    outstanding_at: int | None
    """When `outstanding` was last True or None. If the process is idle in two samples, a single
    unreadable sample between them does not count."""
    pending: int | None
    """Bytes that are still to be written; None if unknown."""
    rate: int | None
    """Recent bytes per second."""
    sampled_at: int = 0
    """Time without samples is counted from this time on."""
    unsampled: int = 0
    """The total time (µs) without samples since the first sample. This time does not prove a
    standstill."""
    progress_unsampled: int = 0
    """The value of `unsampled` at `progress_at`."""
    outstanding_unsampled: int = 0
    """The value of `unsampled` at `outstanding_at`."""
    doubt_at: int | None = None
    """When a doubtful sign last moved; None for never."""
    doubt_unsampled: int = 0
    """The value of `unsampled` at `doubt_at`."""
    amounts: Amounts = NOTHING_COUNTED
    """The written amounts."""
    waiting_at: int | None = None
    """When the process last began to wait, as far as the samples showed; None for never."""
    waiting_unsampled: int = 0
    """The value of `unsampled` at `waiting_at`."""
    hidden: tuple[OpenWait, ...] = ()
    """Earlier waits that the last usable sample lacks only because something was unreadable.
    When it is readable again, they continue, so movement around that sample is not lost."""

    @property
    def may_be_outstanding(self) -> bool:
        """Whether I/O is outstanding; also True if something unreadable may hide it."""
        return self.outstanding is not False

    @property
    def wants_detail(self) -> bool:
        """Whether a wait is old enough for expensive readings, such as those of other processes."""
        waits = (*self.waits, *self.hidden)
        return any(self.last.at - wait.since >= DETAIL_AFTER for wait in waits)

    @property
    def written(self) -> int | None:
        """Bytes written since the first sample; None if unknown."""
        return written_since(self.first, self.last, self.amounts.served)

    @property
    def progress_from(self) -> int:
        """`progress_at` plus the time without samples since then; 0 for never."""
        return self._from(self.progress_at, self.progress_unsampled)

    @property
    def doubt_from(self) -> int:
        """`doubt_at` plus the time without samples since then; 0 for never."""
        return self._from(self.doubt_at, self.doubt_unsampled)

    @property
    def outstanding_from(self) -> int:
        """`outstanding_at` plus the time without samples since then; 0 for never."""
        return self._from(self.outstanding_at, self.outstanding_unsampled)

    @property
    def waiting_from(self) -> int:
        """`waiting_at` plus the time without samples since then; 0 for never."""
        return self._from(self.waiting_at, self.waiting_unsampled)

    def _from(self, at: int | None, unsampled: int) -> int:
        return 0 if at is None else at + max(0, self.unsampled - unsampled)

    def unsampled_until(self, now: int, interval: int = SAMPLE_INTERVAL) -> int:
        """Return the value that `unsampled` would have after a sample taken `now`. A later sample
        adds only the time without samples since then."""
        return self.unsampled + max(0, now - self.sampled_at - interval - SLACK)


def is_news(before: Assessment, now: Assessment) -> bool:
    """Return whether a value that callers see, or that affects a deadline, has changed."""
    return before.seen is before.first or _NEWS(before) != _NEWS(now)


def assess(
    before: Assessment | None, sample: Sample, interval: int = SAMPLE_INTERVAL
) -> Assessment:
    """Return the assessment after one more sample. `before` is None for the first sample.

    `interval`: the planned time (µs) from the last sample to this one. If this one is more than
    SLACK late, its delay beyond SLACK counts as time without samples. If this one could not be
    taken (Sample.missed), all time since the last one counts.
    """
    if before is None:
        return _first(sample)
    covered = 0 if sample.missed else interval + SLACK
    unsampled = before.unsampled + max(0, sample.at - before.sampled_at - covered)
    if tells_nothing(sample):
        return _after_useless_sample(before, sample, unsampled)
    if _is_still(before, sample):
        return _unmoved(before, sample, unsampled)
    waits, hidden, moves, doubts = _follow(before, sample)
    unwatched = _watched_late(waits, sample.at, before.progress_at or 0)
    unsampled = min(unsampled + unwatched, sample.at - before.first.at)
    outstanding = _outstanding(sample, waits)
    progress_at, progress_unsampled = before.progress_at, before.progress_unsampled
    if moves:
        progress_at, progress_unsampled = sample.at, unsampled
    outstanding_at, outstanding_unsampled = before.outstanding_at, before.outstanding_unsampled
    if outstanding is not False and not _is_passing_blindness(before, waits):
        outstanding_at, outstanding_unsampled = sample.at, unsampled
    doubt_at = sample.at if doubts else before.doubt_at
    waiting_at, waiting_unsampled = before.waiting_at, before.waiting_unsampled
    if _begins_to_wait(before, waits, outstanding):
        waiting_at, waiting_unsampled = sample.at, unsampled
    verdict, reasons = _verdict(sample, waits, moves, doubts, progress_at)
    amounts = count_amounts(before.amounts, before.first, sample)
    return Assessment(
        first=counts_of(before.first) if before.first is before.seen else before.first,
        last=sample,
        seen=sample,
        waits=waits,
        verdict=verdict,
        reasons=tuple(reasons),
        progress_at=progress_at,
        outstanding=outstanding,
        outstanding_at=outstanding_at,
        pending=pending(sample),
        rate=amounts.rate,
        sampled_at=sample.at,
        unsampled=unsampled,
        progress_unsampled=progress_unsampled,
        outstanding_unsampled=outstanding_unsampled,
        doubt_at=doubt_at,
        doubt_unsampled=unsampled if doubts else before.doubt_unsampled,
        amounts=amounts,
        waiting_at=waiting_at,
        waiting_unsampled=waiting_unsampled,
        hidden=hidden,
    )


def _begins_to_wait(
    before: Assessment, waits: Sequence[OpenWait], outstanding: bool | None
) -> bool:
    """Return whether the process waits now, but did not in the last usable sample. Most guests have
    a monitor or a connection that may owe a reply, so whether they wait is never certainly False.
    For such a guest, only a new request that is certainly in flight counts, if there was none."""
    if before.outstanding is False:
        return outstanding is not False
    if tells_nothing(before.seen):
        return False
    known = {wait.key: wait.certain for wait in (*before.waits, *before.hidden)}
    stands = any(wait.certain for wait in before.hidden) or any(
        known.get(wait.key, False) for wait in waits
    )
    return not stands and any(wait.certain and wait.key not in known for wait in waits)


def _is_passing_blindness(before: Assessment, waits: Sequence[OpenWait]) -> bool:
    """Return whether the process was idle in the previous sample, and this one shows no wait, but
    may hide one: it is useless (then `waits` is empty), has unreadable sources, has requests that
    may be timers, or shows that storage may have been added. Such a sample proves as little as a
    longer interval between samples, so it does not change `outstanding_at`."""
    return before.outstanding is False and all(wait.kind is WaitKind.UNSEEN for wait in waits)


def _is_still(before: Assessment, sample: Sample) -> bool:
    """Return whether the result stays the same, because nothing has moved in the last two samples
    and no open wait has signs.

    This check only saves time: it returns True for most idle guests, and listing their waits again
    would take three times as long as this check.
    """
    last = before.last
    return (
        before.first is not last
        and before.seen is last
        and last.at not in (before.progress_at, before.doubt_at)
        and not sample.running
        and sample.rings is not None
        and not is_held_still(sample)
        and all(wait.kind is WaitKind.UNSEEN and not wait.marks for wait in before.waits)
        and _READINGS(last) == _READINGS(sample)
        and _own_group(last) == _own_group(sample)
    )


def _own_group(sample: Sample) -> object:
    """Return the values of the process's control group or, if other processes share the group, only
    whether it is frozen."""
    group = sample.cgroup
    return group if group is None or group.own else group.frozen


def _unmoved(before: Assessment, sample: Sample, unsampled: int) -> Assessment:
    may_be_outstanding = before.outstanding is not False
    unsampled = min(unsampled, sample.at - before.first.at)
    amounts = count_amounts(before.amounts, before.first, sample)
    return Assessment(
        first=before.first,
        last=sample,
        seen=sample,
        waits=before.waits,
        verdict=before.verdict,
        reasons=before.reasons,
        progress_at=before.progress_at,
        outstanding=before.outstanding,
        outstanding_at=sample.at if may_be_outstanding else before.outstanding_at,
        pending=before.pending,
        rate=amounts.rate,
        sampled_at=sample.at,
        unsampled=unsampled,
        progress_unsampled=before.progress_unsampled,
        outstanding_unsampled=unsampled if may_be_outstanding else before.outstanding_unsampled,
        doubt_at=before.doubt_at,
        doubt_unsampled=before.doubt_unsampled,
        amounts=amounts,
        waiting_at=before.waiting_at,
        waiting_unsampled=before.waiting_unsampled,
        hidden=before.hidden,
    )


def _first(sample: Sample) -> Assessment:
    """Return the assessment of a single sample, which shows waits but no movement."""
    waits = tuple(new_wait(wait, sample.at) for wait in open_waits(sample, None))
    # A process that has begun to exit makes progress: one sample is enough to show this.
    moves = ["it has begun to exit"] if sample.exiting else []
    verdict, reasons = _verdict(sample, waits, moves, [], sample.at if moves else None)
    if verdict is Verdict.IDLE:
        verdict, reasons = Verdict.UNKNOWN, ["one sample shows no movement"]
    outstanding = _outstanding(sample, waits)
    return Assessment(
        first=sample,
        last=sample,
        seen=sample,
        waits=waits,
        verdict=verdict,
        reasons=tuple(reasons),
        progress_at=sample.at if moves else None,
        outstanding=outstanding,
        outstanding_at=None if outstanding is False else sample.at,
        pending=pending(sample),
        rate=None,
        sampled_at=sample.at,
        amounts=count_amounts(NOTHING_COUNTED, sample, sample),
    )


def _after_useless_sample(before: Assessment, sample: Sample, unsampled: int) -> Assessment:
    """Return the assessment after a useless sample. Only the present state becomes unknown."""
    is_passing = _is_passing_blindness(before, ())
    begins = before.outstanding is False
    return Assessment(
        first=before.first,
        last=sample,
        seen=before.seen,
        waits=before.waits,
        verdict=Verdict.UNKNOWN,
        reasons=(_NO_THREAD if sample.missed else "the process could not be read",),
        progress_at=before.progress_at,
        outstanding=None,
        outstanding_at=before.outstanding_at if is_passing else sample.at,
        pending=None,
        rate=before.rate,
        sampled_at=sample.at,
        unsampled=unsampled,
        progress_unsampled=before.progress_unsampled,
        outstanding_unsampled=before.outstanding_unsampled if is_passing else unsampled,
        doubt_at=before.doubt_at,
        doubt_unsampled=before.doubt_unsampled,
        amounts=before.amounts,
        waiting_at=sample.at if begins else before.waiting_at,
        waiting_unsampled=unsampled if begins else before.waiting_unsampled,
        hidden=before.hidden,
    )


def _follow(
    before: Assessment, sample: Sample
) -> tuple[tuple[OpenWait, ...], tuple[OpenWait, ...], list[str], list[str]]:
    """Return the open waits, the hidden waits, descriptions of movement since the last sample, and
    descriptions of doubtful movement."""
    if is_held_still(sample):
        # A stopped, traced or frozen process makes no progress, whatever its servers do. But if the
        # process ran briefly between two samples, its own reads and writes count.
        waits = [new_wait(wait, sample.at) for wait in open_waits(sample, None)]
        was_still = is_held_still(before.seen)
        moves = _own_moves(before.seen, sample, without_log=False) if was_still else []
        return tuple(waits), (), moves, []
    known = {wait.key: wait for wait in (*before.waits, *before.hidden)}
    waits, moves, doubts, moved, still = [], [], [], [], []
    is_others = True
    for wait in open_waits(sample, before.seen):
        old = known.pop(wait.key, None)
        followed = new_wait(wait, sample.at) if old is None else update_wait(wait, old, sample.at)
        waits.append(followed)
        if followed.moved_at == sample.at:
            moves.append(followed.moved_by)
            moved.append(wait)
            is_others = is_others and _may_be_for_others(followed)
            continue
        still.append(followed)
        if followed.doubted_at == sample.at:
            doubts.append(f"{followed.doubted_by}, which may not be progress")
    hidden = [old for old in known.values() if may_be_hidden(old.key, sample)]
    if any(one.certain and not _was_doubted(one, sample.at) for one in still):
        # One of the waits certainly prevents the exit, and does not move. So ignore doubtful
        # movement elsewhere, which would only delay SIGKILL. If this wait ends, its end counts as
        # progress.
        doubts = []
    # A hidden wait may have ended, so it does not remove doubtful movement. But as far as known, it
    # still prevents the exit.
    still += hidden
    # The thread of such a call is also listed in another wait, which shows whether it moves.
    calls = _calls_of(known.values(), sample)
    hidden += (one for one in known.values() if not calls.isdisjoint(one.calls))
    is_stuck = any(one.certain and _stands(one, sample.at) >= STUCK for one in still)
    if is_stuck and is_others:
        # A request makes no progress, and other servers do. But nothing shows that they have a
        # request of this process: they may work for themselves, or need not even be storage.
        doubts, moves = [*doubts, *(f"{move}, perhaps for others" for move in moves)], []
    if not sample.exiting:
        moves += [f"over: {old.text}" for old in known.values() if _is_over(old, sample, calls)]
    elif not before.seen.exiting:
        # Do not count calls that have ended, because the exit may have interrupted them before the
        # storage answered.
        moves.append("it has begun to exit")
    serves = is_stuck and has_client(sample)
    is_untaken = sample.term_pending is not False and any(one.holds_sigterm for one in still)
    if is_untaken or (serves and not any(is_own(wait, sample, before.seen) for wait in moved)):
        # The movement may be for others: either the guest still runs, because QEMU cannot take
        # SIGTERM yet, or an export serves a client while QEMU's main loop waits.
        doubts, moves = [*doubts, *(f"{move}, perhaps for others" for move in moves)], []
    if not any(wait.kind in _OUTSTANDING for wait in waits):
        moves += _own_moves(before.seen, sample, without_log=True)
    return tuple(waits), tuple(hidden[-MAX_HIDDEN:]), moves, doubts


def _stands(wait: OpenWait, now: int) -> int:
    """Return for how long (µs) the wait has not moved."""
    return now - max(wait.since, wait.moved_at or 0)


def _was_doubted(wait: OpenWait, now: int) -> bool:
    """Return whether the wait has moved doubtfully not long ago, so it does not prove that doubtful
    movement elsewhere is in vain: slow storages seldom move in the same sample."""
    return wait.doubted_at is not None and now - wait.doubted_at < STUCK


def _may_be_for_others(wait: OpenWait) -> bool:
    """Return whether a wait may have moved without a request of this process: only a server's own
    work was seen, or the connection's use is unknown."""
    return not wait.certain and (wait.by_server or wait.key.startswith("socket:"))


def _watched_late(waits: Sequence[OpenWait], now: int, progress_at: int) -> int:
    """Return for how long (µs) the progress of newly sampled servers may have gone unseen: since
    the wait began or since the last progress, whichever is later."""
    delays = [now - max(wait.since, progress_at) for wait in waits if wait.watched_at == now]
    return max((time for time in delays if time > SLACK), default=0)


def _is_over(wait: OpenWait, sample: Sample, calls: frozenset[str]) -> bool:
    """Return whether a wait that is no longer listed was for storage and has certainly ended; False
    if the wait may have become unreadable instead. `calls`: see _calls_of."""
    if wait.kind is not WaitKind.STORAGE:
        return False
    if wait.key.startswith("call:"):
        # The call of a thread that has not run has not ended, even if it is no longer known what
        # the thread waits for.
        return sample.threads is not None and calls.isdisjoint(wait.calls)
    return wait.key == "io_uring" and sample.rings is not None


def _calls_of(missing: Iterable[OpenWait], sample: Sample) -> frozenset[str]:
    """Return the names of the calls in the sample (calls_of) if one of the missing waits has a
    call."""
    has_calls = any(wait.calls for wait in missing)
    return calls_of(sample.threads or ()) if has_calls else frozenset()


def _own_moves(before: Sample, now: Sample, *, without_log: bool) -> list[str]:
    """Describe what the process itself has read and written between two samples.

    `without_log`: leave out a write that may be a message in QEMU's log.
    """
    if before.io is None or now.io is None:
        return []
    moves = []
    size = now.io.write_bytes - before.io.write_bytes
    if size >= OWN_IO and not (without_log and _is_log(before.io, now.io)):
        moves.append(f"it wrote {size} bytes")
    if (size := now.io.read_bytes - before.io.read_bytes) >= OWN_IO:
        moves.append(f"it read {size} bytes from disks")
    # Only wchar includes writes to tmpfs. An event loop alone writes less than OWN_IO.
    if (size := now.io.wchar - before.io.wchar) >= OWN_IO and not moves:
        moves.append(f"it passed {size} bytes to write(2)")
    return moves


def _is_log(before: Io, now: Io) -> bool:
    """Return whether the writes may be one line of a log, which write_bytes counts as a page."""
    pages, passed = now.write_bytes - before.write_bytes, now.wchar - before.wchar
    return pages <= CACHE_NOISE and LOG_LINE <= passed < OWN_IO


def _outstanding(sample: Sample, waits: Sequence[OpenWait]) -> bool | None:
    if any(wait.kind in _OUTSTANDING for wait in waits):
        return True
    # A process that wants a processor, or is unreadable, may have work left.
    return None if waits else False


def _verdict(
    sample: Sample,
    waits: Sequence[OpenWait],
    moves: list[str],
    doubts: list[str],
    progress_at: int | None,
) -> tuple[Verdict, list[str]]:
    if is_dead(sample):
        return Verdict.ZOMBIE, ["it has exited, and only its debugger or parent still holds it"]
    if obstacle := standstill(sample):
        return Verdict.STOPPED, [obstacle]
    texts = [_describe(wait, sample.at) for wait in waits if wait.kind in _OUTSTANDING]
    if sample.exiting and _is_held(waits, sample.at):
        return Verdict.STORAGE_WAIT, texts
    if moves:
        return Verdict.FLUSHING, [*moves, *texts]
    recent = progress_at is not None and sample.at - progress_at <= FLUSHING_FOR
    storage = [wait for wait in waits if wait.kind in (WaitKind.STORAGE, WaitKind.EXIT)]
    if storage and recent:
        return Verdict.FLUSHING, ["it moved recently", *texts]
    if doubts:
        return Verdict.UNKNOWN, [*doubts, *texts]
    if storage:
        return Verdict.STORAGE_WAIT, texts
    if texts:
        return Verdict.BLOCKED, texts
    if wanting := [wait.text for wait in waits if wait.kind is WaitKind.PROCESSOR]:
        return Verdict.UNKNOWN, wanting
    if unseen_texts := [wait.text for wait in waits if wait.kind is WaitKind.UNSEEN]:
        return Verdict.UNKNOWN, [f"cannot be read: {', '.join(unseen_texts)}"]
    return Verdict.IDLE, ["nothing moves and nothing is outstanding"]


def _is_held(waits: Sequence[OpenWait], at: int) -> bool:
    """Return whether an exiting process (for example after SIGKILL) cannot close its files because
    it waits for storage that has not moved recently. The start of the exit does not count."""
    waits = [wait for wait in waits if wait.key.startswith(("call:", "exit"))]
    moved = any(wait.moved_at is not None and at - wait.moved_at <= FLUSHING_FOR for wait in waits)
    return not moved and any(wait.kind is WaitKind.STORAGE for wait in waits)


def _describe(wait: OpenWait, at: int) -> str:
    if wait.moved_at is None:
        return wait.text
    return f"{wait.text}; {wait.moved_by}, {(at - wait.moved_at) // USEC_PER_SEC} s ago"


def is_dead(sample: Sample) -> bool:
    """Return whether the process has exited. The pidfd may report this later: it waits until the
    last thread is reaped, which a debugger at its prompt delays."""
    return sample.state in ("Z", "X") and sample.threads == () and not sample.exiting


def standstill(sample: Sample) -> str:
    """Explain why the process cannot do anything at all; "" if it can."""
    if sample.cgroup is not None and sample.cgroup.frozen:
        return "its control group is frozen"
    if sample.state == "t" or (sample.state == "T" and sample.tracer):
        return f"a debugger holds it (process {sample.tracer})" if sample.tracer else "traced"
    return "it is stopped (SIGSTOP)" if sample.state == "T" else ""


def can_be_continued(sample: Sample) -> bool:
    """Return whether SIGCONT would make the process run again, because only SIGSTOP has stopped
    it."""
    frozen = sample.cgroup is not None and sample.cgroup.frozen
    return sample.state == "T" and not sample.tracer and not frozen
