"""The state that is needed to continue a job in the next daemon or in another program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from signal import SIGKILL, SIGTERM, Signals
from typing import Any, Final

from qkilld.decision.amounts import counts_of
from qkilld.decision.gap import after_gap, unsampled_assessment
from qkilld.decision.ladder import Promise
from qkilld.decision.powerdown import AskMethod, Attempt
from qkilld.decision.risk import CODES_OF_KILL
from qkilld.decision.servers import SavedServer
from qkilld.decision.verdict import Assessment
from qkilld.model.block_state import NetworkStorage
from qkilld.model.codec import from_json, to_json
from qkilld.model.constants import INFINITY, Flag, GuestAsked, Phase, Result, Verdict
from qkilld.model.dataclass import dataclass
from qkilld.model.guest import Guest
from qkilld.model.job import UNCONTROLLED, Control, FlushReport, Request, Risk, Rung, VerdictChange
from qkilld.model.policy import Policy
from qkilld.model.sample import Sample

FORMAT: Final = "qkilld-job"
VERSION: Final = 13
"""Earlier versions can be read, too. Version 1 lacks `control`. Version 2 lacks `error_name`,
Identity.exiting and `risks`, and its assessment has a different format. Version 3 lacks the state
of asking a guest. Version 4 lacks the results of flushing. Version 5 may lack Label.remote.
Versions 5 to 8 may lack some fields of samples, waits and observations. Version 9 lacks `storage`
and `cut_off`. Version 11 lacks `earlier_risks`. Version 12 lacks `servers`, `promise`,
and some fields of assessments, waits and servers. Any version may lack `forced`.

If a field is added to a class of a snapshot, increase this number, and give the field a default."""
YANK: Final = "yank"
"""The action of the rung that cuts off storage."""
MAX_NUMBER: Final = 10**9 - 1
"""A job's number is part of its D-Bus path, and has at most nine digits."""


_UNKNOWN_RISK: Final = Risk("unknown", "it was killed, and the last evidence was not recorded")


class SnapshotError(ValueError):
    """The document is not a snapshot that this program can continue. The text says why, without
    quoting the document."""


