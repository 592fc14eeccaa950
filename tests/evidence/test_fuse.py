"""Servers of FUSE file systems: real mounts, with and without a kernel that names connections."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qkilld.adapters import procfs
from qkilld.ctl.guest_storage import read_storage
from qkilld.evidence import descriptor_search, fuse, peers
from qkilld.evidence.files import MAX_DESCRIPTORS, Descriptors
from qkilld.evidence.fuse import FuseFinder, FuseServers, connection_of
from qkilld.evidence.peer_finder import PeerFinder
from qkilld.evidence.peers import ServerReader
from qkilld.evidence.sampler import HostTables, Reader
from qkilld.evidence.sockets import SocketTable
from qkilld.evidence.storage import StorageTable
from qkilld.model.guest import Unit
from qkilld.model.sample import Mount, Peer, Sample
from qkilld.model.unit import Command, UnitFacts
from qkilld.unitcheck.storage import Storage, mount_unit
from tests.evidence.test_peers import connected, end_of, server_of
from tests.evidence.until import until
from tests.lab.fuse import FuseStore, fuse_store
from tests.lab.nbd import nbd_store

IMAGE = f"image-{os.getpid()}"
"""A unique name, because other tests on this host have servers, too."""
KERNELS = [True, False]
"""Whether the kernel names the connection of a server (since Linux 6.16)."""


@pytest.fixture(params=KERNELS)
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(fuse, "_LABEL", b"\nno such line:\t")
        # Servers of other tests may then be sampled, too, so allow more servers.
        monkeypatch.setattr(peers, "MAX_SERVERS", 32)
    return bool(request.param)


@contextlib.contextmanager
def mounted(directory: Path, name: str) -> Iterator[FuseStore]:
    files = directory / f"files of {name}"
    files.mkdir()
    with (files / name).open("wb") as image:
        image.truncate(1 << 20)
    with fuse_store(files) as store:
        yield store


@contextlib.contextmanager
def opened(store: FuseStore, name: str) -> Iterator[None]:
    file = os.open(store.directory / name, os.O_RDWR)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # The server is gone.
            os.close(file)


@contextlib.contextmanager
def samples() -> Iterator[Callable[[], Sample]]:
    """Yield a function that samples this process, with its servers."""
    with contextlib.closing(Reader(os.getpid(), HostTables())) as reader:
        yield lambda: reader.read(detail=True)


def mount_of(sample: Sample) -> Mount:
    (mount,) = (m for m in sample.mounts or () if connection_of(m) is not None)
    return mount


def pids_of(mount: Mount) -> set[int]:
    return {server.pid for server in mount.servers or ()}


def test_the_server_and_the_disks_of_the_image(lab_dir: Path, named: bool) -> None:
    with (
        mounted(lab_dir, IMAGE) as store,
        mounted(lab_dir, "another") as other,
        opened(store, IMAGE),
        samples() as sample,
    ):
        pids = {store.process.pid} if named else {store.process.pid, other.process.pid}
        mount = until(lambda: mount_of(sample()), lambda mount: pids_of(mount) >= pids)
        assert mount.certain is named
        (server,) = (one for one in mount.servers or () if one.pid == store.process.pid)
        assert server.shared is None
        assert server.devices
        assert set(server.place) <= {device.number for device in server.devices}
        assert server.place


@pytest.mark.parametrize("shows", KERNELS)
def test_a_unit_is_ordered_after_the_unit_of_the_server(
    lab_dir: Path, monkeypatch: pytest.MonkeyPatch, shows: bool
) -> None:
    if not shows:
        read = procfs.read_bounded
        hide = lambda path, most: b"" if "/fdinfo/" in path else read(path, most)  # noqa: E731
        monkeypatch.setattr(procfs, "read_bounded", hide)
    units: dict[int, Unit] = {}
    monkeypatch.setattr(procfs, "read_unit", lambda pid: units.get(pid, Unit("")))
    with mounted(lab_dir, IMAGE) as store, mounted(lab_dir, "another") as other:
        # Some process of the host may be unreadable.
        monkeypatch.setattr(procfs, "pids", lambda: [store.process.pid, other.process.pid])
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        words = ("/usr/bin/qemu-system-x86_64", "-drive", f"file={store.directory / IMAGE}")
        facts = UnitFacts("web.service", exec_start=(Command(words[0], words),))
        mount = mount_unit(str(store.directory))
        first = Storage(mount_point=str(store.directory), unit=mount)
        units[store.process.pid] = Unit("rclone.service")
        found = [first, Storage(protocol="fuse", server="rclone.service")]
        assert read_storage(facts, []) == found
        with opened(store, IMAGE):
            assert read_storage(facts, [os.getpid()]) == found
        # systemd runs the server of a mount in fstab in the unit of the mount.
        units[store.process.pid] = Unit(mount)
        assert read_storage(facts, []) == [first]
        units |= {store.process.pid: Unit("a.service"), other.process.pid: Unit("b.service")}
        place = read_storage(facts, [])[1]
        assert (place.server, "serves" in place.unseen) == (
            ("a.service", False) if shows else ("", True)
        )
        # The server has too many descriptors to read. The other process is not mistaken for it.
        read_links = procfs.read_links

        def too_many(directory: int, most: int) -> list[tuple[str, str]] | None:
            path = Path(f"/proc/self/fd/{directory}").readlink()
            named = path == Path(f"/proc/{store.process.pid}/fd")
            return None if named else read_links(directory, most)

        monkeypatch.setattr(procfs, "read_links", too_many)
        assert any("seen" in place.unseen for place in read_storage(facts, []))


def test_servers_that_cannot_be_told_apart(lab_dir: Path, named: bool) -> None:
    with (
        mounted(lab_dir, IMAGE) as store,
        mounted(lab_dir / f"files of {IMAGE}", IMAGE) as other,
        opened(store, IMAGE),
        samples() as sample,
    ):
        pids = {store.process.pid} if named else {store.process.pid, other.process.pid}
        mount = until(lambda: mount_of(sample()), lambda mount: pids_of(mount) >= pids)
        assert mount.certain is named


@pytest.mark.parametrize("named", [False], indirect=True)
def test_a_server_that_encrypts_names(lab_dir: Path, named: bool) -> None:
    """Any user can run a process that opens /dev/fuse and a file with the name of the image."""
    with (
        mounted(lab_dir, IMAGE) as store,
        mounted(lab_dir / f"files of {IMAGE}", IMAGE) as other,
        opened(store, IMAGE),
        samples() as sample,
    ):
        image = lab_dir / f"files of {IMAGE}" / IMAGE
        image.rename(image.with_name("encrypted"))
        pids = {store.process.pid, other.process.pid}
        mount = until(lambda: mount_of(sample()), lambda mount: pids_of(mount) >= pids)
        assert not mount.certain


@pytest.mark.parametrize("named", [False], indirect=True)
def test_one_of_many_servers(lab_dir: Path, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has more servers than a sample reads."""
    monkeypatch.setattr(peers, "MAX_SERVERS", 2)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(mounted(lab_dir, IMAGE))
        for number in range(3):
            stack.enter_context(mounted(lab_dir, f"other{number}"))
        stack.enter_context(opened(store, IMAGE))
        sample = stack.enter_context(samples())
        mount = until(
            lambda: mount_of(sample()), lambda mount: pids_of(mount) == {store.process.pid}
        )
        assert not mount.certain


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each search go through all processes at once, even on a busy host."""
    monkeypatch.setattr(fuse, "SEARCH_S", 60.0)
    monkeypatch.setattr(fuse, "PAUSE_FACTOR", 0)


def finder_in(proc: Path, *pids: int) -> FuseFinder:
    """Return a finder for a fake /proc in which these processes have /dev/fuse open."""
    for pid in pids:
        add_holder(proc, pid)
    (proc / "self/ns").mkdir(parents=True)
    (proc / "self/ns/pid").symlink_to(fuse.FIRST_NAMESPACE)
    return FuseFinder(proc)


def add_holder(proc: Path, pid: int, descriptor: str = "3") -> None:
    (proc / f"{pid}/fd").mkdir(parents=True, exist_ok=True)
    (proc / f"{pid}/fdinfo").mkdir(exist_ok=True)
    (proc / f"{pid}/fd/{descriptor}").symlink_to(fuse.DEVICE)
    (proc / f"{pid}/fdinfo/{descriptor}").write_text("pos:\t0\n")


def set_start(proc: Path, pid: int, started: float) -> None:
    """`started`: by time.monotonic()."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    ticks = int((now - time.monotonic() + started) * os.sysconf("SC_CLK_TCK"))
    (proc / f"{pid}/stat").write_text(f"{pid} (sshfs) S 1 {'0 ' * 17}{ticks} {'0 ' * 30}")


