"""The rows: the storage and the state of a guest that is stopped, and the right results.

Each case is a context manager that makes the storage and yields a Scene. In a cell, the scene's
machine starts, and reports that its records are written. Then `started` and `strike` are called,
and the guest is stopped at once. Each function of `later` is called at its time after the request
to stop. After the result, `recover` makes the storage and the process work again, so that the disks
can be read.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qkilld.model.constants import Verdict
from tests.lab import needs
from tests.lab.groups import temporary_group
from tests.lab.process import end, run, spawn
from tests.lab.scratch import scratch
from tests.lab.storage import NbdServer, SlowDisk, nbd_server, slow_disk
from tests.safety.machine import Machine, Target

REVISION: Final = 2
"""Increase this number if a change makes earlier measurements invalid."""

MIB: Final = 1 << 20
GRACE_S: Final = 10
STORAGE_STALL_S: Final = 60
REAP_S: Final = 5
"""The defaults of qkilld.conf."""
_SETTLED_S: Final = 8
"""For this long (s) after a change of the storage, the verdict from before it is also accepted."""

_DETAIL_S: Final = 5
"""By this time (s after the request), a sample with detail has found servers and read rings.
Samples have detail when a wait has lasted 2 s."""
_MOVES: Final = frozenset({Verdict.FLUSHING})
_WAITS: Final = frozenset({Verdict.STORAGE_WAIT})
_EITHER: Final = _MOVES | _WAITS
_STANDS: Final = frozenset({Verdict.STOPPED})
_IDLES: Final = frozenset({Verdict.IDLE})


def _nothing(target: Target) -> None:
    pass


@dataclass
class Scene:
    machine: Machine
    images: Sequence[Path]
    """The qcow2 images with the records. They are read when no process has them open."""
    started: Callable[[Target], None] = _nothing
    strike: Callable[[Target], None] = _nothing
    later: Sequence[tuple[float, Callable[[], None]]] = ()
    recover: Callable[[], None] = lambda: None


class StorageMismatch(Exception):
    """The storage did not behave as described in its row, so the cell has no result."""


Network = Callable[[], contextlib.AbstractContextManager[None]]
"""Enters the guest's network, to start servers to which the guest connects."""
Make = Callable[[Network], contextlib.AbstractContextManager[Scene]]


@dataclass(frozen=True)
class RightVerdicts:
    """The verdicts that are right from `since` (s after the request) until the next entry's
    `since`."""

    since: float
    verdicts: frozenset[Verdict]


@dataclass(frozen=True)
class Expectation:
    """The expected result of qkilld with FORCE and default settings."""

    result: frozenset[str]
    within: float
    """The maximum time from the request to the result, s."""
    not_before: float = 0
    nothing_lost: bool = True


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    make: Make
    right: Sequence[RightVerdicts]
    expected: Expectation
    note: str = ""
    """A remark for the table."""
    busy: float = 0
    """The minimum time (s) that the storage needs to finish the guest's writes. If the guest exits
    earlier without SIGKILL, the storage was not slow."""
    weight: float = 60
    """The approximate duration of the longest cell, s. Rows with long cells start first."""


_EXITED: Final = frozenset({"exited"})
_KILLED: Final = frozenset({"killed"})
_DEAD_STORAGE: Final = Expectation(
    frozenset({"killed", "survived"}),
    within=STORAGE_STALL_S + 1,
    not_before=STORAGE_STALL_S - 1,
    nothing_lost=False,
)
_STUCK: Final = Expectation(_KILLED, within=GRACE_S + 1, not_before=GRACE_S)


def _records(count: int, passes: int, stride: int = 32 * MIB) -> str:
    return f"lab.job=disks lab.records={count} lab.passes={passes} lab.stride={stride}"


MANY: Final = _records(900, 3)
"""The later passes leave 300 L2 tables of 4 KiB in memory. A clean exit writes them. At 400 kbit/s,
this takes 24 s."""
FEW: Final = _records(90, 3)
ONE_TABLE: Final = f"{_records(90, 3, 2 * MIB)} lab.at={256 * MIB}"
"""With clusters of 64 KiB, a single L2 table covers all records. QEMU makes the table for the first
record, so later writes cause no flush."""
GAPS: Final = "3600"
"""At this rate (bits per second), nbdkit passes on a request of 4 KiB after 25 s."""
_RATE: Final = 2_000_000
"""Speed of a slow disk, bytes per second."""
TWO_TABLES: Final = _records(80, 40)
"""After these records, two L2 tables and a refcount block must be written, each with a request of 4
KiB."""


