"""The screen of `qkillctl watch` as lines of text. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import field
from typing import TYPE_CHECKING, Final

from qkilld.ctl.job_table import TITLES, Shape, cells_of, line_of, shape_for
from qkilld.ctl.output import user_name, width
from qkilld.model.constants import USEC_PER_SEC
from qkilld.model.dataclass import dataclass
from qkilld.model.job_status import JobStatus, ending, flag_names, label
from qkilld.model.text import format_bytes, printable
from qkilld.model.timespan import format_usec

if TYPE_CHECKING:
    from rich.text import Text

KEEP_ENDED: Final = 15 * USEC_PER_SEC
"""How long (µs) an ended job stays on the screen."""
LEAST_DETAIL: Final = 12
"""Details of the selected job are shown on terminals with at least this many rows."""
MOST_FOOT: Final = 3
MARK: Final = "▸ "
KEYS: Final = (
    ("h", "hold"),
    ("r", "release"),
    ("e", "extend"),
    ("f", "force"),
    ("c", "cancel"),
    ("?", "help"),
    ("q", "quit"),
)
HELP: Final = """\
Each line is a guest that is being stopped: what it does, how much was written, \
how long the stop has taken, and what comes next.

While the guest makes progress, no time counts down: "SIGKILL only after 1min without progress". \
Without progress, the time counts down: "SIGKILL in 41s unless it moves".

↑ ↓   choose a guest (also k and j)
h     hold: no signal is sent until the stop is released
r     release a stop that is held
e     extend: no SIGKILL for the time that you enter
f     force: SIGKILL now; what the guest has not written is lost. Asks first
c     cancel: no more signals, but a SIGTERM that was sent may still end the guest. Asks first
q     quit; all stops continue