class SlowFiles:
    """Replaces read_descriptors(). Every process has the image open, and reading three processes
    takes longer than SEARCH_S."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        self.now = time.monotonic()
        monkeypatch.setattr(peers, "read_descriptors", self._read)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def _read(self, pid: int, proc: Path) -> Descriptors:
        self.read.append(pid)
        self.now += fuse.SEARCH_S / 2.5
        return Descriptors(2, (("3", fuse.DEVICE), ("4", f"/srv/{IMAGE}")), ())


def test_a_search_for_the_image_among_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user can have many processes, so each sample reads a few of them, and each process is
    read once."""
    pids = list(range(7, 7 + fuse.MAX_SERVERS))
    holders = [*pids, 50]
    finder = FuseFinder(tmp_path)
    monkeypatch.setattr(finder, "find", lambda _: {39: FuseServers(tuple(holders), False)})
    files = SlowFiles(monkeypatch)
    mount = Mount("fuse.mergerfs", None, None, "0:39")
    names = {mount.number: frozenset({IMAGE})}
    with contextlib.closing(peers.ServerReader(1, PeerFinder(), finder, tmp_path)) as reader:

        def sample() -> int:
            before = len(files.read)
            reader.read_all({}, (mount,), names, storage=StorageTable(), sockets=SocketTable())
            return len(files.read) - before

        assert [sample() for _ in range(4)] == [3, 3, 3, 0]
        assert sorted(files.read) == [*pids, 50]
        holders.append(51)
        assert sample() == 1
        assert files.read[-1] == 51


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize(("count", "is_open"), [(1, False), (1, True), (50, True)])
def test_too_many_processes_may_be_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certain: bool, count: int, is_open: bool
) -> None:
    """Either none of them has the image open, or too many have."""
    pids = tuple(range(100, 100 + fuse.MAX_SERVERS + count))
    finder = FuseFinder(tmp_path)
    monkeypatch.setattr(finder, "find", lambda _: {39: FuseServers(pids, certain)})
    monkeypatch.setattr(peers, "SEARCH_S", 60.0)
    files = (("4", f"/srv/{IMAGE}"),) if is_open else ()
    monkeypatch.setattr(peers, "read_descriptors", lambda pid, proc: Descriptors(2, files, ()))
    mount = Mount("fuse.sshfs", None, None, "0:39")
    names = {mount.number: frozenset({IMAGE})}
    with contextlib.closing(peers.ServerReader(1, PeerFinder(), finder, tmp_path)) as reader:

        def sample() -> Mount:
            tables: dict[str, Any] = {"storage": StorageTable(), "sockets": SocketTable()}
            return reader.read_all({}, (mount,), names, **tables)[1][0]

        found = sample()
        assert (found.servers, found.certain) == ((), False)
        # Not all of them were checked yet.
        monkeypatch.setattr(peers, "SEARCH_S", 0.0)
        monkeypatch.setattr(peers, "REFRESH_S", 0.0)
        reader._matches.clear()
        assert sample().servers == (() if certain else None)


