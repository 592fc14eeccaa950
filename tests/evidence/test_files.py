"""The open files of real processes, and of fake ones for rare cases."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkilld.evidence.files import MAX_DESCRIPTORS, Image, read_descriptors, read_images
from tests.evidence.places import number_of, on_a_disk
from tests.evidence.trees import lay, process
from tests.lab import needs
from tests.lab.guest import make_disk, start_qemu
from tests.lab.process import OTHER_UID, end, spawn
from tests.lab.storage import slow_disk

MOUNTS = """\
1 0 8:2 / / rw - ext4 /dev/sda2 rw
2 1 0:40 / /mnt/dead rw shared:3 - nfs4 server:/export rw
3 1 0:6 / /dev rw - devtmpfs devtmpfs rw
"""


@pytest.fixture
def home(lab_dir: Path) -> Iterator[Path]:
    """An empty directory on a disk."""
    with on_a_disk(lab_dir) as directory:
        yield directory


@contextlib.contextmanager
def holder(*descriptors: int) -> Iterator[int]:
    """Run a process with these descriptors and /dev/null; yield its pid after its exec."""
    child = spawn(
        ["sh", "-c", "echo; read nothing"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=descriptors,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid
    finally:
        end(child)
        for descriptor in descriptors:
            os.close(descriptor)


def images(pid: int, proc: Path = Path("/proc")) -> tuple[Image, ...]:
    descriptors = read_descriptors(pid, proc)
    assert descriptors is not None
    found = read_images(pid, descriptors, proc)
    assert found is not None
    return tuple(found.values())


def where(image: Image) -> tuple[str, bool]:
    return image.filesystem.number if image.filesystem else image.device, image.writable


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (os.O_RDWR, [True]),
        (os.O_RDWR | os.O_APPEND | os.O_DSYNC, [True]),
        (os.O_RDONLY, [False]),
        (os.O_WRONLY, []),
        (os.O_PATH, []),
    ],
)
def test_how_a_file_is_open(home: Path, flags: int, expected: list[bool]) -> None:
    file = home / "a file\n(deleted)"
    file.touch()
    with holder(os.open(file, flags)) as pid:
        file.unlink()  # A deleted image can still be written.
        assert [where(i) for i in images(pid)] == [(number_of(home), w) for w in expected]


def test_descriptors_that_are_not_images(lab_dir: Path) -> None:
    directory = os.open(lab_dir, os.O_RDONLY | os.O_DIRECTORY)
    shared = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    kernel = os.open("/proc/self/stat", os.O_RDONLY)
    with holder(directory, shared, kernel, os.memfd_create("/x"), os.eventfd(0)) as pid:
        # A file in /proc is on a file system, which the storage reader handles.
        assert [i.filesystem.kind for i in images(pid) if i.filesystem] == ["proc"]


@pytest.mark.parametrize("format", ["qcow2", "qed", "vmdk", "vdi", "vhdx", "vpc"])
def test_an_image_where_guests_have_their_memory(format: str) -> None:
    """An image that was added through the monitor is not on the command line. Only its magic number
    shows what it is."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        image = make_disk(Path(directory) / "image", "64M", format)
        memory = Path(directory) / "memory"
        memory.write_bytes(bytes(1 << 20))
        with holder(os.open(image, os.O_RDWR), os.open(memory, os.O_RDWR)) as pid:
            assert [found.path for found in images(pid)] == [str(image)]


def test_a_real_qemu(home: Path) -> None:
    needs.root("a block device")
    for name in ("rw", "ro"):
        with (home / name).open("wb") as file:
            file.truncate(1 << 20)
    with slow_disk(mebibytes=8, filesystem=None) as disk:
        arguments = [
            *("-blockdev", f"driver=file,node-name=a,filename={home}/rw"),
            *("-blockdev", f"driver=file,node-name=b,read-only=on,filename={home}/ro"),
            *("-blockdev", f"driver=host_device,node-name=c,filename={disk.device}"),
        ]
        with start_qemu(arguments=arguments) as guest:
            root = number_of(home)
            expected = {(root, True), (root, False), (disk.number, True)}
            assert {where(i) for i in images(guest.pid)} == expected


