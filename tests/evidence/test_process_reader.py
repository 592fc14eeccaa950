"""The readers of a process and its threads read tables, and real processes in every state."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qkilld.evidence import syscalls
from qkilld.evidence.process_reader import ProcessReader
from qkilld.evidence.threads import MAX_THREADS
from qkilld.model.sample import Io
from tests.campaign.standstill import trace
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.guest import Guest
from tests.lab.process import OTHER_UID, end, spawn
from tests.lab.storage import slow_disk

Make = Callable[..., Guest]
ReaderOf = Callable[..., ProcessReader]


@pytest.fixture
def reader_of() -> Iterator[ReaderOf]:
    """A function that makes a reader, closed at the end."""
    readers = []

    def make(pid: int, *arguments: Any) -> ProcessReader:
        readers.append(ProcessReader(pid, *arguments))
        return readers[-1]

    yield make
    for reader in readers:
        reader.close()
        reader.close()


def read(reader: ProcessReader) -> dict[str, Any]:
    found = {"state": "?"}
    reader.read(found)
    return found


UNKNOWN = dict.fromkeys(
    (
        *("cpu", "term_pending", "tracer", "dumping", "io", "switches", "threads", "running"),
        *("exiting", "rings", "direct"),
    )
)

# ---- a fake /proc ----

STAT = "7 ({name}) {state} 1 7 7 0 -1 0 1 2 3 4 50 25 0 0 20 0 {threads} 0 99 0 0"
STATUS = (
    "Name:\tqemu\nState:\t{state} (x)\nTracerPid:\t{tracer}\nCoreDumping:\t0\n"
    "ShdPnd:\t{pending:016x}\n"
)
SWITCHES = "voluntary_ctxt_switches:\t{count}\nnonvoluntary_ctxt_switches:\t5\n"
IO = (
    "rchar: 1\nwchar: 2\nsyscr: 3\nsyscw: 4\nread_bytes: 5\nwrite_bytes: 6\n"
    "cancelled_write_bytes: 7\n"
)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def put_process(proc: Path, *, name: str = "qemu", threads: int = 0, pending: int = 0) -> Path:
    own = proc / "7"
    put(own / "stat", STAT.format(name=name, state="S", threads=threads))
    put(own / "status", STATUS.format(state="S", tracer=3, pending=pending))
    put(own / "io", IO)
    (own / "fd").mkdir()
    (own / "task").mkdir()
    return own


def put_thread(
    own: Path, tid: int, state: str, syscall: str, *, ran: str = "1 2 3", switches: int = 10
) -> Path:
    thread = own / f"task/{tid}"
    status = STATUS.format(state=state, tracer=0, pending=0) + SWITCHES.format(count=switches)
    put(thread / "status", status)
    put(thread / "schedstat", f"{ran}\n")
    put(thread / "syscall", f"{syscall}\n")
    put(thread / "wchan", "folio_wait_bit")
    return thread


def test_the_fields(lab_dir: Path, reader_of: ReaderOf) -> None:
    own = put_process(lab_dir, name="q) R 1 (\n", threads=1, pending=1 << 14 | 1)
    put_thread(own, 7, "S", "-1 0x0 0x0")
    assert read(reader_of(7, lab_dir)) == {
        "state": "S",
        "cpu": 75,
        "term_pending": True,
        "tracer": 3,
        "io": Io(1, 2, 3, 4, 5, 6, 7),
        "dumping": False,
        "switches": 10,
        "threads": (),
        "running": 0,
        "exiting": False,
        "rings": 0,
        "timers": 0,
        "direct": False,
    }


def test_without_detail_only_what_is_cheap(lab_dir: Path, reader_of: ReaderOf) -> None:
    put_process(lab_dir, pending=1 << 13)
    found: dict[str, Any] = {}
    reader_of(7, lab_dir).read(found, detail=False)
    assert set(found) == {"state", "cpu", "term_pending", "tracer", "dumping", "io"}
    assert found["term_pending"] is False


@pytest.mark.parametrize("text", ["", "nonsense", "7 (q) S", "7 (q) S " + "x " * 30, "\0" * 5000])
def test_garbage_is_unknown(lab_dir: Path, reader_of: ReaderOf, text: str) -> None:
    own = put_process(lab_dir)
    for name in ("stat", "status", "io"):
        put(own / name, text)
    assert read(reader_of(7, lab_dir)) == {
        **UNKNOWN, "state": "?", "rings": 0, "timers": 0, "direct": False
    }  # fmt: skip


def test_a_missing_process_has_unknown_values(lab_dir: Path, reader_of: ReaderOf) -> None:
    assert read(reader_of(7, lab_dir)) == {"state": "?", **UNKNOWN}
    (lab_dir / "7").mkdir()
    assert read(reader_of(7, lab_dir)) == {"state": "?", **UNKNOWN}


def test_too_many_threads_are_not_looked_into(lab_dir: Path, reader_of: ReaderOf) -> None:
    own = put_process(lab_dir, threads=MAX_THREADS + 1)
    put_thread(own, 7, "S", "-1 0x0 0x0")
    found = read(reader_of(7, lab_dir))
    assert (found["switches"], found["threads"], found["state"]) == (None, None, "S")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86_64")
@pytest.mark.parametrize(
    ("state", "syscall", "told"),
    [
        ("S", "271 0x1 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", None),
        ("S", "18 0x4 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", (18, True)),
        ("D", "75 0x4 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", (75, True)),
        ("S", "202 0x4 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", None),
        ("S", "1 0x4 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", (1, False)),
        ("S", "0 0x4 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", (0, False)),
        ("D", "1 0x4 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", (1, False)),
        ("S", "3 0x4 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", (3, True)),
        ("S", "426 0x4 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", (426, True)),
        ("S", "9999 0x4 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", (9999, False)),
        ("D", "-1 0x7f 0x7f", (-1, False)),
        ("S", "16 0x4 0xae80 0x0 0x0 0x0 0x0 0x7f 0x7f", None),
        ("S", "16 0x4 0x127f 0x0 0x0 0x0 0x0 0x7f 0x7f", (16, True)),
        ("S", "16 0x4 0x2285 0x0 0x0 0x0 0x0 0x7f 0x7f", (16, True)),
        # A worker of the kernel shows the call of its creator
        ("S", "1 0x4 0x2 0x0 0x0 0x0 0x0 0x0 0x0", None),
        ("D", "1 0x4 0x2 0x0 0x0 0x0 0x0 0x0 0x0", (-1, False)),
        ("D", "running", (-1, False)),
        ("R", "18 0x4 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", None),
        ("T", "18 0x4 0x2 0x0 0x0 0x0 0x0 0x7f 0x7f", (None, None)),
        ("D", "nonsense", (None, None)),
    ],
)
def test_a_thread(
    lab_dir: Path,
    reader_of: ReaderOf,
    state: str,
    syscall: str,
    told: tuple[int | None, bool | None] | None,
) -> None:
    own = put_process(lab_dir, threads=1)
    put_thread(own, 8, state, syscall)
    threads = read(reader_of(7, lab_dir))["threads"]
    if told is None:
        assert threads == ()
    else:
        (thread,) = threads
        assert (thread.tid, thread.name, thread.state) == (8, "qemu", state)
        assert (thread.syscall, thread.io_call) == told
        assert thread.wchan == "folio_wait_bit"


def test_values_the_kernel_hides_are_unknown(lab_dir: Path, reader_of: ReaderOf) -> None:
    own = put_process(lab_dir, threads=2)
    put_thread(own, 8, "S", "nonsense")
    thread = put_thread(own, 9, "S", "-1 0x0 0x0")
    assert read(reader_of(7, lab_dir))["threads"] is None
    put(thread / "status", STATUS.format(state="D", tracer=0, pending=0) + SWITCHES.format(count=1))
    put(thread / "wchan", "0")
    (told,) = read(reader_of(7, lab_dir))["threads"]
    assert (told.tid, told.wchan) == (9, None)


@pytest.mark.parametrize("wchan", ["io_wq_worker", "io_wqe_worker", "0", "request_wait_answer"])
def test_a_worker_of_io_uring_waits_for_its_request(
    lab_dir: Path, reader_of: ReaderOf, wchan: str
) -> None:
    thread = put_thread(put_process(lab_dir, threads=1), 8, "S", f"271{8 * ' 0x0'}")
    put(thread / "status", (thread / "status").read_text().replace("qemu", "iou-wrk-7"))
    put(thread / "wchan", wchan)
    threads = read(reader_of(7, lab_dir))["threads"]
    assert [one.io_call for one in threads] == [True] * (wchan == "request_wait_answer")


def test_a_thread_that_waits_for_its_ring_waits_for_events(
    lab_dir: Path, reader_of: ReaderOf
) -> None:
    own = put_process(lab_dir, threads=1)
    thread = put_thread(own, 8, "S", "426 0x4 0x0 0x0 0x0 0x0 0x0 0x7f 0x7f")
    put(thread / "wchan", "io_cqring_schedule_timeout")
    assert read(reader_of(7, lab_dir))["threads"] == ()


def test_a_thread_is_read_again_once_it_ran(lab_dir: Path, reader_of: ReaderOf) -> None:
    own = put_process(lab_dir, threads=1)
    thread = put_thread(own, 8, "S", "-1 0x0 0x0")
    reader = reader_of(7, lab_dir)
    assert read(reader)["switches"] == 10
    put(
        thread / "status", STATUS.format(state="S", tracer=0, pending=0) + SWITCHES.format(count=11)
    )
    assert read(reader)["switches"] == 10, "it is read though it did not run"
    put(thread / "schedstat", "2 2 3\n")
    assert read(reader)["switches"] == 11


@pytest.mark.parametrize("ran", ["0 0 0", ""])
def test_where_the_kernel_does_not_count_runs(lab_dir: Path, reader_of: ReaderOf, ran: str) -> None:
    own = put_process(lab_dir, threads=1)
    thread = put_thread(own, 8, "S", "-1 0x0 0x0", ran=ran)
    if not ran:
        (thread / "schedstat").unlink()
    reader = reader_of(7, lab_dir)
    assert read(reader)["switches"] == 10
    put(
        thread / "status", STATUS.format(state="S", tracer=0, pending=0) + SWITCHES.format(count=11)
    )
    assert read(reader)["switches"] == 11


def test_switches_never_fall(lab_dir: Path, reader_of: ReaderOf) -> None:
    own = put_process(lab_dir, threads=2)
    put_thread(own, 8, "S", "-1 0x0 0x0")
    thread = put_thread(own, 9, "S", "-1 0x0 0x0")
    reader = reader_of(7, lab_dir)
    assert read(reader)["switches"] == 20
    thread.rename(own / "task/10")
    put(own / "stat", STAT.format(name="q", state="S", threads=1))
    (own / "task/8").rename(lab_dir / "gone")
    assert read(reader)["switches"] == 20


def test_switches_do_not_count_while_threads_end(lab_dir: Path, reader_of: ReaderOf) -> None:
    own = put_process(lab_dir, threads=2)
    put_thread(own, 8, "S", "-1 0x0 0x0")
    put_thread(own, 9, "S", "-1 0x0 0x0")
    reader = reader_of(7, lab_dir)
    assert read(reader)["switches"] == 20
    # An idle thread of QEMU's pool ends, and wakes another one.
    put(own / "stat", STAT.format(name="q", state="S", threads=1))
    (own / "task/8").rename(lab_dir / "gone")
    put_thread(own, 9, "S", "-1 0x0 0x0", ran="2 2 3", switches=13)
    assert read(reader)["switches"] == 20
    put_thread(own, 9, "S", "-1 0x0 0x0", ran="3 2 3", switches=15)
    assert read(reader)["switches"] == 22


# ---- the numbers of system calls ----

FILES = {
    *("pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2"),
    *("fsync", "fdatasync", "sync", "syncfs", "sync_file_range", "msync"),
    *("fallocate", "ftruncate", "truncate", "copy_file_range", "io_submit", "io_destroy"),
    # Some architectures have this call instead of sync_file_range, with the same number.
    "sync_file_range2",
}
ANY = {"read", "write", "readv", "writev", "sendfile", "splice"}
HEADERS = {
    "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": "/usr/include/asm-generic/unistd.h",
}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_are_those_of_the_kernel(machine: str) -> None:
    header = Path(HEADERS[machine])
    if not header.exists():
        raise needs.Missing(f"{header} is not there: apt-get install linux-libc-dev")
    text = header.read_text()
    numbers = {
        name: int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)
    }
    known = syscalls._NUMBERS[machine]
    assert {name: numbers[name] for name in known.values() if name in numbers} == {
        name: number for number, name in known.items() if name in numbers
    }
    assert set(known.values()) <= numbers.keys() | {"newfstatat", "pread64", "pwrite64"}


def test_calls_that_wait_for_events_are_no_waits() -> None:
    def call(name: str, *arguments: int) -> syscalls.Call:
        numbers = {name: number for number, name in syscalls._NUMBERS["x86_64"].items()}
        found = syscalls.describe_call(numbers[name], arguments, "x86_64")
        assert found is not None
        return found

    for name in ("ppoll", "futex", "io_uring_enter", "epoll_wait", "recvmsg"):
        assert not call(name).waits, name
    assert call("fdatasync", 11).waits
    assert call("fdatasync", 11).of_files
    assert call("fdatasync", 11).descriptor == 11
    assert call("close", 12).of_files
    assert call("write", 2, 0).waits
    assert not call("write", 2, 0).of_files
    assert call("read", 3).reads
    assert not call("read", 3).waits
    assert not call("ioctl", 9, 0xAE80, 0).waits  # KVM_RUN
    assert call("ioctl", 9, 0x1277, 0).of_files  # BLKDISCARD
    unknown = syscalls.describe_call(9999, (), "x86_64")
    assert unknown is not None
    assert unknown.waits
    none = syscalls.describe_call(-1, (), "x86_64")
    assert none is not None
    assert not none.waits


def test_no_system_calls_are_known_of_another_architecture() -> None:
    assert syscalls.describe_call(1, (), "alpha") is None


# ---- real processes ----


def test_an_idle_qemu(qemu: Make, reader_of: ReaderOf) -> None:
    guest = qemu()
    reader = reader_of(guest.pid)
    found = until(
        lambda: read(reader), lambda found: (found["state"], found["threads"]) == ("S", ())
    )
    assert found["switches"] > 0
    assert found["io"].rchar > 0
    assert (found["term_pending"], found["tracer"]) == (False, 0)
    assert (found["rings"], found["direct"]) == (0, False)

    def counted() -> tuple[int, int]:
        return read(reader)["switches"], sum(
            int(re.findall(r"\nvoluntary_ctxt_switches:\t(\d+)", path.read_text())[0])
            for path in Path(f"/proc/{guest.pid}/task").glob("*/status")
        )

    # The counters of a stopped guest do not change, so both readings must become equal.
    guest.signal(signal.SIGSTOP)
    until(counted, lambda counts: counts[0] == counts[1])


def test_a_stopped_one_has_not_taken_sigterm(qemu: Make, reader_of: ReaderOf) -> None:
    guest = qemu()
    assert guest.process is not None
    reader = reader_of(guest.pid)
    guest.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, guest.pid, os.WSTOPPED)
    assert read(reader)["state"] == "T"
    assert read(reader)["term_pending"] is False
    guest.signal(signal.SIGTERM)
    found = read(reader)
    assert (found["state"], found["term_pending"], found["threads"]) == ("T", True, ())
    guest.signal(signal.SIGCONT)
    assert guest.wait_gone() == 0
    assert read(reader) == {"state": "?", **UNKNOWN}


def test_a_debugger_shows(qemu: Make, reader_of: ReaderOf) -> None:
    guest = qemu()
    reader = reader_of(guest.pid)
    gdb = spawn(
        [
            needs.program("gdb", "gdb"),
            "--nx",
            "--quiet",
            "-p",
            str(guest.pid),
            "-ex",
            "echo attached\\n",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert gdb.stdout is not None
        assert any(line == b"attached\n" for line in gdb.stdout)
        found = read(reader)
        assert (found["tracer"], found["state"]) == (gdb.pid, "t")
        assert found["threads"] == ()
    finally:
        end(gdb)
    until(lambda: read(reader)["tracer"], lambda tracer: tracer == 0)


def test_a_reused_process_id_is_not_read(fake_qemu: Make, reader_of: ReaderOf) -> None:
    needs.root("to have a process id given again")
    guest = fake_qemu()
    reader = reader_of(guest.pid)
    assert read(reader)["state"] != "?"
    guest.signal(signal.SIGKILL)
    guest.wait_gone()
    other = fork_with_pid(guest.pid)
    try:
        assert Path(f"/proc/{guest.pid}/stat").exists()
        assert read(reader) == {"state": "?", **UNKNOWN}
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)


def fork_with_pid(pid: int) -> int:
    """Fork a child with this pid (which must be free) by clone3(2). It waits until it is killed."""
    wanted = (ctypes.c_int32 * 1)(pid)
    # struct clone_args: the fifth field is the exit signal; set_tid and set_tid_size follow tls.
    words = (0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wanted), 1, 0)
    arguments = (ctypes.c_uint64 * len(words))(*words)
    clone3 = 435  # On every architecture.
    child = ctypes.CDLL(None, use_errno=True).syscall(clone3, arguments, ctypes.sizeof(arguments))
    if child == 0:
        while True:
            signal.pause()
    assert child == pid, f"clone3: {os.strerror(ctypes.get_errno())}"
    return pid


def test_without_the_ptrace_right(fake_qemu: Make, reader_of: ReaderOf) -> None:
    needs.root("to be another user")
    guest = fake_qemu()
    os.seteuid(OTHER_UID)
    try:
        reader = reader_of(guest.pid)
        found = until(lambda: read(reader), lambda found: found["state"] == "S")
    finally:
        os.seteuid(0)
    assert (found["state"], found["term_pending"], found["tracer"]) == ("S", False, 0)
    assert found["switches"] > 0
    for name in ("io", "threads", "rings", "direct"):
        assert found[name] is None, name


CHATTY = """
import sys, threading
def wait():
    stop.acquire()