@pytest.mark.usefixtures("patient")
def test_the_device_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One search is enough even if a guest uses many file systems."""
    finder = finder_in(tmp_path, 7, 8)
    links = []
    readlink = os.readlink

    def count(path: str, *, dir_fd: int | None = None) -> str:
        links.append(path)
        return readlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "readlink", count)
    now = time.monotonic()
    finder.find({39: now})
    links.clear()
    assert len(finder.find({39: now})) == 1
    before = len(links)
    monkeypatch.setattr(fuse, "SEARCH_S", 0.0)
    links.clear()
    assert len(finder.find(dict.fromkeys(range(30, 40), now))) == 10
    assert len(links) == before


@pytest.mark.usefixtures("patient")
def test_the_only_process_with_the_device_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is certainly the server as long as the last search through all processes is
    recent."""
    finder = finder_in(tmp_path, 7)
    now = time.monotonic()
    assert finder.find({39: now}) == {39: FuseServers((7,), True)}
    monkeypatch.setattr(fuse, "SEARCH_S", 0.0)
    later = time.monotonic() + fuse.AGE_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert finder.find({39: now}) == {39: FuseServers((7,), False)}
    monkeypatch.setattr(fuse, "SEARCH_S", 1.0)
    assert finder.find({39: now}) == {39: FuseServers((7,), True)}


