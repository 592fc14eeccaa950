"""From the text of /proc/PID/cgroup to a systemd unit, by the rules of systemd itself.

Source: systemd, src/basic/cgroup-util.c (cg_path_get_unit, cg_path_get_user_unit, cg_shift_path).
Works on both: cgroup v2 ("0::PATH") and the name=systemd hierarchy of v1.
"""

from __future__ import annotations

from typing import Final

from qkilld.model.guest import Unit

_UNIT_SUFFIXES: Final = (".service", ".scope", ".socket", ".mount", ".swap")


def unit_of(own: str, init: str) -> Unit:
    """`own` and `init` are the texts for the process and for process 1 of the same system."""
    path = _systemd_path(own)
    # In a container without a cgroup namespace every path begins with the container's own.
    root = _systemd_path(init).removesuffix("/init.scope").rstrip("/")
    if path.startswith(root + "/"):
        path = path[len(root) :]
    parts = [part for part in path.split("/") if part]
    system, rest = _first_unit(parts)
    user = ""
    if system.startswith("user@") and system.endswith(".service"):
        user, _ = _first_unit(rest)
    return Unit(system, user)


def _systemd_path(text: str) -> str:
    """The path in systemd's own hierarchy; "" where there is none."""
    unified = ""
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "name=systemd":
            return path
        if not controllers:
            unified = path
    return unified


def _first_unit(parts: list[str]) -> tuple[str, list[str]]:
    """The first part that is a unit, slices skipped, and what follows it."""
    for index, part in enumerate(parts):
        # A leading underscore escapes names that a controller would claim.
        name = part.removeprefix("_")
        if name.endswith(".slice"):
            continue
        return (name, parts[index + 1 :]) if name.endswith(_UNIT_SUFFIXES) else ("", [])
    return "", []
