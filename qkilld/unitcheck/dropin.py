"""The drop-in that makes a unit safe: its lines and its text."""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Final

from qkilld.model.dataclass import dataclass
from qkilld.model.text import printable
from qkilld.model.unit import SETTINGS, UnitFacts
from qkilld.unitcheck.finding import Finding, Line
from qkilld.unitcheck.unit_text import entries, keys

FILE_NAME: Final = "50-qkilld.conf"
_WIDTH: Final = 96
_MARK: Final = "# Written by `qkillctl adopt`"
_CHECKSUM: Final = "# Checksum of the rest: sha256:"
_HEADER: Final = re.compile(
    re.escape(_MARK) + r"[^\n]*\n(?:#[^\n]*\n)*?" + re.escape(_CHECKSUM) + r"([0-9a-f]{64})\n"
)
_KEPT: Final = (
    "systemd runs the lines of ExecStop= in order, each after the previous one has ended. Lines"
    " before qkilld-stop have a - so that qkilld-stop runs even if they fail. qkilld-stop returns"
    " only when the guest is gone, so lines that need this come after it."
)


@dataclass(frozen=True, slots=True)
class Change:
    """Lines that belong together, and their reason."""

    reason: str
    lines: tuple[Line, ...]


def changes(findings: Iterable[Finding]) -> list[Change]:
    """Return the changes that adopt writes: the fixes of problems that lose or may lose data,
    except fixes that only the owner can judge."""
    wanted_changes: list[Change] = []
    lines_seen: set[Line] = set()
    for finding in findings:
        if not finding.is_unsafe:
            continue
        lines = tuple(line for line in finding.fixes if not line.by_hand)
        if any(_sets_stop(line) for line in lines) and any(map(_sets_stop, lines_seen)):
            # Keep only the first change of ExecStop=, because each such change contains the whole
            # list.
            lines = tuple(line for line in lines if not _sets_stop(line))
        if lines := tuple(line for line in lines if line not in lines_seen):
            wanted_changes.append(Change(f"{finding.problem}: {finding.reason}", lines))
            lines_seen.update(lines)
    return wanted_changes


def missing_changes(wanted: Iterable[Change], old: str) -> list[Change]:
    """Return the wanted changes that our earlier drop-in does not contain completely."""
    old_lines = set(_lines(old))
    return [change for change in wanted if not old_lines.issuperset(change.lines)]


@dataclass(frozen=True, slots=True)
class Override:
    """A drop-in that systemd reads after ours."""

    path: str
    keys: tuple[str, ...]
    """The settings of our drop-in that this one overrides, such as `KillSignal=`."""
    adds_stop: bool = False
    """This drop-in adds ExecStop= lines, which systemd runs after our lines."""

    def __str__(self) -> str:
        return (
            f"{printable(self.path, 1000)} sorts after {FILE_NAME} and sets {', '.join(self.keys)}"
        )


def read_later(drop_ins: Iterable[str]) -> list[str]:
    """Return the drop-ins that systemd reads after ours. systemd sorts drop-ins by file name,
    whatever their directories are. Source: systemd.unit(5)."""
    return [path for path in drop_ins if PurePosixPath(path).name > FILE_NAME]


def override(path: str, text: str, wanted: Iterable[Change]) -> Override | None:
    """Return which of our lines a later drop-in overrides; None if it overrides none."""
    keys = dict.fromkeys(line.text.partition("=")[0] for change in wanted for line in change.lines)
    # Any assignment to ExecStop= counts as an override, because a line that it appends runs after
    # our lines, even if they contain the same line. In other lists, only an empty assignment
    # overrides our lines.
    ends = {"After": r"\s*$", "RequiresMountsFor": r"\s*$"}
    overridden = tuple(
        f"{key}="
        for key in keys
        if re.search(rf"^\s*{key}\s*={ends.get(key, '')}", text, re.MULTILINE)
    )
    adds_stop = "ExecStop=" in overridden and _adds_stop(text)
    return Override(path, overridden, adds_stop) if overridden else None