@pytest.mark.usefixtures("patient")
def test_one_of_two_processes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that ended may have been the server."""
    finder = finder_in(tmp_path, 7, 8)
    since = time.monotonic()
    assert finder.find({39: since}) == {39: FuseServers((7, 8), False)}
    shutil.rmtree(tmp_path / "8")
    assert finder.find({39: since}) == {39: FuseServers((7,), False)}
    # For a mount that was seen later, the other process is irrelevant.
    assert finder.find({40: time.monotonic()}) == {40: FuseServers((7,), True)}
    monkeypatch.setattr(fuse, "RENEW_S", 0.0)
    assert finder.find({39: since}) == {39: FuseServers((7,), True)}


@pytest.mark.usefixtures("patient")
def test_a_process_that_is_younger_than_the_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be fusermount3, or the server of a container that starts during the stop. But if an
    older process has ended, the younger one may have got its descriptor."""
    finder = finder_in(tmp_path, 7, 8)
    since = time.monotonic()
    set_start(tmp_path, 7, since - 9)
    set_start(tmp_path, 8, since + 9)
    assert finder.find({39: since}) == {39: FuseServers((7,), True)}
    assert finder.find({39: since + 20}) == {39: FuseServers((7, 8), False)}
    # The end of a younger process changes nothing.
    shutil.rmtree(tmp_path / "8")
    assert finder.find({39: since}) == {39: FuseServers((7,), True)}
    add_holder(tmp_path, 8)
    set_start(tmp_path, 8, since + 9)
    monkeypatch.setattr(fuse, "RENEW_S", 0.0)
    assert finder.find({39: since}) == {39: FuseServers((7,), True)}
    monkeypatch.setattr(fuse, "SEARCH_S", 0.0)
    shutil.rmtree(tmp_path / "7")
    assert finder.find({39: since}) == {39: FuseServers((8,), False)}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("number", [39, 40])
