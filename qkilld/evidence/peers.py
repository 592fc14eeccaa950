"""Sample the processes at the other end of a guest's local connections.

nbdkit, qemu-nbd, qemu-storage-daemon, virtiofsd and iSCSI targets on this host work for the guest:
their system calls and disks show progress. Needs the ptrace right for other users' processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from qkilld.debug_log import note_once
from qkilld.evidence.exports import ExportReader
from qkilld.evidence.files import read_descriptors
from qkilld.evidence.kept_file import open_directory, read_once
from qkilld.evidence.peer_finder import PeerFinder
from qkilld.evidence.process_reader import ProcessReader
from qkilld.evidence.sockdiag import Unreadable
from qkilld.evidence.sockets import SocketReader, SocketTable
from qkilld.evidence.storage import StorageReader, StorageTable
from qkilld.evidence.thread_places import place_threads
from qkilld.model.sample import Peer
from qkilld.model.text import printable

PROC: Final = Path("/proc")
REFRESH_S: Final = 10.0
"""How long a list of a server's open files is valid."""
MAX_PEERS: Final = 64
"""The maximum number of servers of one guest that are sampled."""
HOPS: Final = 2
"""How many levels of servers to follow behind a server that forwards requests."""

_NONE: Final = frozenset[int]()


class ServerReader:
    """Samples the servers of one guest. Not thread-safe."""

    def __init__(self, pid: int, finder: PeerFinder, proc: Path = PROC) -> None:
        """`pid`: the guest's process, which never counts as its own server."""
        self._pid, self._finder, self._proc = pid, finder, proc
        self._readers: dict[int, PeerReader] = {}
        self._used_pids: list[int] = []
        """The processes that the last read() used."""
        self._missing_ends = _NONE

    def expect(self, ends: Iterable[int]) -> None:
        """Announce sockets of servers, so that search() can find them before read() needs them."""
        self._missing_ends = frozenset(ends)

    def search(self) -> None:
        """Continue the search for servers that were not found yet. May run in any thread."""
        if missing := self._missing_ends:
            self._finder.go_on(missing)

    def read(
        self, ends: Mapping[int, str | None], storage: StorageTable, sockets: SocketTable
    ) -> dict[int, Peer]:
        """Sample the server of each connection, if found.

        `ends` maps the inode of each socket of a server to the export that the guest requested,
        None if unknown.
        """
        self._used_pids = []
        values = self._read(ends, storage, sockets, downstream={self._pid})
        self._missing_ends = frozenset(ends) - values.keys()
        # Close unused readers: a server that forks for each connection has a new process after each
        # reconnect.
        for pid in self._readers.keys() - set(self._used_pids):
            self._readers.pop(pid).close()
        return values

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
        for pid in set(owners.values()) - downstream:
            own_ends = {end: ends[end] for end, owner in owners.items() if owner == pid}
            reader = self._reader(pid)
            peer = reader.read(storage, sockets, own_ends) if reader is not None else None
            if reader is None:
                continue
            if peer is None:
                self._readers.pop(pid).close()
                continue
            if len(downstream) <= HOPS:
                upstream = dict.fromkeys(reader.upstream)
                behind = self._read(upstream, storage, sockets, downstream | {pid})
                peer = replace(peer, behind=tuple({p.pid: p for p in behind.values()}.values()))
            peers |= dict.fromkeys(own_ends, peer)
        return peers

    def _reader(self, pid: int) -> PeerReader | None:
        if pid not in self._readers and len(self._readers) < MAX_PEERS:
            self._readers[pid] = PeerReader(pid, self._proc)
        self._used_pids.append(pid)
        return self._readers.get(pid)


class PeerReader:
    """Samples one server. Not thread-safe."""

    def __init__(self, pid: int, proc: Path = PROC) -> None:
        self.pid = pid
        self._proc = proc
        self._process = ProcessReader(pid, proc)
        self._storage = StorageReader(pid, proc)
        self._command = _command(pid, proc)
        self._refresh_time = -REFRESH_S
        self.upstream: list[int] = []
        """Inodes of the other ends of local connections that it made to servers of its own."""
        self._sockets = SocketReader(pid, proc)
        self._exports = ExportReader(pid, proc)

    def read(
        self, table: StorageTable, sockets: SocketTable, ours: Mapping[int, str | None]
    ) -> Peer | None:
        """Sample the server; None if it is gone. `ours`: the export that the guest requested over
        each of its connections, by the inode of the server's end."""
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
        devices, _ = self._storage.read(table)
        connections = self._sockets.read(sockets)
        shared = None if connections is None else self._is_shared(ours, sockets)
        client_ends = [connection for connection in connections or () if connection.client]
        self.upstream = list(self._sockets.peers(tuple(client_ends), sockets).values())
        return Peer(
            pid=self.pid,
            command=self._command,
            threads=place_threads(self.pid, values["threads"], self._storage, self._proc),
            switches=values["switches"],
            io=values["io"],
            devices=devices,
            shared=shared,
            place=self._place(set(ours.values())) if shared is not False else (),
            unread=None
            if connections is None
            else sum(c.receive_queue for c in connections if c.inode in ours),
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
        places = set(images.values())
        if len(places) != 1:
            return ()
        (place,) = places
        return place.disks or ((place.mount,) if place.mount else ())

    def close_files(self) -> None:
        """Close files; the next read opens them again."""
        self._process.close_files()

    def close(self) -> None:
        self._process.close()
        self._storage.close()
        self._sockets.close()


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
