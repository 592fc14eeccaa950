"""Fake /proc and /sys trees, for cases that this host does not have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def lay(top: Path, files: Mapping[str, str]) -> Path:
    """Make these files below `top`; a text that begins with "->" makes a symbolic link."""
    for name, text in files.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("->"):
            path.symlink_to(text[2:])
        else:
            path.write_text(text)
    return top


def disk(
    name: str,
    number: str,
    *,
    below: Mapping[str, str] | None = None,
    partition: bool = False,
    **more: str,
) -> dict[str, str]:
    """Return the files of a block device in /sys; a `name` with "/" is below another device.

    partition: whether it is a partition of the device above it
    below: its lower devices, name and number
    """
    home = f"devices/{name}"
    files = {
        f"{home}/dev": f"{number}\n",
        f"{home}/stat": "5 0 40 1 7 0 56 1 2 9 9 1 0 8 0 3 1\n",
        f"dev/block/{number}": f"->../../{home}",
    }
    if partition:
        files[f"{home}/partition"] = "1\n"
    for slave, slave_number in (below or {}).items():
        files[f"{home}/slaves/{slave}/dev"] = f"{slave_number}\n"
    for path, text in more.items():
        files[f"{home}/{path.replace('__', '/')}"] = text
    return files


def loop(
    name: str, number: str, path: str, *, offset: int = 0, sizelimit: int = 0
) -> dict[str, str]:
    """Return the files of a loop device of 1024 bytes in /sys."""
    return disk(
        name,
        number,
        size="2\n",
        loop__backing_file=f"{path}\n",
        loop__offset=f"{offset}\n",
        loop__sizelimit=f"{sizelimit}\n",
    )


def process(
    pid: str, descriptors: Mapping[int, tuple[str, int, int]], mountinfo: str
) -> dict[str, str]:
    """Return the files of a process in /proc. descriptors: number: (link, flags, mount)."""
    files = {f"{pid}/mountinfo": mountinfo}
    for number, (link, flags, mount) in descriptors.items():
        files[f"{pid}/fd/{number}"] = f"->{link}"
        files[f"{pid}/fdinfo/{number}"] = (
            f"pos:\t0\nflags:\t0{flags:o}\nmnt_id:\t{mount}\nino:\t1\n"
        )
    return files