Press any key to return."""


@dataclass(slots=True)
class WatchState:
    bus_title: str = ""
    """The bus, if it is not the system bus. Printable."""
    jobs: dict[str, JobStatus] = field(default_factory=dict)
    """The last status of each job, by path."""
    selection: str = ""
    """The path of the selected job, on which keys act."""
    outage: str = "qkilld has not answered yet"
    """Why the daemon is unreachable; "" if it is reachable."""
    message: str = ""
    """The outcome of the last key. Printable."""
    prompt: str = ""
    """The question, and the answer as typed so far. Printable."""
    help: bool = False
    steers: bool = True
    """Whether keys act on jobs; False without a keyboard."""

    def show(self, job: JobStatus) -> None:
        self.jobs[job.path] = job
        if self.selection not in self.jobs or not self.selection:
            self.selection = job.path

    def forget(self, now: int) -> None:
        """Drop jobs that ended more than KEEP_ENDED ago."""
        for path, job in list(self.jobs.items()):
            if job.ended is not None and now - job.ended > KEEP_ENDED:
                del self.jobs[path]
        if self.selection not in self.jobs:
            self.selection = next((job.path for job in self.ordered if not job.result), "")

    @property
    def ordered(self) -> list[JobStatus]:
        """All jobs: running ones first, the oldest on top."""
        return sorted(self.jobs.values(), key=lambda job: (bool(job.result), job.id))

    @property
    def running(self) -> int:
        return sum(not job.result for job in self.jobs.values())

    def choose(self, step: int) -> None:
        paths = [job.path for job in self.ordered]
        if not paths:
            return
        at = paths.index(self.selection) if self.selection in paths else 0
        self.selection = paths[max(0, min(at + step, len(paths) - 1))]


def screen(state: WatchState, now: int, columns: int, rows: int) -> list[Text]:
    """Draw at most `rows` lines of at most `columns`. `now`: CLOCK_MONOTONIC in µs."""
    if state.help:
        return _help(columns)[:rows]
    head = _head(state, columns)
    foot = _foot(state, columns)
    detail = _detail(state, now, columns) if rows >= LEAST_DETAIL else []
    room = max(1, rows - len(head) - len(foot) - len(detail))
    body = _table(state, now, columns, room)
    space = [_plain("", columns)] * (room - len(body))
    return [*head, *body, *space, *detail, *foot][:rows]


def _head(state: WatchState, columns: int) -> list[Text]:
    from rich.text import Text

    running = state.running
    count = {0: "No guest is being stopped", 1: "1 guest is being stopped"}.get(
        running, f"{running} guests are being stopped"
    )
    title = Text(count, style="bold", no_wrap=True)
    if state.bus_title:
        title.append(f", on the {state.bus_title}", style="not bold dim")
    title.truncate(columns, overflow="ellipsis")
    lines = [title]
    if state.outage:
        lines.append(_plain(f"{state.outage}; this list may be outdated", columns, "yellow"))
    return [*lines, _plain("", columns)]


def _table(state: WatchState, now: int, columns: int, room: int) -> list[Text]:
    jobs = state.ordered
    if not jobs:
        return [_plain("Stops appear here as soon as they begin.", columns, "dim")][:room]
    rows = [cells_of(job, now) for job in jobs if not job.result]
    shape = shape_for([TITLES, *rows], columns - len(MARK) - 1)
    at = next((i for i, job in enumerate(jobs) if job.path == state.selection), 0)
    # Always show the titles and the selected job. One line says how many jobs do not fit.
    room -= 1
    if len(jobs) > room:
        room = max(1, room - 1)
    first = max(0, min(at - room + 1, len(jobs) - room))
    shown = jobs[first : first + room]
    lines = [_marked(False, line_of(TITLES, shape))]
    lines += [_row(state, job, now, shape, columns) for job in shown]
    if hidden := len(jobs) - len(shown):
        lines.append(_plain(f"{' ' * len(MARK)}… and {hidden} more", columns, "dim"))
    return lines


def _row(state: WatchState, job: JobStatus, now: int, shape: Shape, columns: int) -> Text:
    if not job.result:
        line = line_of(cells_of(job, now), shape)
    else:
        result_text = ending(job.result, job.receipt) if job.receipt is not None else job.doing
        room = columns - len(MARK)
        guest_label = label(job.pid, job.name)
        if width(f"{guest_label}: {result_text}") > room:
            guest_label = printable(job.name) or guest_label
        line = _plain(f"{guest_label}: {result_text}", room, "dim")
    return _marked(job.path == state.selection and state.steers, line)


def _detail(state: WatchState, now: int, columns: int) -> list[Text]:
    """Return details of the selected job: its guest, and the reasons for its verdict."""
    job = state.jobs.get(state.selection)
    if job is None:
        return []
    facts = [f"job {job.id}", ", ".join(flag_names(job.flags)) or "without force"]
    if job.requested_by is not None:
        facts.append(f"for {user_name(job.requested_by)}")
    if job.reason:
        facts.append(f'"{job.reason}"')
    if job.unit:
        facts.append(job.unit)
    if job.bytes_pending is not None:
        facts.append(f"{format_bytes(job.bytes_pending)} to go")
    if job.last_progress is not None and not job.result:
        since = max(0, now - job.last_progress) // USEC_PER_SEC * USEC_PER_SEC
        facts.append(f"last progress {format_usec(since)} ago" if since else "makes progress")
    lines = [_plain("", columns), _plain("; ".join(facts), columns, "dim")]
    why = "; ".join(job.reasons)
    for text in textwrap.wrap(why, columns - 1)[:2]:
        lines.append(_plain(text, columns, "dim"))
    return lines


def _foot(state: WatchState, columns: int) -> list[Text]:
    from rich.text import Text

    if state.prompt:
        # If the prompt is too long, keep its last lines, because the user types there.
        prompt_lines = textwrap.wrap(state.prompt, columns - 1)[-MOST_FOOT:]
        return [
            _plain("", columns),
            *(_plain(text, columns, "bold yellow") for text in prompt_lines),
        ]
    message_lines = textwrap.wrap(state.message, columns - 1)[:MOST_FOOT] or [""]
    lines = [_plain(text, columns) for text in message_lines]
    if not state.steers:
        return [*lines, _plain("Ctrl-C quits; all stops continue", columns, "dim")]
    gap = "  " if sum(len(key) + len(word) + 3 for key, word in KEYS) <= columns else " "
    keys = Text(no_wrap=True)
    for key, word in KEYS:
        keys.append(gap if keys.plain else "").append(key, style="bold")
        keys.append(f" {word}", style="dim")
    keys.truncate(columns, overflow="ellipsis")
    return [*lines, keys]


def _help(columns: int) -> list[Text]:
    return [_plain(line, columns) for line in _wrapped(HELP, columns)]


def _wrapped(text: str, columns: int) -> Iterator[str]:
    for line in text.splitlines():
        indent = " " * 6 if line[6:7].strip() and line[:6].rstrip() != line[:6] else ""
        yield from textwrap.wrap(line, columns - 1, subsequent_indent=indent) or [""]


def _marked(chosen: bool, line: Text) -> Text:
    from rich.text import Text

    highlighted = Text(no_wrap=True)
    highlighted.append(MARK if chosen else " " * len(MARK), style="bold")
    return highlighted.append_text(line)


def _plain(text: str, columns: int, style: str = "") -> Text:
    from rich.text import Text

    line = Text(text, style=style, no_wrap=True)
    line.truncate(columns, overflow="ellipsis")
    return line
