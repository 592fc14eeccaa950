"""The connections of real processes, from sock_diag."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.evidence import sockdiag, sockets
from qkilld.evidence.command_line import GraphReader
from qkilld.evidence.sockets import SocketReader, SocketTable
from qkilld.model.sample import Socket
from tests.evidence.trees import lay
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bare import bare_guest
from tests.lab.guest import Guest, start_qemu
from tests.lab.nbd import nbd_store
from tests.lab.netns import NetworkNamespace
from tests.lab.process import OTHER_UID, TOP, end, spawn
from tests.lab.storage import NbdServer, nbd_server


class Monitor:
    """A QMP connection that makes QEMU read and write its disk d0."""

    def __init__(self, guest: Guest) -> None:
        assert guest.qmp is not None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(guest.qmp))
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: str) -> object:
        request = {"execute": name, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "event" not in answer:
                return answer["return"]

    def io(self, command: str) -> None:
        """Run a qemu-io command."""
        self.command("human-monitor-command", **{"command-line": f'qemu-io d0 "{command}"'})

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@contextlib.contextmanager
def qemu_over_nbd(directory: Path, *, tcp: bool) -> Iterator[tuple[NbdServer, Guest, Monitor]]:
    image = directory / "disk"
    image.touch()
    with (
        nbd_server(image, tcp=tcp, room=64 << 20) as server,
        start_qemu(arguments=["-drive", f"file={server.uri},if=none,id=d0,format=raw"]) as guest,
        contextlib.closing(Monitor(guest)) as monitor,
    ):
        yield server, guest, monitor


def read(pid: int) -> tuple[Socket, ...]:
    reader = SocketReader(pid)
    reader.refresh()
    found = reader.read(SocketTable())
    assert found is not None
    return found


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_qemu_over_nbd(lab_dir: Path, tcp: bool) -> None:
    with qemu_over_nbd(lab_dir, tcp=tcp) as (server, guest, monitor):
        reader = SocketReader(guest.pid)
        reader.refresh()

        def connections() -> tuple[Socket, Socket]:
            """Return the connection to the server, and that to the monitor."""
            found = reader.read(SocketTable())
            assert found is not None
            one, other = sorted(found, key=lambda s: not s.client)
            assert one.client
            assert not other.client
            assert (one.family, other.family) == ("tcp" if tcp else "unix", "unix")
            return one, other

        idle, _ = connections()
        assert (idle.send_queue, idle.receive_queue) == (0, 0)
        monitor.io("write 0 1M")
        written, _ = connections()
        assert written.send_queue == 0
        if tcp:
            assert idle.acked is not None and written.acked is not None
            assert idle.received is not None and written.received is not None
            assert written.acked - idle.acked >= 1 << 20
            assert written.received - idle.received >= 16  # a reply to one request
            assert written.unacked == 0
        else:
            assert (written.acked, written.received, written.unacked) == (None, None, None)

        server.freeze()
        monitor.io("aio_write 0 32M")
        monitor.command("query-status")  # QEMU's main loop has run once more.
        frozen, _ = connections()
        assert frozen.send_queue > 0
        server.thaw()
        monitor.io("aio_flush")
        thawed, _ = connections()
        assert thawed.send_queue == 0
        if tcp:
            assert written.acked is not None
            assert frozen.acked is not None and thawed.acked is not None
            assert thawed.acked > frozen.acked
            assert thawed.acked - written.acked >= 32 << 20


def test_a_server_that_is_gone(lab_dir: Path) -> None:
    with qemu_over_nbd(lab_dir, tcp=False) as (server, guest, _):
        assert [s.client for s in read(guest.pid) if s.client] == [True]
        end(server.process)
        assert not [s for s in read(guest.pid) if s.client]


def inode(of: socket.socket) -> int:
    return os.fstat(of.fileno()).st_ino


def send(client: socket.socket, data: bytes) -> None:
    """Send data over TCP. Wait until the data is acknowledged, so that nothing changes
    afterwards."""
    client.send(data)
    until(lambda: fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)), lambda queue: queue == bytes(4))


def own() -> dict[int, Socket]:
    return {s.inode: s for s in read(os.getpid())}


def test_the_connecting_side_on_unix(lab_dir: Path) -> None:
    path = str(lab_dir / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path)
        server.listen()
        assert inode(server) not in own()
        assert inode(client) not in own()
        client.connect(path)
        client.send(b"x" * 1000)
        # Not yet accepted.
        assert own()[inode(client)].client
        assert own()[inode(client)].send_queue >= 1000
        accepted, _ = server.accept()
        with accepted:
            found = own()
            assert found[inode(client)].client
            assert not found[inode(accepted)].client
            assert (found[inode(client)].accepted, found[inode(accepted)].accepted) == (False, True)
            assert found[inode(accepted)].receive_queue == 1000
            assert found[inode(client)].send_queue >= 1000
            server.close()
            assert not own()[inode(accepted)].accepted  # Perhaps it came from another process.
        assert inode(client) not in own()


def test_output_to_a_log(lab_dir: Path) -> None:
    """systemd connects a service's standard output to the journal like this: nothing can be
    received."""
    path = str(lab_dir / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path)
        server.listen()
        client.connect(path)
        accepted, _ = server.accept()
        with accepted:
            client.shutdown(socket.SHUT_WR)
            assert own()[inode(client)].client
            client.shutdown(socket.SHUT_RD)
            assert inode(client) not in own()


def test_socket_pairs_and_datagram_sockets() -> None:
    one, other = socket.socketpair()
    datagrams = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other, datagrams[0], datagrams[1], socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.connect(("127.0.0.1", 9))
        found = own()
        assert not found[inode(one)].client
        assert not found[inode(other)].client
        assert not (found[inode(one)].accepted or found[inode(other)].accepted)
        assert not {inode(datagrams[0]), inode(udp)} & found.keys()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_connecting_side_on_tcp(family: socket.AddressFamily) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family) as server, socket.socket(family) as client:
        try:
            server.bind((host, 0))
        except OSError:
            pytest.xfail(f"this machine has no {host}")
        server.listen()
        client.connect(server.getsockname())
        accepted, _ = server.accept()
        with accepted:
            reader = SocketReader(os.getpid())
            reader.refresh()
            # In the second round, the reader already knows where the sockets are.
            for _ in range(2):
                found = {s.inode: s for s in reader.read(SocketTable()) or ()}
                assert inode(server) not in found
                assert found[inode(client)].client
                assert not found[inode(accepted)].client
                assert not found[inode(client)].accepted
                assert found[inode(accepted)].accepted
            send(client, b"x" * 1000)
            found = {s.inode: s for s in reader.read(SocketTable()) or ()}
            assert found[inode(accepted)].receive_queue == 1000
            assert found[inode(accepted)].received == 1000
            assert found[inode(client)].acked == 1001  # The handshake counts as one byte.
            assert found == own()
            client.shutdown(socket.SHUT_WR)
            found = {s.inode: s for s in reader.read(SocketTable()) or ()}
            assert not {inode(client), inode(accepted)} & found.keys()


def test_one_by_one_and_all_at_once_are_alike() -> None:
    """A table queries single TCP sockets at first. After some queries, it reads all at once."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for _ in range(sockdiag._CHEAPER):
            client = stack.enter_context(socket.create_connection(server.getsockname()))
            send(client, b"x")
            stack.enter_context(server.accept()[0])
        reader = SocketReader(os.getpid())
        reader.refresh()
        first = reader.read(SocketTable())
        assert first is not None
        assert len([s for s in first if s.family == "tcp"]) == 2 * sockdiag._CHEAPER
        assert reader.read(SocketTable()) == first


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_crowded_table_tells_the_same(
    host: str, lab_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user with many sockets must not hide the sockets of others."""
    path = str(lab_dir / "s")
    with contextlib.ExitStack() as stack:
        for end in socket.socketpair():
            stack.enter_context(end)
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(path)
        server.listen()
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(path)
        client.send(b"x")
        stack.enter_context(server.accept()[0])
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tcp = stack.enter_context(socket.socket(family))
        if family == socket.AF_INET6:
            tcp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        tcp.bind((host, 0))
        tcp.listen()
        for _ in range(2):
            made = stack.enter_context(socket.socket(family))
            made.connect(tcp.getsockname())
            send(made, b"xy")
            stack.enter_context(tcp.accept()[0])
        port = tcp.getsockname()[1]
        free = stack.enter_context(socket.socket())
        free.bind(("127.0.0.1", 0))

        def told() -> list[object]:
            # The first read of a socket scans the whole table, the second does not.
            reader = SocketReader(os.getpid())
            reader.refresh()
            found: list[object] = []
            for _ in range(2):
                table = SocketTable(crowd)
                read = reader.read(table)
                assert read is not None
                found += [read, reader.peers(read, table), reader.accepted]
                found += [table.listens_at(inode(s)) for s in (server, client, tcp)]
                found += [table.has_unix(inode(s)) for s in (server, client, tcp)]
                found += [table.listens(b.__eq__) for b in (os.fsencode(path), b"no such")]
                found += [table.listens_on(p) for p in (port, free.getsockname()[1])]
            return found

        crowd = sockdiag.CrowdedTables()
        whole = told()
        assert socket.AF_UNIX not in crowd and socket.AF_INET not in crowd
        assert len(whole[1]) >= 6, whole[1]  # type: ignore[arg-type]
        monkeypatch.setattr(sockdiag, "MAX_SOCKETS", 1)
        assert told() == whole
        assert socket.AF_UNIX in crowd and socket.AF_INET in crowd


MANY = """
import resource, socket, sys
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
pairs = []
try:
    while len(pairs) < int(sys.argv[1]) // 2:
        pairs.append(socket.socketpair())
except OSError:
    pass
print(2 * len(pairs), flush=True)
input()
"""


def look_among_many() -> None:
    """Read two sockets of this process while other processes have more than MAX_SOCKETS."""
    one, other = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(one)
        stack.enter_context(other)
        count = 0
        while count <= sockdiag.MAX_SOCKETS + 100:
            argv = [sys.executable, "-c", MANY, str(sockdiag.MAX_SOCKETS)]
            child = spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(end, child)
            assert child.stdout is not None
            opened = int(child.stdout.readline())
            assert opened
            count += opened
        reader = SocketReader(os.getpid())
        reader.refresh()
        found = {s.inode for s in reader.read(SocketTable()) or ()}
        assert {inode(one), inode(other)} <= found


def test_many_sockets_of_another_user_hide_nothing() -> None:
    """This runs in its own network namespace, because so many sockets would crowd the tables of
    other tests."""
    script = "from tests.evidence.test_sockets import look_among_many; look_among_many()"
    with NetworkNamespace() as network:
        child = network.run(
            lambda: spawn([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(TOP)})
        )
        try:
            assert child.wait(300) == 0
        finally:
            end(child)


def test_a_crowded_table_takes_no_longer_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket.socketpair()
    with one, other:
        reader = SocketReader(os.getpid())
        reader.refresh()
        monkeypatch.setattr(sockdiag, "MAX_SOCKETS", 1)
        monkeypatch.setattr(sockdiag, "SINGLE_S", 0.0)
        assert reader.read(SocketTable()) is None


def test_a_kind_that_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """UDP takes the place of MPTCP and other protocols, because not every kernel has those."""
    monkeypatch.setattr(sockets, "_UNSEEN", frozenset({"UDP"}))
    with socket.socket(type=socket.SOCK_DGRAM):
        reader = SocketReader(os.getpid())
        reader.refresh()
        assert reader.read(SocketTable()) is None


def test_not_to_be_read() -> None:
    needs.root("to be another user")
    with start_qemu() as guest:
        reader = SocketReader(guest.pid)
        assert reader.read(SocketTable()) is None
        reader.refresh()
        assert reader.read(SocketTable()) == ()
        os.seteuid(OTHER_UID)
        try:
            reader.refresh()
        finally:
            os.seteuid(0)
        assert reader.read(SocketTable()) is None
        reader.refresh()
        assert reader.read(SocketTable()) == ()
    reader.refresh()
    assert reader.read(SocketTable()) is None


ELSEWHERE = """
import fcntl, socket, struct, sys
with socket.socket() as any:
    fcntl.ioctl(any, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS: up
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
accepted, _ = server.accept()
client.send(b"x" * 1000)
if sys.argv[1]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    unix = socket.socket(socket.AF_UNIX)
    unix.connect(sys.argv[1])
print(flush=True)
input()
"""


@pytest.mark.parametrize("unix", [False, True])
def test_in_another_network_namespace(lab_dir: Path, unix: bool) -> None:
    needs.root("a network namespace")
    unshare = needs.program("unshare", "util-linux")
    path = str(lab_dir / "s") if unix else ""
    argv: list[str | Path] = [unshare, "--net", sys.executable, "-c", ELSEWHERE, path]
    child = spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline()
        reader = SocketReader(child.pid)
        reader.refresh()
        found = reader.read(SocketTable())
        if unix:
            assert found is None
        else:
            assert found is not None
            assert {(s.family, s.client, s.receive_queue) for s in found} == {
                ("tcp", True, 0),
                ("tcp", False, 1000),
            }
    finally:
        end(child)


CONNECTED = """
import socket, sys
server = socket.socket(socket.AddressFamily[sys.argv[1]])
server.listen()
client = socket.create_connection(server.getsockname()[:2])
accepted, _ = server.accept()
print(flush=True)
input()
"""


@pytest.mark.parametrize("crowded", ["AF_UNIX", "AF_INET", "AF_INET6"])
@pytest.mark.parametrize("own", ["AF_INET", "AF_INET6"])
def test_more_than_is_read_of_another_network_namespace(
    monkeypatch: pytest.MonkeyPatch, crowded: str, own: str
) -> None:
    """A socket that may be beyond the limit is unknown, not missing."""

    def listener() -> socket.socket:
        made = crowd.enter_context(socket.socket(socket.AddressFamily[crowded]))
        if crowded == "AF_UNIX":
            made.bind("")  # The kernel chooses an abstract name.
        made.listen()
        return made

    argv = [sys.executable, "-c", CONNECTED, own]
    with NetworkNamespace() as namespace, contextlib.ExitStack() as crowd:
        for _ in range(100):
            namespace.run(listener)
        child = namespace.run(lambda: spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        crowd.callback(end, child)
        assert child.stdout is not None
        assert child.stdout.readline()
        reader = SocketReader(child.pid)
        reader.refresh()
        whole = reader.read(SocketTable())
        assert whole is not None
        assert sorted(s.client for s in whole) == [False, True]
        monkeypatch.setattr(sockets, "MAX_BYTES", 4000)
        # Only a socket for IPv6 can be in the file for IPv6.
        expected = whole if (crowded, own) == ("AF_INET6", "AF_INET") else None
        assert reader.read(SocketTable()) == expected


@pytest.mark.parametrize("forged", ["", "TCP", "UNIX"])
def test_line_feeds_in_names_in_another_network_namespace(forged: str) -> None:
    """After a line feed, the rest of a name looks like another row of the kernel's table. If such a
    row seems to be for a unix socket of the process, the process's connections are unknown."""
    script = "import socket\nown = socket.socket(socket.AF_UNIX)\nown.bind('')\nown.listen()\n"
    argv = [sys.executable, "-c", script + CONNECTED, "AF_INET"]
    with NetworkNamespace() as namespace, contextlib.ExitStack() as stack:
        child = namespace.run(lambda: spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        stack.callback(end, child)
        assert child.stdout is not None
        assert child.stdout.readline()
        rows = ["", "\n\r", "0: x", "0: 00000002 00000000 00000000 0001 03 1 /s\n"]
        for descriptor in Path(f"/proc/{child.pid}/fd").iterdir():
            link = str(descriptor.readlink())
            if link.startswith("socket:["):
                kind = os.getxattr(descriptor, "system.sockprotoname").decode().rstrip("\0")
                if forged and kind.startswith(forged):
                    rows.append(f"0: 00000002 00000000 00000000 0001 03 {link[8:-1]} /s")
        assert len(rows) == {"": 4, "TCP": 7, "UNIX": 5}[forged]
        for row in rows:
            forging = stack.enter_context(namespace.run(lambda: socket.socket(socket.AF_UNIX)))
            forging.bind(f"\0\n{row}")
        reader = SocketReader(child.pid)
        reader.refresh()
        found = reader.read(SocketTable())
        if forged == "UNIX":
            assert found is None
        else:
            assert found is not None
            assert [s.family for s in found] == ["tcp", "tcp"]


def test_without_proc(tmp_path: Path) -> None:
    reader = SocketReader(7, lay(tmp_path, {"7/fd/3": "->socket:[5]"}))
    reader.refresh()
    assert reader.read(SocketTable()) is None


def test_the_rest_of_an_answer_does_not_wait_for_the_next_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event loop may ask the next question. It would then have to read the rest: up to 500,000
    sockets."""
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)
    monkeypatch.setattr(sockdiag, "namespace_of", "self")
    monkeypatch.setattr(sockdiag, "_netlink", None)
    sockdiag.ask_through(kernel.detach())
    ours = sockdiag._netlink
    assert ours is not None
    with contextlib.ExitStack() as stack:
        stack.callback(ours.close)
        for number in range(20):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(f"\0qkilld-{os.getpid()}-{number}")
            listener.listen()
        assert SocketTable().listens(bool)
        with pytest.raises(BlockingIOError):
            ours.recv(1, socket.MSG_DONTWAIT)
        monkeypatch.setattr(sockdiag, "MAX_SOCKETS", 1)
        crowd = sockdiag.CrowdedTables()
        assert SocketTable(crowd).listens(bool)
        assert socket.AF_UNIX in crowd
        with pytest.raises(BlockingIOError):
            ours.recv(1, socket.MSG_DONTWAIT)


def test_a_disk_may_have_the_descriptor_of_standard_input(lab_dir: Path) -> None:
    """If QEMU starts without standard streams, its connections may get descriptors 0, 1 and 2."""

    def close_standard_streams() -> None:
        for descriptor in (0, 1, 2):
            os.close(descriptor)

    image = lab_dir / "image.raw"
    image.write_bytes(bytes(1 << 20))
    with nbd_store(image) as store:
        drive = f"driver=nbd,server.type=unix,server.path={store.server()['path']},if=none,id=n"
        with bare_guest(lab_dir, ["-drive", drive], before=close_standard_streams) as guest:
            reader = SocketReader(guest.pid)
            reader.refresh(
                graph=until(GraphReader(guest.pid).read, lambda known: known is not None)
            )
            found = reader.read(SocketTable()) or ()
            (connection,) = [socket for socket in found if socket.role == "storage"]
            links = [Path(f"/proc/{guest.pid}/fd/{number}").readlink() for number in (0, 1, 2)]
            assert connection.node == "n"
            if Path(f"socket:[{connection.inode}]") not in links:
                raise needs.Missing("a QEMU that opens nothing else before its disks")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write to /run")
def test_var_run_is_the_same_directory_as_run() -> None:
    """Many command lines name /var/run, which is a symbolic link to /run."""
    with contextlib.ExitStack() as stack:
        name = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/run"))).name
        nbdkit, path = needs.program("nbdkit", "nbdkit"), f"/run/{name}/nbd"
        stack.callback(end, spawn([nbdkit, "-f", "-U", path, "memory", "1M"]))
        until(lambda: SocketTable().listens(lambda bound: bound == path.encode()), bool)
        drive = f"file=nbd:unix:/var/run/{name}/nbd,if=none,id=n,format=raw"
        guest = stack.enter_context(start_qemu(arguments=["-drive", drive]))
        graph = until(GraphReader(guest.pid).read, lambda known: known is not None)
        reader = SocketReader(guest.pid)

        def storage() -> list[Socket]:
            reader.refresh(graph=graph)
            found = reader.read(SocketTable()) or ()
            return [socket for socket in found if socket.role == "storage" and socket.node]

        assert len(until(storage, bool)) == 1
