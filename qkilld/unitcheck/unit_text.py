"""Parse unit files as written, with their specifiers. Pure.

systemd reports templates only as instances, with the specifiers (%i, %n, …) resolved. So lines that
are right for all instances must come from the files. Source: systemd.syntax(7).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator


def entries(text: str, section: str, key: str) -> Iterator[str]:
    """Yield the values of a key in order. An empty value resets a list."""
    current = ""
    for line in _logical_lines(text):
        if line.startswith("[") and line.endswith("]"):
            current = line[1:-1]
            continue
        name, equals, value = line.partition("=")
        if equals and current == section and name.strip() == key:
            yield value.strip()


def keys(text: str) -> set[str]:
    """Return the keys that a text sets, in any section."""
    pairs = (line.partition("=") for line in _logical_lines(text))
    return {name.strip() for name, equals, _ in pairs if equals}


def merged(texts: Iterable[str], section: str, key: str) -> list[str]:
    """Merge a list such as ExecStop= from a unit file and its drop-ins, in the order in which
    systemd reads them."""
    values: list[str] = []
    for text in texts:
        for value in entries(text, section, key):
            if value:
                values.append(value)
            else:
                values.clear()
    return values


def parse_environment(text: str) -> dict[str, str]:
    """Parse a file of EnvironmentFile=: systemd.exec(5)."""
    variables = {}
    for line in _logical_lines(text):
        name, equals, value = line.partition("=")
        value = value.strip()
        if equals and re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
            if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
                value = value[1:-1]
            variables[name.strip()] = value
    return variables


def _logical_lines(text: str) -> Iterator[str]:
    """Yield lines without comments, with continued lines joined."""
    pending = ""
    for raw in text.splitlines():
        line = raw.strip() if not pending else raw.rstrip()
        if line.lstrip().startswith(("#", ";")):
            continue
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        if pending or line:
            yield (pending + line).strip()
        pending = ""
    if pending:
        yield pending.strip()
