"""Running jobs as a table, one line each, for any terminal width. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from qkilld.ctl.output import width
from qkilld.model.constants import Flag, Phase, Verdict
from qkilld.model.job_status import JobStatus, label
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.text import format_bytes, printable

if TYPE_CHECKING:
    from rich.text import Text

GAP: Final = 2
LEAST_GUEST: Final = 8
LEAST_DOING: Final = 8
LEAST_NEXT: Final = 4
_SHORT: Final = {
    "storage stands still": "storage still",
    "blocked in a call": "blocked",
    "is held still": "held still",
    "idle, does not exit": "idle",
    "is about to be asked": "to be asked",
    "was asked to shut down": "was asked",
    "cannot be asked": "not asked",
}
"""Short forms of JobStatus.doing."""
_GOOD: Final = (Verdict.FLUSHING, Verdict.GUEST_SHUTDOWN)
_BAD: Final = (Verdict.BLOCKED, Verdict.STOPPED)


class JobCells(NamedTuple):
    """The cells of one job, with short forms for a narrow terminal."""

    guest: str
    doing: str
    size: str
    rate: str
    time: str
    next: str
    short_guest: str
    short_doing: str
    short_next: str
    style: str
    """The style of `doing`, in the syntax of the rich library."""
    urgent: bool
    """Whether the job has FORCE, and `next` says that the next step is due now, or that it follows
    unless there is progress."""


class Shape(NamedTuple):
    """The width of each column; 0 hides it."""

    guest: int
    doing: int
    size: int
    rate: int
    time: int
    next: int
    names: bool = False
    """Whether guests are shown by name alone."""
    short: bool = False
    """Whether other cells are shown in their short forms."""


TITLES: Final = JobCells(
    *("GUEST", "DOING", "WRITTEN", "RATE", "TIME", "NEXT"),
    *("GUEST", "DOING", "NEXT", "bold"),
    urgent=False,
)


def cells_of(job: JobStatus, now: int) -> JobCells:
    """Return the cells of a job, all printable. `now`: CLOCK_MONOTONIC, µs."""
    outlook = job.outlook(now)
    return JobCells(
        guest=label(job.pid, job.name),
        doing=job.doing,
        size="" if job.bytes_written is None else format_bytes(job.bytes_written),
        rate=f"{format_bytes(job.rate)}/s" if job.rate else "",
        time=job.clock(now),
        next=outlook,
        short_guest=printable(job.name) or f"pid {job.pid}",
        short_doing=_SHORT.get(job.doing, job.doing),
        short_next=job.outlook(now, short=True),
        style=_style(job),
        urgent=Flag.FORCE in job.flags and outlook.endswith((" now", " unless it moves")),
    )


def shape_for(rows: Sequence[JobCells], columns: int) -> Shape:
    """Return the most detailed shape that fits, or the narrowest. Every shape has the time and the
    next rung."""
    shape = None
    for shape in _shapes(rows):
        if _width(shape) <= columns:
            return shape
    assert shape is not None
    doing = max(LEAST_DOING, shape.doing - (_width(shape) - columns))
    shape = shape._replace(doing=min(doing, shape.doing))
    if _width(shape) > columns:
        shape = shape._replace(doing=0)
    following = max(LEAST_NEXT, shape.next - max(0, _width(shape) - columns))
    shape = shape._replace(next=min(following, shape.next))
    return shape._replace(guest=max(1, shape.guest - max(0, _width(shape) - columns)))


def _shapes(rows: Sequence[JobCells]) -> Iterator[Shape]:
    """Yield shapes from the most to the least detailed."""

    def widest(name: str) -> int:
        return max((width(getattr(row, name)) for row in rows), default=0)

    full = Shape(
        guest=widest("guest"),
        doing=widest("doing"),
        size=widest("size"),
        rate=widest("rate"),
        time=widest("time"),
        next=widest("next"),
    )
    yield full
    yield full._replace(rate=0)
    named = full._replace(guest=widest("short_guest"), names=True)
    enough = min(named.guest, 2 * LEAST_GUEST)
    yield named
    yield named._replace(rate=0)
    yield named._replace(rate=0, guest=enough)
    short = named._replace(doing=widest("short_doing"), next=widest("short_next"), short=True)
    yield short
    yield short._replace(guest=enough)
    yield short._replace(rate=0, guest=enough)
    for guest in range(named.guest, min(named.guest, LEAST_GUEST) - 1, -1):
        yield short._replace(rate=0, size=0, guest=guest)


def line_of(row: JobCells, shape: Shape) -> Text:
    """Format one row, padded to the width of the shape."""
    from rich.text import Text

    head = row is TITLES
    guest = row.short_guest if shape.names else row.guest
    doing = row.short_doing if shape.short else row.doing
    following = row.short_next if shape.short else row.next
    cells = (
        (guest, shape.guest, "left", ""),
        (doing, shape.doing, "left", row.style),
        (row.size, shape.size, "right", ""),
        (row.rate, shape.rate, "right", ""),
        (row.time, shape.time, "right", "dim"),
        (following, shape.next, "left", "bold red" if row.urgent else "bold"),
    )
    line = Text(no_wrap=True, overflow="ellipsis")
    for text, size, align, style in cells:
        if not size:
            continue
        cell = Text(text, style=TITLES.style if head else style)
        cell.truncate(size, overflow="ellipsis")
        cell.align("right" if align == "right" else "left", size)
        if line.plain:
            line.append(" " * GAP)
        line.append_text(cell)
    return line


def _width(shape: Shape) -> int:
    sizes = [size for size in shape[:6] if size]
    return sum(sizes) + GAP * (len(sizes) - 1)


def _style(job: JobStatus) -> str:
    if job.phase in (Phase.KILL, Phase.REAP) or job.verdict in _BAD:
        return "red"
    if job.verdict in _GOOD:
        return "green"
    return "yellow" if job.verdict in (Verdict.STORAGE_WAIT, Verdict.IDLE) else ""
