"""Sample one server: a process at the other end of a guest's connection, or a process that such a
server uses itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from qkilld.adapters.procfs import read_stat
from qkilld.debug_log import note_once
from qkilld.evidence.exports import ExportReader, WaitBudget
from qkilld.evidence.files import read_descriptors
from qkilld.evidence.kept_file import count_kept, open_directory, read_once
from qkilld.evidence.parents import listener_of
from qkilld.evidence.process_reader import ProcessReader
from qkilld.evidence.sockdiag import Unreadable
from qkilld.evidence.sockets import SocketReader, SocketTable
from qkilld.evidence.storage import FilePlace, StorageReader, StorageTable
from qkilld.evidence.thread_places import place_threads
from qkilld.model.sample import Mount, Peer, Socket
from qkilld.model.text import printable

PROC: Final = Path("/proc")
REFRESH_S: Final = 10.0
"""How long a list of a server's open files is valid."""
KEPT_THREADS: Final = 16
"""For at most this many threads of a server, schedstat stays open between reads (see
threads.MAX_KEPT)."""
_MAY_LEAVE: Final = ("qemu-nbd", "nbdkit", "socat")
"""Programs that, with some options, exit when their client disconnects (`leaves_with_client`)."""


class PeerReader:
    """Samples one server. Not thread-safe."""

    def __init__(self, pid: int, budget: WaitBudget, proc: Path = PROC, guest: int = 0) -> None:
        """`guest`: the guest's process; 0 if unknown."""
        self.pid = pid
        self._proc = proc
        self._process: ProcessReader | None = None
        """The reader of the process; None if its files are closed."""
        self._start_time: int | None = None
        """The start of the process; None before it was read. It shows whether the process id was
        reused while the files were closed."""
        self._storage = StorageReader(pid, proc)
        self._command = _command(pid, proc)
        self._parent = _parent(pid, proc)
        self._looked_for_listener = False
        """Whether it was checked which process listens for the server."""
        self._refresh_time = -REFRESH_S
        self.upstream: list[int] = []
        """The inodes of the sockets at the other ends of the server's own connections and socket
        pairs. They belong to servers that it uses."""
        self.upstream_unknown = True
        """Whether `upstream` may be incomplete, because sockets or their other ends are
        unreadable."""
        self.mounts: tuple[Mount, ...] = ()
        """The file systems that hold the server's files and have no block device."""
        self._sockets = SocketReader(pid, proc)
        self._counted: dict[int, int] = {}
        """The bytes that each TCP connection of the server had exchanged at the last reading."""
        self._exchanged = self._ended = 0
        self._exports = ExportReader(pid, budget, proc, guest)

    def read(
        self,
        table: StorageTable,
        sockets: SocketTable,
        ours: Mapping[int, str | None] | None,
        names: frozenset[str] = frozenset(),
    ) -> Peer | None:
        """Sample the server; None if it is gone.

        `ours`: the export that the guest requested over each of its connections, keyed by the inode
        of the server's end. `ours` is None for the server of a FUSE file system, because the guest
        has no connection to it. Peer.shared is then unknown, because nothing shows who else uses
        the file system. `names`: the names of the guest's images in the file system.
        """
        values: dict[str, Any] = {"state": "?"}
        self._read_process(values)
        if values["state"] in ("?", "Z", "X"):
            return None
        now = time.monotonic()
        if now - self._refresh_time >= REFRESH_S:
            self._refresh_time = now
            descriptors = read_descriptors(self.pid, self._proc)
            self._storage.refresh(descriptors)
            self._sockets.refresh(descriptors)
        devices, mounts = self._storage.read(table)
        self.mounts = mounts or ()
        connections = self._sockets.read(sockets)
        known = ours if connections is not None else None
        shared = None if known is None else self._is_shared(known, sockets)
        if ours and not self._looked_for_listener and connections is not None:
            # Look only once: a server that is being stopped closes its listening socket.
            self._looked_for_listener = True
            own = [one for one in connections if one.inode in ours]
            if own and not shared and (own[0].family == "tcp" or not own[0].accepted):
                listener = listener_of(self.pid, own[0].inode, sockets, self._proc)
                self._parent = listener or self._parent
        clients = {*self._sockets.accepted, *(ours or ())}
        made = tuple(one for one in connections or () if one.inode not in clients)
        if ours is None:
            connects = connections is None or any(one.client for one in made)
            place = self._place_of_names(names, has_upstream=connects)
        else:
            place = self._place(set(ours.values())) if shared is not False else ()
        self.upstream = list(self._sockets.peers(made, sockets).values())
        self.upstream_unknown = connections is None or self._sockets.has_unknown_peers
        return Peer(
            pid=self.pid,
            command=self._command,
            threads=place_threads(self.pid, values["threads"], self._storage, self._proc),
            switches=values["switches"],
            io=values["io"],
            devices=devices,
            shared=shared,
            place=place,
            unread=None
            if connections is None or ours is None
            else sum(c.receive_queue for c in connections if c.inode in ours),
            parent=self._parent,
            leaves=self._exports.leaves() if self._command in _MAY_LEAVE else False,
            unseen_requests=_unseen_requests(values["rings"], values["direct"]),
            exchanged=None if connections is None else self._count_exchanged(made),
            ended=self._ended,
        )

    def _read_process(self, values: dict[str, Any]) -> None:
        if self._process is None:
            self._process = ProcessReader(self.pid, self._proc, most_kept=KEPT_THREADS)
            count_kept(self._process.directory >= 0)
        self._process.read(values)
        if self._start_time is None:
            self._start_time = self._process.start_time
        elif self._process.start_time != self._start_time:
            values["state"] = "?"

    def _count_exchanged(self, made: Iterable[Socket]) -> int | None:
        """Return Peer.exchanged. `made`: the connections that the server has made.

        The first bytes of a connection are left out: they may be a handshake, which a server
        repeats forever if its own server closes each connection.
        """
        counts: dict[int, int] = {}
        for one in made:
            if one.family == "tcp":
                if one.acked is None or one.received is None:
                    return None
                counts[one.inode] = one.acked + one.received - one.receive_queue
        for inode, count in counts.items():
            self._exchanged += max(0, count - self._counted.get(inode, count))
        self._ended += len(self._counted.keys() - counts.keys())
        self._counted = counts
        return self._exchanged

    def _is_shared(self, ours: Mapping[int, str | None], table: SocketTable) -> bool | None:
        if not ours.keys() >= set(self._sockets.accepted):
            return True
        # A hidden socket may connect the server to another client.
        try:
            return None if self._sockets.hidden(table) - ours.keys() else False
        except Unreadable as error:
            note_once("looking for other clients of a server", error)
            return None

    def _place(self, exports: set[str | None]) -> tuple[str, ...]:
        """Return the storage of the guest's image. Return () if the server has several images and
        its command line does not show which of them is the guest's."""
        images = self._storage.writable_places
        if len(set(images.values())) > 1:
            known_exports = [export for export in exports if export is not None]
            paths = {self._exports.path_of(export) for export in known_exports}
            if len(known_exports) < len(exports):
                return ()
            images = {path: place for path, place in images.items() if path in paths}
        return _only_place(images.values())

    def _place_of_names(self, names: frozenset[str], *, has_upstream: bool) -> tuple[str, ...]:
        """Return the storage of those files of the server that have the names of the guest's
        images. If no file matches, the server may have changed the names: return the storage of all
        its files. But if the server has connections, return (): the images may be behind a
        connection, and the files may be a log or cache."""
        images = self._storage.writable_places
        if named := {path: place for path, place in images.items() if file_name(path) in names}:
            images = named
        elif has_upstream:
            return ()
        return _only_place(images.values())

    @property
    def names(self) -> dict[str, frozenset[str]]:
        """The names of the server's files open for writing, for each file system without a block
        device."""
        return names_by_mount(self._storage.writable_places)

    @property
    def open_files(self) -> int:
        """The number of descriptors that are open between reads."""
        return 0 if self._process is None else self._process.open_files

    def close_files(self) -> None:
        """Close the files and the directory of the process. The next read opens them again."""
        if self._process is not None:
            count_kept(-(self._process.directory >= 0))
            self._process.close()
            self._process = None

    def close(self) -> None:
        self.close_files()
        self._storage.close()
        self._sockets.close()


