"""Sample the processes at the other end of a guest's local connections, and FUSE servers.

nbdkit, qemu-nbd, qemu-storage-daemon, virtiofsd and iSCSI targets on this host do the guest's I/O,
so their system calls and disks show its progress. The same is true of the servers of FUSE file
systems under its images. Needs the ptrace right for other users' processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from qkilld.adapters.procfs import read_stat
from qkilld.debug_log import note_once
from qkilld.evidence.exports import ExportReader, WaitBudget
from qkilld.evidence.files import read_descriptors
from qkilld.evidence.fuse import (
    MAX_SERVERS,
    SEARCH_S,
    FuseFinder,
    connection_of,
    read_waiting,
)
from qkilld.evidence.kept_file import open_directory, read_once
from qkilld.evidence.peer_finder import PeerFinder
from qkilld.evidence.process_reader import ProcessReader
from qkilld.evidence.sockdiag import Unreadable
from qkilld.evidence.sockets import SocketReader, SocketTable
from qkilld.evidence.storage import FilePlace, StorageReader, StorageTable
from qkilld.evidence.thread_places import place_threads
from qkilld.model.sample import Mount, Peer
from qkilld.model.text import printable

PROC: Final = Path("/proc")
REFRESH_S: Final = 10.0
"""How long a list of a server's open files is valid."""
MAX_PEERS: Final = 64
"""The maximum number of servers of one guest that are sampled."""
HOPS: Final = 2
"""How many levels of servers to follow behind a server, which may only forward requests."""

_MAY_LEAVE: Final = ("qemu-nbd", "nbdkit", "socat")
"""The programs for which leaves_with_client can tell whether they exit with their client."""


class _SampledServers(NamedTuple):
    peers: tuple[Peer, ...]
    certain: bool
    """Whether all of these processes serve the file system."""


class _Match(NamedTuple):
    at: float
    """time.monotonic()."""
    opens: bool
    """Whether the process has a file open that is named like an image of the guest."""


