"""Draw one stop as SVG: rungs, verdicts, throughput and deadlines over time. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from qkilld.model.constants import Verdict
from qkilld.model.dataclass import dataclass
from qkilld.model.text import format_bytes, printable

WIDTH: Final = 1000
LEFT: Final = 110
RIGHT: Final = 24
PLOT: Final = WIDTH - LEFT - RIGHT
CHARACTER: Final = 6.4
"""The mean width of a character in a label."""
COLOURS: Final[dict[str, str]] = {
    Verdict.UNKNOWN: "#cbd0d6",
    Verdict.GUEST_SHUTDOWN: "#4c8fd0",
    Verdict.FLUSHING: "#3aa76d",
    Verdict.STORAGE_WAIT: "#eba937",
    Verdict.BLOCKED: "#cf6a4a",
    Verdict.STOPPED: "#9a6fc0",
    Verdict.IDLE: "#8d96a0",
    Verdict.ZOMBIE: "#4a5058",
    Verdict.GONE: "#4a5058",
}
_STYLE: Final = (
    "text{font:11px system-ui,'DejaVu Sans',sans-serif;fill:#30363d}"
    ".t{font-size:16px;font-weight:600}.s{fill:#6a737d}.l{fill:#6a737d;text-anchor:end}"
    ".g{stroke:#e4e7eb;stroke-width:1}.a{stroke:#9aa3ad;stroke-width:1}"
    ".r{stroke:#30363d;stroke-width:1;stroke-dasharray:3 3}.k{stroke:#c62828;fill:#c62828}"
    ".w{fill:#3aa76d;fill-opacity:.35;stroke:#3aa76d}.d{fill:none;stroke:#c62828;stroke-width:1.5}"
    ".p{fill:none;stroke:#4c8fd0;stroke-width:1.5}.h{fill:#30363d;fill-opacity:.09}"
)
_NAME: Final = "fill:#30363d"


@dataclass(frozen=True, slots=True)
class Milestone:
    """Times are seconds since the start."""

    at: float
    text: str
    drastic: bool = False


@dataclass(frozen=True, slots=True)
class Stretch:
    """An interval with a constant value."""

    start: float
    end: float
    word: str
    """The value, such as a verdict."""
    text: str = ""
    """The tooltip."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Times are seconds since the job's start. Texts need not be printable."""

    title: str
    subtitle: str
    length: float
    marks: tuple[Milestone, ...] = ()
    verdicts: tuple[Stretch, ...] = ()
    held: tuple[Stretch, ...] = ()
    written: tuple[tuple[float, int], ...] | None = None
    """Pairs (time, bytes written since the start); None if unknown."""
    pending: tuple[tuple[float, int], ...] = ()
    """Pairs (time, bytes still to be written)."""
    time_left: tuple[tuple[float, float | None], ...] = ()
    """Pairs (time, seconds from then until the next rung; None for no limit)."""
    next_rung: str = ""


def draw(timeline: Timeline) -> str:
    scale = _Scale(timeline.length)
    rows = _label_rows(timeline.marks, scale)
    top = 66 + 15 * (max(rows, default=0) + 1)
    body: list[str] = []
    y = top + 6.0
    lanes = [_verdicts(timeline, scale)]
    if timeline.written is not None:
        lanes.append(_throughput(timeline.written, scale))
    if any(count for _, count in timeline.pending):
        lanes.append(_pending(timeline.pending, scale))
    if timeline.time_left:
        lanes.append(_deadlines(timeline, scale))
    for height, elements in lanes:
        body.append(f'<g transform="translate(0 {y:.1f})">')
        body += [*elements, "</g>"]
        y += height + 24
    bottom = y - 14
    frame = [
        _text(LEFT - 90, 26, timeline.title, "t"),
        _text(LEFT - 90, 45, timeline.subtitle, "s"),
        *(_band(span, scale, top, bottom) for span in timeline.held),
        *_axis(scale, top, bottom),
    ]
    marks = list(_marks(timeline.marks, rows, scale, top, bottom))
    legend = list(_legend(timeline.verdicts, bottom + 42))
    height = bottom + 60
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
            f'viewBox="0 0 {WIDTH} {height:.0f}">',
            f"<title>{_escaped(timeline.title)}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>',
            *frame,
            *body,
            *marks,
            *legend,
            "</svg>",
            "",
        ]
    )