def test_a_mount_that_is_newer_than_the_search(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server of the new mount may be another process than the only earlier server. The kernel
    may reuse the number of an earlier mount."""
    finder = finder_in(tmp_path, 7)
    assert finder.find({39: time.monotonic()}) == {39: FuseServers((7,), True)}
    add_holder(tmp_path, 8)
    found = {number: FuseServers((7, 8), False)}
    since = time.monotonic()
    monkeypatch.setattr(fuse, "SEARCH_S", 0.0)
    assert finder.find({number: since}) == {number: FuseServers((7,), False)}
    monkeypatch.setattr(fuse, "SEARCH_S", 60.0)
    assert finder.find({number: since}) == found


@pytest.mark.usefixtures("patient")
def test_the_servers_of_two_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A completed search does not delay the search for a later mount."""
    finder = finder_in(tmp_path, 7)
    (tmp_path / "7/fdinfo/3").write_text("pos:\t0\nfuse_connection:\t39\n")
    add_holder(tmp_path, 9)
    assert finder.find({39: time.monotonic(), 40: time.monotonic()}) == {
        39: FuseServers((7,), True)
    }
    add_holder(tmp_path, 8)
    (tmp_path / "8/fdinfo/3").write_text("pos:\t0\nfuse_connection:\t41\n")
    monkeypatch.setattr(fuse, "RETRY_S", 600.0)
    since = time.monotonic()
    assert finder.find({41: since}) == {41: FuseServers((8,), True)}


@pytest.mark.usefixtures("patient")
def test_a_process_that_opens_the_device_later(tmp_path: Path) -> None:
    """An earlier search found no such descriptor in this process, but it may open one later."""
    finder = finder_in(tmp_path, 7)
    (tmp_path / "8/fd").mkdir(parents=True)
    (tmp_path / "8/fd/1").symlink_to("/dev/null")
    assert finder.find({39: time.monotonic()}) == {39: FuseServers((7,), True)}
    (tmp_path / "8/fd/1").unlink()
    add_holder(tmp_path, 8, "1")
    found = {39: FuseServers((7, 8), False)}
    since = time.monotonic()
    assert finder.find({39: since}) == found


def test_a_server_that_is_gone(lab_dir: Path, named: bool) -> None:
    with mounted(lab_dir, IMAGE) as store, opened(store, IMAGE), samples() as sample:
        until(lambda: mount_of(sample()), lambda mount: mount.servers)
        store.leave()
        servers = mount_of(sample()).servers or ()
        assert store.process.pid not in {server.pid for server in servers}


def test_a_server_is_searched_for_before_it_is_needed(
    lab_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse, "SEARCH_S", 0.0)
    with (
        mounted(lab_dir, IMAGE) as store,
        opened(store, IMAGE),
        contextlib.closing(Reader(os.getpid(), HostTables())) as reader,
    ):
        reader.read()

        def read() -> Mount:
            reader.search()
            return mount_of(reader.read(detail=True))

        until(read, lambda mount: mount.servers)


def test_a_search_ends_when_the_kernel_has_named_the_server(
    lab_dir: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the search continued, each new guest on FUSE would cost a search of all processes."""
    with mounted(lab_dir, IMAGE) as store:
        # The server is found first, long before all processes are searched.
        server = store.process.pid

        def server_first(processes: list[Any]) -> list[Any]:
            return sorted(processes, key=lambda process: process.pid != server)

        monkeypatch.setattr(descriptor_search, "by_turns", server_first)
        monkeypatch.setattr(fuse, "SEARCH_S", 0.001)
        connection = os.minor(store.directory.stat().st_dev)
        finder = FuseFinder()
        since = time.monotonic()
        until(lambda: finder.find({connection: since}), bool)
        is_over = not any(search.wants_any for search in finder._searches)
        assert is_over is named


def test_the_server_of_a_server(lab_dir: Path, named: bool) -> None:
    """The file of an NBD server is on FUSE."""
    with (
        mounted(lab_dir, IMAGE) as store,
        nbd_store(store.directory / IMAGE) as nbd,
        connected(nbd) as connection,
    ):
        number = store.directory.stat().st_dev
        peer = server_of(
            end_of(connection),
            lambda peer: store.process.pid in [server.pid for server in peer.behind],
        )
        (server,) = (one for one in peer.behind if one.pid == store.process.pid)
        assert server.serves == (f"{os.major(number)}:{os.minor(number)}",)
        # If the kernel does not name connections, certainty depends on what else runs on this host.
        assert server.certain or not named
        assert peer.unseen_requests is False
        assert not peer.behind_unknown


_WITH_CHILDREN = """
import signal, socket, subprocess, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
children = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
signal.signal(signal.SIGTERM, lambda *_: [child.kill() for child in children] and sys.exit())
print(flush=True)
connection = listener.accept()
signal.pause()
"""


@pytest.mark.parametrize("found_later", [False, True])
def test_the_servers_of_the_guest_come_before_those_behind_them(
    lab_dir: Path, monkeypatch: pytest.MonkeyPatch, found_later: bool
) -> None:
    """A server on a socket has started more processes than the reader has room for."""
    monkeypatch.setattr(peers, "MAX_PEERS", 2)
    command = [sys.executable, "-c", _WITH_CHILDREN, str(lab_dir / "socket")]
    with (
        mounted(lab_dir, IMAGE) as store,
        opened(store, IMAGE),
        subprocess.Popen(command, stdout=subprocess.PIPE) as server,
        socket.socket(socket.AF_UNIX) as connection,
        contextlib.closing(peers.ServerReader(os.getpid(), PeerFinder(), FuseFinder())) as reader,
    ):
        assert server.stdout is not None
        server.stdout.readline()
        connection.connect(str(lab_dir / "socket"))
        number = store.directory.stat().st_dev
        mount = Mount("fuse.lab", None, None, f"{os.major(number)}:{os.minor(number)}")

        def read(*mounts: Mount) -> tuple[dict[int, Peer], tuple[Mount, ...]]:
            # The other end is unknown until the server has accepted the connection.
            ends = {end_of(connection): None}
            return reader.read_all(ends, mounts, {}, storage=StorageTable(), sockets=SocketTable())

        try:
            if found_later:
                until(read, lambda found: any(peer.behind for peer in found[0].values()))
            until(
                lambda: read(mount),
                lambda found: len(found[0]) == 1 and pids_of(found[1][0]) == {store.process.pid},
            )
        finally:
            server.terminate()


def test_a_search_that_has_not_ended(lab_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM is delayed until the search has ended."""
    monkeypatch.setattr(fuse, "SEARCH_S", 0)
    with (
        mounted(lab_dir, IMAGE) as store,
        nbd_store(store.directory / IMAGE) as nbd,
        connected(nbd) as connection,
        contextlib.closing(ServerReader(os.getpid(), PeerFinder(), FuseFinder())) as reader,
    ):
        end = end_of(connection)
        until(lambda: reader.read({end: None}, StorageTable(), SocketTable()), bool)
        assert reader.searches

        def searches() -> bool:
            reader.search()
            return reader.searches

        until(searches, lambda found: not found)


def test_the_server_of_a_server_that_is_not_found(
    lab_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is unknown, not absent."""
    with (
        mounted(lab_dir, IMAGE) as store,
        nbd_store(store.directory / IMAGE) as nbd,
        connected(nbd) as connection,
    ):
        monkeypatch.setattr(FuseFinder, "find", lambda finder, connections: {})
        peer = server_of(end_of(connection), lambda peer: peer.behind_unknown)
        assert peer.behind == ()


def test_a_process_without_fuse_costs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(FuseFinder, "find", search)
    with samples() as sample:
        sample()


@pytest.mark.parametrize(
    ("kind", "number", "connection"),
    [
        ("fuse", "0:39", 39),
        ("fuse.sshfs", "0:7", 7),
        ("fuseblk", "0:7", None),
        ("fuse", "8:1", None),
        ("fuse", "0:0", None),
        ("fuse", "", None),
        ("nfs4", "0:40", None),
    ],
)
def test_the_connection_of_a_mount(kind: str, number: str, connection: int | None) -> None:
    assert connection_of(Mount(kind, None, None, number)) == connection


def test_requests_that_wait(tmp_path: Path) -> None:
    directory = tmp_path / "fs/fuse/connections/39"
    directory.mkdir(parents=True)
    (directory / "waiting").write_text("12\n")
    assert fuse.read_waiting(39, tmp_path) == 12
    assert fuse.read_waiting(40, tmp_path) is None


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("error", "certain"),
    [
        (None, True),
        (FileNotFoundError, True),
        (ProcessLookupError, True),
        (PermissionError, False),
        (OSError, False),
    ],
)
@pytest.mark.parametrize("where", ["scandir", "stat"])
def test_the_only_process_that_can_be_read(
    tmp_path: Path,
    where: str,
    error: type[OSError] | None,
    certain: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server may be a process that could not be read, because it belongs to another user or
    there are no free descriptors. A process that has exited cannot be the server."""
    finder = finder_in(tmp_path, 7)
    (tmp_path / "8/fd").mkdir(parents=True)
    function = getattr(os, where)

    def fail(path: str, **options: Any) -> Any:
        if error is not None and path == f"{tmp_path}/8/fd":
            raise error(path)
        return function(path, **options)

    monkeypatch.setattr(os, where, fail)
    assert finder.find({39: time.monotonic()}) == {39: FuseServers((7,), certain)}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("other", ["uid", "namespace", "many", "very many"])
def test_the_only_process_that_is_seen(
    tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = finder_in(tmp_path, 7)
    (tmp_path / "8/fd").mkdir(parents=True)
    match other:
        case "uid":
            monkeypatch.setattr(os, "geteuid", lambda: 1000)
            finder = FuseFinder(tmp_path)
        case "namespace":
            (tmp_path / "self/ns/pid").unlink()
            (tmp_path / "self/ns/pid").symlink_to("pid:[4026532000]")
            finder = FuseFinder(tmp_path)
        case "many" | "very many":
            stat, count = os.stat, MAX_DESCRIPTORS + (other == "very many")

            def with_count(path: str, **options: Any) -> Any:
                status = stat(path, **options)
                is_its = path == f"{tmp_path}/8/fd"
                return SimpleNamespace(st_size=count, st_uid=0) if is_its else status

            monkeypatch.setattr(os, "stat", with_count)
    assert finder.find({39: time.monotonic()}) == {39: FuseServers((7,), other == "many")}


@pytest.mark.usefixtures("patient")
def test_a_server_whose_number_of_descriptors_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process has many descriptors while the search reads processes with few, and has few while
    the search reads processes with many."""
    finder = finder_in(tmp_path, 7, 8)
    stat, counts = os.stat, iter((descriptor_search.FEW, 1))

    def changing(path: str, **options: Any) -> Any:
        status = stat(path, **options)
        if path == f"{tmp_path}/8/fd":
            return SimpleNamespace(st_size=next(counts, 1), st_uid=0)
        return status

    monkeypatch.setattr(os, "stat", changing)
    (servers,) = finder.find({39: time.monotonic()}).values()
    assert (sorted(servers.pids), servers.certain) == ([7, 8], False)
