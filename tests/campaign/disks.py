"""The disks of a run: real storage, QEMU's arguments for it, and the changes of the storage."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.campaign.noise import unshare_network
from tests.campaign.spec import Change, Disk
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.bare import BLOCK, MIB, BareGuest, Layout
from tests.lab.fuse import FuseStore, fuse_store
from tests.lab.hung_disk import hung_disk
from tests.lab.iscsi import IscsiStore, iscsi_store
from tests.lab.nbd import NbdClient, NbdStore, nbd_store
from tests.lab.process import run
from tests.lab.scratch import scratch
from tests.lab.storage import SlowDisk, slow_disk
from tests.lab.vhost_user import VhostBackend, vhost_backend

_SIZE: Final = 8 << 30
_ROOM: Final = 128 * MIB
"""The size of a qcow2 file behind a server, because servers do not grow files."""
_FILL_AT: Final = 6 << 30
_IN_FLIGHT_AT: Final = 7 << 30
_CALLS: Final = ("flush", "fsync")


@dataclass
class RunDisk:
    """A disk of a run in progress."""

    disk: Disk
    number: int
    image: Path
    """The image file. If there is a server, the server opens the file."""
    fuse: FuseStore | None = None
    """The FUSE file system that contains the image file, or the file of the disk below it."""
    loop: SlowDisk | None = None
    server: NbdStore | IscsiStore | VhostBackend | None = None
    front: NbdStore | None = None
    """The proxy that QEMU connects to instead of the server."""
    level: float = 0
    """How slow the disk is; 0 means not slowed."""
    frozen: bool = False
    node: dict[str, Any] = field(default_factory=dict)
    """The node in the format of blockdev-add."""
    layout: Layout = field(default_factory=lambda: Layout(0))

    @property
    def name(self) -> str:
        return f"d{self.number}"

    @property
    def path(self) -> Path:
        """The path under which the server or QEMU opens the file."""
        if self.disk.store == "fuse":
            assert self.fuse is not None
            return self.fuse.directory / self.image.name
        return self.image

    def pass_fds(self) -> list[int]:
        """Descriptors to pass to QEMU."""
        pair = self.server.pair if isinstance(self.server, NbdStore) else None
        return [pair.fileno()] if pair else []

    def close_pair(self) -> None:
        """Close QEMU's end of the socket pair in this process. Call this when QEMU has it."""
        if isinstance(self.server, NbdStore) and self.server.pair:
            self.server.pair.close()

    def arguments(self) -> list[str]:
        """QEMU's arguments."""
        disk = self.disk
        if disk.kind == "vhost":
            assert isinstance(self.server, VhostBackend)
            server = ",server=on" if disk.connects else ""
            device = f"vhost-user-blk-pci-transitional,chardev=c{self.number},addr={self.slot:x}"
            chardev = f"socket,id=c{self.number},path={self.server.path}{server}"
            return ["-chardev", chardev, "-device", device]
        direct, no_flush = disk.cache == "none", disk.cache == "unsafe"
        cache = {"direct": direct, "no-flush": no_flush}
        if disk.syntax in ("blockdev", "added", "mirror"):
            node = {"driver": disk.format, "node-name": self.name, "cache": cache}
            below = self._protocol() | {"node-name": f"{self.name}-file", "cache": cache}
            self.node = node | {"file": below}
            return ["-blockdev", json.dumps(self.node)] if disk.syntax == "blockdev" else []
        ending = f"if=none,id={self.name},cache={disk.cache}"
        if disk.syntax == "options" and disk.kind == "file":
            options = f"file={self.path},format={disk.format},aio={disk.aio}"
            return ["-drive", f"{options},{ending}"]
        node = {"driver": disk.format, "file": self._protocol()}
        return ["-drive", f"{ending},file=json:{json.dumps(node)}".replace(", ", ",,")]

    @property
    def slot(self) -> int:
        """Return the disk's slot on the PCI bus."""
        return 5 + self.number

    def _protocol(self) -> dict[str, Any]:
        if isinstance(self.server, NbdStore):
            server = (self.front or self.server).server()
            node: dict[str, Any] = {"driver": "nbd", "server": server}
            return node | ({"reconnect-delay": self.disk.reconnect} if self.disk.reconnect else {})
        if isinstance(self.server, IscsiStore):
            return self.server.node()
        return {"driver": "file", "filename": str(self.path), "aio": self.disk.aio}

    def write(self, guest: BareGuest) -> None:
        """Write the records, and wait until all are acknowledged."""
        if self.disk.kind == "vhost":
            guest.start_virtio(self.slot)
            return
        if self.disk.syntax in ("added", "mirror"):
            guest.add(self.node)
        if self.disk.syntax == "mirror":
            return
        self.layout = Layout(self.disk.records)
        guest.write(self.name, self.layout)
        if self.disk.fill:
            for number in range(self.disk.fill):
                at = _FILL_AT + number * MIB
                printed = guest.hmp(f'qemu-io {self.name} "write -q -P 85 {at} {MIB}"')
                assert not printed, printed

    def write_late(self, guest: BareGuest) -> None:
        """Submit the requests that are in flight during the stop."""
        if self.disk.syntax == "mirror":
            guest.mirror("d0", self.name)
        if self.disk.in_flight:
            guest.write_later(self.name, _IN_FLIGHT_AT, self.disk.in_flight)
        if self.disk.flush:
            guest.flush_later(self.name)

    def wait_closed(self) -> None:
        """Wait until the image is no longer locked. After the end of a QEMU that uses io_uring, the
        kernel closes its files only when the last request has ended (io_ring_exit_work)."""
        qemu_img = str(needs.program("qemu-img", "qemu-utils"))
        info = [qemu_img, "info", "-f", self.disk.format, str(self.image)]
        until(lambda: run(info), lambda done: done.returncode == 0)

    def lost(self) -> int:
        """Return how many records are missing in the image. No process may have the image open."""
        wanted = self.layout.count * self.layout.passes
        return wanted - self.layout.kept(self.image, self.disk.format) if wanted else 0

    def bitmap_left(self) -> bool:
        """Return whether the bitmap was not stored, so that its content is lost."""
        if not self.disk.bitmap:
            return False
        argv = [str(needs.program("qemu-img", "qemu-utils")), "info", "--output=json"]
        info = json.loads(run([*argv, str(self.image)], check=True).stdout)
        bitmaps = info["format-specific"]["data"].get("bitmaps", [])
        return not bitmaps or "in-use" in bitmaps[0]["flags"]

    def apply(self, change: Change) -> None:
        """Change the storage. Raises AssertionError if this kind of disk does not support that."""
        match change.what:
            case "slow":
                self.level = change.value
                self._set(change.value)
            case "fast":
                self.level = 0
                self._set(0)
            case "freeze":
                self.frozen = True
                self._freeze()
            case "thaw":
                self.frozen = False
                self._thaw()
            case "hang":
                assert self.fuse is not None
                for call in _CALLS:
                    self.fuse.delay(call, change.value or float("inf"))
            case "dead":
                # Make only the storage below the server hang.
                self._below_freeze()
            case "alive":
                self._below_thaw()
            case "leave":
                (self.server or self.fuse).leave()  # type: ignore[union-attr]
            case "back":
                assert isinstance(self.server, NbdStore | IscsiStore)
                self.server.start()
            case "fail":
                if isinstance(self.server, NbdStore):
                    self.server.fail()
                else:
                    assert self.fuse is not None
                    self.fuse.fail()
            case _:
                raise AssertionError(f"a disk cannot {change.what}")

    def recover(self) -> None:
        """Make the disk work again, so that its users can finish the run."""
        if isinstance(self.server, NbdStore):
            self.server.fast()
            self.server.fail(False)
        if self.server is not None and self.server.process and self.server.process.poll() is None:
            self.server.thaw()
        if self.fuse is not None and self.fuse.process.poll() is None:
            self.fuse.thaw()
            self.fuse.fast()
        if self.loop is not None:
            self.loop.fast()

    def joined(self, pid: int) -> None:
        """Throttle the process that writes to the disk. (cgroup v2 throttles only members of the
        group.)"""
        if self.loop is not None:
            self.loop.join(pid)

    def _set(self, level: float) -> None:
        """Set how slow the disk is; 0 means not slowed."""
        if self.fuse is not None:
            self.fuse.delay("write", 0.25 * level)
            self.fuse.delay("fsync", 0.25 * level)
        elif self.loop is not None:
            (self.loop.slow(int(2_000_000 / level)) if level else self.loop.fast())
        elif isinstance(self.server, NbdStore) and self.server.make == "nbdkit":
            if level:
                self.server.slow(f"{int(400 / level)}K")
            else:
                self.server.fast()
        else:
            assert not level, f"a disk of kind {self.disk.kind} cannot be slow"

    def _freeze(self) -> None:
        # Freeze the storage below the server, too. Otherwise, writes that the server has passed on
        # would complete, and that would be progress.
        if self.server is None or self.fuse is not None:
            self._below_freeze()
        if isinstance(self.server, NbdStore) and self.fuse is not None:
            self.server.freeze("TD")
        elif self.server is not None:
            self.server.freeze()

    def _below_freeze(self) -> None:
        if self.fuse is not None:
            self.fuse.freeze()
        else:
            raise AssertionError("a plain file or a throttled disk cannot be frozen")

    def _thaw(self) -> None:
        self._below_thaw()
        if self.server is not None:
            self.server.thaw()

    def _below_thaw(self) -> None:
        if self.fuse is not None:
            self.fuse.thaw()


