"""Read the subordinate uids of each user.

Source: subuid(5). Each line is NAME:FIRST:COUNT, or UID:FIRST:COUNT. Ranges from other sources
(`subid` in nsswitch.conf(5)) are not read, because that may block.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qkilld.debug_log import note
from qkilld.engine.fair_shares import FIRST_SUBORDINATE

SUBUID: Final = Path("/etc/subuid")
PASSWD: Final = Path("/etc/passwd")
MAX_BYTES: Final = 4 << 20


def read_subordinate_uids(
    subuid: Path = SUBUID, passwd: Path = PASSWD
) -> list[tuple[int, int, int]]:
    """Return the first and the last uid of each range, and the uid of its user. A user name that is
    not in `passwd` gets a negative number. The ranges of root are left out, because root gives them
    to containers."""
    uids = {name: int(uid) for name, _, uid, *_ in _lines(passwd, 7) if uid.isdecimal()}
    ranges = []
    for name, first, count in _lines(subuid, 3):
        if first.isdecimal() and count.isdecimal() and int(first) >= FIRST_SUBORDINATE:
            uid = int(name) if name.isdecimal() else uids.setdefault(name, -len(uids) - 1)
            if uid != 0:
                ranges.append((int(first), int(first) + int(count) - 1, uid))
    return ranges


def _lines(path: Path, fields: int) -> Iterator[list[str]]:
    """Yield the words of each line that has `fields` words; nothing if the file is unreadable."""
    try:
        with path.open(errors="surrogateescape") as file:
            text = file.read(MAX_BYTES)
    except OSError as error:
        note(f"reading {path}", error)
        return
    for line in text.splitlines():
        words = line.strip().split(":")
        if len(words) == fields:
            yield words
