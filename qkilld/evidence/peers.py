"""Sample the servers of a guest: the processes at the other end of its local connections, and FUSE
servers.

The guest's I/O may be done on this host by nbdkit, qemu-nbd, qemu-storage-daemon, virtiofsd, iSCSI
targets, and servers of FUSE file systems that hold its images. Their system calls and disks then
show the guest's progress. Needs the ptrace right for other users' processes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import read_children
from qkilld.evidence.exports import WaitBudget
from qkilld.evidence.files import read_descriptors
from qkilld.evidence.fuse import (
    MAX_SERVERS,
    SEARCH_S,
    FuseFinder,
    FuseServers,
    connection_of,
    read_waiting,
)
from qkilld.evidence.peer_finder import PeerFinder
from qkilld.evidence.peer_reader import PROC, REFRESH_S, PeerReader, file_name
from qkilld.evidence.sockets import SocketTable
from qkilld.evidence.storage import StorageTable
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.sample import Mount, Peer

MAX_PEERS: Final = 64
"""The maximum number of servers sampled for one guest, including those behind other servers."""
OWN_PEERS: Final = 16
"""Servers that the guest itself uses may exceed MAX_PEERS by this many, because some are found only
after other servers have used up MAX_PEERS."""
MAX_PLACES: Final = 1024
"""How many servers behind other servers fit into one sample. If a server is behind several
connections of the guest, it counts once for each, because the sample has a copy for each."""
MAX_CHILDREN: Final = 2
"""Of the processes that a server has started, only this many of the oldest and this many of the
newest are sampled. A process that does a long flush is older than short scripts that were started
later, but the oldest processes may be helpers that never end."""
MAX_BEFORE_CHILDREN: Final = 48
"""If at least this many processes are already sampled, no more processes that a server has started
are sampled. The rest of MAX_PEERS is for servers to which a server is connected."""
KEPT_FILES: Final = 64
"""How many descriptors all servers of one guest together may keep open between reads."""
HOPS: Final = 4
"""How many levels of servers behind a server are sampled. Some servers only forward requests."""

_NONE: Final = frozenset[int]()


class _SampledServers(NamedTuple):
    peers: tuple[Peer, ...]
    """() if too many processes may serve the file system."""
    certain: bool
    """Whether all `peers` serve the file system."""


class _SampleTables(NamedTuple):
    storage: StorageTable
    sockets: SocketTable


class _Links(NamedTuple):
    """The servers that a server uses itself."""

    pids: tuple[int, ...]
    unknown: bool
    """Whether the server may use other servers, too."""
    mounts: Mapping[int, tuple[str, ...]]
    """The FUSE file systems (MAJOR:MINOR) that each server serves or may serve, keyed by its
    process id."""
    uncertain: frozenset[int]
    """The servers that are not certain to serve the file systems in `mounts`."""


class _Match(NamedTuple):
    at: float
    """The time of the check, by time.monotonic()."""
    opens: bool
    """Whether the process has an open file with the name of one of the guest's images."""


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
        """The servers that the last read_all() needed."""
        self._missing_ends: Set[int] = _NONE
        """The sockets (inodes) whose servers were not found yet, including servers behind other
        servers."""
        self._connections: Mapping[int, float] = {}
        """When each FUSE connection was first seen (time.monotonic())."""
        self._new_missing_ends: Set[int] = _NONE
        self._new_connections: dict[int, float] = {}
        """The values of `_missing_ends` and `_connections` that the present read_all() has found so
        far. The values are kept apart, because search() may run in another thread."""
        self._sampled: dict[int, Peer] = {}
        """The servers that the present read_all() has sampled, without the servers behind them,
        keyed by process id."""
        self._links: dict[int, _Links] = {}
        """The servers that each sampled server uses itself, keyed by process id."""
        self._open_files = 0
        """How many descriptors of servers are open."""
        self._room = 0
        """How many more servers behind other servers fit into this sample."""
        self._limit = 0
        """The current maximum number of `_readers`."""
        self._matches: dict[tuple[str, frozenset[str]], dict[int, _Match]] = {}
        """The processes that may serve a FUSE mount, keyed by the mount and the names of the
        guest's images."""

    def expect(self, ends: Iterable[int], mounts: Iterable[Mount] = ()) -> None:
        """Announce which servers will be read, so that search() can find them earlier. `ends`: the
        inodes of the servers' sockets."""
        self._missing_ends = frozenset(ends)
        self._connections = self._since(_connections_of(mounts).values())

    def search(self) -> None:
        """Continue the search for servers that were not found yet. May run in any thread."""
        if missing := self._missing_ends:
            self._finder.go_on(missing)
        if connections := self._connections:
            self._fuse_finder.go_on(connections)

    @property
    def searches(self) -> bool:
        """Return whether servers that the last sample lacks are still being searched for."""
        return self._finder.searches(self._missing_ends) or self._fuse_finder.searches(
            self._connections
        )

    def read(
        self, ends: Mapping[int, str | None], storage: StorageTable, sockets: SocketTable
    ) -> dict[int, Peer]:
        """Sample the server of each connection, if it was found.

        `ends`: the export that the guest requested over each connection, keyed by the inode of the
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

        `names`: the names of the guest's images on each mount, keyed by its MAJOR:MINOR.
        """
        self._used_pids = []
        self._new_missing_ends, self._new_connections = _NONE, {}
        self._sampled, self._links, self._room = {}, {}, MAX_PLACES
        self._limit = MAX_PEERS + OWN_PEERS
        # Scripts are replaced by others from sample to sample.
        ended = [pid for pid in self._readers if not (self._proc / str(pid)).exists()]
        self._close_readers(ended)
        self._open_files = sum(reader.open_files for reader in self._readers.values())
        self._budget.renew()
        tables = _SampleTables(storage, sockets)
        owners = self._read(ends, tables)
        owners = {end: pid for end, pid in owners.items() if pid != self._pid}
        fuse = self._read_fuse(mounts, names, tables)
        self._limit = MAX_PEERS
        chains = {pid: self._with_behind(self._sampled[pid], tables) for pid in owners.values()}
        values = {end: self._placed(chains[pid]) for end, pid in owners.items()}
        served = {
            number: _SampledServers(
                tuple(self._placed(self._with_behind(one, tables)) for one in peers), certain
            )
            for number, (peers, certain) in fuse.items()
        }
        self._missing_ends = self._new_missing_ends
        self._connections = self._new_connections
        # Close unused readers, so that they do not pile up: a server that forks for each connection
        # has a new process after each reconnect.
        self._close_readers(self._readers.keys() - set(self._used_pids))
        return values, tuple(_with_servers(mount, served) for mount in mounts)

    def close_files(self) -> None:
        """Close files; the next read opens them again."""
        for reader in self._readers.values():
            reader.close_files()

    def close(self) -> None:
        self._close_readers(tuple(self._readers))

    def _close_readers(self, pids: Iterable[int]) -> None:
        for pid in pids:
            self._readers.pop(pid).close()

    def _read(self, ends: Mapping[int, str | None], tables: _SampleTables) -> dict[int, int]:
        """Sample the servers at these ends, except those that were already read for the present
        sample. Return the process id of each end, if its server was sampled or is the guest's own
        process."""
        owners = self._finder.find(ends) if ends else {}
        self._new_missing_ends |= ends.keys() - owners.keys()
        own_ends: dict[int, dict[int, str | None]] = {}
        for end, pid in owners.items():
            own_ends.setdefault(pid, {})[end] = ends[end]
        for pid in own_ends.keys() - self._sampled.keys() - {self._pid}:
            if (peer := self._sample(pid, tables, own_ends[pid])) is not None:
                self._sampled[pid] = peer
        known = {self._pid, *self._sampled}
        return {end: owners[end] for end in ends if owners.get(end) in known}

    def _sample(
        self,
        pid: int,
        tables: _SampleTables,
        ours: Mapping[int, str | None] | None,
        names: frozenset[str] = frozenset(),
    ) -> Peer | None:
        reader = self._reader(pid)
        if reader is None:
            return None
        self._open_files -= reader.open_files
        peer = reader.read(*tables, ours, names)
        if peer is None:
            self._readers.pop(pid).close()
        if self._open_files + reader.open_files > KEPT_FILES:
            reader.close_files()
        self._open_files += reader.open_files
        return peer

    def _with_behind(self, server: Peer, tables: _SampleTables) -> Peer:
        """Add the servers that this server uses itself, and the servers that those use, up to HOPS
        levels. Each process is added only once, although there may be many ways to it."""
        seen = {self._pid, server.pid}
        level, behind, unknown = [server.pid], dict[int, list[int]](), set[int]()
        served = Counter[int]()
        for _ in range(HOPS):
            following: list[int] = []
            for pid in level:
                links = self._links_of(pid, tables)
                served.update(links.pids)
                behind[pid] = [one for one in links.pids if one not in seen]
                seen.update(behind[pid])
                following += behind[pid]
                if links.unknown:
                    unknown.add(pid)
            level = following
        unknown |= {pid for pid in level if self._may_use_servers(pid)}

        def build(peer: Peer) -> Peer:
            others = []
            for pid in behind.get(peer.pid, ()):
                other, links = build(self._sampled[pid]), self._links[peer.pid]
                # If several of these processes use a server, it serves none of them alone.
                serves = links.mounts.get(pid, ()) if served[pid] == 1 else ()
                others.append(replace(other, serves=serves, certain=pid not in links.uncertain))
            return replace(peer, behind=tuple(others), behind_unknown=peer.pid in unknown)

        return build(server)

    def _may_use_servers(self, pid: int) -> bool:
        if (reader := self._readers.get(pid)) is None:
            return True
        return bool(reader.upstream or reader.upstream_unknown or _connections_of(reader.mounts))

    def _links_of(self, pid: int, tables: _SampleTables) -> _Links:
        """Find and sample the servers that a server uses itself. If this was already done for the
        present sample, return the same result."""
        if (links := self._links.get(pid)) is not None:
            return links
        if (reader := self._readers.get(pid)) is None:
            return _Links((), True, {}, _NONE)
        ends = dict.fromkeys(reader.upstream)
        owners = self._read(ends, tables)
        pids = dict.fromkeys(owners.values())
        served = self._fuse_servers(reader.mounts, reader.names, {self._pid, pid})
        mounts: dict[int, tuple[str, ...]] = {}
        certain, missing = set(pids), set(_connections_of(reader.mounts))
        for number, servers in served.items():
            names = reader.names.get(number, frozenset())
            for other in servers.pids:
                peer = self._sampled.get(other) or self._sample(other, tables, None, names)
                if peer is not None:
                    self._sampled[other] = peer
                    missing.discard(number)
                    mounts[other] = (*mounts.get(other, ()), number)
                    certain.update({other} if servers.certain else ())
        for other in self._children(pid):
            peer = self._sampled.get(other)
            has_room = other in self._readers or len(self._readers) < MAX_BEFORE_CHILDREN
            if peer is None and has_room:
                peer = self._sample(other, tables, None)
            if peer is not None:
                self._sampled[other] = peer
                mounts.setdefault(other, ())
        links = self._links[pid] = _Links(
            pids=(*pids, *(other for other in mounts if other not in pids)),
            unknown=reader.upstream_unknown or bool(missing or ends.keys() - owners.keys()),
            mounts={other: numbers for other, numbers in mounts.items() if other not in pids},
            uncertain=frozenset(mounts.keys() - certain),
        )
        return links

    def _children(self, pid: int) -> list[int]:
        """Return processes that the server has started and may wait for, as nbdkit waits for its
        scripts. Nothing shows whether these processes work for this guest. Return [] if the
        server has threads that wait for something else."""
        server = self._sampled.get(pid)
        if server is None or server.threads:
            return []
        # Sort by age: newer processes have greater pids, until the pids wrap.
        started = sorted(child for child in read_children(pid, self._proc) if child != self._pid)
        if len(started) <= 2 * MAX_CHILDREN:
            return started
        return [*started[:MAX_CHILDREN], *started[-MAX_CHILDREN:]]

    def _placed(self, server: Peer) -> Peer:
        """Return the server, but without the servers behind it if the sample has no room for
        them."""
        size = _size(server) - 1
        if size > self._room:
            return replace(server, behind=(), behind_unknown=True)
        self._room -= size
        return server

    def _read_fuse(
        self, mounts: Iterable[Mount], names: Mapping[str, frozenset[str]], tables: _SampleTables
    ) -> dict[str, _SampledServers]:
        """Sample the servers of FUSE mounts, but not the servers behind them. The result is keyed
        by the mount's MAJOR:MINOR."""
        served = {}
        for number, servers in self._fuse_servers(mounts, names, {self._pid}).items():
            wanted = names.get(number, frozenset())
            sampled = [self._sample(pid, tables, None, wanted) for pid in servers.pids]
            peers = tuple(peer for peer in sampled if peer is not None)
            if peers or not servers.pids:
                served[number] = _SampledServers(peers, servers.certain)
        return served

    def _fuse_servers(
        self, mounts: Iterable[Mount], names: Mapping[str, frozenset[str]], downstream: set[int]
    ) -> dict[str, FuseServers]:
        """Find the servers of FUSE mounts, keyed by the mount's MAJOR:MINOR. If too many processes
        may serve a mount, and their files do not show which of them do, its FuseServers are empty.
        `downstream`: the processes that use the mounts, and so cannot serve them."""
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
            if len(pids) > MAX_SERVERS and not servers.certain:
                # There are too many processes to sample all, so choose those that have files with
                # the names of the images. A name proves nothing: gocryptfs changes names, and
                # anybody can open /dev/fuse and a file of that name.
                matching = self._matching(number, pids, names.get(number, frozenset()), end)
                if matching is None:
                    continue
                pids = matching
            is_known = len(pids) <= MAX_SERVERS
            served[number] = (
                FuseServers(tuple(pids), servers.certain) if is_known else FuseServers((), False)
            )
        return served

    def _since(self, connections: Iterable[int]) -> dict[int, float]:
        """Return when each FUSE connection was first seen (time.monotonic())."""
        now = time.monotonic()
        return {number: self._connections.get(number, now) for number in connections}

    def _matching(
        self, number: str, pids: Sequence[int], names: frozenset[str], end: float
    ) -> list[int] | None:
        """Return the processes that have an open file with one of these names; None until all were
        checked.

        Every REFRESH_S, this costs 4 µs for each descriptor. Any user can have many processes, so
        checking stops at `end` (time.monotonic()), and the next sample continues.
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
            return None
        return [pid for pid in pids if matches[pid].opens]

    def _reader(self, pid: int) -> PeerReader | None:
        if pid not in self._readers and len(self._readers) < self._limit:
            self._readers[pid] = PeerReader(pid, self._budget, self._proc, self._pid)
        self._used_pids.append(pid)
        return self._readers.get(pid)


def _connections_of(mounts: Iterable[Mount]) -> dict[str, int]:
    """Return the FUSE connection of each mount, keyed by its MAJOR:MINOR."""
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


def _size(server: Peer) -> int:
    return 1 + sum(map(_size, server.behind))


def _opens(pid: int, names: frozenset[str], proc: Path) -> bool:
    """Return whether the process has an open file with one of these names."""
    descriptors = read_descriptors(pid, proc)
    files = () if descriptors is None else descriptors.files
    return any(file_name(path) in names for _, path in files)
