"""Parse /proc/PID/net/unix: proc_pid_net(5).

The kernel does not escape the names of sockets. So any user of the network namespace can forge a
row for somebody else's socket, with a name that contains line feeds. But the kernel lists each
socket only once, so if several rows have the same inode, at most one is true.
"""

from __future__ import annotations

import re
from typing import Final

from qkilld.model.named_tuple import NamedTuple

_ROW: Final = re.compile(
    # Num: RefCount Protocol Flags Type St Inode [Path]
    rb"[0-9A-Fa-f]+: [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) ([0-9A-F]{4}) ([0-9A-F]{2})"
    rb" +([0-9]{1,10})(?: (.*))?",
    re.DOTALL,
)
_LISTENING: Final = 0x10000  # __SO_ACCEPTCON, include/uapi/linux/net.h
_STREAM: Final = b"0001"
_CONNECTED: Final = b"03"


class UnixRow(NamedTuple):
    inode: int
    stream: bool
    listening: bool
    connected: bool
    name: bytes
    """The path of the socket, or "@" and its abstract name; empty if it has no name."""


def parse_unix_row(line: bytes) -> UnixRow | None:
    """Parse a line without its line feed; None if it is not a row."""
    if (match := _ROW.fullmatch(line)) is None:
        return None
    flags, kind, state, inode, name = match.groups()
    return UnixRow(
        inode=int(inode),
        stream=kind == _STREAM,
        listening=bool(int(flags, 16) & _LISTENING),
        connected=state == _CONNECTED,
        name=name or b"",
    )
