"""The rows whose guest has no operating system, so it cannot be asked to shut down.

Each guest has a healthy disk with 300 acknowledged records. QEMU has about two thirds of them only
in memory. Most guests have a second disk, which causes the problem.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.bare import BareGuest, Layout
from tests.lab.log import wait_for_path
from tests.lab.nbd import NbdStore, nbd_store
from tests.lab.process import end, run, spawn
from tests.lab.vhost_user import vhost_backend
from tests.shutdown.scene import Launcher, Make, RecordCount, Row, Scene

RECORDS: Final = Layout(100, passes=3)
MIB: Final = 1 << 20
_ROOM: Final = 64 * MIB


def _qcow2(path: Path, room: int = 0) -> Path:
    qemu_img = str(needs.program("qemu-img", "qemu-utils"))
    run([qemu_img, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4K", path, "10G"], check=True)
    if room:
        with path.open("r+b") as image:
            image.truncate(path.stat().st_size + room)
    return path


def _raw(path: Path) -> Path:
    path.touch()
    with path.open("r+b") as image:
        image.truncate(_ROOM)
    return path


def _drive(name: str, words: str) -> list[str]:
    return ["-drive", f"{words},if=none,id={name}", "-device", f"virtio-blk-pci,drive={name}"]


def _local(image: Path, more: str = "") -> list[str]:
    return _drive("data", f"file={image},format=qcow2{more}")


def _nbd(path: object, more: str = "") -> str:
    return f"driver=nbd,server.type=unix,server.path={path}{more}"


@contextlib.contextmanager
def _guest(
    directory: Path, launcher: Launcher, arguments: Sequence[str], image: Path
) -> Iterator[tuple[BareGuest, Scene]]:
    qmp = directory / "qmp"
    words = [*arguments, "-qmp", f"unix:{qmp},server=on,wait=off"]
    with launcher.bare(directory, words) as (guest, target):
        assert guest.write("data", RECORDS) == 300
        yield guest, Scene(target, qmp, lambda: RecordCount(RECORDS.kept(image, "qcow2"), 300))


def _with_remote(
    strike: Callable[[NbdStore, BareGuest], None],
    *,
    more: str = "",
    back_after: float | None = None,
    paused: bool = False,
) -> Make:
    @contextlib.contextmanager
    def make(directory: Path, launcher: Launcher) -> Iterator[Scene]:
        image = _qcow2(directory / "data.qcow2")
        with nbd_store(_raw(directory / "remote.raw")) as store:
            remote = _drive("remote", _nbd(store.server()["path"], more))
            words = [*_local(image), *remote]
            with _guest(directory, launcher, words, image) as (guest, scene):
                if paused:
                    guest.hmp("stop")
                strike(store, guest)
                if back_after is not None:
                    scene.later = [(back_after, store.thaw)]
                scene.recover = store.thaw
                yield scene

    return make


def _freeze(store: NbdStore, guest: BareGuest) -> None:
    store.freeze()
    guest.write_later("remote", 0, 4)


def _leave(store: NbdStore, guest: BareGuest) -> None:
    store.leave()
    guest.write_later("remote", 0, 4)


def _write(store: NbdStore, guest: BareGuest) -> None:
    guest.hmp('qemu-io remote "write -q 0 1M"')


@contextlib.contextmanager
def _slow_beside_dead(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    image = _qcow2(directory / "data.qcow2", _ROOM)
    with nbd_store(image) as healthy, nbd_store(_raw(directory / "remote.raw")) as dead:
        place = f"file.server.type=unix,file.server.path={healthy.server()['path']}"
        data = _drive("data", f"driver=qcow2,file.driver=nbd,{place}")
        remote = _drive("remote", _nbd(dead.server()["path"]))
        with _guest(directory, launcher, [*data, *remote], image) as (guest, scene):
            healthy.slow("55K")
            _freeze(dead, guest)

            def recover() -> None:
                healthy.fast()
                dead.thaw()

            scene.recover = recover
            yield scene


@contextlib.contextmanager
def _vhost(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    image = _qcow2(directory / "data.qcow2")
    with vhost_backend(directory / "vhost", connects=False) as backend:
        device = ["-chardev", f"socket,id=back,path={directory / 'vhost'}"]
        device += ["-device", "vhost-user-blk-pci,chardev=back,addr=6"]
        with _guest(directory, launcher, [*_local(image), *device], image) as (guest, scene):
            guest.start_virtio(6)
            backend.freeze()
            scene.recover = backend.thaw
            yield scene


@contextlib.contextmanager
def _failing_flush(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    image = _qcow2(directory / "data.qcow2")
    script = ["get_size=echo 64M", "pwrite=cat >/dev/null", "can_write=exit 0", "can_flush=exit 0"]
    script += ["pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none"]
    script += ["flush=echo EIO gone >&2; exit 1"]
    path = directory / "socket"
    server = spawn([needs.program("nbdkit", "nbdkit"), "-f", "-U", path, "eval", *script])
    try:
        wait_for_path(path, 30)
        words = [*_local(image), *_drive("remote", _nbd(path))]
        with _guest(directory, launcher, words, image) as (guest, scene):
            guest.hmp('qemu-io remote "write -q 0 64k"')
            yield scene
    finally:
        end(server)


@contextlib.contextmanager
def _panicked(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    """The guest reports a panic on its pvpanic device, and QEMU stops it."""
    image = _qcow2(directory / "data.qcow2")
    words = [*_local(image), "-device", "pvpanic", "-action", "panic=pause"]
    with _guest(directory, launcher, words, image) as (guest, scene):
        guest.hmp("o/b 0x505 1")
        assert guest.call("query-status")["status"] == "guest-panicked"
        yield scene


@contextlib.contextmanager
def _backup(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    image, copy = _qcow2(directory / "data.qcow2"), directory / "copy.raw"
    with _guest(directory, launcher, _local(image), image) as (guest, scene):
        guest.hmp(f"drive_backup -f data {copy} raw")
        guest.hmp("block_job_set_speed data 450M")
        scene.count = lambda: _with_copy(image, copy)
        yield scene


@contextlib.contextmanager
def _mirror(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    image, copy = _qcow2(directory / "data.qcow2"), directory / "copy.raw"
    with _guest(directory, launcher, _local(image), image) as (guest, scene):
        guest.hmp(f"drive_mirror -f data {copy} raw")
        guest.hmp("block_job_set_speed data 450M")
        scene.count = lambda: _with_copy(image, copy)
        yield scene


def _with_copy(image: Path, copy: Path) -> RecordCount:
    whole = RECORDS.kept(copy, "raw") == 300
    return RecordCount(
        RECORDS.kept(image, "qcow2"), 300, ("the copy is whole" if whole else "half a copy",)
    )


@contextlib.contextmanager
def _migration(directory: Path, launcher: Launcher) -> Iterator[Scene]:
    """Start a migration of 8 MiB at 300 KiB/s."""
    image, state, fill = (directory / name for name in ("data.qcow2", "state", "fill"))
    _qcow2(image)
    fill.write_bytes(os.urandom(8 * MIB))
    words = [*_local(image), "-device", f"loader,file={fill},addr=0x200000,force-raw=on"]
    with _guest(directory, launcher, words, image) as (guest, scene):
        guest.call("migrate-set-parameters", **{"max-bandwidth": 300 << 10})
        guest.call("migrate", uri=f"exec:cat >{state}")

        def count() -> RecordCount:
            whole = state.stat().st_size > 8 * MIB
            note = "the migration is complete" if whole else "half a migration"
            return RecordCount(RECORDS.kept(image, "qcow2"), 300, (note,))

        scene.count = count
        yield scene


ROWS: Final = {
    "healthy": Row("both disks are healthy", _with_remote(_write)),
    "back": Row("NBD freezes and is back after 30 s", _with_remote(_freeze, back_after=30)),
    "dead": Row("NBD is frozen for good", _with_remote(_freeze), at_risk=("yanked",)),
    "gone": Row(
        "NBD is gone for good, reconnect-delay=3600",
        _with_remote(_leave, more=",reconnect-delay=3600"),
        result=("killed",),
        at_risk=("yanked", "killed-io"),
    ),
    "slow": Row(
        "NBD is frozen for good, the healthy disk needs 60 s more",
        _slow_beside_dead,
        at_risk=("yanked",),
    ),
    "vhost": Row("a vhost-user backend is frozen for good", _vhost, at_risk=("yanked",)),
    "paused": Row(
        "NBD is frozen for good, the guest is paused",
        _with_remote(_freeze, paused=True),
        at_risk=("yanked",),
        asked="not-running",
    ),
    "panicked": Row("the guest has panicked (pvpanic)", _panicked, asked="not-running"),
    "eio": Row(
        "EIO on the last flush of the other disk", _failing_flush, at_risk=("flush-failed",)
    ),
    "backup": Row("a backup is running, 24 s more", _backup, note="the copy is whole"),
    # A mirror that is ready continues until somebody ends it. So qkilld does not wait for it.
    "mirror": Row(
        "a mirror is running", _mirror, at_risk=("job-cancelled",), note="the copy is whole"
    ),
    "migration": Row(
        "a migration is running, 28 s more", _migration, note="the migration is complete"
    ),
}
