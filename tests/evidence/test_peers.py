"""Servers on this host: their processes, their images' storage, and the servers behind them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qkilld.evidence import peers
from qkilld.evidence.exports import WaitBudget
from qkilld.evidence.fuse import FuseFinder
from qkilld.evidence.kept_file import kept_files
from qkilld.evidence.peer_finder import PeerFinder
from qkilld.evidence.peer_reader import PeerReader
from qkilld.evidence.peers import ServerReader
from qkilld.evidence.sockets import SocketReader, SocketTable
from qkilld.evidence.storage import StorageTable
from qkilld.model.sample import Peer
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.nbd import NbdClient, NbdStore, nbd_store
from tests.lab.process import end, spawn


def end_of(connection: socket.socket) -> int:
    """Return the inode of the other end."""
    unix = SocketTable().unix(os.fstat(connection.fileno()).st_ino)
    assert unix is not None
    return unix.peer


def server_of(inode: int, wanted: Callable[[Peer], object] = bool) -> Peer:
    reader = ServerReader(os.getpid(), PeerFinder(), FuseFinder())

    def read() -> Peer | None:
        return reader.read({inode: None}, StorageTable(), SocketTable()).get(inode)

    with contextlib.closing(reader):
        found = until(read, lambda peer: peer is not None and wanted(peer))
        assert found is not None
        return found


@contextlib.contextmanager
def connected(store: NbdStore, export: str = "") -> Iterator[socket.socket]:
    with contextlib.closing(NbdClient(store.address, export)) as client:
        yield client.connection


@pytest.fixture
def image(lab_dir: Path) -> Path:
    path = lab_dir / "disk"
    path.touch()
    os.truncate(path, 1 << 20)
    return path


@pytest.mark.parametrize("count", [4, 8, 50])
def test_the_oldest_and_newest_processes_of_a_server_with_several_threads(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The kernel lists processes by the thread that has started them, not by age. A process with a
    long flush is older than the short scripts that other requests start meanwhile."""
    pids = list(range(10, 10 + count))
    monkeypatch.setattr(peers, "read_children", lambda pid, proc: pids[1::2] + pids[::2])
    with contextlib.closing(ServerReader(os.getpid(), PeerFinder(), FuseFinder())) as reader:
        reader._sampled[5] = Peer(5, "nbdkit", (), None, None, None)
        expected = pids if count <= 4 else [*pids[:2], *pids[-2:]]
        assert reader._children(5) == expected


class FakePeerReader:
    """Server 5000 uses the server at the end 99; no other process uses a server."""

    upstream_unknown, mounts, names, open_files = False, (), dict[str, frozenset[str]](), 0

    def __init__(self, pid: int, budget: object, proc: object, guest: int) -> None:
        self.pid = pid
        self.upstream = [99] if pid == 5000 else []

    def read(self, *args: object) -> Peer:
        return Peer(self.pid, "nbdkit", (), 1, None, ())

    def close(self) -> None: ...

    close_files = close


class FakePeerFinder:
    def __init__(self) -> None:
        self.owners = {end: end * 1000 for end in range(1, 6)}

    def find(self, ends: Iterable[int]) -> dict[int, int]:
        return {end: self.owners[end] for end in ends if end in self.owners}


@pytest.mark.parametrize("is_found_late", [False, True])
@pytest.mark.parametrize("commands", [1, 4])
def test_processes_that_servers_have_started_leave_room_for_the_servers_behind_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commands: int, is_found_late: bool
) -> None:
    """Each of five servers has eight scripts, and each script runs some commands. At each sample,
    there are other scripts."""
    scripts = 0

    def children(pid: int, proc: Path) -> list[int]:
        digits = len(str(pid))
        if digits == 4:
            return [pid * 10 + scripts + number for number in range(8)]
        return [pid * 10 + number for number in range(commands)] if digits < 6 else []

    monkeypatch.setattr(peers, "PeerReader", FakePeerReader)
    monkeypatch.setattr(peers, "read_children", children)
    for pid in (9, *range(1000, 6000, 1000)):
        (tmp_path / str(pid)).mkdir()
    finder: Any = FakePeerFinder()
    with contextlib.closing(ServerReader(1, finder, FuseFinder(), tmp_path)) as reader:
        for sample in range(3):
            scripts = sample % 2
            if sample == 2 or not is_found_late:
                finder.owners[99] = 9
            found = reader.read(dict.fromkeys(range(1, 6)), StorageTable(), SocketTable())
            behind = {end: [peer.pid for peer in server.behind] for end, server in found.items()}
            assert behind[1] == [10000 + scripts + number for number in (0, 1, 6, 7)]
            assert (9 in behind[5]) == (99 in finder.owners)
            if commands == 1:
                assert len(behind[5]) == 4 + (99 in finder.owners)


