"""What is being waited for, in one line for `systemctl status`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qkilld.engine.events import VERDICTS_IN_WORDS
from qkilld.model.jobview import JobView, known, label, verdict_of
from qkilld.model.words import Phase

NAMED: Final = 3
"""Of several guests so many are told of."""


def status(views: Sequence[JobView], now: int) -> str:
    """Of the jobs that run; `now` is CLOCK_MONOTONIC, µs."""
    if not views:
        return "Asking for the guest to be stopped"
    if len(views) == 1:
        return f"Stopping {_standing(views[0], now)}"
    told = "; ".join(_standing(view, now) for view in views[:NAMED])
    more = f"; and {len(views) - NAMED} more" if len(views) > NAMED else ""
    return f"Stopping {len(views)} guests: {told}{more}"


def _standing(view: JobView, now: int) -> str:
    said = [f"{label(view.pid, view.name)}, which {VERDICTS_IN_WORDS[verdict_of(view.verdict)]}"]
    for key, words in (("BytesWritten", "written"), ("BytesPending", "to go")):
        if (count := known(view.properties[key])) is not None:
            said.append(f"{megabytes(count)} {words}")
    if outlook := view.outlook(now):
        if view.held:
            outlook += " until `qkillctl release`"
        elif view.phase == Phase.TERMINATE:
            outlook += " unless it moves"
        said.append(outlook)
    return ", ".join(said)


def megabytes(count: int) -> str:
    """`12.3 MB`; MB are 10^6 bytes."""
    return f"{count / 1e6:.1f} MB"
