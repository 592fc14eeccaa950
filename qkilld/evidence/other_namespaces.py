"""Read which unix sockets listen in network namespaces other than ours.

sock_diag(7) reports only the sockets of one network namespace, but a unix socket with a path can be
reached from all namespaces. A namespace without processes cannot be read.

Needs the ptrace right for other users' processes. Sources: proc_pid_ns(5), proc_pid_net(5).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qkilld.adapters import blockable
from qkilld.adapters.procfs import read_bounded
from qkilld.adapters.unix_table import parse_unix_row
from qkilld.debug_log import note_once
from qkilld.evidence import sockdiag
from qkilld.evidence.files import PROC

SEARCH_S: Final = 0.2
"""How long a search may take. This is enough for about 40,000 processes."""
AGE_S: Final = 5.0
"""How long a search is valid."""
MAX_BYTES: Final = 4 << 20
"""The maximum number of bytes to read for one namespace. This is enough for about 28,000
sockets."""


class OtherNamespaces:
    """The listening unix sockets of other network namespaces. Thread-safe."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._lock = threading.Lock()
        self._names: frozenset[bytes] | None = None
        self._read_at = -AGE_S

    def listens(self, matches: Callable[[bytes], bool]) -> bool | None:
        """Return whether any listening unix socket of another namespace has a matching name; None
        if unknown.

        Processes that we cannot read count as processes of our namespace. A user's qkilld can read
        only the processes of this user. Every AGE_S, this costs 5 µs for each process of the host.
        """
        with self._lock:
            if time.monotonic() - self._read_at >= AGE_S:
                self._names = self._read()
                self._read_at = time.monotonic()
            names = self._names
        return None if names is None else any(map(matches, names))

    def _read(self) -> frozenset[bytes] | None:
        """Return the names of the sockets; None if there are too many sockets or reading takes too
        long."""
        end = time.monotonic() + SEARCH_S
        names: set[bytes] = set()
        unread: set[str] = set()
        try:
            read = {os.readlink(f"{self._proc}/{sockdiag.namespace_of}/ns/net")}  # noqa: PTH115
            pids = [name for name in os.listdir(self._proc) if name.isdecimal()]  # noqa: PTH208
        except OSError as error:
            note_once("looking for network namespaces", error)
            return None
        directories = [f"{self._proc}/{pid}" for pid in pids]
        namespaces = blockable.shared.each(directories, _namespace)
        for directory, namespace in zip(directories, namespaces, strict=True):
            if time.monotonic() > end:
                note_once("looking for network namespaces", "there are too many processes")
                return None
            if isinstance(namespace, Exception):
                continue  # The process has exited, or is unreadable.
            if namespace in read:
                continue
            text = read_bounded(f"{directory}/net/unix", MAX_BYTES)
            if text is None:
                unread.add(namespace)
                continue
            read.add(namespace)
            rows = map(parse_unix_row, text.split(b"\n"))
            names.update(row.name for row in rows if row is not None and row.listening)
        return None if unread - read else frozenset(names)


def _namespace(directory: str) -> str:
    """Raises OSError."""
    return os.readlink(f"{directory}/ns/net")  # noqa: PTH115 - half the cost