class UnknownVersion(SnapshotError):
    """A newer qkilld wrote the document. Keep the document, because that version may be installed
    again."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A job at one moment. Times are CLOCK_MONOTONIC in µs, so they are valid only for one boot."""

    number: int
    guest: Guest
    request: Request
    """The first request of the job, or the one that took the job over."""
    flags: Flag
    """The flags, including those that later requests have added."""
    policy: Policy
    control: Control
    phase: Phase
    verdict: Verdict
    result: Result | None
    """None while the job runs."""
    error: str
    error_name: str
    risks: tuple[Risk, ...]
    guest_asked: GuestAsked
    flush: FlushReport
    processors_stopped: bool
    """Whether the job may have stopped the virtual processors, and must therefore start them
    again."""
    rungs: tuple[Rung, ...]
    """The executed rungs, which a resumed job does not repeat."""
    history: tuple[VerdictChange, ...]
    assessment: Assessment | None
    asking: Attempt | None
    """The state of asking the guest; None if the guest was not asked, or if the phases before
    signals are over."""
    own_chardevs: tuple[str, ...]
    """The labels of the monitor connection that systemd keeps; () if it keeps none."""
    started: int
    ended: int | None
    earlier_risks: int = 0
    """If SIGKILL was about to be sent: how many of `risks`, from the first on, are older."""
    forced: bool = False
    """Whether a caller was promised SIGKILL, whatever the ladder decides."""
    storage: NetworkStorage = NetworkStorage()
    cut_off: frozenset[str] = frozenset()
    """The names of the connections that were cut off."""
    servers: tuple[SavedServer, ...] = ()
    promise: Promise = Promise()

    @classmethod
    def of_signals(
        cls,
        guest: Guest,
        request: Request,
        policy: Policy,
        *,
        number: int,
        started: int,
        kill_at: int | None = None,
        guest_asked: GuestAsked | None = None,
        verdict: Verdict = Verdict.UNKNOWN,
        progress_at: int | None = None,
        control: Control = UNCONTROLLED,
    ) -> Snapshot:
        """Make a snapshot from properties that a caller can read (StartedUSec, Verdict,
        LastProgressUSec, Held). Assume that SIGTERM was sent at the start, and SIGKILL at `kill_at`
        if given. But if `guest_asked` is given, assume that no signal was sent. Unless the value is
        NOT_ASKED, also assume that the guest was asked at the start.

        `policy` is the job's policy, including the time spans of the request. If `progress_at` is
        None, assume that progress continues until the job is resumed.
        """
        phase = Phase.TERMINATE
        rungs = [Rung(phase, SIGTERM.name, started)]
        if guest_asked is not None:
            asks = Flag.POWERDOWN in request.flags
            phase, kill_at = (Phase.POWERDOWN if asks else Phase.QUIT), None
            was_asked = guest_asked is not GuestAsked.NOT_ASKED
            rungs = [Rung(phase, AskMethod.BUTTON.value, started)] if was_asked else []
        if kill_at is not None:
            phase = Phase.REAP
            rungs.append(Rung(Phase.KILL, SIGKILL.name, kill_at))
        assessment = None
        if progress_at is not None and guest_asked is None:
            assessment = unsampled_assessment(started, verdict, progress_at)
        return cls(
            number=number,
            guest=guest,
            request=request,
            flags=request.flags,
            policy=policy,
            control=control,
            phase=phase,
            verdict=verdict,
            result=None,
            error="",
            error_name="",
            # NOT_ASKED is also used if it is unknown whether the guest was asked.
            guest_asked=guest_asked or GuestAsked.NOT_ASKED,
            flush=FlushReport(),
            processors_stopped=False,
            risks=() if kill_at is None else (_UNKNOWN_RISK,),
            rungs=tuple(rungs),
            history=(),
            assessment=assessment,
            asking=None,
            own_chardevs=(),
            started=started,
            ended=None,
        )

    @property
    def latest(self) -> int:
        """The newest time in the snapshot."""
        return max(
            self.started,
            self.ended or 0,
            *(rung.at for rung in self.rungs),
            *(turn.at for turn in self.history),
            self.assessment.last.at if self.assessment else 0,
            (self.assessment and self.assessment.progress_at) or 0,
            _latest_of(self.asking) if self.asking is not None else 0,
        )

    @property
    def may_be_killed(self) -> bool:
        """Whether SIGKILL was about to be sent, and may have been sent."""
        return self.phase is Phase.KILL

    def without_kill(self) -> Snapshot:
        """Return the snapshot without its last rung, which is a SIGKILL that was not sent. If
        SIGKILL was forced, it stays forced."""
        known, of_kill = self.risks[: self.earlier_risks], self.risks[self.earlier_risks :]
        risks = (*known, *(risk for risk in of_kill if risk.code not in CODES_OF_KILL))
        return replace(self, phase=Phase.TERMINATE, rungs=self.rungs[:-1], risks=risks)

    def sent_at(self, signal: Signals) -> int | None:
        """Return the time at which this signal was last sent; None for never."""
        return max((rung.at for rung in self.rungs if rung.action == signal.name), default=None)

    def rung_at(self, action: str) -> int | None:
        """Return the time at which this action was last taken; None for never."""
        return max((rung.at for rung in self.rungs if rung.action == action), default=None)

    def assessment_at(self, now: int) -> Assessment | None:
        """Return the assessment at `now`. If the job is running, uses evidence and has reached the
        phases that send signals, the time since the last sample counts as a gap."""
        asking = self.phase in (Phase.POWERDOWN, Phase.QUIT)
        if asking or self.result is not None or self.flags & (Flag.FIXED | Flag.NOWAIT):
            return self.assessment
        return after_gap(self.assessment, self.started, now)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        evidence = self.assessment
        if evidence is not None:
            # Leave out the servers: they may take megabytes, and only the comparison with the next
            # sample uses them.
            evidence = replace(
                evidence,
                first=_without_servers(counts_of(evidence.first)),
                last=_without_servers(evidence.last),
                seen=_without_servers(evidence.seen),
            )
        fields = to_json(replace(self, assessment=evidence))
        return {"format": FORMAT, "version": VERSION, **fields}