def _unseen_requests(rings: int | None, direct: bool | None) -> bool | None:
    """Return Peer.unseen_requests. `rings`, `direct`: as in model.sample.Sample."""
    if rings or direct:
        return True
    return None if rings is None or direct is None else False


def names_by_mount(places: Mapping[str, FilePlace]) -> dict[str, frozenset[str]]:
    """Return the names of the files on each file system without a block device, keyed by its
    MAJOR:MINOR. `places`: the storage of each file, keyed by its path."""
    names: dict[str, set[str]] = {}
    for path, place in places.items():
        if place.mount:
            names.setdefault(place.mount, set()).add(file_name(path))
    return {number: frozenset(files) for number, files in names.items()}


def file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _only_place(places: Iterable[FilePlace]) -> tuple[str, ...]:
    """Return the storage of the files if they all have the same storage; () if not."""
    distinct = set(places)
    if len(distinct) != 1:
        return ()
    (place,) = distinct
    return place.disks or ((place.mount,) if place.mount else ())


def _parent(pid: int, proc: Path) -> int:
    """Return Peer.parent."""
    try:
        stat = read_stat(pid, proc)
        is_copy = stat.forked and read_stat(stat.parent, proc).comm == stat.comm
        return stat.parent if is_copy else 0
    except OSError as error:
        note_once("looking for the parent of a server", error)
        return 0


def _command(pid: int, proc: Path) -> str:
    try:
        directory = open_directory(proc / str(pid))
    except OSError as error:
        note_once("looking at a server", error)
        return ""
    try:
        return printable(os.fsdecode(read_once("comm", directory)).strip())
    except OSError as error:
        note_once("looking at a server", error)
        return ""
    finally:
        os.close(directory)