class _Scale:
    """Maps seconds to horizontal positions."""

    def __init__(self, length: float) -> None:
        self.length = max(length, 0.001)
        self.step = _nice(self.length / 8)

    def __call__(self, seconds: float) -> float:
        return LEFT + PLOT * min(max(seconds, 0.0), self.length) / self.length


def _nice(least: float) -> float:
    """Round up to a round number of seconds or minutes."""
    for step in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30):
        if step >= least:
            return step
    minutes = 60.0
    while minutes < least:
        minutes *= 2
    return minutes


def _axis(scale: _Scale, top: float, bottom: float) -> Iterator[str]:
    count = int(scale.length / scale.step + 1e-9)
    for number in range(count + 1):
        x = scale(number * scale.step)
        yield _line(x, top, x, bottom, "g")
        label = _seconds(number * scale.step)
        yield _text(x, bottom + 16, label, "s", anchor="middle")
    yield _line(LEFT, bottom, LEFT + PLOT, bottom, "a")


def _seconds(seconds: float) -> str:
    if seconds >= 120:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}min {rest}s" if rest else f"{minutes}min"
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + " s"


_Lane = tuple[float, list[str]]


def _verdicts(timeline: Timeline, scale: _Scale) -> _Lane:
    elements = [_text(LEFT - 10, 17, "verdict", "l", style=_NAME)]
    elements.append(f'<rect x="{LEFT}" width="{PLOT}" height="26" fill="#f1f3f5"/>')
    for span in timeline.verdicts:
        x, width = scale(span.start), max(scale(span.end) - scale(span.start), 1)
        colour = COLOURS.get(span.word, COLOURS[Verdict.UNKNOWN])
        shown = f"{span.word}, from {_seconds(round(span.start, 1))}: {span.text}"
        elements.append(
            f'<rect x="{x:.1f}" width="{width:.1f}" height="26" fill="{colour}">'
            f"<title>{_escaped(shown)}</title></rect>"
        )
        if len(span.word) * CHARACTER + 10 < width:
            light = span.word in (Verdict.UNKNOWN, Verdict.STORAGE_WAIT)
            style = "" if light else "fill:#fff"
            elements.append(_text(x + width / 2, 17, span.word, anchor="middle", style=style))
    return 26, elements


def _throughput(points: Sequence[tuple[float, int]], scale: _Scale) -> _Lane:
    """Draw bytes per second between consecutive samples."""
    rates = [
        (start, end, max(0, after - before) / (end - start))
        for (start, before), (end, after) in pairwise(points)
        if end > start
    ]
    most = max((rate for *_, rate in rates), default=0.0)
    if not most:
        empty = "no writes were seen" if points else "unknown"
        return 26, [*_frame(26, "written", ""), _text(LEFT + 8, 18, empty, "s")]
    elements = _frame(90, "written", f"{format_bytes(round(most))}/s")
    elements.append(_text(LEFT - 10, 32, f"{format_bytes(points[-1][1])} in total", "l"))
    corners = []
    for start, end, rate in rates:
        height = 90 - 84 * rate / most
        corners += [(scale(start), height), (scale(end), height)]
    outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    first, last = corners[0][0], corners[-1][0]
    elements.append(f'<polygon class="w" points="{first:.1f},90 {outline} {last:.1f},90"/>')
    return 90, elements


def _pending(points: Sequence[tuple[float, int]], scale: _Scale) -> _Lane:
    most = max(count for _, count in points)
    places = (f"{scale(at):.1f},{60 - 54 * count / most:.1f}" for at, count in points)
    elements = _frame(60, "to go", format_bytes(most))
    return 60, [*elements, f'<polyline class="p" points="{" ".join(places)}"/>']


