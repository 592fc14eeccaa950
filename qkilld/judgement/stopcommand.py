"""Judgement of the lines of ExecStop=: which of them waits until the guest is gone.

Of all programs only qkilld-stop is known to. The lists below are for the wording alone: a program
that is in none of them counts as one that may return too early.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Final

from qkilld.model.unit import Command

HELPER: Final = "qkilld-stop"

_SENDERS: Final = frozenset(
    [
        "socat",
        "nc",
        "ncat",
        "netcat",
        "nc.openbsd",
        "nc.traditional",
        "echo",
        "printf",
        "qmp-shell",
        "virsh",
        "kill",
        "pkill",
        "killall",
        "screen",
        "tmux",
        "true",
        "qm",
        "busctl",
        "systemctl",
    ]
)
"""They send something and end, or end at once."""
_SHELLS: Final = frozenset(["sh", "bash", "dash", "zsh", "ksh", "busybox", "env"])
_POWERDOWN: Final = re.compile(r"powerdown|guest-shutdown|\bshutdown\b|\bpoweroff\b")
_WORD: Final = re.compile(r"[\w./+-]+")
_KILL: Final = re.compile(
    r"\b(?:p?kill|killall)\b[^;&|\n]*"
    r"\s-(?:9|KILL|SIGKILL|s\s*(?:9|KILL|SIGKILL)|-signal[= ]\S*KILL)\b"
)
_READS: Final = re.compile(
    r"(?:^|[\s;|&])(?:read|cat)(?:\s*(?:[;&|)>]|$)|\s+-|\s+[A-Za-z_]+\s*(?:;|$))"
)
_STDIO: Final = re.compile(r"\bsocat\b.*\s(?:-|STDIO|STDIN)(?:[\s,]|$)", re.IGNORECASE)
_PIPED: Final = re.compile(r"\|\s*\S*(?:socat|nc|ncat)\b")


class Kind(Enum):
    HELPER = auto()
    """qkilld-stop."""
    KILLS = auto()
    """Sends SIGKILL."""
    READS = auto()
    """Reads its standard input, which is /dev/null."""
    SENDS = auto()
    """Is known to send a request and end."""
    UNKNOWN = auto()
    """Any other program."""


def kind_of(command: Command) -> Kind:
    words = command.arguments
    text = " ".join(words)
    if is_helper(command):
        return Kind.HELPER
    if _KILL.search(text):
        return Kind.KILLS
    if _READS.search(text) or (_STDIO.search(text) and not _PIPED.search(text)):
        return Kind.READS
    name = PurePosixPath(command.path).name
    if name in _SENDERS:
        return Kind.SENDS
    if name in _SHELLS and any(
        PurePosixPath(word).name in _SENDERS for word in _WORD.findall(text)
    ):
        return Kind.SENDS
    return Kind.UNKNOWN


def is_helper(command: Command) -> bool:
    words = command.arguments
    return PurePosixPath(command.path).name == HELPER or any(
        pair == ("-m", "qkilld.stop") for pair in pairwise(words)
    )


def asks_guest(command: Command) -> bool:
    """Whether it seems to ask the guest's own system to shut down."""
    return _POWERDOWN.search(" ".join(command.arguments)) is not None


def line_of(command: Command, *, ignore_failure: bool = False) -> str:
    """The command as a line of a unit file, after `ExecStop=`.

    systemd has undone quotes and specifiers in what it tells, but not `$`: systemd.service(5),
    "Command lines".
    """
    prefixes = {"privileged": "+", "no-setuid": "!", "ambient": "!!", "no-env-expand": ":"}
    front = "-" if ignore_failure or command.ignores_failure else ""
    front += "".join(prefixes.get(flag, "") for flag in command.flags)
    words = list(command.arguments) or [command.path]
    if words[0] == command.path:
        return front + " ".join(quoted(word) for word in words)
    return f"{front}@" + " ".join(quoted(word) for word in (command.path, *words))


def quoted(word: str) -> str:
    """One word as systemd.syntax(7) and systemd.unit(5) want it: quoted where that is needed, `%`
    doubled, and everything that is not plain ASCII as its bytes."""
    word = word.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./$(){}-]+", word, re.ASCII):
        return word
    return '"' + "".join(_escaped(byte) for byte in word.encode(errors="surrogateescape")) + '"'


def _escaped(byte: int) -> str:
    if chr(byte) in '"\\':
        return "\\" + chr(byte)
    return chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
