"""Print the matrix as a table in Markdown, and the wrong cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.safety.cases import Case
from tests.safety.cell import Cell
from tests.safety.policies import Column

_LEGEND = """\
Each cell: acknowledged records that were lost, the seconds until the guest was gone or given up,
how that ended, and the verdicts that qkilld came to from the third second on."""


def table(
    rows: Sequence[Case], columns: Sequence[Column], cells: Mapping[tuple[str, str], Cell]
) -> str:
    lines = [["case", *(column.title for column in columns)]]
    for row in rows:
        found = [cells.get((row.name, column.name)) for column in columns]
        lines.append([row.title, *(_shown(cell) if cell else "not measured" for cell in found)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "| " + " | ".join(t.ljust(w) for t, w in zip(x, widths, strict=True)) + " |" for x in lines
    ]
    padded.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [f"- {row.title}: {row.note}." for row in rows if row.note]
    bad = [
        f"- {row.title}: {what}"
        for row in rows
        for column in columns
        if (cell := cells.get((row.name, column.name)))
        for what in cell.wrong
    ]
    parts = ["\n".join(padded), _LEGEND]
    if notes:
        parts.append("\n".join(notes))
    parts.append(
        "\n".join(["qkilld's cells that are not as expected:", *bad])
        if bad
        else "All of qkilld's cells are as expected."
    )
    return "\n\n".join(parts)


def _shown(cell: Cell) -> str:
    """Format a cell, for example "352 of 900 lost, 11.4 s, killed"."""
    lost = f"{cell.lost} of {cell.acknowledged} lost, " if cell.acknowledged else ""
    corrupt = f"{cell.corrupt} errors, " if cell.corrupt else ""
    verdicts = list(dict.fromkeys(verdict for at, verdict in cell.outcome.ticks if at >= 2))
    shown = f" ({', '.join(verdicts)})" if verdicts and set(verdicts) != {"unknown"} else ""
    mark = " (!)" if cell.wrong else ""
    return f"{lost}{corrupt}{cell.outcome.seconds:.1f} s, {cell.outcome.result}{shown}{mark}"