def make_disk(stack: contextlib.ExitStack, number: int, disk: Disk) -> RunDisk:
    """Make fast storage with an empty image. Raises needs.Missing."""
    directory = stack.enter_context(scratch("s"))
    below: FuseStore | None = None
    loop: SlowDisk | None = None
    if disk.store == "disk":
        hung = stack.enter_context(hung_disk())
        directory, below = hung.directory / "files", hung.fuse
        directory.mkdir()
    if disk.store == "loop":
        loop = stack.enter_context(slow_disk(mebibytes=512))
        assert loop.directory is not None
        directory = loop.directory / "files"
        directory.mkdir()
    image = directory / "disk"
    if disk.kind != "vhost":
        _make_image(image, disk)
    if disk.store == "fuse":
        below = stack.enter_context(fuse_store(directory))
    made = RunDisk(disk, number, image, below, loop)
    match disk.kind:
        case "nbd":
            other = stack.enter_context(_other()) if disk.shared else None
            store = nbd_store(
                made.path,
                disk.make,
                disk.transport,
                other=other,
                before=unshare_network if disk.netns else None,
            )
            made.server = stack.enter_context(store)
            if disk.proxy:
                front = nbd_store(made.path, upstream=made.server)
                made.front = stack.enter_context(front)
            if disk.shared:
                stack.enter_context(_busy(made.server))
        case "iscsi":
            made.server = stack.enter_context(iscsi_store(made.path))
        case "vhost":
            path, log = directory / "vhost", directory / "log" if disk.logs else None
            backend = vhost_backend(path, connects=disk.connects, log=log)
            made.server = stack.enter_context(backend)
    return made


@contextlib.contextmanager
def _other() -> Iterator[Path]:
    with scratch("o") as directory:
        path = directory / "disk"
        path.touch()
        os.truncate(path, 1024 * MIB)
        yield path


@contextlib.contextmanager
def _busy(store: NbdStore) -> Iterator[None]:
    """Write all over the server's other file, five times a second."""
    client = NbdClient(store.address, "other")
    offsets = itertools.cycle(range(0, 1024 * MIB, MIB))
    over = threading.Event()

    def write() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.2):
                client.write(next(offsets), b"x" * 65536)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        client.close()
        thread.join(5)


def _make_image(image: Path, disk: Disk) -> None:
    if disk.format == "raw":
        image.touch()
        os.truncate(image, _SIZE)
        return
    qemu_img = needs.program("qemu-img", "qemu-utils")
    argv: Sequence[str | os.PathLike[str]] = [qemu_img, "create", "-q", "-f", "qcow2"]
    run([*argv, "-o", f"cluster_size={BLOCK}", image, str(_SIZE)], check=True)
    if disk.bitmap:
        run([qemu_img, "bitmap", "--add", "-g", "64K", image, "changes"], check=True)
    if disk.kind != "file":
        os.truncate(image, _ROOM + disk.fill * MIB)
