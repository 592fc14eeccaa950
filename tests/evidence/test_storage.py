"""From the images of a process to the disks under them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import Mock

import pytest

from qkilld.evidence import storage
from qkilld.evidence.storage import FilePlace, StorageReader, StorageTable
from qkilld.evidence.thread_places import place_threads
from qkilld.model.sample import Device, Mount, Thread
from tests.evidence.places import number_of, on_a_disk
from tests.evidence.trees import disk, lay, loop, process
from tests.lab import needs
from tests.lab.guest import start_qemu
from tests.lab.process import OTHER_UID, run, spawn
from tests.lab.storage import slow_disk

RW = os.O_RDWR


def image(path: Path, node: str, *more: str) -> list[str]:
    driver = "host_device" if path.is_block_device() else "file"
    return ["-blockdev", ",".join([f"driver={driver},node-name={node},filename={path}", *more])]


def raw(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return path


def seen(reader: StorageReader) -> dict[str, Device]:
    devices, _ = reader.read()
    assert devices is not None
    return {device.number: device for device in devices}


def test_images_on_a_file_system(lab_dir: Path) -> None:
    with on_a_disk(lab_dir) as home:
        number = number_of(home)
        run(["qemu-img", "create", "-q", "-f", "qcow2", home / "a", "1M"], check=True)
        arguments = [*image(home / "a", "a"), "-blockdev", "driver=qcow2,node-name=q,file=a"]
        arguments += image(raw(home / "b"), "b", "read-only=on")
        with start_qemu(arguments=arguments) as guest:
            reader = StorageReader(guest.pid)
            assert reader.read() == (None, None)
            reader.refresh()
            found = seen(reader)[number]
            assert (found.depth, found.own, found.writable) == (0, False, True)
            # fsync of new data writes at least once.
            with (home / "c").open("wb") as file:
                file.write(b"x" * 65536)
                file.flush()
                os.fsync(file.fileno())
            later = seen(reader)[number]
            assert later.writes > found.writes
            assert later.sectors_written >= found.sectors_written + 128
            assert reader.read()[1] == ()
        # The file is closed, but the devices under it are kept.
        reader.refresh()
        assert number in seen(reader)
        reader.close()
        assert reader.read() == (None, None)


def test_an_image_on_a_loop_device_and_one_that_is_one(lab_dir: Path) -> None:
    needs.root("a loop device")
    with slow_disk(mebibytes=16) as mounted, slow_disk(mebibytes=8, filesystem=None) as bare:
        assert mounted.directory is not None
        arguments = image(raw(mounted.directory / "a"), "a", "read-only=on")
        with start_qemu(arguments=[*arguments, *image(bare.device, "b")]) as guest:
            reader = StorageReader(guest.pid)
            reader.refresh()
            found = seen(reader)
            top, own = found[mounted.number], found[bare.number]
            assert (top.depth, top.own, top.writable) == (0, False, False)
            assert (own.depth, own.own, own.writable) == (0, True, True)
            assert (top.name, own.name) == (mounted.device.name, bare.device.name)
            if not number_of(lab_dir).startswith("0:"):
                below = found[number_of(lab_dir)]
                assert (below.depth, below.own, below.writable) == (1, False, True)
                assert below.above == (
                    min(mounted.number, bare.number),
                    max(mounted.number, bare.number),
                )


def test_not_to_be_read(lab_dir: Path) -> None:
    needs.root("to be another user")
    with start_qemu(arguments=image(raw(lab_dir / "a"), "a")) as guest:
        reader = StorageReader(guest.pid)
        os.seteuid(OTHER_UID)
        try:
            reader.refresh()
        finally:
            os.seteuid(0)
        assert reader.read() == (None, None)


def reader_of(
    top: Path,
    descriptors: Mapping[int, tuple[str, int, int]],
    mountinfo: str,
    sys: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
) -> StorageReader:
    """Make a reader of process 7 in a fake tree; `more`: further files of /proc."""
    proc = lay(top / "proc", process("7", descriptors, mountinfo))
    lay(proc, more or {})
    reader = StorageReader(7, proc, lay(top / "sys", sys or {}))
    reader.refresh()
    return reader


SYS = (
    disk("sda", "8:0")
    | disk("sda/sda1", "8:1", partition=True)
    | disk("sdb", "8:16")
    | disk("dm-0", "253:0", below={"sda1": "8:1", "sdb": "8:16"})
)


def depths(reader: StorageReader) -> dict[str, tuple[int, bool]]:
    return {number: (d.depth, d.writable) for number, d in seen(reader).items()}


def test_every_layer_once_with_its_least_depth(tmp_path: Path) -> None:
    mountinfo = "1 0 253:0 / / rw - xfs /dev/mapper/a rw\n2 1 8:1 / /boot rw - ext4 /dev/sda1 rw\n"
    reader = reader_of(
        tmp_path,
        {3: ("/a", os.O_RDONLY, 1), 4: ("/boot/b", RW, 2), 5: ("/c", os.O_RDONLY, 1)},
        mountinfo,
        SYS,
    )
    assert depths(reader) == {
        "253:0": (0, False),
        "8:1": (0, True),
        "8:0": (1, True),
        "8:16": (1, False),
    }
    assert {number: d.above for number, d in seen(reader).items()} == {
        "253:0": (),
        "8:1": (),
        "8:0": ("253:0", "8:1"),
        "8:16": ("253:0",),
    }


def test_a_loop_on_nfs(tmp_path: Path) -> None:
    host = "1 0 8:0 / / rw - ext4 /dev/sda rw\n2 1 0:50 / /far rw - nfs4 s:/x rw\n"
    reader = reader_of(
        tmp_path,
        {3: ("/inside/a", RW, 9)},
        "9 0 7:0 / /inside rw - ext4 /dev/loop0 rw\n",
        loop("loop0", "7:0", "/far/file"),
        more={"1/mountinfo": host, "self/mountinfo": host, "self/mountstats": NFS % ("/far", 5)},
    )
    assert depths(reader) == {"7:0": (0, True)}
    assert reader.read()[1] == (Mount("nfs4", 5, 4096, "0:50"),)


NFS = (
    "device s:/x mounted on %s with fstype nfs4 statvers=1.1\n"
    "\tbytes:\t0 0 0 0 0 4096 0 0\n\tper-op statistics\n\t   WRITE: %d 5 0 0 0 0 0 0 0\n"
)


def test_nfs_of_the_process_alone(tmp_path: Path) -> None:
    """In another mount namespace, the same mount has another place or is missing."""
    reader = reader_of(
        tmp_path,
        {3: ("/images/a", RW, 9), 4: ("/images/b", RW, 9)},
        "9 0 0:50 / /images rw - nfs4 s:/x rw\n",
        more={"7/mountstats": NFS % ("/images", 7)},
    )
    assert reader.read() == ((), (Mount("nfs4", 7, 4096, "0:50"),))


def test_nfs_by_our_own_mounts_where_they_have_it(tmp_path: Path) -> None:
    reader = reader_of(
        tmp_path,
        {3: ("/images/a", RW, 9)},
        "9 0 0:50 / /images rw - nfs4 s:/x rw\n",
        more={
            "self/mountinfo": "4 0 0:50 / /other rw - nfs4 s:/x rw\n",
            "self/mountstats": NFS % ("/other", 8),
        },
    )
    assert reader.read()[1] == (Mount("nfs4", 8, 4096, "0:50"),)


def test_a_process_with_many_more_mounts_than_we_have(tmp_path: Path) -> None:
    """A very long mountinfo is not read, because the kernel takes long to write it. The storage is
    known only if process 1 has the mount, or if our own mountinfo is as long."""
    many = "".join(
        f"{number} 9 0:50 / /{'x' * 200} rw - tmpfs x rw\n" for number in range(10, 2000)
    )
    disk_mount = "9 0 8:0 / / rw - ext4 /dev/sda rw\n"
    for name, more, known in (
        ("alone", {"self/mountinfo": ""}, False),
        ("host", {"self/mountinfo": "", "1/mountinfo": disk_mount}, True),
        ("both", {"self/mountinfo": many}, True),
    ):
        reader = reader_of(tmp_path / name, {3: ("/a", RW, 9)}, disk_mount + many, SYS, more)
        devices, mounts = reader.read()
        assert [device.number for device in devices or ()] == (["8:0"] if known else []), name
        assert bool(mounts) is not known, name  # Unknown storage has no counters.


OVERLAY = "9 0 0:60 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/up\\040per/x,workdir=/w\n"


@pytest.mark.parametrize(
    ("mountinfo", "flags", "expected_devices", "expected_mounts"),
    [
        ("9 0 0:60 / / rw - tmpfs tmpfs rw\n", RW, {}, []),
        ("9 0 0:60 / / rw - fuse.sshfs me@there rw\n", RW, {}, ["fuse.sshfs"]),
        ("9 0 0:60 / / rw - fuse.\x1b[2J me rw\n", RW, {}, ["fuse.\N{REPLACEMENT CHARACTER}[2J"]),
        ("9 0 0:60 / / rw - zfs tank/a rw\n", RW, {}, ["zfs"]),
        ("9 0 0:60 / / rw - btrfs /dev/sdb rw\n", RW, {"8:16": (0, True)}, []),
        ("9 0 0:60 / / rw - btrfs /dev/sdz rw\n", RW, {}, ["btrfs"]),
        # An overlay counts no requests, so it is no layer.
        (OVERLAY, RW, {"8:0": (0, True)}, []),
        (OVERLAY, os.O_RDONLY, {}, ["overlay"]),
        (OVERLAY.replace("upperdir=/", "upperdir="), RW, {}, ["overlay"]),
        ("9 0 9:9 / / rw - ext4 /dev/gone rw\n", RW, {}, ["block device"]),
        ("8 0 8:0 / / rw - ext4 /dev/sda rw\n", RW, {}, ["unknown"]),
    ],
)
def test_kinds_of_file_systems(
    tmp_path: Path,
    mountinfo: str,
    flags: int,
    expected_devices: dict[str, tuple[int, bool]],
    expected_mounts: list[str],
) -> None:
    btrfs = {
        "fs/btrfs/a/devices/sdb/dev": "8:16\n",
        "fs/btrfs/b/devices/sda/dev": "8:0\n",
    }
    host = "1 0 0:1 / / rw - tmpfs none rw\n2 1 8:0 / /up\\040per rw - ext4 /dev/sda rw\n"
    more = {"1/mountinfo": host, "1/root/up per/x/a": ""}
    reader = reader_of(tmp_path, {3: ("/x/a", flags, 9)}, mountinfo, SYS | btrfs, more=more)
    assert depths(reader) == expected_devices
    _, mounts = reader.read()
    assert mounts is not None
    assert [(m.kind, m.operations) for m in mounts] == [(kind, None) for kind in expected_mounts]


DISK = "1 0 8:0 / / rw - ext4 /dev/sda rw\n"
FUSE = DISK + "2 1 0:60 / /tmp rw - fuse me rw\n"
OTHER = "1 0 8:16 / / rw - ext4 /dev/sdb rw\n"


@pytest.mark.parametrize(
    ("more", "sys", "devices", "mounts"),
    [
        ({"1/mountinfo": DISK, "1/root/tmp/a": 1024 * "x"}, {}, {"8:0"}, []),
        # The last, incomplete sector of a file is no part of the device.
        ({"1/mountinfo": DISK, "1/root/tmp/a": 1030 * "x"}, {}, {"8:0"}, []),
        ({"1/mountinfo": DISK}, {}, set(), ["loop"]),
        ({"1/mountinfo": DISK, "1/root/tmp/a": 5000 * "x"}, {}, set(), ["loop"]),
        ({"1/mountinfo": DISK, "1/root/tmp/a": 5000 * "x"}, {"sizelimit": 1024}, {"8:0"}, []),
        ({"1/mountinfo": DISK, "1/root/tmp/a": 5120 * "x"}, {"offset": 4096}, {"8:0"}, []),
        ({"1/mountinfo": DISK, "1/root/tmp/a/b": ""}, {}, set(), ["loop"]),
        ({"1/mountinfo": DISK, "self/mountinfo": FUSE}, {}, set(), ["fuse"]),
        ({"1/mountinfo": FUSE, "self/mountinfo": DISK}, {}, set(), ["fuse"]),
        (
            {"1/mountinfo": DISK, "self/mountinfo": OTHER, "self/root/tmp/a": 1024 * "x"},
            {},
            {"8:16"},
            [],
        ),
    ],
    ids=[
        *("there", "a part of a sector", "missing", "another size", "limit", "offset"),
        *("a directory", "ours on FUSE", "the host's on FUSE", "ours"),
    ],
)
def test_a_backing_file_counts_only_where_it_is_found(
    tmp_path: Path,
    more: Mapping[str, str],
    sys: Mapping[str, int],
    devices: set[str],
    mounts: list[str],
) -> None:
    reader = reader_of(
        tmp_path,
        {3: ("/inside/a", RW, 9)},
        "9 0 7:0 / /inside rw - ext4 /dev/loop0 rw\n",
        SYS | loop("loop0", "7:0", "/tmp/a", **sys),
        more=more,
    )
    assert depths(reader).keys() == {"7:0", *devices}
    assert [mount.kind for mount in reader.read()[1] or ()] == mounts


def test_without_a_thread_only_the_backing_file_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError))
        reader = reader_of(
            tmp_path,
            {3: ("/inside/a", RW, 9)},
            "9 0 7:0 / /inside rw - ext4 /dev/loop0 rw\n",
            SYS | loop("loop0", "7:0", "/tmp/a"),
            more={"1/mountinfo": DISK, "1/root/tmp/a": 1024 * "x"},
        )
        assert depths(reader).keys() == {"7:0"}
    reader.refresh()
    assert depths(reader).keys() == {"7:0", "8:0"}


ELSEWHERE = """
set -e
mount -t tmpfs qkilld-test "$1"
truncate --size=2M "$1/image"
device=$(losetup --find --show "$1/image")
echo "$device"
read end || true
losetup --detach "$device"
"""


def test_a_loop_device_made_in_another_mount_namespace(lab_dir: Path) -> None:
    needs.root("a mount namespace")
    unshare = needs.program("unshare", "util-linux")
    for name in ("losetup", "mount"):
        needs.program(name, "mount")
    with on_a_disk(lab_dir) as home:
        # The same path outside is a file on a disk.
        raw(home / "image")
        argv: list[str | Path] = [unshare, "--mount", "sh", "-c", ELSEWHERE, "sh", home]
        child = spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            device = Path(child.stdout.readline().decode().strip())
            assert device.is_block_device()
            with start_qemu(arguments=image(device, "a")) as guest:
                reader = StorageReader(guest.pid)
                reader.refresh()
                found = seen(reader)
                number = Path(f"/sys/class/block/{device.name}/dev").read_text().strip()
                assert found.keys() == {number}
                assert [mount.kind for mount in reader.read()[1] or ()] == ["loop"]
        finally:
            child.communicate(b"\n")


def test_circles_end(tmp_path: Path) -> None:
    reader = reader_of(
        tmp_path,
        {3: ("/a", RW, 1)},
        "1 0 253:0 / / rw - ext4 /dev/dm-0 rw\n",
        disk("dm-0", "253:0", below={"dm-1": "253:1"})
        | disk("dm-1", "253:1", below={"dm-0": "253:0", "loop0": "7:0"})
        | loop("loop0", "7:0", "/a"),
        more={"1/mountinfo": "1 0 253:0 / / rw - ext4 /dev/dm-0 rw\n", "1/root/a": 1024 * "x"},
    )
    assert depths(reader) == {"253:0": (0, True), "253:1": (1, True), "7:0": (2, True)}


def test_an_overlay_on_its_own_upper_directory_is_unknown(tmp_path: Path) -> None:
    """The mount can hide the directory of the same name, which then leads back to the overlay."""
    host = DISK + "9 1 0:60 / /up\\040per rw - overlay o rw,lowerdir=/l,upperdir=/up\\040per\n"
    more = {"1/mountinfo": host, "1/root/up per/a": ""}
    reader = reader_of(tmp_path, {3: ("/up per/a", RW, 9)}, host, SYS, more)
    assert depths(reader) == {}
    assert [mount.kind for mount in reader.read()[1] or ()] == ["overlay"]


def test_an_image_on_an_overlay_counts_like_one_on_the_disk(lab_dir: Path) -> None:
    """The disk of the upper directory has depth 0. With another depth, it would count only while a
    device above it has requests in flight, and there is no such device."""
    needs.root("an overlay and a loop device")
    with slow_disk(mebibytes=16) as disk:
        assert disk.directory is not None
        upper, merged = disk.directory, lab_dir / "merged"
        for directory in (upper / "files", upper / "work", lab_dir / "lower", merged):
            directory.mkdir()
        options = f"lowerdir={lab_dir}/lower,upperdir={upper}/files,workdir={upper}/work"
        run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
        try:
            with start_qemu(arguments=image(raw(merged / "disk"), "a")) as guest:
                reader = StorageReader(guest.pid)
                reader.refresh()
                found = seen(reader)[disk.number]
                assert (found.depth, found.above, found.writable) == (0, (), True)
                assert reader.read()[1] == ()
        finally:
            run(["umount", merged], check=True)


def test_too_much_is_unknown(tmp_path: Path) -> None:
    many = {f"sd{i}": f"8:{i}" for i in range(storage.MAX_DEVICES)}
    sys = disk("md0", "9:0", below=many)
    for name, number in many.items():
        sys |= disk(name, number)
    mountinfo = "1 0 9:0 / / rw - ext4 /dev/md0 rw\n"
    assert reader_of(tmp_path, {3: ("/a", RW, 1)}, mountinfo, sys).read() == (None, None)


def test_a_disk_stays_until_it_is_unplugged(tmp_path: Path) -> None:
    mountinfo = "1 0 8:0 / / rw - ext4 /dev/sda rw\n2 1 8:16 / /b rw - ext4 /dev/sdb rw\n"
    reader = reader_of(tmp_path, {3: ("/a", RW, 1), 4: ("/b/b", RW, 2)}, mountinfo, SYS)
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    # An exiting QEMU reopens its images for reading, and closes them before its last flush has
    # finished.
    (proc / "7/fdinfo/3").write_text("flags:\t00\nmnt_id:\t1\n")
    (proc / "7/fd/4").unlink()
    reader.refresh()
    assert depths(reader) == {"8:0": (0, True), "8:16": (0, True)}
    (sys / "dev/block/8:16").unlink()
    assert depths(reader) == {"8:0": (0, True)}
    (sys / "dev/block/8:16").symlink_to("../../devices/sdb")
    assert depths(reader) == {"8:0": (0, True), "8:16": (0, True)}
    (sys / "dev/block/8:16").unlink()
    reader.refresh()
    (sys / "dev/block/8:16").symlink_to("../../devices/sdb")
    assert depths(reader) == {"8:0": (0, True)}
    (proc / "7/fd/3").unlink()
    reader.refresh()
    assert depths(reader) == {"8:0": (0, True)}


def test_counters_that_cannot_be_read(tmp_path: Path) -> None:
    reader = reader_of(
        tmp_path, {3: ("/a", RW, 1)}, "1 0 8:16 / / rw - ext4 /dev/sdb rw\n", disk("sdb", "8:16")
    )
    (tmp_path / "sys/devices/sdb/stat").write_text("garbage\n")
    assert reader.read() == (None, ())


def test_a_table_is_read_once(tmp_path: Path) -> None:
    reader = reader_of(
        tmp_path, {3: ("/a", RW, 1)}, "1 0 8:16 / / rw - ext4 /dev/sdb rw\n", disk("sdb", "8:16")
    )
    table = StorageTable(tmp_path / "proc", tmp_path / "sys")
    first = reader.read(table)
    (tmp_path / "sys/devices/sdb/stat").write_text("9 0 0 0 9 0 9 0 9 0 0\n")
    assert reader.read(table) == first
    assert reader.read() != first


def test_the_disks_below_a_descriptor(tmp_path: Path) -> None:
    """The storage of a descriptor has all layers of its image and none of other images, even after
    it is closed."""
    host = "1 0 253:0 / / rw - ext4 /dev/dm-0 rw\n2 1 8:16 / /far rw - ext4 /dev/sdb rw\n"
    reader = reader_of(
        tmp_path,
        {3: ("/loop/a", RW, 9), 4: ("/far/b", RW, 8), 5: ("/fuse/c", RW, 7)},
        "9 0 7:0 / /loop rw - ext4 /dev/loop0 rw\n8 0 8:16 / /far rw - ext4 /dev/sdb rw\n"
        "7 0 0:60 / /fuse rw - fuse me rw\n",
        SYS | loop("loop0", "7:0", "/file"),
        more={"1/mountinfo": host, "1/root/file": 1024 * "x"},
    )
    assert reader.place_of(3) == FilePlace(("7:0", "253:0", "8:1", "8:16", "8:0"), "")
    assert reader.place_of(4) == FilePlace(("8:16",), "")
    assert reader.place_of(5) == FilePlace((), "0:60")
    assert reader.place_of(6) is None
    assert sorted(reader.writable or ()) == ["/far/b", "/fuse/c", "/loop/a"]
    (tmp_path / "proc/7/fd/5").unlink()
    reader.refresh()
    assert reader.place_of(5) == FilePlace((), "0:60")
    assert sorted(reader.writable or ()) == ["/far/b", "/loop/a"]


def test_a_file_that_is_only_written_counts_once_a_thread_waits_for_it(tmp_path: Path) -> None:
    """A dump of the guest's memory is not an image, so none of the guest's data is lost with it."""
    reader = reader_of(
        tmp_path,
        {2: ("/far/log", os.O_WRONLY, 8), 4: ("/far/dump", os.O_WRONLY, 8), 5: ("/fuse/c", RW, 7)},
        "8 0 8:16 / /far rw - ext4 /dev/sdb rw\n7 0 0:60 / /fuse rw - fuse me rw\n",
        SYS,
    )
    assert (reader.place_of(4), seen(reader)) == (None, {})
    for descriptor in (2, 4):
        reader.refresh(waited_for=descriptor)
    reader.refresh()
    assert reader.place_of(4) == FilePlace(("8:16",), "")
    assert reader.place_of(2) is None
    assert not seen(reader)["8:16"].writable
    assert reader.writable == ["/fuse/c"]


@pytest.mark.parametrize("call", ["fsync", "fdatasync", "syncfs"])
def test_a_file_on_a_standard_stream_counts_once_a_thread_flushes_it(
    tmp_path: Path, call: str
) -> None:
    """A script of a storage server may run dd conv=fsync, for example."""
    mountinfo = "8 0 8:16 / /far rw - ext4 /dev/sdb rw\n"
    reader = reader_of(tmp_path, {1: ("/far/disk", os.O_WRONLY, 8)}, mountinfo, SYS)
    thread = Thread(7, "dd", "D", 1, io_call=True, wchan="", call="write", descriptor=1)
    for present, target in (("write", "other"), (call, "disk")):
        waiting = (dataclasses.replace(thread, call=present),)
        (placed,) = place_threads(7, waiting, reader, tmp_path / "proc") or ()
        assert (placed.target, placed.disks) == (target, ("8:16",) if target == "disk" else ())


def test_an_image_may_have_the_descriptor_of_standard_error(tmp_path: Path) -> None:
    """If QEMU starts without standard streams, its images may get descriptors 0, 1 and 2. A
    terminal is not an image."""
    reader = reader_of(
        tmp_path,
        {0: ("/dev/pts/1", RW, 6), 1: ("/far/log", os.O_WRONLY, 8), 2: ("/far/a", RW, 8)},
        "8 0 8:16 / /far rw - ext4 /dev/sdb rw\n6 0 0:20 / /dev/pts rw - devpts none rw\n",
        SYS,
    )
    assert reader.writable == ["/far/a"]
    assert reader.writable_places == {"/far/a": FilePlace(("8:16",), "")}


def test_the_log_of_a_program_that_opens_it_for_reading_and_writing(tmp_path: Path) -> None:
    """os.Create in Go opens files like this."""
    mountinfo = "8 0 8:16 / /far rw - ext4 /dev/sdb rw\n"
    reader = reader_of(
        tmp_path, {1: ("/far/log", RW, 8), 2: ("/far/b (deleted)", RW, 8)}, mountinfo
    )
    assert sorted(reader.writable or ()) == ["/far/b (deleted)", "/far/log"]
    reader.names = {"b"}
    assert reader.writable == ["/far/b (deleted)"]
    assert list(reader.writable_places) == ["/far/b (deleted)"]


def test_an_image_that_qemu_has_opened_instead_of_a_standard_stream(tmp_path: Path) -> None:
    """The command line may name a symbolic link, such as one to a logical volume."""
    mountinfo = "8 0 8:16 / /far rw - ext4 /dev/sdb rw\n"
    reader = reader_of(tmp_path, {0: ("/far/a", RW | os.O_CLOEXEC, 8)}, mountinfo)
    reader.names = {"link"}
    assert reader.writable == ["/far/a"]