def test_a_server_and_the_one_behind_it(image: Path) -> None:
    with (
        nbd_store(image) as store,
        nbd_store(image, upstream=store) as front,
        connected(front) as connection,
    ):
        peer = server_of(end_of(connection), lambda peer: peer.behind)
        assert front.process is not None and store.process is not None
        assert (peer.pid, peer.shared) == (front.process.pid, False)
        (behind,) = peer.behind
        assert (behind.pid, behind.shared, behind.behind) == (store.process.pid, False, ())


SERVER = """
import socket, sys
names = [name.replace("@", chr(0)) for name in sys.argv[2:]]
listener = socket.socket(socket.AF_UNIX)
listener.bind(names[0])
listener.listen()
other = socket.socket(socket.AF_INET, socket.SOCK_STREAM, int(sys.argv[1]))
connections = [socket.socket(socket.AF_UNIX) for _ in names[1:]]
for connection, name in zip(connections, names[1:]):
    connection.connect(name)
print(flush=True)
while True:
    connections.append(listener.accept()[0])
"""


@contextlib.contextmanager
def running_server(*names: str, protocol: int = 0) -> Iterator[int]:
    """Run a server that listens on the first of these unix sockets ("@": abstract), is connected to
    the others, and has a TCP socket of this protocol. Yield its process id."""
    argv = [sys.executable, "-c", SERVER, str(protocol), *names]
    process = spawn(argv, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process.pid
    finally:
        end(process)


@contextlib.contextmanager
def layers_of_servers(directory: Path, *sizes: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Run layers of servers. Each server is connected to all servers of the previous layer. Yield
    the path of the only one in the last layer, and the process ids of each layer."""
    with contextlib.ExitStack() as stack:
        paths: list[str] = []
        pids: list[list[int]] = []
        for layer, size in enumerate((*sizes, 1)):
            behind, paths = paths, [f"{directory}/{layer}-{number}" for number in range(size)]
            servers = [running_server(path, *behind) for path in paths]
            pids.append([stack.enter_context(server) for server in servers])
        yield paths[0], pids


@contextlib.contextmanager
def connected_to(path: str) -> Iterator[int]:
    """Connect to a server; yield the inode of the server's end."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        yield until(lambda: end_of(connection), bool)


def pids_of(peer: Peer) -> list[int]:
    """Return the server's process id, and those of all servers behind it."""
    return [peer.pid, *(pid for other in peer.behind for pid in pids_of(other))]


def test_each_server_is_sampled_once_and_has_one_place(
    lab_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, count = PeerReader.read, 0

    def counted(self: PeerReader, *args: Any) -> Peer | None:
        nonlocal count
        count += 1
        return read(self, *args)

    monkeypatch.setattr(PeerReader, "read", counted)
    with (
        layers_of_servers(lab_dir, 4, 4) as (path, layers),
        contextlib.closing(ServerReader(os.getpid(), PeerFinder(), FuseFinder())) as reader,
        socket.socket(socket.AF_UNIX) as one,
        socket.socket(socket.AF_UNIX) as other,
    ):
        one.connect(path)
        other.connect(path)
        first_end = until(lambda: end_of(one), bool)
        ends: dict[int, str | None] = {first_end: None, until(lambda: end_of(other), bool): None}
        every = sorted(pid for layer in layers for pid in layer)

        def read_both() -> list[Peer]:
            nonlocal count
            count = 0
            return list(reader.read(ends, StorageTable(), SocketTable()).values())

        found = until(read_both, lambda found: any(len(pids_of(peer)) == 9 for peer in found))
        assert [sorted(pids_of(peer)) for peer in found] == [every, every]
        assert count == 9
        # If there is no room for all, the servers behind the second connection are unknown.
        monkeypatch.setattr(peers, "MAX_PLACES", 8)
        first, second = read_both()
        assert sorted(pids_of(first)) == every
        assert (second.pid, second.behind, second.behind_unknown) == (first.pid, (), True)


def chain_of(peer: Peer) -> list[Peer]:
    """Return the server and, in order, the servers behind it."""
    return [peer, *(one for other in peer.behind for one in chain_of(other))]


def test_servers_too_far_behind_are_unknown(lab_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with layers_of_servers(lab_dir, 1, 1, 1) as (path, _), connected_to(path) as inode:
        whole = chain_of(server_of(inode, lambda peer: len(pids_of(peer)) == 4))
        assert not any(one.behind_unknown for one in whole)
        monkeypatch.setattr(peers, "HOPS", 2)
        part = chain_of(server_of(inode, lambda peer: len(pids_of(peer)) == 3))
        assert [one.behind_unknown for one in part] == [False, False, True]


@pytest.mark.parametrize(("protocol", "unknown"), [(0, False), (socket.IPPROTO_MPTCP, True)])
def test_a_server_whose_connections_cannot_be_read(
    lab_dir: Path, protocol: int, unknown: bool
) -> None:
    """The kernel does not list an MPTCP socket among the TCP sockets, although it may be a
    connection to another server."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol).close()
    except OSError as error:
        raise needs.Missing(f"MPTCP: {error}. Set the sysctl net.mptcp.enabled to 1") from None
    path = str(lab_dir / "s")
    with running_server(path, protocol=protocol), connected_to(path) as inode:
        assert server_of(inode).behind_unknown is unknown


def test_a_service_of_the_system_is_no_server_of_a_server(lab_dir: Path) -> None:
    bus, path = f"@/tmp/dbus-{os.getpid()}", str(lab_dir / "s")
    with running_server(bus), running_server(path, bus), connected_to(path) as inode:
        for _ in range(3):
            peer = server_of(inode)
            assert (peer.behind, peer.behind_unknown) == ((), False)


def test_a_server_that_has_not_accepted_the_connection_of_a_server(lab_dir: Path) -> None:
    hung, path = str(lab_dir / "hung"), str(lab_dir / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(hung)
        listener.listen()
        with running_server(path, hung), connected_to(path) as inode:
            assert server_of(inode).behind_unknown


def open_below(pids: list[int]) -> int:
    """Return how many of our descriptors are in the directories of these processes in /proc."""
    places = {("/", "proc", str(pid)) for pid in pids}
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        # The descriptor with which iterdir() has listed the directory is closed by now.
        with contextlib.suppress(FileNotFoundError):
            links.append(entry.readlink())
    return sum(link.parts[:3] in places for link in links)


def test_descriptors_of_servers_are_counted_closed_and_few(
    lab_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "KEPT_FILES", 12)
    before = kept_files()
    with (
        layers_of_servers(lab_dir, 3, 3) as (path, layers),
        contextlib.closing(ServerReader(os.getpid(), PeerFinder(), FuseFinder())) as reader,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        connection.connect(path)
        pids = [pid for layer in layers for pid in layer]
        ends: dict[int, str | None] = {until(lambda: end_of(connection), bool): None}

        def read() -> list[Peer]:
            return list(reader.read(ends, StorageTable(), SocketTable()).values())

        for _ in range(2):
            (peer,) = until(read, lambda found: found and len(pids_of(found[0])) == 7)
            assert 0 < open_below(pids) == kept_files() - before <= 12
            reader.close_files()
            assert open_below(pids) == kept_files() - before == 0
        assert peer.threads is not None
    assert kept_files() == before


def test_a_process_id_that_is_used_again_while_files_are_closed(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    (proc / "7/task/7").mkdir(parents=True)
    fields = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()

    def write_stat(start_time: int) -> None:
        (proc / "7/stat").write_text(
            f"7 (s) {' '.join((*fields[:19], str(start_time), *fields[20:]))}"
        )

    write_stat(100)
    reader = PeerReader(7, WaitBudget(), proc)
    assert reader.read(StorageTable(), SocketTable(), None) is not None
    reader.close_files()
    assert reader.read(StorageTable(), SocketTable(), None) is not None
    reader.close_files()
    write_stat(200)
    assert reader.read(StorageTable(), SocketTable(), None) is None
    reader.close()


def test_bytes_that_a_stopped_server_has_not_read(image: Path) -> None:
    with nbd_store(image) as store, connected(store) as connection:
        assert server_of(end_of(connection)).unread == 0
        store.freeze()
        connection.sendall(bytes(28))
        assert server_of(end_of(connection)).unread == 28


def test_a_server_that_others_use_too(image: Path) -> None:
    """All of its clients use the same image, so its storage is known."""
    with nbd_store(image) as store, connected(store) as connection:
        assert server_of(end_of(connection)).shared is False
        with connected(store):
            peer = server_of(end_of(connection))
            assert peer.shared is True
            assert peer.devices is not None
            assert set(peer.place) <= {device.number for device in peer.devices}


def test_servers_that_are_used_no_more_are_let_go(image: Path) -> None:
    """The finder must forget these servers, to have room for the next ones."""
    finder = PeerFinder()
    with (
        contextlib.closing(ServerReader(os.getpid(), finder, FuseFinder())) as reader,
        nbd_store(image) as store,
        connected(store) as connection,
    ):
        before = os.listdir("/proc/self/fd")  # noqa: PTH208
        ends: dict[int, str | None] = {end_of(connection): None}
        assert until(lambda: reader.read(ends, StorageTable(), SocketTable()), bool)
        assert len(os.listdir("/proc/self/fd")) > len(before)  # noqa: PTH208
        assert reader.read({}, StorageTable(), SocketTable()) == {}
        assert len(os.listdir("/proc/self/fd")) == len(before)  # noqa: PTH208


CLIENT = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
client.send(b"x" * 1000)
print(flush=True)
input()
"""


def wait_for_listener(path: Path) -> None:
    """Wait without a connection, because some servers accept only one."""
    until(lambda: SocketTable().listens(lambda name: name == bytes(path)), bool)


def test_a_server_that_exits_with_its_client_and_one_forked_for_it(lab_dir: Path) -> None:
    with contextlib.ExitStack() as stack:
        image = lab_dir / "disk"
        image.write_bytes(bytes(1 << 20))
        path = lab_dir / "socket"
        nbd = spawn([needs.program("qemu-nbd", "qemu-utils"), "-f", "raw", "-k", path, image])
        stack.callback(end, nbd)
        wait_for_listener(path)
        client = stack.enter_context(contextlib.closing(NbdClient(str(path), "")))
        peer = server_of(end_of(client.connection))
        assert (peer.pid, peer.parent, peer.leaves) == (nbd.pid, 0, True)
        forks = f"UNIX-LISTEN:{lab_dir / 'forks'},fork"
        socat = spawn([needs.program("socat", "socat"), forks, "EXEC:cat"])
        stack.callback(end, socat)
        wait_for_listener(lab_dir / "forks")
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.connect(str(lab_dir / "forks"))
        inode = until(lambda: end_of(connection), bool)
        peer = server_of(inode, lambda peer: peer.pid != socat.pid)
        assert (peer.parent, peer.leaves) == (socat.pid, True)


def test_a_server_here_of_a_process_in_another_network_namespace(lab_dir: Path) -> None:
    needs.root("a network namespace")
    unshare = needs.program("unshare", "util-linux")
    path = lab_dir / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        argv: list[str | Path] = [unshare, "--net", sys.executable, "-c", CLIENT, path]
        child = spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            accepted, _ = listener.accept()
            assert child.stdout is not None
            assert child.stdout.readline()
            reader = SocketReader(child.pid)
            reader.refresh()
            with accepted:
                (found,) = reader.read(SocketTable()) or ()
                assert (found.family, found.client) == ("unix", True)
                inode = os.fstat(accepted.fileno()).st_ino
                assert reader.peers((found,), SocketTable()) == {found.inode: inode}
                # The server's own sockets do not show where this connection leads, or whether there
                # are other connections.
                server = SocketReader(os.getpid())
                server.refresh()
                server.read(SocketTable())
                assert inode in server.hidden(SocketTable())
        finally:
            end(child)


def test_a_connection_under_the_descriptor_of_another(lab_dir: Path) -> None:
    """libiscsi reconnects like this: the number of descriptors does not change."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        accepted = [listener.accept()[0]]
        reader = SocketReader(os.getpid())
        reader.refresh()
        table = SocketTable()
        inodes = {found.inode for found in reader.read(table) or ()}
        assert os.fstat(first.fileno()).st_ino in inodes
        second = socket.create_connection(listener.getsockname())
        accepted.append(listener.accept()[0])
        with first, second, accepted[0], accepted[1]:
            inode = os.fstat(second.fileno()).st_ino
            os.dup2(second.fileno(), first.fileno())
            assert inode not in {found.inode for found in reader.read(SocketTable()) or ()}
            assert reader.lost
            reader.refresh()
            assert inode in {found.inode for found in reader.read(SocketTable()) or ()}