def _adds_stop(text: str) -> bool:
    """Return whether a drop-in only appends lines to ExecStop=. With an empty assignment, it would
    replace the earlier lines."""
    values = list(entries(text, "Service", "ExecStop"))
    return bool(values) and "" not in values


def own_files(facts: UnitFacts) -> list[str]:
    """Return the files that belong to this instance alone: its own unit file and its own
    drop-ins."""
    own = {f"{name}.d" for name in (facts.id, *facts.names)}
    files = [path for path in facts.drop_ins if PurePosixPath(path).parent.name in own]
    is_templates = PurePosixPath(facts.fragment).name.partition("@")[2].startswith(".")
    return files if is_templates else [facts.fragment, *files]


def sets_facts(text: str) -> bool:
    """Return whether a file has any of the settings by which units are judged. A memory limit, for
    example, is not one of them."""
    judged = {key for settings in SETTINGS.values() for key in settings}
    return not judged.isdisjoint(keys(text))


def overridden_by_template(path: str, text: str, wanted: Iterable[Change]) -> bool:
    """Return whether our drop-in for a template conflicts with this file of an instance. Our
    drop-in overrides settings in the instance's unit file and in drop-ins that systemd reads
    earlier. Lines that a later drop-in adds to ExecStop= would run after ours."""
    name = PurePosixPath(path).name
    keys = {line.text.partition("=")[0] for change in wanted for line in change.lines}
    if name.endswith(".conf") and name >= FILE_NAME:
        return "ExecStop" in keys and _adds_stop(text)
    return any(re.search(rf"^\s*{key}\s*=", text, re.MULTILINE) for key in keys)


def text_of(unit: str, undo: str, version: str, wanted: Sequence[Change], old: str = "") -> str:
    """Return the text of the drop-in. `old`: our earlier drop-in, whose lines are kept. `undo`: the
    command that removes the drop-in."""
    body = ""
    for section in ("Unit", "Service", "Scope"):
        old_lines = [line.text for line in _lines(old) if line.section == section]
        parts = ["\n".join(old_lines)] if old_lines else []
        for change in wanted:
            lines = [line.text for line in change.lines if line.section == section]
            if not lines:
                continue
            reason = f"{change.reason}."
            if "ExecStop=" in lines and len([line for line in lines if "ExecStop=" in line]) > 2:
                reason += f" {_KEPT}"
            parts.append("\n".join([*_comment(reason), *lines]))
        if parts:
            body += f"\n[{section}]\n" + "\n\n".join(parts) + "\n"
    head = [
        f"{_MARK}, of qkilld {version}, for {printable(unit)}, so that",
        "# no fixed timeout kills a guest in the unit. To remove this file:",
        f"#     {printable(undo)}",
        "# To change something, write a drop-in of your own with a name that sorts after this one.",
        f"{_CHECKSUM}{_checksum(body)}",
    ]
    return "\n".join(head) + "\n" + body


def is_ours(text: str) -> bool:
    """Return whether adopt wrote this text, even if it was edited later."""
    return _HEADER.match(text) is not None


def is_unchanged(text: str) -> bool:
    """Return whether the text is as adopt wrote it."""
    header = _HEADER.match(text)
    return header is not None and header[1] == _checksum(text[header.end() :])


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode(errors="surrogateescape")).hexdigest()


def _sets_stop(line: Line) -> bool:
    return line.text.startswith("ExecStop=")


def _comment(reason: str) -> list[str]:
    # Replace backslashes, because a backslash at the end would make the next line part of the
    # comment.
    text = printable(reason, 2000).replace("\\", "/")
    return [f"# {line}" for line in textwrap.wrap(text[:1].upper() + text[1:], _WIDTH)]


def _lines(text: str) -> list[Line]:
    section, lines = "", []
    for line in text.splitlines():
        if line.startswith("["):
            section = line[1:-1]
        elif line and not line.startswith("#"):
            lines.append(Line(section, line))
    return lines
