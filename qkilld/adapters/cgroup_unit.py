"""Find the systemd unit in the text of /proc/PID/cgroup, by systemd's own rules.

Source: systemd, src/basic/cgroup-util.c (cg_path_get_unit, cg_path_get_user_unit, cg_shift_path,
cg_unified_cached). Handles cgroup v2 ("0::PATH") and the name=systemd hierarchy of v1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from qkilld.model.guest import Unit

_UNIT_SUFFIXES: Final = (".service", ".scope", ".socket", ".mount", ".swap")


def unit_of(own: str, init: str, uses_v2: Callable[[], bool | None]) -> Unit | None:
    """Return the unit, or None if systemd's hierarchy is unknown.

    `own` and `init` are the contents of the cgroup files of the process and of process 1 of the
    same system. `uses_v2` (`systemd_uses_v2`) is called only if the process is in both hierarchies.
    systemd then uses one of them, and other programs can use the other.
    """
    paths, roots = _paths(own), _paths(init)
    v2: bool | None = "" in paths
    if len(paths) == 2:
        v2 = uses_v2()
    if v2 is None:
        return None
    controller = "" if v2 else "name=systemd"
    path = paths.get(controller, "")
    # In a container without a cgroup namespace, every path begins with the container's own path.
    # Remove that.
    root = roots.get(controller, "").removesuffix("/init.scope").rstrip("/")
    if path.startswith(root + "/"):
        path = path[len(root) :]
    parts = [part for part in path.split("/") if part]
    system, rest = _first_unit(parts)
    user = ""
    if system.startswith("user@") and system.endswith(".service"):
        user, _ = _first_unit(rest)
    return Unit(system, user)


def systemd_uses_v2(kind_at: Callable[[str], str]) -> bool | None:
    """Return whether systemd keeps its units in cgroup v2, by systemd's rules; None if unknown.

    `kind_at` returns the type of the file system mounted at a path, or "". In hybrid mode,
    /sys/fs/cgroup is a tmpfs, and v2 is mounted below it at "unified". systemd 232 mounts it at
    "systemd".
    """
    places = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")
    kinds = [kind_at(place) for place in places]
    if "cgroup2" in kinds:
        return True
    return False if kinds[2] == "cgroup" else None


def _paths(text: str) -> dict[str, str]:
    """Return the paths in v2 (key "") and in v1's name=systemd. A missing path is left out."""
    paths = {}
    # Not splitlines(): a path may contain any line separator except a line feed.
    for line in text.removesuffix("\n").split("\n"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers in ("", "name=systemd"):
            paths[controllers] = path
    return paths


def _first_unit(parts: list[str]) -> tuple[str, list[str]]:
    """Return the first part that is not a slice, and the parts after it; ("", []) if that part is
    not a unit."""
    for index, part in enumerate(parts):
        # systemd puts an underscore before names that a cgroup controller could claim.
        name = part.removeprefix("_")
        if name.endswith(".slice"):
            continue
        return (name, parts[index + 1 :]) if name.endswith(_UNIT_SUFFIXES) else ("", [])
    return "", []