def _file(where: Path | str, options: str = "cache=writeback") -> str:
    return f"file={where},format=qcow2,{options}"


def _qcow2(path: Path, cluster: str = "4K") -> Path:
    """Make an image in which each cluster contains one record. Each later pass needs new clusters,
    which QEMU enters into existing L2 tables."""
    qemu_img = str(needs.program("qemu-img", "qemu-utils"))
    options = f"cluster_size={cluster}"
    run([qemu_img, "create", "-q", "-f", "qcow2", "-o", options, path, "10G"], check=True)
    return path


@contextlib.contextmanager
def _fast(
    network: Network, job: str = MANY, started: Callable[[Target], None] = _nothing
) -> Iterator[Scene]:
    with scratch("m") as directory:
        image = _qcow2(directory / "disk.qcow2")
        yield Scene(Machine(directory, [_file(image)], job), [image], started)


@contextlib.contextmanager
def _idle(network: Network) -> Iterator[Scene]:
    """A guest without a disk, so QEMU has nothing to write."""
    with scratch("m") as directory:
        yield Scene(Machine(directory, [], "lab.job=disks"), [])


def _page_cache(mebibytes: int) -> Make:
    """The image's pages are in the page cache. The last flush writes them to the slow disk."""

    @contextlib.contextmanager
    def make(network: Network) -> Iterator[Scene]:
        with _slow_image("cache=writeback", f"{ONE_TABLE} lab.fill={mebibytes * MIB}") as (
            disk,
            scene,
        ):
            scene.strike = lambda target: disk.slow(_RATE)
            yield scene

    return make


def _queue(aio: str) -> Make:
    """The guest's own writes wait in a long queue of the disk instead of in the page cache."""
    job = f"{ONE_TABLE} lab.load=write lab.bytes={MIB} lab.depth=40"

    @contextlib.contextmanager
    def make(network: Network) -> Iterator[Scene]:
        with _slow_image(f"cache=none,aio={aio}", job) as (disk, scene):

            def strike(target: Target) -> None:
                # Let the guest fill its queue. With Linux AIO, no thread of QEMU waits afterwards.
                time.sleep(3)
                disk.slow(_RATE)
                time.sleep(1)  # all writes are in the queue now
                before = disk.written()
                time.sleep(2)
                took = disk.written() - before
                if not _RATE // 2 <= took <= 4 * _RATE:
                    raise StorageMismatch(f"the disk took {took} bytes in 2 s and not {2 * _RATE}")

            scene.strike = strike
            yield scene

    return make


@contextlib.contextmanager
def _slow_image(options: str, job: str, memory: int = 256) -> Iterator[tuple[SlowDisk, Scene]]:
    """A guest with its image on a disk that can become slow."""
    with scratch("m") as directory, slow_disk(mebibytes=1024) as disk:
        assert disk.directory is not None
        image = _qcow2(disk.directory / "disk.qcow2", cluster="64K")
        machine = Machine(directory, [_file(image, options)], job, memory)
        yield (
            disk,
            Scene(
                machine, [image], started=lambda target: disk.join(target.pid), recover=disk.fast
            ),
        )


def _nbd(
    *,
    tcp: bool = False,
    rate: str | None = None,
    freeze: bool = False,
    thaw_after: float | None = None,
    job: str = MANY,
) -> Make:
    @contextlib.contextmanager
    def make(network: Network) -> Iterator[Scene]:
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(scratch("m"))
            image = _qcow2(directory / "disk.qcow2")
            with network():
                server = stack.enter_context(nbd_server(image, tcp=tcp, room=64 * MIB))

            def strike(target: Target) -> None:
                if rate:
                    server.rate(rate)
                if freeze:
                    server.freeze()

            yield Scene(
                Machine(directory, [_file(server.uri)], job),
                [image],
                strike=strike,
                later=[] if thaw_after is None else [(thaw_after, server.thaw)],
                recover=lambda: _restore(server),
            )

    return make


def _restore(server: NbdServer) -> None:
    server.rate("10G")
    server.thaw()


