"""Servers of FUSE file systems: real mounts, with and without a kernel that names connections."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qkilld.evidence import fuse, peer_finder, peers
from qkilld.evidence.files import Descriptors
from qkilld.evidence.fuse import connection_of
from qkilld.evidence.peer_finder import PeerFinder
from qkilld.evidence.sampler import HostTables, Reader
from qkilld.evidence.sockets import SocketTable
from qkilld.evidence.storage import StorageTable
from qkilld.model.sample import Mount, Sample
from tests.evidence.test_peers import connected, end_of, server_of
from tests.evidence.until import until
from tests.lab.fuse import FuseStore, fuse_store
from tests.lab.nbd import nbd_store

IMAGE = f"image-{os.getpid()}"
"""Other tests on this host have servers, too."""
KERNELS = [True, False]
"""Whether the kernel names the connection of a server (since Linux 6.16)."""


@pytest.fixture(params=KERNELS)
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(fuse, "_LABEL", b"\nno such line:\t")
        # Then servers of other tests may be sampled, too.
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
    """A process that has /dev/fuse and a file with the name of the image open may be anybody's."""
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
    """On a host with more servers than are sampled."""
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


def holders_in(proc: Path, *pids: int) -> fuse.FuseHolders:
    """Return processes in a fake /proc that have /dev/fuse open."""
    holders = fuse.FuseHolders(proc)
    for pid in pids:
        add_holder(holders, proc, pid)
    return holders


def add_holder(holders: fuse.FuseHolders, proc: Path, pid: int) -> None:
    (proc / f"{pid}/fd").mkdir(parents=True)
    (proc / f"{pid}/fdinfo").mkdir()
    (proc / f"{pid}/fd/3").symlink_to(fuse.DEVICE)
    (proc / f"{pid}/fdinfo/3").write_text("pos:\t0\n")
    holders.add(pid, "3")


class SlowFiles:
    """Replaces read_descriptors(): every process has the image open, and looking at three takes
    longer than SEARCH_S."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        self.now = time.monotonic()
        monkeypatch.setattr(peers, "read_descriptors", self._read)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def _read(self, pid: int, proc: Path) -> Descriptors:
        self.read.append(pid)
        self.now += peer_finder.SEARCH_S / 2.5
        return Descriptors(2, (("3", fuse.DEVICE), ("4", f"/srv/{IMAGE}")), ())


def test_a_search_for_the_image_among_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user can have many, so each sample looks at a few, and at each process once."""
    pids = list(range(7, 7 + fuse.MAX_SERVERS))
    holders = holders_in(tmp_path, *pids, 50)
    finder = PeerFinder(tmp_path)
    monkeypatch.setattr(finder, "find_fuse", holders.servers_of)
    files = SlowFiles(monkeypatch)
    mount = Mount("fuse.mergerfs", None, None, "0:39")
    names = {mount.number: frozenset({IMAGE})}
    with contextlib.closing(peers.ServerReader(1, finder, tmp_path)) as reader:

        def sample() -> int:
            before = len(files.read)
            reader.read_all({}, (mount,), names, storage=StorageTable(), sockets=SocketTable())
            return len(files.read) - before

        assert [sample() for _ in range(4)] == [3, 3, 3, 0]
        assert sorted(files.read) == [*pids, 50]
        add_holder(holders, tmp_path, 51)
        assert sample() == 1
        assert files.read[-1] == 51


def test_the_device_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many file systems a guest uses."""
    holders = holders_in(tmp_path, 7, 8)
    links = []
    readlink = os.readlink

    def count(path: str) -> str:
        links.append(path)
        return readlink(path)

    monkeypatch.setattr(os, "readlink", count)
    assert len(holders.servers_of(range(30, 40))) == 10
    assert len(links) == 2


def test_the_only_process_with_the_device_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is certainly the server while a search through all processes is recent."""
    holders = holders_in(tmp_path, 7)
    assert holders.servers_of([39]) == {39: fuse.FuseServers((7,), False)}
    holders.complete(readable=True)
    assert holders.servers_of([39]) == {39: fuse.FuseServers((7,), True)}
    assert not holders.wants_search([39])
    later = time.monotonic() + fuse.AGE_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert holders.servers_of([39]) == {39: fuse.FuseServers((7,), False)}
    assert holders.wants_search([39])


def test_a_server_that_is_gone(lab_dir: Path, named: bool) -> None:
    with mounted(lab_dir, IMAGE) as store, opened(store, IMAGE), samples() as sample:
        until(lambda: mount_of(sample()), lambda mount: mount.servers)
        store.leave()
        servers = mount_of(sample()).servers or ()
        assert store.process.pid not in {server.pid for server in servers}


def test_a_server_is_searched_for_before_it_is_needed(
    lab_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_finder, "SEARCH_S", 0.0)
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
    """Otherwise, each new guest on FUSE would delay the searches for all other servers."""
    with mounted(lab_dir, IMAGE) as store:
        # The server is found first, long before all processes are searched.
        server = store.process.pid

        def server_first(processes: list[Any]) -> list[Any]:
            return sorted(processes, key=lambda process: process.pid != server)

        monkeypatch.setattr(peer_finder, "by_turns", server_first)
        monkeypatch.setattr(peer_finder, "SEARCH_S", 0.001)
        connection = os.minor(store.directory.stat().st_dev)
        finder = peer_finder.PeerFinder()
        until(lambda: finder.find_fuse([connection]), bool)
        is_over = not any(search.wants(fuse.DEVICE) for search in finder._searches)
        assert is_over or not named


def test_the_server_of_a_server(lab_dir: Path) -> None:
    """An NBD server that has its file on FUSE."""
    with (
        mounted(lab_dir, IMAGE) as store,
        nbd_store(store.directory / IMAGE) as nbd,
        connected(nbd) as connection,
    ):
        peer = server_of(end_of(connection), lambda peer: peer.behind)
        assert [server.pid for server in peer.behind] == [store.process.pid]


def test_a_process_without_fuse_costs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(PeerFinder, "find_fuse", search)
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


@pytest.mark.parametrize("denied", [False, True])
def test_the_only_process_that_can_be_read(
    tmp_path: Path, denied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may be the process of another user, whose descriptors a user may not read."""
    holders_in(tmp_path, 7)
    (tmp_path / "8/fd").mkdir(parents=True)
    open_file = os.open

    def open_own(path: str, flags: int, dir_fd: int | None = None) -> int:
        if denied and path == f"{tmp_path}/8/fd":
            raise PermissionError(path)
        return open_file(path, flags, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", open_own)
    assert PeerFinder(tmp_path).find_fuse([39]) == {39: fuse.FuseServers((7,), not denied)}
