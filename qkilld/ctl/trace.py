"""The command trace: observe a guest live, one line for each change. Stops nothing."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Final, Self

from qkilld.ctl.session import Session
from qkilld.ctl.targets import Resolver, Target
from qkilld.model.constants import UNKNOWN, ExitCode, Verdict
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import NoSuchProcess, NotQemu
from qkilld.model.job_status import known, label
from qkilld.model.text import printable

INTERVAL_S: Final = 1.0
MAX_LINE: Final = 2000


@dataclass(frozen=True, slots=True)
class Observation:
    """The parts of a reply to Inspect that can change."""

    verdict: str
    reasons: tuple[str, ...] = ()
    written: int | None = None
    """Bytes written, including those written before the trace began."""
    pending: int | None = None
    """Bytes still to be written."""

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Self:
        """Other releases of the daemon may omit some keys."""
        group = answer.get("cgroup", {}) if answer.get("cgroup-own") else {}
        written = group.get("written", answer.get("io", {}).get("write_bytes"))
        return cls(
            verdict=str(answer["verdict"]),
            reasons=tuple(map(str, answer.get("reasons", ()))),
            written=written,
            pending=known(answer.get("bytes-pending", UNKNOWN)),
        )

    def since(self, first: Observation) -> int | None:
        if self.written is None or first.written is None:
            return None
        return max(0, self.written - first.written)

    def line(self, first: Observation) -> str:
        """Format as printable text."""
        written = self.since(first)
        sizes = [
            f"{size} bytes {what}"
            for size, what in ((written, "written"), (self.pending, "pending"))
            if size
        ]
        why = "; ".join([*self.reasons, *sizes])
        return printable(f"{self.verdict}: {why}" if why else self.verdict, MAX_LINE)

    def as_json(self, first: Observation, at: int) -> dict[str, Any]:
        return {
            "at_usec": at,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "bytes_written": self.since(first),
            "bytes_pending": self.pending,
        }


async def trace(session: Session, target: Target) -> int:
    """Inspect the guest once a second until it is gone or the output is closed."""
    process = await Resolver(session.manager).find(target)
    answer = await session.manager.inspect(process.pid)
    start_time = answer["start-time"]
    began = time.monotonic()
    first = before = Observation.of(answer)
    if not session.json:
        session.output.line(f"{label(process.pid, str(answer['name']))}, sampled every second")
    _show(session, first, first, began)
    while not session.output.abandoned:
        await asyncio.sleep(INTERVAL_S)
        try:
            answer = await session.manager.inspect(process.pid)
        except (NoSuchProcess, NotQemu):
            break
        if answer["start-time"] != start_time:
            break
        observation = Observation.of(answer)
        if observation != before:
            _show(session, observation, first, began)
        before = observation
    else:
        return ExitCode.OK
    _show(session, Observation(Verdict.GONE), first, began)
    return ExitCode.OK


def _show(session: Session, observation: Observation, first: Observation, began: float) -> None:
    elapsed = time.monotonic() - began
    if session.json:
        document = observation.as_json(first, int(elapsed * 1_000_000))
        session.output.line(json.dumps(document, ensure_ascii=True))
    else:
        session.output.line(f"{elapsed:7.1f} s  {observation.line(first)}")