def decode(document: object) -> Snapshot:
    """Decode what `to_json` returned. Raises SnapshotError."""
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise SnapshotError("it is not a saved job of qkilld")
    version = document.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise UnknownVersion("this program does not know its version")
    fields = {key: document[key] for key in document if key not in ("format", "version")}
    if version < 4:
        fields.setdefault("asking", None)
        fields.setdefault("own_chardevs", [])
    if version < 3:
        fields.setdefault("control", to_json(UNCONTROLLED))
        fields.setdefault("error_name", "")
        fields.setdefault("guest_asked", GuestAsked.NOT_ASKED.value)
        fields["rungs"] = _with_actions(fields.get("rungs"))
        # The assessment of these versions has another format. Continue as if no sample had been
        # taken.
        fields["assessment"] = None
        fields["risks"] = to_json((_UNKNOWN_RISK,) if fields.pop("data_at_risk", False) else ())
    if version < 6:
        fields["guest"] = _with_remote(fields.get("guest"))
    if version < 5:
        fields.setdefault("flush", to_json(FlushReport()))
        fields.setdefault("processors_stopped", False)
    fields.setdefault("forced", False)
    try:
        snapshot: Snapshot = from_json(Snapshot, fields, "the job", strict=version == VERSION)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(str(error)) from None
    if problem := _problem(snapshot):
        raise SnapshotError(problem)
    return snapshot


def _without_servers(sample: Sample) -> Sample:
    sockets, mounts = sample.sockets, sample.mounts
    if sockets is not None:
        sockets = tuple(replace(socket, peer=None) for socket in sockets)
    if mounts is not None:
        mounts = tuple(replace(mount, servers=None) for mount in mounts)
    return replace(sample, sockets=sockets, mounts=mounts)


def _latest_of(attempt: Attempt) -> int:
    times = [attempt.started, *(one.at for one in attempt.recent), *(o.at for o in attempt.asked)]
    times += [attempt.answered_at or 0, attempt.disk_work_at or 0]
    return max(*times, attempt.effect_at or 0, attempt.progress_at or 0)


def _with_actions(rungs: object) -> object:
    """Convert the rungs of an older version, which have signal numbers instead of names."""
    if not isinstance(rungs, list) or not all(isinstance(rung, dict) for rung in rungs):
        return rungs
    names = {number.value: number.name for number in Signals}
    return [
        {key: value for key, value in rung.items() if key != "signal"}
        | {"action": names.get(rung.get("signal"), rung.get("action"))}
        for rung in rungs
    ]


def _with_remote(guest: object) -> object:
    """Set Label.remote in a guest saved by an older version: it may have storage on a network."""
    if not isinstance(guest, dict) or not isinstance(guest.get("label"), dict):
        return guest
    return guest | {"label": {"remote": True} | guest["label"]}


def _problem(snapshot: Snapshot) -> str:
    """Describe a contradiction in the snapshot; return "" if there is none."""
    ended = snapshot.result is not None
    if not 1 <= snapshot.number <= MAX_NUMBER:
        return "the job's number is impossible"
    if snapshot.guest.identity.pid <= 0:
        return "the process id is impossible"
    if snapshot.earlier_risks < 0:
        return "the number of risks is impossible"
    if snapshot.phase is Phase.REAP and not snapshot.rungs:
        return "the job has not sent a signal"
    if not ended == (snapshot.phase is Phase.DONE) == (snapshot.ended is not None):
        return "it says both that the job has ended and that it has not"
    if not min((snapshot.started, *(rung.at for rung in snapshot.rungs))) >= 0:
        return "a time is impossible"
    promise, not_before = snapshot.promise, snapshot.control.not_before
    if snapshot.latest >= INFINITY or not 0 <= not_before <= INFINITY:
        return "a time is impossible"
    if min(promise.start, promise.unsampled) < 0 or not 0 <= promise.due <= INFINITY:
        return "a time is impossible"
    return ""