def _deadlines(timeline: Timeline, scale: _Scale) -> _Lane:
    """Draw the time until the next rung. Without progress, this time falls; with progress, it
    rises."""
    most = max(
        (remaining for _, remaining in timeline.time_left if remaining is not None), default=0.0
    )
    name = f"time to {timeline.next_rung or 'the next rung'}"
    if not most:
        return 26, [*_frame(26, name, ""), _text(LEFT + 8, 18, "no limit", "s")]
    ends = [at for at, _ in timeline.time_left[1:]] + [timeline.length]
    path: list[str] = []
    starts_segment = True
    for (start, remaining), end in zip(timeline.time_left, ends, strict=True):
        if remaining is None:
            starts_segment = True
            continue
        fallen = max(0.0, remaining - (end - start))
        path.append(
            f"{'M' if starts_segment else 'L'}{scale(start):.1f},{90 - 84 * remaining / most:.1f}"
        )
        path.append(f"L{scale(end):.1f},{90 - 84 * fallen / most:.1f}")
        starts_segment = False
    elements = _frame(90, name, _seconds(round(most, 1)))
    return 90, [*elements, f'<path class="d" d="{"".join(path)}"/>']


def _frame(height: int, name: str, high: str) -> list[str]:
    """Draw a lane's base line, its name, and the value of its upper edge."""
    elements = [
        _line(LEFT, height, LEFT + PLOT, height, "a"),
        _text(LEFT - 10, 16, name, "l", style=_NAME),
    ]
    if high:
        elements.append(_line(LEFT, 6, LEFT + PLOT, 6, "g"))
        elements.append(_text(LEFT + 4, 2, high, "s"))
        elements.append(_text(LEFT - 10, height + 3, "0", "l"))
    return elements


def _label_rows(marks: Sequence[Milestone], scale: _Scale) -> list[int]:
    """Assign each label a row, so that no labels overlap. Row 0 is the lowest."""
    ends: list[float] = []
    rows = []
    for mark in marks:
        start, end = _extent(mark, scale)
        row = next((i for i, taken in enumerate(ends) if taken + 6 < start), len(ends))
        ends[row : row + 1] = [end]
        rows.append(row)
    return rows


def _extent(mark: Milestone, scale: _Scale) -> tuple[float, float]:
    """Return the left and right end of a label. The label is to the right of its line, except near
    the end of the axis, where it is to the left."""
    x, width = scale(mark.at), len(_label(mark, scale)) * CHARACTER
    if x + width > WIDTH - 4:
        return x - width - 4, x
    return x, x + width + 4


def _label(mark: Milestone, scale: _Scale) -> str:
    return f"{printable(mark.text, 60)} {_seconds(round(mark.at, 1 if scale.length > 10 else 3))}"


def _marks(
    marks: Sequence[Milestone], rows: Sequence[int], scale: _Scale, top: float, bottom: float
) -> Iterator[str]:
    for mark, row in zip(marks, rows, strict=True):
        x, y = scale(mark.at), top - 4 - 15 * row
        kind = "r k" if mark.drastic else "r"
        yield _line(x, y - 9, x, bottom, kind)
        start, _ = _extent(mark, scale)
        style = "fill:#c62828;font-weight:600" if mark.drastic else ""
        yield _text(start + 4 if start == x else start, y, _label(mark, scale), style=style)


def _band(span: Stretch, scale: _Scale, top: float, bottom: float) -> str:
    x, width = scale(span.start), max(scale(span.end) - scale(span.start), 1)
    return (
        f'<rect class="h" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" '
        f'height="{bottom - top:.1f}"><title>{_escaped(span.word)}</title></rect>'
    )


def _legend(spans: Iterable[Stretch], y: float) -> Iterator[str]:
    x = float(LEFT)
    for word in dict.fromkeys(span.word for span in spans):
        colour = COLOURS.get(word, COLOURS[Verdict.UNKNOWN])
        yield f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="10" height="10" fill="{colour}"/>'
        yield _text(x + 15, y, word, "s")
        x += 15 + len(word) * CHARACTER + 18


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(
    x: float, y: float, text: str, kind: str = "", *, anchor: str = "", style: str = ""
) -> str:
    more = "".join(
        f" {name}={quoteattr(value)}"
        for name, value in (("class", kind), ("text-anchor", anchor), ("style", style))
        if value
    )
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    return escape(printable(text, 400))