stop = threading.Lock()
stop.acquire()
thread = threading.Thread(target=wait)
thread.start()
for line in sys.stdin.buffer.raw:
    if line == b"end\\n":
        stop.release()
        thread.join()
    print(flush=True)
"""


def test_switches_count_wake_ups_of_threads_that_come_and_go(reader_of: ReaderOf) -> None:
    process = spawn([sys.executable, "-c", CHATTY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None

    def tell(text: bytes) -> None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(text)
        process.stdin.flush()
        process.stdout.readline()

    def tasks() -> int:
        return len(list(Path(f"/proc/{process.pid}/task").iterdir()))

    try:
        tell(b"\n")
        reader = reader_of(process.pid)
        before = read(reader)["switches"]
        # The line wakes the thread, which then sleeps again.
        tell(b"\n")
        more = until(lambda: read(reader)["switches"], lambda switches: switches > before)
        assert tasks() == 2
        tell(b"end\n")
        until(tasks, lambda count: count == 1)
        assert read(reader)["switches"] >= more
    finally:
        end(process)


def test_a_thread_that_a_debugger_holds_alone(reader_of: ReaderOf) -> None:
    process = spawn([sys.executable, "-c", CHATTY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    reader = reader_of(process.pid)

    def held() -> list[int]:
        return [thread.tid for thread in read(reader)["threads"] if thread.state == "t"]

    try:
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        tids = {int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir()}
        (other,) = tids - {process.pid}
        assert held() == []
        tracer = trace([other])
        assert until(held, bool) == [other]
        process.send_signal(signal.SIGSTOP)
        # Now SIGSTOP stops all threads, so the whole process is stopped. No thread counts as held.
        until(lambda: read(reader)["state"], lambda state: state == "T")
        assert held() == []
        process.send_signal(signal.SIGCONT)
        assert until(held, bool) == [other]
        end(tracer)
        until(held, lambda tids: tids == [])
    finally:
        end(process)


FLUSH = """
import os, sys
with open(sys.argv[1], "wb") as file:
    file.write(bytes(4 << 20))
    file.flush()
    sys.stdin.readline()
    os.fdatasync(file.fileno())
"""


def test_in_fdatasync_on_a_slow_disk(reader_of: ReaderOf) -> None:
    fdatasync = {"x86_64": 75, "aarch64": 83}[os.uname().machine]
    with slow_disk() as disk:
        assert disk.directory is not None
        process = spawn(
            [sys.executable, "-c", FLUSH, disk.directory / "file"], stdin=subprocess.PIPE
        )
        try:
            disk.join(process.pid)
            disk.slow(1 << 20)
            reader = reader_of(process.pid)
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            found = until(
                lambda: read(reader),
                # The slow disk delays open(2), too, and a thread that was just woken has no wchan.
                lambda found: any(
                    thread.syscall == fdatasync and "wait" in (thread.wchan or "")
                    for thread in found["threads"]
                ),
            )
            (thread,) = found["threads"]
            assert (thread.tid, thread.state, thread.io_call) == (process.pid, "D", True)
            assert not found["direct"]
        finally:
            disk.fast()
            end(process)
