"""Read the command line of a storage server: the images that it exports, and whether it exits
when its client disconnects.

qemu-storage-daemon may serve many images. Only its system calls on the guest's image show progress
of the guest's requests. The command line is a claim of the server's owner. The guest's owner has
chosen this server, so a false claim affects only that guest.
"""

from __future__ import annotations

import os.path
import re
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import read_command_line, read_stat, read_uid
from qkilld.adapters.qemu_args import parse_command_line
from qkilld.adapters.target_threads import AllThreadsBlocked, shared
from qkilld.debug_log import about, note_once
from qkilld.evidence.parents import ancestors_of

TIMEOUT_S: Final = 0.05
"""How long one sample waits for the command lines of all servers together."""
_MAX_TRIES: Final = 4
"""A command line is unreadable for a moment during execve(2), so reading it is tried this often."""
_RETRY_S: Final = 0.05
"""The next try begins at least this long after the last one began."""
_MAX_DEPTH: Final = 8
# Short options can be joined into one word, such as "-vt". The next two patterns find -t and -s in
# a word if only options without arguments come before them.
_QEMU_NBD_PERSISTENT: Final = re.compile("-[hVrsndvAL]*t")
_NBDKIT_SINGLE: Final = re.compile("-[46fhnorvV]*s.*|--si[a-z]*|--st[a-z]*", re.DOTALL)
_NBDKIT_FILTER: Final = re.compile(r"--fi[a-z]*[= ](.*/nbdkit-)?exit(last|when)(-filter\.so)?")
_NBDKIT_CAPTIVE: Final = re.compile("--run?(=.*)?", re.DOTALL)
_NBDKIT_CHILD: Final = re.compile("--exi[a-z-]*")


class WaitBudget:
    """The time that the readers of one sample may still wait. Not thread-safe."""

    __slots__ = ("_left_s",)

    def __init__(self) -> None:
        self._left_s = TIMEOUT_S

    def renew(self) -> None:
        """Allow TIMEOUT_S again, for the next sample."""
        self._left_s = TIMEOUT_S

    def join(self, thread: threading.Thread) -> None:
        start = time.monotonic()
        thread.join(max(self._left_s, 0.0))
        self._left_s -= time.monotonic() - start


class ExportReader:
    """Reads the command line once, in a thread because reading may block (command_line.py). If that
    fails, a later call tries again. Not thread-safe."""

    def __init__(
        self, pid: int, budget: WaitBudget, proc: Path = Path("/proc"), guest: int = 0
    ) -> None:
        """`guest`: the guest's process; 0 if unknown."""
        self._pid, self._budget, self._proc, self._guest = pid, budget, proc, guest
        self._thread: threading.Thread | None = None
        self._tries, self._next_try = 0, 0.0
        self._paths: Mapping[str, str] = {}
        self._leaves: bool | None = None

    def path_of(self, export: str) -> str:
        """Return the path of the exported image; "" if unknown. Waits for each try."""
        self._start()
        return self._paths.get(export, "")

    def leaves(self) -> bool | None:
        """Return whether the server exits when its client disconnects, or when a process does that
        runs the guest; None if unknown. Waits for each try."""
        self._start()
        return self._leaves

    def _start(self) -> None:
        is_read = self._leaves is not None
        is_reading = self._thread is not None and self._thread.is_alive()
        now = time.monotonic()
        if is_read or is_reading or self._tries >= _MAX_TRIES or now < self._next_try:
            return
        try:
            self._thread = shared.start(self._pid, read_uid(self._pid, self._proc), self._read)
        except (OSError, AllThreadsBlocked) as error:
            note_once("reading the command line of a server", error)
        else:
            self._tries, self._next_try = self._tries + 1, now + _RETRY_S
            self._budget.join(self._thread)

    def _read(self) -> None:
        about(self._pid)
        try:
            argv = read_command_line(self._pid, self._proc)
            directory = str((self._proc / str(self._pid) / "cwd").readlink())
            leaves = leaves_with_client(argv) or (
                leaves_with_parent(argv) and self._runs_beside_guest()
            )
        except (OSError, ValueError) as error:
            note_once("reading the command line of a server", error)
            return
        if not argv[0]:
            return  # The process is exiting.
        self._paths = {
            name: os.path.normpath(os.path.join(directory, path))  # noqa: PTH118
            for name, path in exported_files(argv).items()
        }
        self._leaves = leaves

    def _runs_beside_guest(self) -> bool:
        """Return whether the guest, or a process that runs it, is the server's parent. If another
        process is the parent, nothing shows that the server exits when the guest does. Raises
        OSError."""
        parent = read_stat(self._pid, self._proc).parent
        return parent in (self._guest, *ancestors_of(self._guest, self._proc))


def leaves_with_client(argv: Sequence[str]) -> bool:
    """Return whether a server exits when its only client disconnects.

    This is true of nbdkit --single (or --stdin), of qemu-nbd without --persistent, and of socat,
    which serves one connection in each process. It is also true of nbdkit's filters exitlast and
    exitwhen, which wait for the last client, and of nbdkit --run, whose client is the command that
    it runs: when the command exits, nbdkit kills the server (nbdkit-captive(1)).
    """
    words = [word for word in argv[1:] if word]
    match os.path.basename(argv[0]) if argv else "":  # noqa: PTH119
        case "qemu-nbd":
            # getopt_long(3) accepts any unique abbreviation of a long option.
            long = any(word.startswith("--pe") for word in words)
            return not long and not any(map(_QEMU_NBD_PERSISTENT.match, words))
        case "nbdkit":
            # The value of an option may be the next word.
            pairs = [*words, *map(" ".join, pairwise(words))]
            leaving = (_NBDKIT_SINGLE, _NBDKIT_FILTER, _NBDKIT_CAPTIVE)
            return any(one.fullmatch(word) for one in leaving for word in pairs)
        case "socat":
            return True
    return False


def leaves_with_parent(argv: Sequence[str]) -> bool:
    """Return whether a server exits when its parent process does: nbdkit --exit-with-parent."""
    is_nbdkit = bool(argv) and os.path.basename(argv[0]) == "nbdkit"  # noqa: PTH119
    return is_nbdkit and any(map(_NBDKIT_CHILD.fullmatch, argv[1:]))


def exported_files(argv: Sequence[str]) -> dict[str, str]:
    """Return {export: file} from the command line of a qemu-storage-daemon."""
    nodes: dict[str, Mapping[str, str]] = {}
    exports: list[Mapping[str, str]] = []
    for option in parse_command_line(argv):
        flat = option.flat
        if option.name == "blockdev" and "node-name" in flat:
            nodes[flat["node-name"]] = flat
        elif option.name == "export":
            exports.append(flat)
    files = {}
    for flat in exports:
        node = flat.get("node-name", "")
        if path := _file_of(node, nodes):
            # An NBD export without a name gets the name of its node.
            files[flat.get("name", node)] = path
    return files


def _file_of(node: str, nodes: Mapping[str, Mapping[str, str]]) -> str:
    """Return the file at the end of a chain of `file` children; "" if there is none."""
    for _ in range(_MAX_DEPTH):
        flat = nodes.get(node)
        if flat is None:
            return ""
        prefix = ""
        while f"{prefix}file.driver" in flat:
            prefix += "file."
        if path := flat.get(f"{prefix}filename"):
            return path
        node = flat.get(f"{prefix}file", "")
    return ""
