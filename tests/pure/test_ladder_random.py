"""Made-up stops: SIGKILL comes neither while something moves nor much later than it must."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace

import pytest

from qkilld.decision.ladder import Action, JobFacts, decide, kill_due
from qkilld.decision.verdict import assess
from qkilld.engine.snapshot import Snapshot, decode
from qkilld.model.constants import Flag
from qkilld.model.job import Control, Request
from qkilld.model.policy import Policy
from qkilld.model.sample import Device, Sample
from tests.engine.conftest import make_guest
from tests.pure.test_verdict import FDATASYNC, FULL_PIPE, IDLE, SERVER, S, served

POLICY = Policy()
STALL, STORAGE_STALL, GRACE = 10, 60, 10
END = 2_400
FORCE = Flag.FORCE


@dataclass
class Stop:
    """One made-up stop. All times are in seconds, and SIGTERM was sent at 0."""

    random: random.Random
    facts: JobFacts
    requests: int = 1_000
    """How many requests the disk has completed."""
    work: int = 0
    """The amount of work that a server with other clients has done."""
    seen_at: int = -1
    """The first of the last samples that all showed the wait for the disk; -1 if the last useful
    sample did not show it."""
    moved_at: int | None = None
    """When such a sample last showed a completed request."""
    shown: int = 0
    """`requests` in the last useful sample."""
    delayed_until: int = 0
    """When the last hold, extension, action or gap ended."""
    unsampled: int = 0
    """The time without samples since `delayed_until` or the last progress."""
    deadline: int = 0
    """The deadline (µs) according to the last useful sample."""
    protected_until: int = 0
    """If a wait began or ended after SIGKILL was due: when its time is over."""
    waits: bool | None = None
    """Whether the last useful sample showed a wait; None if it is unknown."""
    useful_at: int = 0
    """The time of the last useful sample."""
    told: list[str] = field(default_factory=list)
    """What was made up, for the message of a failed check."""

    def sample(self, kind: str) -> Sample:
        disk = (Device("8:0", "sda", self.requests, 0, 0, 1),)
        base = replace(IDLE, devices=disk)
        match kind:
            case "disk" | "moving":
                return replace(base, threads=(FDATASYNC,))
            case "pipe":
                return replace(base, threads=(FULL_PIPE,))
            case "unread":
                return replace(base, sockets=None)
            case "starved":
                return replace(base, running=1, cpu=self.work)
            case "server":
                peer = replace(SERVER, shared=True, switches=1_000 + self.work)
                return replace(base, switches=100 + self.work, **served(peer))
            case "useless":
                return Sample(0, "?")
            case "missed":
                return Sample(0, "?", missed=True)
        return base

    def look(self, now: int, kind: str) -> Action:
        """Take one sample, decide, and check the decision."""
        self.work += self.random.random() < 0.5
        if kind == "moving":
            self.requests += 1
        sample = replace(self.sample(kind), at=now * S)
        self.protect(now, kind)
        evidence = assess(self.facts.assessment, sample)
        is_useful = kind not in ("useless", "missed")
        if is_useful and kind in ("disk", "moving"):
            if self.seen_at < 0:
                self.seen_at = now
            elif self.requests != self.shown:
                self.moved_at = now
        elif is_useful:
            self.seen_at, self.moved_at = -1, None
        if is_useful:
            self.shown = self.requests
        if kind == "missed":
            self.unsampled += 1
        self.facts = replace(self.facts, assessment=evidence)
        decision = decide(self.facts, now * S)
        self.facts = replace(self.facts, promise=decision.promise or self.facts.promise)
        if evidence.progress_at == now * S:
            self.unsampled = 0
        if is_useful:
            assert decision.deadline >= self.deadline, (now, kind, self.told)
            self.deadline = decision.deadline if not self.facts.control.held else 0
        if decision.action is Action.KILL:
            self.check_not_early(now, kind)
        self.check_not_late(now, decision.action, kind)
        return decision.action

    def protect(self, now: int, kind: str) -> None:
        """Note whether a wait has begun or ended after SIGKILL was due."""
        if kind in ("useless", "missed"):
            return
        waits = None if kind in ("unread", "starved") else kind != "idle"
        known = self.facts.assessment is not None and self.waits is not None and waits is not None
        if known and waits is not self.waits and kill_due(self.facts) <= self.useful_at * S:
            self.protected_until = now - 1 + (STORAGE_STALL if waits else STALL)
        elif waits is not self.waits:
            self.protected_until = 0
        self.waits, self.useful_at = waits, now

    def check_not_early(self, now: int, kind: str) -> None:
        moved = self.moved_at
        assert moved is None or now - moved >= STORAGE_STALL, (now, moved, kind, self.told)
        assert now >= max(GRACE, self.protected_until), (now, kind, self.told)

    def check_not_late(self, now: int, action: Action, kind: str) -> None:
        """At the latest, SIGKILL follows this long after the last progress or delay. Useless
        samples delay it by at most StorageStallSec=."""
        evidence = self.facts.assessment
        assert evidence is not None
        progress = (evidence.progress_at or 0) // S
        latest = max(progress, self.delayed_until) + 5 * STORAGE_STALL + STALL + self.unsampled
        if kind not in ("useless", "missed") and action is not Action.KILL:
            assert now <= latest + STORAGE_STALL + 2, (now, progress, self.delayed_until, self.told)

    def restart(self, now: int) -> None:
        """Continue in the next daemon."""
        snapshot = Snapshot.of_signals(make_guest(), Request(FORCE), POLICY, number=1, started=0)
        snapshot = replace(snapshot, assessment=self.facts.assessment, promise=self.facts.promise)
        again = decode(json.loads(json.dumps(snapshot.to_json())))
        self.facts = replace(
            self.facts, assessment=again.assessment_at(now * S), promise=again.promise
        )


KINDS = ("idle", "disk", "moving", "pipe", "unread", "starved", "server", "useless", "missed")
UNSURE = ("idle", "pipe", "unread", "starved", "server", "useless")


def run(seed: int) -> None:
    """Make up one stop until SIGKILL. From some time on, nothing changes any more."""
    rand = random.Random(seed)
    stop = Stop(rand, JobFacts(flags=FORCE, policy=POLICY, started=0, term_at=0))
    some = rand.sample(KINDS, 3), rand.sample(UNSURE, 2), ("idle", rand.choice(UNSURE))
    kinds = rand.choice((KINDS, UNSURE, *some))
    lengths = rand.choice(((1, 2), (1, 6), (1, 12), (1, 80)))
    events = rand.random() < 0.6
    quiet_at = rand.choice((50, 200, 700, END))
    now, until, kind, held = 0, 0, "idle", 0
    while now < END + 600:
        now += 1
        if now >= quiet_at:
            if until != END * 9:
                kind, until = rand.choice(("idle", "disk", "pipe")), END * 9
                stop.told.append(f"{now}: {kind} to the end")
        elif now >= until:
            kind, until = rand.choice(kinds), now + rand.randint(*lengths)
            stop.told.append(f"{now}: {kind}")
        if events and now < quiet_at and rand.random() < 0.01:
            event = rand.choice(("gap", "restart", "hold", "extend", "yank", "continue"))
            stop.told.append(f"{now}: {event}")
            length = rand.choice((3, 30, 400))
            if event in ("gap", "restart"):
                now += length
                if event == "restart":
                    stop.restart(now)
            elif event == "hold":
                held = now + length
            elif event == "extend":
                later = max(stop.facts.control.not_before, (now + length) * S)
                control = replace(stop.facts.control, not_before=later)
                stop.facts = replace(stop.facts, control=control)
            elif event == "yank":
                stop.facts = replace(stop.facts, yank_at=now * S)
            else:
                stop.facts = replace(stop.facts, continued_at=now * S)
            stop.delayed_until = max(stop.delayed_until, now + length)
            stop.unsampled = 0
        was_held = stop.facts.control.held
        control = Control(held=now < held, not_before=stop.facts.control.not_before)
        if was_held and not control.held:
            stop.deadline = 0
        stop.facts = replace(stop.facts, control=control)
        if stop.look(now, kind) is Action.KILL:
            quiet = max(quiet_at, stop.delayed_until)
            assert now <= quiet + STORAGE_STALL + 2, (now, quiet_at, stop.told)
            return
    raise AssertionError(("no SIGKILL", stop.told))


@pytest.mark.parametrize("seed", range(30))
def test_made_up_stops(seed: int) -> None:
    run(seed)