class ServerReader:
    """Samples the servers of one guest. Not thread-safe."""

    def __init__(
        self, pid: int, finder: PeerFinder, fuse_finder: FuseFinder, proc: Path = PROC
    ) -> None:
        """`pid`: the guest's process, which never counts as its own server."""
        self._pid, self._proc = pid, proc
        self._finder, self._fuse_finder = finder, fuse_finder
        self._readers: dict[int, PeerReader] = {}
        self._budget = WaitBudget()
        self._used_pids: list[int] = []
        """The processes that the last read() used."""
        self._missing_ends: Set[int] = frozenset()
        """The sockets of servers that were not found yet, including servers behind other
        servers."""
        self._connections: Mapping[int, float] = {}
        """When each FUSE connection was first seen, time.monotonic()."""
        self._new_missing_ends: set[int] = set()
        self._new_connections: dict[int, float] = {}
        """What the present read() has found so far. It is kept apart, because search() may run
        meanwhile."""
        self._matches: dict[tuple[str, frozenset[str]], dict[int, _Match]] = {}
        """The processes that may serve a FUSE mount, by the mount and the names of the images."""

    def expect(self, ends: Iterable[int], mounts: Iterable[Mount] = ()) -> None:
        """Say which servers read() will need, so that search() can find them earlier. `ends`: the
        inodes of their sockets."""
        self._missing_ends = frozenset(ends)
        self._connections = self._since(_connections_of(mounts).values())

    def search(self) -> None:
        """Continue the search for servers that were not found yet. May run in any thread."""
        if missing := self._missing_ends:
            self._finder.go_on(missing)
        if connections := self._connections:
            self._fuse_finder.go_on(connections)

    def read(
        self, ends: Mapping[int, str | None], storage: StorageTable, sockets: SocketTable
    ) -> dict[int, Peer]:
        """Sample the server of each connection, if found.

        `ends`: the export that the guest requested over each connection, by the inode of the
        server's socket; None if unknown.
        """
        return self.read_all(ends, (), {}, storage=storage, sockets=sockets)[0]

    def read_all(
        self,
        ends: Mapping[int, str | None],
        mounts: tuple[Mount, ...],
        names: Mapping[str, frozenset[str]],
        *,
        storage: StorageTable,
        sockets: SocketTable,
    ) -> tuple[dict[int, Peer], tuple[Mount, ...]]:
        """Sample the server of each connection, as read() does, and the servers of FUSE mounts.
        Return the servers of the connections, and the mounts with their servers.

        `names`: the names of the guest's images on each mount, by its MAJOR:MINOR.
        """
        self._used_pids = []
        self._new_missing_ends, self._new_connections = set(), {}
        self._budget.renew()
        values = self._read(ends, storage, sockets, downstream={self._pid})
        served = self._read_fuse(mounts, names, storage, sockets, downstream={self._pid})
        self._missing_ends = self._new_missing_ends
        self._connections = self._new_connections
        # Close unused readers. They would pile up, because a server that forks for each connection
        # has a new process after each reconnect.
        for pid in self._readers.keys() - set(self._used_pids):
            self._readers.pop(pid).close()
        return values, tuple(_with_servers(mount, served) for mount in mounts)

    def close_files(self) -> None:
        """Close files; the next read opens them again."""
        for reader in self._readers.values():
            reader.close_files()

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _read(
        self,
        ends: Mapping[int, str | None],
        storage: StorageTable,
        sockets: SocketTable,
        downstream: set[int],
    ) -> dict[int, Peer]:
        """Sample the servers at these ends. `downstream`: the guest's process and the servers
        between it and these ends, which are not sampled again."""
        peers: dict[int, Peer] = {}
        owners = self._finder.find(ends) if ends else {}
        self._new_missing_ends |= ends.keys() - owners.keys()
        for pid in set(owners.values()) - downstream:
            own_ends = {end: ends[end] for end, owner in owners.items() if owner == pid}
            reader = self._reader(pid)
            peer = reader.read(storage, sockets, own_ends) if reader is not None else None
            if reader is None:
                continue
            if peer is None:
                self._readers.pop(pid).close()
                continue
            peers |= dict.fromkeys(
                own_ends, self._with_behind(peer, reader, storage, sockets, downstream)
            )
        return peers

    def _with_behind(
        self,
        peer: Peer,
        reader: PeerReader,
        storage: StorageTable,
        sockets: SocketTable,
        downstream: set[int],
    ) -> Peer:
        """Add the servers that the server uses itself."""
        if len(downstream) > HOPS:
            return peer
        downstream = downstream | {peer.pid}
        upstream = dict.fromkeys(reader.upstream)
        behind = self._read(upstream, storage, sockets, downstream)
        others = {other.pid: other for other in behind.values()}
        served = self._read_fuse(reader.mounts, reader.names, storage, sockets, downstream)
        for servers in served.values():
            # An uncertain server may serve somebody else, so leave it out.
            others |= {other.pid: other for other in servers.peers if servers.certain}
        unfound = upstream.keys() - behind.keys()
        return replace(peer, behind=tuple(others.values()), behind_unknown=bool(unfound))

    def _read_fuse(
        self,
        mounts: Iterable[Mount],
        names: Mapping[str, frozenset[str]],
        storage: StorageTable,
        sockets: SocketTable,
        downstream: set[int],
    ) -> dict[str, _SampledServers]:
        """Sample the servers of FUSE mounts, by the MAJOR:MINOR of the mount."""
        numbers = _connections_of(mounts)
        if not numbers:
            return {}
        connections = self._since(numbers.values())
        self._new_connections |= connections
        found = self._fuse_finder.find(connections)
        end = time.monotonic() + SEARCH_S
        served = {}
        for number, connection in numbers.items():
            servers = found.get(connection)
            pids = [pid for pid in (servers.pids if servers else ()) if pid not in downstream]
            if servers is None or not pids:
                continue
            wanted = names.get(number, frozenset())
            if len(pids) > MAX_SERVERS and not servers.certain:
                # Choose by the names of files only if there are too many processes. A name proves
                # nothing: gocryptfs changes names, and anybody can have /dev/fuse and a file of
                # that name open.
                pids = self._matching(number, pids, wanted, end)
            if len(pids) > MAX_SERVERS:
                continue
            readers = {pid: reader for pid in pids if (reader := self._reader(pid)) is not None}
            peers = {
                pid: self._with_behind(peer, reader, storage, sockets, downstream)
                for pid, reader in readers.items()
                if (peer := reader.read(storage, sockets, None, wanted)) is not None
            }
            if peers:
                served[number] = _SampledServers(tuple(peers.values()), servers.certain)
        return served

    def _since(self, connections: Iterable[int]) -> dict[int, float]:
        """Return when each FUSE connection was first seen, time.monotonic()."""
        now = time.monotonic()
        return {number: self._connections.get(number, now) for number in connections}

    def _matching(
        self, number: str, pids: Sequence[int], names: frozenset[str], end: float
    ) -> list[int]:
        """Return the processes that have a file with one of these names open; [] until all were
        looked at.

        Costs 4 µs for each descriptor, every REFRESH_S. Any user can have many processes, so this
        stops at `end`, time.monotonic(), and the next sample continues.
        """
        known = self._matches.get((number, names), {})
        matches = {pid: known[pid] for pid in pids if pid in known}
        self._matches[number, names] = matches
        while len(self._matches) > MAX_PEERS:
            del self._matches[next(iter(self._matches))]
        for pid in sorted(pids, key=lambda pid: known[pid].at if pid in known else 0.0):
            now = time.monotonic()
            if now >= end:
                break
            if pid not in matches or now - matches[pid].at >= REFRESH_S:
                matches[pid] = _Match(now, _opens(pid, names, self._proc))
        if len(matches) < len(pids):
            return []
        return [pid for pid in pids if matches[pid].opens]

    def _reader(self, pid: int) -> PeerReader | None:
        if pid not in self._readers and len(self._readers) < MAX_PEERS:
            self._readers[pid] = PeerReader(pid, self._budget, self._proc)
        self._used_pids.append(pid)
        return self._readers.get(pid)


