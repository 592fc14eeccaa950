"""The command trace: a live look at a guest, a line for each change. Stops nothing."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, Final, Self

from qkilld.ctl.session import Session
from qkilld.ctl.targets import Resolver, Target
from qkilld.model.errors import NoSuchProcess, NotQemu
from qkilld.model.jobview import known, label
from qkilld.model.text import printable
from qkilld.model.words import UNKNOWN, ExitCode, Verdict

INTERVAL_S: Final = 1.0
MAX_LINE: Final = 2000


@dataclass(frozen=True, slots=True)
class Look:
    """What one answer of Inspect says, as far as it changes."""

    verdict: str
    reasons: tuple[str, ...] = ()
    written: int | None = None
    """Bytes, of a counter that began before the look."""
    pending: int | None = None
    """Bytes."""

    @classmethod
    def of(cls, seen: dict[str, Any]) -> Self:
        """From the keys of Inspect; those of a newer or older daemon may lack."""
        group = seen.get("cgroup", {}) if seen.get("cgroup-own") else {}
        written = group.get("written", seen.get("io", {}).get("write_bytes"))
        return cls(
            verdict=str(seen["verdict"]),
            reasons=tuple(map(str, seen.get("reasons", ()))),
            written=written,
            pending=known(seen.get("bytes-pending", UNKNOWN)),
        )

    def since(self, first: Look) -> int | None:
        """Bytes written since then."""
        if self.written is None or first.written is None:
            return None
        return max(0, self.written - first.written)

    def line(self, first: Look) -> str:
        """In words, printable."""
        written = self.since(first)
        sizes = [
            f"{size} bytes {what}"
            for size, what in ((written, "written"), (self.pending, "pending"))
            if size
        ]
        why = "; ".join([*self.reasons, *sizes])
        return printable(f"{self.verdict}: {why}" if why else self.verdict, MAX_LINE)

    def as_json(self, first: Look, at: int) -> dict[str, Any]:
        return {
            "at_usec": at,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "bytes_written": self.since(first),
            "bytes_pending": self.pending,
        }


async def trace(session: Session, target: Target) -> int:
    """Look once a second until the guest is gone, or nobody reads any more."""
    found = await Resolver(session.manager).find(target)
    seen = await session.manager.inspect(found.pid)
    start_time = seen["start-time"]
    began = time.monotonic()
    first = before = Look.of(seen)
    if not session.json:
        session.output.line(f"{label(found.pid, str(seen['name']))}, looked at every second")
    _show(session, first, first, began)
    while not session.output.abandoned:
        await asyncio.sleep(INTERVAL_S)
        try:
            seen = await session.manager.inspect(found.pid)
        except (NoSuchProcess, NotQemu):
            break
        if seen["start-time"] != start_time:
            break
        look = Look.of(seen)
        if look != before:
            _show(session, look, first, began)
        before = look
    else:
        return ExitCode.OK
    _show(session, Look(Verdict.GONE), first, began)
    return ExitCode.OK


def _show(session: Session, look: Look, first: Look, began: float) -> None:
    elapsed = time.monotonic() - began
    if session.json:
        document = look.as_json(first, int(elapsed * 1_000_000))
        session.output.line(json.dumps(document, ensure_ascii=True))
    else:
        session.output.line(f"{elapsed:7.1f} s  {look.line(first)}")
