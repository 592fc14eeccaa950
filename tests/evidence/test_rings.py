"""Requests in flight on io_uring, and possible requests of Linux AIO, in tables and in real
rings."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from qkilld.evidence import rings
from qkilld.evidence.kept_file import open_directory
from qkilld.evidence.process_reader import ProcessReader
from qkilld.evidence.rings import RingReader, RingRequests, requests_in_flight
from tests.evidence.until import until
from tests.lab.fuse import fuse_store
from tests.lab.guest import Guest, make_disk
from tests.lab.process import end, spawn
from tests.lab.qmp import Qmp
from tests.lab.storage import SlowDisk, slow_disk

Make = Callable[..., Guest]

HEADS = (
    "pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t9\nSqMask:\t0x7f\nSqHead:\t{taken}\n"
    "SqTail:\t{tail}\nCachedSqHead:\t{taken}\nCqMask:\t0xff\nCqHead:\t0\nCqTail:\t{answered}\n"
    "CachedCqTail:\t{answered}\nSQEs:\t0\nCQEs:\t0\n"
)
V6_1 = HEADS + "SqThread:\t-1\nSqThreadCpu:\t-1\nUserFiles:\t0\nUserBufs:\t0\nPollList:\n{polls}"
V6_1 += "CqOverflowList:\n{overflow}"
V6_18 = (
    V6_1.replace("UserFiles", "SqTotalTime:\t0\nSqWorkTime:\t0\nUserFiles") + "NAPI:\tdisabled\n"
)
POLL = "  op=6, task_works=0\n"
ARMED_READ = "  op=22, task_works=0\n"
OVERFLOW = "  user_data=7, res=4096, flags=0\n"


@pytest.mark.parametrize("text", [V6_1, V6_18], ids=["6.1", "6.18"])
@pytest.mark.parametrize(
    ("tail", "answered", "polls", "overflow", "told"),
    [
        (0, 0, "", "", (0, 0)),
        (7, 4, "", "", (3, 0)),
        (3, (1 << 32) - 2, "", "", (5, 0)),
        (3, 0, POLL * 3, "", (0, 0)),
        (4, 0, POLL * 3, "", (1, 1)),
        (9, 0, POLL * 3, "", (6, 1)),
        (4, 0, ARMED_READ, "", (4, 0)),
        (4, 0, "", OVERFLOW, (3, 0)),
        (1, 0, POLL * 2, "", (0, 0)),
        (1 << 31, 0, "", "", None),
        ("x", 0, "", "", None),
    ],
)
def test_in_flight_is_taken_less_answered(
    text: str,
    tail: object,
    answered: int,
    polls: str,
    overflow: str,
    told: tuple[int, int] | None,
) -> None:
    filled = text.format(tail=tail, taken=0, answered=answered, polls=polls, overflow=overflow)
    expected = None if told is None else RingRequests(*told)
    assert requests_in_flight(filled.encode()) == expected


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\n",  # Another thread holds its lock.
        b"pos:\t0\nUserFiles:\t0\nUserBufs:\t0\nPollList:\n",  # 5.10
        HEADS.format(tail=3, taken=3, answered=1).encode(),
    ],
)
def test_a_ring_that_tells_nothing_is_unknown(text: bytes) -> None:
    assert requests_in_flight(text) is None


# ---- a fake /proc ----

Reader = Callable[..., RingReader]


@pytest.fixture
def reader(lab_dir: Path) -> Iterator[Reader]:
    """A function that makes a reader of process 7 in lab_dir."""
    with contextlib.ExitStack() as stack:

        def make(clock: Callable[[], float] = lambda: 0.0) -> RingReader:
            directory = open_directory(lab_dir / "7")
            stack.callback(os.close, directory)
            return RingReader(directory, lab_dir, clock)

        for name in ("7/fd", "7/fdinfo", "sys/fs"):
            (lab_dir / name).mkdir(parents=True)
        (lab_dir / "sys/fs/aio-nr").write_text("128\n")
        yield make


def put_descriptor(proc: Path, number: int, link: str, text: str) -> None:
    (proc / f"7/fd/{number}").symlink_to(link)
    (proc / f"7/fdinfo/{number}").write_text(text)


def put_ring(proc: Path, number: int, in_flight: int, polls: int = 0) -> None:
    tail = in_flight + polls
    text = V6_18.format(tail=tail, taken=0, answered=0, polls=POLL * polls, overflow="")
    put_descriptor(proc, number, "anon_inode:[io_uring]", text)


FLAGS = "pos:\t0\nflags:\t{flags:o}\nmnt_id:\t27\n"
DIRECT = FLAGS.format(flags=os.O_RDWR | os.O_DIRECT)
BUFFERED = FLAGS.format(flags=os.O_RDWR)
AIO = "7f-80 rw-s 00000000 00:13 273842                     /[aio] (deleted)\n"
NOT_AIO = "7f-80 rw-s 00000000 00:13 273842                     /tmp/my/[aio]s (deleted)\n"
CARRIAGE_RETURN = "7f-80 rw-s 00000000 00:13 273842                     /tmp/\r /[aio]\n"


def test_all_rings_count(lab_dir: Path, reader: Reader) -> None:
    put_ring(lab_dir, 3, 2)
    put_ring(lab_dir, 4, 5, polls=2)
    put_ring(lab_dir, 5, 1, polls=2)
    assert reader().read() == (RingRequests(8, timers=2), False)


def test_one_ring_unknown_is_all_unknown(lab_dir: Path, reader: Reader) -> None:
    put_ring(lab_dir, 3, 2)
    put_descriptor(lab_dir, 4, "anon_inode:[io_uring]", "pos:\t0\n")
    assert reader().read() == (None, False)


@pytest.mark.parametrize(
    ("link", "text", "maps", "contexts", "told"),
    [
        ("/a", DIRECT, AIO, "128", True),
        ("/a", DIRECT, AIO, "", True),
        ("/a", DIRECT, NOT_AIO, "128", False),
        ("/a", DIRECT, CARRIAGE_RETURN, "128", True),
        ("/a", DIRECT, None, "128", None),
        ("/a", DIRECT, AIO, "0", False),
        ("/a", BUFFERED, AIO, "128", False),
        ("/a", "nonsense", AIO, "128", None),
        ("pipe:[1]", DIRECT, AIO, "128", False),
    ],
)
def test_direct(
    lab_dir: Path,
    reader: Reader,
    link: str,
    text: str,
    maps: str | None,
    contexts: str,
    told: bool | None,
) -> None:
    put_descriptor(lab_dir, 3, link, text)
    (lab_dir / "sys/fs/aio-nr").write_text(contexts)
    if maps is not None:
        (lab_dir / "7/maps").write_text(maps, newline="")
    assert reader().read() == (RingRequests(0), told)


def test_too_many_descriptors_are_not_looked_into(lab_dir: Path, reader: Reader) -> None:
    put_ring(lab_dir, 0, 1)
    for number in range(1, rings.MAX_DESCRIPTORS + 1):
        (lab_dir / f"7/fd/{number}").symlink_to("/a")
    assert reader().read() == (None, None)


def test_descriptors_are_looked_at_again_after_a_while(lab_dir: Path, reader: Reader) -> None:
    (lab_dir / "7/maps").write_text(AIO)
    put_descriptor(lab_dir, 3, "/a", BUFFERED)
    now = 100.0
    reading = reader(lambda: now)
    assert reading.read() == (RingRequests(0), False)
    (lab_dir / "7/fdinfo/3").write_text(DIRECT)
    assert reading.read() == (RingRequests(0), False)
    now += rings.REFRESH_S
    assert reading.read() == (RingRequests(0), True)


def test_descriptors_of_a_process_that_has_not_run_are_looked_at_more_rarely(
    lab_dir: Path, reader: Reader
) -> None:
    (lab_dir / "7/maps").write_text(AIO)
    put_descriptor(lab_dir, 3, "/a", BUFFERED)
    now = 100.0
    reading = reader(lambda: now)
    assert reading.read() == (RingRequests(0), False)
    (lab_dir / "7/fdinfo/3").write_text(DIRECT)
    now += rings.REFRESH_S
    assert reading.read(has_run=False) == (RingRequests(0), False)
    # The process has run since then.
    assert reading.read(has_run=True) == (RingRequests(0), True)
    (lab_dir / "7/fdinfo/3").write_text(BUFFERED)
    now += rings.IDLE_REFRESH_S
    assert reading.read(has_run=False) == (RingRequests(0), False)
    # An unknown result is read again, even if the process has not run.
    (lab_dir / "7/fdinfo/3").write_text("")
    now += rings.IDLE_REFRESH_S
    assert reading.read(has_run=False) == (RingRequests(0), None)
    (lab_dir / "7/fdinfo/3").write_text(BUFFERED)
    now += rings.REFRESH_S
    assert reading.read(has_run=False) == (RingRequests(0), False)


def test_a_ring_that_became_another_file(lab_dir: Path, reader: Reader) -> None:
    put_ring(lab_dir, 3, 2)
    reading = reader()
    assert reading.read() == (RingRequests(2), False)
    (lab_dir / "7/fd/3").unlink()
    put_descriptor(lab_dir, 3, "/a", BUFFERED)
    assert reading.read() == (RingRequests(0), False)


def test_mappings_that_block_hold_nobody_up(lab_dir: Path, reader: Reader) -> None:
    put_ring(lab_dir, 3, 2)
    put_descriptor(lab_dir, 4, "/a", DIRECT)
    os.mkfifo(lab_dir / "7/maps")
    now = 0.0
    reading = reader(lambda: now)
    assert reading.read() == (RingRequests(2), None)
    now += rings.REFRESH_S
    assert reading.read() == (RingRequests(2), None)
    # Only one thread reads, although there were two calls.
    with (lab_dir / "7/maps").open("w") as pipe:
        pipe.write(AIO)
    now += rings.REFRESH_S
    thread = reading._mappings._thread
    assert thread is not None
    thread.join(30)
    (lab_dir / "7/maps").unlink()
    (lab_dir / "7/maps").write_text(AIO)
    assert reading.read() == (RingRequests(2), True)


def test_without_a_thread_the_mappings_are_unknown(
    lab_dir: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lab_dir / "7/maps").write_text(AIO)
    put_ring(lab_dir, 3, 2)
    put_descriptor(lab_dir, 4, "/a", DIRECT)
    now = 0.0
    reading = reader(lambda: now)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError))
        assert reading.read() == (RingRequests(2), None)
    now += rings.REFRESH_S
    assert reading.read() == (RingRequests(2), True)


# ---- a real QEMU ----


@pytest.fixture
def disk() -> Iterator[SlowDisk]:
    with slow_disk() as disk:
        yield disk


@contextlib.contextmanager
def reading(guest: Guest) -> Iterator[Callable[[], tuple[int | None, bool | None]]]:
    reader = ProcessReader(guest.pid)

    def read() -> tuple[int | None, bool | None]:
        found: dict[str, object] = {}
        reader.read(found)
        return found["rings"], found["direct"]  # type: ignore[return-value]

    try:
        yield read
    finally:
        reader.close()


def drive(disk: SlowDisk, aio: str) -> list[str]:
    assert disk.directory is not None
    image = make_disk(disk.directory / "image", "64M", "raw")
    return ["-drive", f"file={image},if=none,id=d0,format=raw,cache=none,aio={aio}"]


def test_io_uring_on_a_slow_disk(disk: SlowDisk, qemu: Make) -> None:
    guest = qemu(arguments=drive(disk, "io_uring"))
    with reading(guest) as read:
        assert read() == (0, False)
        disk.join(guest.pid)
        disk.slow(1 << 20)
        with Qmp(guest) as qmp:
            for at in range(3):
                qmp.hmp(f'qemu-io d0 "aio_write {at}M 1M"')
        assert read()[0] in range(1, 4)
        disk.fast()
        until(read, lambda found: found == (0, False))


FLUSHES = """
import ctypes, mmap, os, signal, struct, sys
libc, params = ctypes.CDLL(None), ctypes.create_string_buffer(120)
file = os.open(sys.argv[1], os.O_RDWR)
ring = libc.syscall(425, 4, params)  # io_uring_setup
queue, entries = mmap.mmap(ring, 4096), mmap.mmap(ring, 4096, offset=0x10000000)
(tail,), (order,) = struct.unpack_from("I", params, 44), struct.unpack_from("I", params, 64)
for number in range(3):
    struct.pack_into("BBHi", entries, 64 * number, 3, 16, 0, file)  # IORING_OP_FSYNC, IOSQE_ASYNC
    struct.pack_into("I", queue, order + 4 * number, number)