class PeerReader:
    """Samples one server. Not thread-safe."""

    def __init__(self, pid: int, budget: WaitBudget, proc: Path = PROC) -> None:
        self.pid = pid
        self._proc = proc
        self._process = ProcessReader(pid, proc)
        self._storage = StorageReader(pid, proc)
        self._command = _command(pid, proc)
        self._parent = _parent(pid, proc)
        self._refresh_time = -REFRESH_S
        self.upstream: list[int] = []
        """The local servers that it uses itself: the inodes of their ends of the connections."""
        self.mounts: tuple[Mount, ...] = ()
        """The file systems without a block device under its files."""
        self._sockets = SocketReader(pid, proc)
        self._exports = ExportReader(pid, budget, proc)

    def read(
        self,
        table: StorageTable,
        sockets: SocketTable,
        ours: Mapping[int, str | None] | None,
        names: frozenset[str] = frozenset(),
    ) -> Peer | None:
        """Sample the server; None if it is gone.

        `ours`: the export that the guest requested over each of its connections, by the inode of
        the server's end. It is None for the server of a FUSE file system: nothing shows who else
        uses that. `names`: the names of the guest's images in the file system.
        """
        values: dict[str, Any] = {"state": "?"}
        self._process.read(values)
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
        shared = None
        if connections is not None and ours is not None:
            shared = self._is_shared(ours, sockets)
        client_ends = [connection for connection in connections or () if connection.client]
        if ours is None:
            has_upstream = connections is None or bool(client_ends)
            place = self._place_of_names(names, has_upstream=has_upstream)
        else:
            place = self._place(set(ours.values())) if shared is not False else ()
        self.upstream = list(self._sockets.peers(tuple(client_ends), sockets).values())
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
        )

    def _is_shared(self, ours: Mapping[int, str | None], table: SocketTable) -> bool | None:
        if not ours.keys() >= set(self._sockets.accepted):
            return True
        # A hidden socket may belong to another client, so the answer is unknown.
        try:
            return None if self._sockets.hidden(table) - ours.keys() else False
        except Unreadable as error:
            note_once("looking for other clients of a server", error)
            return None

    def _place(self, exports: set[str | None]) -> tuple[str, ...]:
        """Return the storage of the guest's image; () unless the server has only one image, or its
        command line shows which one it is."""
        images = self._storage.writable_places
        if len(set(images.values())) > 1:
            known_exports = [export for export in exports if export is not None]
            paths = {self._exports.path_of(export) for export in known_exports}
            if len(known_exports) < len(exports):
                return ()
            images = {path: place for path, place in images.items() if path in paths}
        return _only_place(images.values())

    def _place_of_names(self, names: frozenset[str], *, has_upstream: bool) -> tuple[str, ...]:
        """Return the storage of the server's files that are named like the guest's images. If it
        has none, because it changes names, return the storage of its only files. But if it has
        connections, return (): the images may be behind them, and the files may be its log or
        cache."""
        images = self._storage.writable_places
        if named := {path: place for path, place in images.items() if _name(path) in names}:
            images = named
        elif has_upstream:
            return ()
        return _only_place(images.values())

    @property
    def names(self) -> dict[str, frozenset[str]]:
        """The names of the server's own images on each file system without a block device."""
        return names_by_mount(self._storage.writable_places)

    def close_files(self) -> None:
        """Close files; the next read opens them again."""
        self._process.close_files()

    def close(self) -> None:
        self._process.close()
        self._storage.close()
        self._sockets.close()