@contextlib.contextmanager
def _sigstopped(network: Network) -> Iterator[Scene]:
    stopped: list[Target] = []

    def strike(target: Target) -> None:
        stopped.append(target)
        target.signal(signal.SIGSTOP)
        _wait_for_state(target, "T")

    def recover() -> None:
        for target in stopped:
            with contextlib.suppress(ProcessLookupError):
                target.signal(signal.SIGCONT)

    with _fast(network) as scene:
        scene.strike, scene.recover = strike, recover
        yield scene


def _wait_for_state(target: Target, state: str) -> None:
    deadline = time.monotonic() + 30
    while target.state() != state:
        assert time.monotonic() < deadline, f"QEMU is in state {target.state()} and not {state}"
        time.sleep(0.01)


@contextlib.contextmanager
def _debugger(network: Network) -> Iterator[Scene]:
    gdb = needs.program("gdb", "gdb")
    with contextlib.ExitStack() as stack, _idle(network) as scene:
        debuggers: list[subprocess.Popen[bytes]] = []

        def strike(target: Target) -> None:
            quick = ["-iex", "set auto-solib-add off", "-iex", "set debuginfod enabled off"]
            debugger = spawn(
                [gdb, "-nx", "-q", *quick, "-p", str(target.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            debuggers.append(debugger)
            stack.callback(end, debugger)
            assert debugger.stdin is not None and debugger.stdout is not None
            # When gdb prints this, it has stopped every thread.
            debugger.stdin.write(b"echo attached\\n\n")
            debugger.stdin.flush()
            while b"attached" not in (line := debugger.stdout.readline()):
                assert line, "gdb ended"
            assert target.state() == "t", f"QEMU is in state {target.state()}"

        def recover() -> None:
            for debugger in debuggers:
                end(debugger)

        scene.strike, scene.recover = strike, recover
        yield scene


def _frozen_cgroup(version: int) -> Make:
    @contextlib.contextmanager
    def make(network: Network) -> Iterator[Scene]:
        parent = _hierarchy(version, "freezer")
        with contextlib.ExitStack() as stack, _idle(network) as scene:
            thawed: list[Callable[[], None]] = []

            def strike(target: Target) -> None:
                group = _own_group(target.pid, parent)
                if group == parent:
                    group = stack.enter_context(temporary_group(parent))
                    (group / "cgroup.procs").write_text(str(target.pid))
                control, freeze, thaw = (
                    (group / "freezer.state", "FROZEN", "THAWED")
                    if version == 1
                    else (group / "cgroup.freeze", "1", "0")
                )
                thawed.append(lambda: _write(control, thaw))
                control.write_text(freeze)
                deadline = time.monotonic() + 30
                while not _is_frozen(group):
                    assert time.monotonic() < deadline, "the control group does not freeze"
                    time.sleep(0.01)

            def recover() -> None:
                for thaw in thawed:
                    with contextlib.suppress(FileNotFoundError):  # gone with the guest
                        thaw()

            scene.strike, scene.recover = strike, recover
            yield scene

    return make


def _own_group(pid: int, hierarchy: Path) -> Path:
    """Return the process's control group in the hierarchy mounted at this path."""
    controller = "" if (hierarchy / "cgroup.controllers").exists() else "freezer"
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == controller:
            return hierarchy / path.lstrip("/")
    return hierarchy


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _is_frozen(group: Path) -> bool:
    state = group / "freezer.state"
    if state.exists():
        return state.read_text() == "FROZEN\n"
    return "frozen 1" in (group / "cgroup.events").read_text()


def _hierarchy(version: int, controller: str) -> Path:
    """Return the mount point of v1's hierarchy of this controller, or of v2's hierarchy. Raises
    needs.Missing."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = (part.split() for part in line.split(" - ", 1))
        if version == 1 and after[0] == "cgroup" and controller in after[-1].split(","):
            return Path(before[4])
        if version == 2 and after[0] == "cgroup2":
            return Path(before[4])
    raise needs.Missing(
        f"there is no cgroup v{version} hierarchy with {controller} on this machine"
    )


@contextlib.contextmanager
def _neighbour(network: Network) -> Iterator[Scene]:
    """The image's file system is stuck, but the disk below it works for somebody else.

    The guest has its own control groups, as under libvirt and systemd.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("m"))
        outer = stack.enter_context(slow_disk(mebibytes=1024))
        assert outer.directory is not None
        inner = stack.enter_context(_file_system(outer.directory / "inner", 512))
        image = _qcow2(inner / "disk.qcow2")
        groups = [stack.enter_context(temporary_group(p)) for p in _own_group_parents()]
        frozen = threading.Event()

        def started(target: Target) -> None:
            for group in groups:
                (group / "cgroup.procs").write_text(str(target.pid))

        def strike(target: Target) -> None:
            run(["sync", "-f", inner], check=True)
            run([needs.program("fsfreeze", "util-linux"), "-f", inner], check=True)
            frozen.set()
            busy = f"file={outer.directory}/busy; while :; do dd if=/dev/zero of=$file bs=64K"
            busy += " count=16 oflag=direct conv=notrunc status=none; sleep 0.2; done"
            stack.callback(end, spawn(["sh", "-c", busy]))

        def recover() -> None:
            if frozen.is_set():
                frozen.clear()
                run([needs.program("fsfreeze", "util-linux"), "-u", inner], check=True)

        stack.callback(recover)
        machine = Machine(directory, [_file(image)], FEW)
        yield Scene(machine, [image], started, strike, recover=recover)


def _own_group_parents() -> list[Path]:
    """Return the parent directories for the guest's own groups, in the hierarchies that count
    writes."""
    parents = []
    for controller in ("memory", "blkio"):
        with contextlib.suppress(needs.Missing):
            parents.append(_hierarchy(1, controller))
    return parents or [_hierarchy(2, "io")]


@contextlib.contextmanager
def _file_system(image: Path, mebibytes: int) -> Iterator[Path]:
    """An ext4 file system on a loop device. The file of the device is on another file system."""
    with contextlib.ExitStack() as stack:
        image.touch()
        os.truncate(image, mebibytes * MIB)
        mounted = image.with_suffix(".mnt")
        mounted.mkdir()
        run([needs.program("mkfs.ext4", "e2fsprogs"), "-q", image], check=True)
        run(["mount", "-o", "loop", image, mounted], check=True)
        stack.callback(run, ["umount", "--lazy", mounted])
        yield mounted


@contextlib.contextmanager
def _failing(network: Network) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("m"))
        image = _qcow2(directory / "disk.qcow2")
        trigger = directory / "fail"
        parameters = ["error-pwrite=EIO", "error-pwrite-rate=100%"]
        parameters.append(f"error-pwrite-file={trigger}")
        with network():
            server = stack.enter_context(
                nbd_server(image, room=64 * MIB, filters=["error"], parameters=parameters)
            )
        yield Scene(
            Machine(directory, [_file(server.uri)], MANY),
            [image],
            strike=lambda target: trigger.touch(),
            recover=lambda: trigger.unlink(missing_ok=True),
        )


@contextlib.contextmanager
def _sixteen(network: Network) -> Iterator[Scene]:
    """A guest with sixteen disks, each on its own server. QEMU flushes them one by one."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("m"))
        images = [_qcow2(directory / f"disk{n}.qcow2") for n in range(16)]
        with network():
            servers = [stack.enter_context(nbd_server(image, room=8 * MIB)) for image in images]

        def rate(limit: str) -> None:
            for server in servers:
                server.rate(limit)

        yield Scene(
            Machine(directory, [_file(s.uri) for s in servers], _records(60, 3), 256),
            images,
            strike=lambda target: rate("150K"),
            recover=lambda: rate("10G"),
        )


_READ: Final = f"{MANY} lab.load=read lab.at=0 lab.bytes=65536 lab.depth=16"

CASES: Final[Mapping[str, Case]] = {
    case.name: case
    for case in (
        Case("fast", "fast disk", _fast, (), Expectation(_EXITED, within=2), weight=5),
        Case(
            "cache-30",
            "page cache to a 2 MB/s disk, 30 s",
            _page_cache(60),
            (RightVerdicts(2, _MOVES),),
            Expectation(_EXITED, within=60),
            busy=20,
        ),
        Case(
            "cache-90",
            "page cache to a 2 MB/s disk, 90 s",
            _page_cache(180),
            (RightVerdicts(2, _MOVES),),
            Expectation(_EXITED, within=150),
            weight=120,
            busy=60,
        ),
        Case(
            "queue-threads",
            "cache=none, a deep queue, aio=threads",
            _queue("threads"),
            (RightVerdicts(2, _MOVES),),
            Expectation(_EXITED, within=60),
            busy=8,
        ),
        Case(
            "queue-native",
            "cache=none, a deep queue, Linux AIO",
            _queue("native"),
            (RightVerdicts(2, _EITHER), RightVerdicts(_DETAIL_S, _MOVES)),
            Expectation(_EXITED, within=60),
            busy=8,
        ),
        Case(
            "queue-uring",
            "cache=none, a deep queue, io_uring",
            _queue("io_uring"),
            (RightVerdicts(2, _MOVES),),
            Expectation(_EXITED, within=60),
            busy=8,
        ),
        Case(
            "nbd-unix",
            "NBD on a unix socket, 400 kbit/s",
            _nbd(rate="400K"),
            (RightVerdicts(2, _EITHER), RightVerdicts(_DETAIL_S, _MOVES)),
            Expectation(_EXITED, within=60),
            busy=15,
        ),
        Case(
            "nbd-tcp",
            "NBD on TCP, 400 kbit/s",
            _nbd(tcp=True, rate="400K"),
            (RightVerdicts(2, _MOVES),),
            Expectation(_EXITED, within=60),
            busy=15,
        ),
        Case(
            "nbd-unix-gaps",
            "NBD on a unix socket, 25 s a request",
            _nbd(rate=GAPS, job=TWO_TABLES),
            (RightVerdicts(2, _EITHER),),
            Expectation(_EXITED, within=200),
            weight=150,
            busy=40,
        ),
        Case(
            "nbd-tcp-gaps",
            "NBD on TCP, 25 s a request",
            _nbd(tcp=True, rate=GAPS, job=TWO_TABLES),
            (RightVerdicts(2, _EITHER),),
            Expectation(_EXITED, within=200),
            weight=150,
            busy=40,
        ),
        Case(
            "nbd-back",
            "NBD that freezes for 30 s and comes back",
            _nbd(freeze=True, thaw_after=30),
            (
                RightVerdicts(2, _EITHER),
                RightVerdicts(_SETTLED_S, _WAITS),
                RightVerdicts(30, _EITHER),
            ),
            Expectation(_EXITED, within=35),
            busy=29,
        ),
        Case(
            "nbd-dead",
            "NBD frozen for good",
            _nbd(freeze=True),
            (RightVerdicts(2, _EITHER), RightVerdicts(_SETTLED_S, _WAITS)),
            _DEAD_STORAGE,
            note="what a dead storage never took is lost, whoever stops the guest",
            weight=80,
            busy=STORAGE_STALL_S - 1,
        ),
        Case(
            "debugger",
            "idle, stopped under a debugger",
            _debugger,
            (RightVerdicts(2, _STANDS),),
            _STUCK,
        ),
        Case("sigstop", "SIGSTOPped", _sigstopped, (), Expectation(_EXITED, within=2)),
        Case(
            "frozen-v2",
            "idle, in a frozen cgroup (v2)",
            _frozen_cgroup(2),
            (RightVerdicts(2, _STANDS),),
            _STUCK,
        ),
        Case(
            "frozen-v1",
            "idle, in a frozen cgroup (v1)",
            _frozen_cgroup(1),
            (RightVerdicts(2, _STANDS),),
            Expectation(frozenset({"survived"}), GRACE_S + REAP_S + 1, GRACE_S + REAP_S),
            note="the freezer of cgroup v1 keeps SIGKILL itself waiting",
        ),
        Case(
            "neighbour",
            "hangs on a disk that a neighbour keeps busy",
            _neighbour,
            (RightVerdicts(2, _EITHER), RightVerdicts(_SETTLED_S, _WAITS)),
            Expectation(
                frozenset({"killed", "survived"}),
                STORAGE_STALL_S + REAP_S + 1,
                STORAGE_STALL_S - 1,
                nothing_lost=False,
            ),
            note="as dead as a storage can be; SIGKILL waits for the file system as well",
            weight=80,
            busy=STORAGE_STALL_S - 1,
        ),
        Case(
            "eio",
            "error (EIO) on the last flush",
            _failing,
            (),
            Expectation(_EXITED, within=2, nothing_lost=False),
            note="the storage refuses the data and QEMU exits without a word",
            weight=5,
        ),
        Case(
            "read-load",
            "under full read load",
            lambda network: _fast(network, _READ),
            (RightVerdicts(2, _MOVES),),
            Expectation(_EXITED, within=5),
            weight=10,
        ),
        Case(
            "disks-16",
            "16 disks on NBD, 150 kbit/s each",
            _sixteen,
            (RightVerdicts(2, _EITHER), RightVerdicts(_DETAIL_S, _MOVES)),
            Expectation(_EXITED, within=90),
            busy=25,
        ),
    )
}