struct.pack_into("I", queue, tail, 3)
libc.syscall(426, ring, 3, 0, 0, None, 0)  # io_uring_enter
signal.pause()
"""


def test_each_worker_of_a_ring_shows_its_request(lab_dir: Path) -> None:
    """The kernel starts most workers while their process is in another call, and shows that call
    for them."""
    (lab_dir / "file").touch()
    with fuse_store(lab_dir) as store:
        store.hang("fsync")
        process = spawn([sys.executable, "-c", FLUSHES, store.directory / "file"])
        reader = ProcessReader(process.pid)

        def workers() -> list[tuple[str, bool | None]]:
            found: dict[str, Any] = {}
            reader.read(found)
            return [(one.call, one.io_call) for one in found["threads"]]

        try:
            until(workers, lambda found: found == 3 * [("", True)])
        finally:
            store.fast()
            reader.close()
            end(process)


def test_linux_aio_on_a_slow_disk(disk: SlowDisk, qemu: Make) -> None:
    guest = qemu(arguments=drive(disk, "native"))
    with reading(guest) as read:
        # QEMU 10 makes its context with the first request.
        with Qmp(guest) as qmp:
            qmp.hmp('qemu-io d0 "aio_read 0 4k"')
        until(read, lambda found: found == (0, True))


def test_o_direct_with_threads_is_no_aio(disk: SlowDisk, qemu: Make) -> None:
    guest = qemu(arguments=drive(disk, "threads"))
    with reading(guest) as read:
        assert read() == (0, False)


def test_a_write_in_a_thread_of_qemu(disk: SlowDisk, qemu: Make) -> None:
    guest = qemu(arguments=drive(disk, "threads"))
    disk.join(guest.pid)
    disk.slow(1 << 20)
    reader = ProcessReader(guest.pid)
    try:
        with Qmp(guest) as qmp:
            qmp.hmp('qemu-io d0 "aio_write 0 2M"')

        def threads() -> list[tuple[str, bool | None]]:
            found: dict[str, object] = {}
            reader.read(found)
            return [(one.state, one.io_call) for one in found["threads"]]  # type: ignore[attr-defined]

        until(threads, lambda found: found == [("D", True)])
        disk.fast()
        until(threads, lambda found: found == [])
    finally:
        reader.close()