def _connections_of(mounts: Iterable[Mount]) -> dict[str, int]:
    """Return the FUSE connection of each mount, by its MAJOR:MINOR."""
    return {
        mount.number: connection
        for mount in mounts
        if (connection := connection_of(mount)) is not None
    }


def _with_servers(mount: Mount, served: Mapping[str, _SampledServers]) -> Mount:
    connection = connection_of(mount)
    if connection is None:
        return mount
    servers = served.get(mount.number)
    return replace(
        mount,
        waiting=read_waiting(connection),
        servers=servers.peers if servers is not None else None,
        certain=servers is not None and servers.certain,
    )


def names_by_mount(places: Mapping[str, FilePlace]) -> dict[str, frozenset[str]]:
    """Return the names of the files on each file system without a block device, by its MAJOR:MINOR.
    `places` has the storage of each file, by its path."""
    names: dict[str, set[str]] = {}
    for path, place in places.items():
        if place.mount:
            names.setdefault(place.mount, set()).add(_name(path))
    return {number: frozenset(files) for number, files in names.items()}


def _opens(pid: int, names: frozenset[str], proc: Path) -> bool:
    """Return whether the process has a file with one of these names open."""
    descriptors = read_descriptors(pid, proc)
    files = () if descriptors is None else descriptors.files
    return any(_name(path) in names for _, path in files)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _only_place(places: Iterable[FilePlace]) -> tuple[str, ...]:
    """Return the storage that all files have; () if they have none, or not the same."""
    distinct = set(places)
    if len(distinct) != 1:
        return ()
    (place,) = distinct
    return place.disks or ((place.mount,) if place.mount else ())


def _parent(pid: int, proc: Path) -> int:
    """Return Peer.parent."""
    try:
        stat = read_stat(pid, proc)
        return stat.parent if read_stat(stat.parent, proc).comm == stat.comm else 0
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