def test_a_path_too_long_to_be_told(home: Path) -> None:
    here = os.open(home, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        deeper = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    image = os.open("disk", os.O_RDWR | os.O_CREAT, dir_fd=here)
    os.close(here)
    with holder(image) as pid:
        assert [where(i) for i in images(pid)] == [(number_of(home), True)]


def test_too_many_descriptors() -> None:
    script = f"import os; [os.dup(0) for _ in range({MAX_DESCRIPTORS})]; print(flush=True); input()"
    child = spawn([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        found = read_descriptors(child.pid)
        assert found is not None
        assert found.too_many
        assert (found.files, found.sockets) == ((), ())
    finally:
        end(child)


def test_not_to_be_read() -> None:
    needs.root("to be another user")
    with holder() as pid:
        descriptors = read_descriptors(pid)
        assert descriptors is not None
        os.seteuid(OTHER_UID)
        try:
            assert read_descriptors(pid) is None
        finally:
            os.seteuid(0)
    assert read_descriptors(pid) is None
    assert read_images(pid, descriptors) is None or not descriptors.files


def test_a_file_of_a_dead_server_is_not_asked(lab_dir: Path) -> None:
    """A FUSE file system answers until the file is open, and never afterwards."""
    needs.root("to mount")
    with dead_file(lab_dir) as pid:
        found = images(pid)
    assert [i.filesystem.kind for i in found if i.filesystem] == ["fuse"]


@contextlib.contextmanager
def dead_file(directory: Path) -> Iterator[int]:
    """Yield the pid of a process with a file of that file system open for reading and writing."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        raise needs.Missing(f"/dev/fuse: {error.strerror}; load the module fuse") from None
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    child = None
    try:
        if libc.mount(b"lab", bytes(directory), b"fuse", 0, options):
            raise OSError(ctypes.get_errno(), "mount")
        script = 'exec 3<>"$1/disk"; echo; read nothing'
        pipe = subprocess.PIPE
        child = spawn(["sh", "-c", script, "sh", directory], stdin=pipe, stdout=pipe)
        assert child.stdout is not None
        ready = child.stdout.fileno()
        while ready not in select.select([fuse, ready], [], [], 30)[0]:
            _answer(fuse)
        yield child.pid
    finally:
        os.close(fuse)  # Pending calls fail now.
        if child is not None:
            end(child)
        libc.umount2(bytes(directory), 2)  # MNT_DETACH


def _answer(fuse: int) -> None:
    """Answer one request (include/uapi/linux/fuse.h) for a directory with one file."""
    request = os.read(fuse, 1 << 17)
    _, operation, unique, node = struct.unpack_from("=IIQQ", request)
    attributes = struct.pack(
        "=QQQQQQIIIIIIIIII", 2, 0, 0, 0, 0, 0, 0, 0, 0, 0o100600, 1, 0, 0, 0, 0, 0
    )
    if operation == 26:  # INIT
        body = struct.pack("=IIIIHHIIHHI28x", 7, 31, 0, 0, 1, 1, 4096, 1, 0, 0, 0)
    elif operation == 1:  # LOOKUP
        body = struct.pack("=QQQQII", 2, 0, 0, 0, 0, 0) + attributes
    elif operation == 3 and node == 1:  # GETATTR
        root = struct.pack(
            "=QQQQQQIIIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o40700, 2, 0, 0, 0, 0, 0
        )
        body = struct.pack("=QII", 0, 0, 0) + root
    elif operation == 3:
        body = struct.pack("=QII", 0, 0, 0) + attributes
    elif operation == 14:  # OPEN
        body = struct.pack("=QII", 1, 0, 0)
    else:
        os.write(fuse, struct.pack("=IiQ", 16, -38, unique))  # ENOSYS
        return
    os.write(fuse, struct.pack("=IiQ", 16 + len(body), 0, unique) + body)


def test_by_the_mount_of_the_descriptor(tmp_path: Path) -> None:
    """These paths need not exist, because only the text of the fake /proc is read."""
    proc = lay(
        tmp_path,
        process(
            "7",
            {
                3: ("/images/a", os.O_RDWR, 1),
                4: ("/mnt/dead/b", os.O_RDWR, 2),
                5: ("/mnt/dead/b", os.O_RDONLY, 2),
                6: ("/memfd:x (deleted)", os.O_RDWR, 99),
                7: ("/detached/c", os.O_RDWR, 99),
                8: ("/of/the/host", os.O_RDWR, 50),
                9: ("socket:[42]", os.O_RDWR, 9),
                10: ("anon_inode:[eventfd]", os.O_RDWR, 15),
            },
            MOUNTS,
        )
        | {"self/mountinfo": "50 1 0:41 / /host rw - nfs other:/ rw\n"},
    )
    descriptors = read_descriptors(7, proc)
    assert descriptors is not None
    assert descriptors.sockets == (("9", 42),)
    assert descriptors.count == 8
    assert {where(i) for i in images(7, proc)} == {
        ("8:2", True),
        ("0:40", True),
        ("0:40", False),
        ("", True),
        ("0:41", True),
    }


@pytest.mark.parametrize("text", ["", "flags:\t02\n", "flags:\t09\nmnt_id:\t1\n", "\0" * 999])
def test_garbage_is_unknown(tmp_path: Path, text: str) -> None:
    proc = lay(tmp_path, process("7", {3: ("/a", os.O_RDWR, 1)}, MOUNTS))
    (proc / "7/fdinfo/3").write_text(text)
    descriptors = read_descriptors(7, proc)
    assert descriptors is not None
    assert read_images(7, descriptors, proc) is None
