"""The control groups of a process: fake trees of v1, v2 and both, and real ones."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qkilld.evidence import cgroup
from qkilld.evidence.cgroup import CgroupReader
from qkilld.evidence.hierarchies import CROWDED_S, Hierarchies
from qkilld.model.sample import Cgroup
from tests.evidence.until import until
from tests.lab import needs
from tests.lab.groups import temporary_group
from tests.lab.guest import Guest
from tests.lab.process import end, spawn
from tests.lab.storage import SlowDisk, slow_disk

Make = Callable[..., Guest]

# ---- fake trees ----

V1 = """\
20 1 0:18 / /cg rw - tmpfs tmpfs rw
21 20 0:19 / /cg/memory rw,relatime shared:9 - cgroup cgroup rw,memory
22 20 0:20 / /cg/blkio rw,relatime - cgroup cgroup rw,blkio
23 20 0:21 / /cg/freezer rw,relatime - cgroup cgroup rw,freezer
24 20 0:22 / /cg/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
"""
V2 = "30 1 0:23 / /cg/with\\040blank rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
UNIFIED = "cg/with blank"


class Tree:
    """A fake host in `top`; process 7 is the guest."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.proc = top / "proc"
        self.now = 0.0
        self.readers: list[CgroupReader] = []

    def put(self, path: str, text: str) -> None:
        (self.top / path).parent.mkdir(parents=True, exist_ok=True)
        (self.top / path).write_text(text)

    def process(self, pid: int, parent: int = 1) -> None:
        self.put(f"proc/{pid}/stat", f"{pid} (x) y) S {parent}" + " 0" * 48)

    def machine(self, mounts: str, membership: str) -> None:
        self.put("proc/self/mountinfo", mounts)
        self.put("proc/7/cgroup", membership)
        self.process(7)

    def reader(self) -> CgroupReader:
        hierarchies = Hierarchies(self.proc, self.top, lambda: self.now)
        self.readers.append(CgroupReader(7, self.proc, hierarchies, lambda: self.now))
        return self.readers[-1]


@pytest.fixture
def tree(lab_dir: Path) -> Iterator[Tree]:
    tree = Tree(lab_dir)
    yield tree
    for reader in tree.readers:
        reader.close()
        reader.close()


def put_v1(tree: Tree, group: str = "vm") -> None:
    tree.machine(V1, f"4:memory:/{group}\n3:blkio:/{group}\n2:freezer:/{group}\n1:name=systemd:/\n")
    tree.put(
        f"cg/memory/{group}/memory.stat",
        "cache 9\ndirty 1\nwriteback 2\ntotal_cache 9\ntotal_dirty 3\ntotal_writeback 4\n",
    )
    bytes_ = "8:0 Read 1\n8:0 Write 5\n8:0 Total 6\n8:16 Write 6\nTotal 12\n"
    tree.put(f"cg/blkio/{group}/blkio.throttle.io_service_bytes", bytes_)
    tree.put(f"cg/blkio/{group}/blkio.throttle.io_serviced", "8:0 Write 7\nTotal 7\n")
    tree.put(f"cg/freezer/{group}/freezer.state", "THAWED\n")
    for controller in ("memory", "blkio"):
        tree.put(f"cg/{controller}/{group}/cgroup.procs", "7\n")


def put_v2(tree: Tree, group: str = "vm", mounts: str = V2, membership: str = "") -> str:
    tree.machine(mounts, f"{membership}0::/{group}\n")
    directory = f"{UNIFIED}/{group}"
    tree.put(f"{directory}/memory.stat", "anon 1\nfile 2\nfile_dirty 3\nfile_writeback 4\n")
    line = "8:0 rbytes=9 wbytes={} rios=9 wios={} dbytes=9 dios=9\n"
    tree.put(f"{directory}/io.stat", line.format(5, 6) + "8:16 \n" + line.format(7, 8))
    tree.put(f"{directory}/cgroup.events", "populated 1\nfrozen 0\n")
    tree.put(f"{directory}/cgroup.freeze", "0\n")
    tree.put(f"{directory}/cgroup.procs", "7\n")
    return directory


def test_v1(tree: Tree) -> None:
    put_v1(tree)
    assert tree.reader().read() == Cgroup(True, 3, 4, 11, 7, False)


def test_v1_takes_groups_below_along_where_the_kernel_adds_them_up(tree: Tree) -> None:
    put_v1(tree)
    tree.put("cg/blkio/vm/blkio.throttle.io_service_bytes_recursive", "8:0 Write 50\nTotal 50\n")
    tree.put("cg/blkio/vm/blkio.throttle.io_serviced_recursive", "8:0 Write 70\nTotal 70\n")
    assert tree.reader().read() == Cgroup(True, 3, 4, 50, 70, False)


@pytest.mark.parametrize("text", ["Total 0\n", "", "8:0 Write\n", "8:0 Write x\n"])
def test_v1_missing_counters_are_unknown(tree: Tree, text: str) -> None:
    put_v1(tree)
    tree.put("cg/blkio/vm/blkio.throttle.io_service_bytes", text)
    assert tree.reader().read() == Cgroup(True, 3, 4, None, 7, False)


def test_v2(tree: Tree) -> None:
    put_v2(tree)
    assert tree.reader().read() == Cgroup(True, 3, 4, 12, 14, False)


def test_v2_a_group_without_writes(tree: Tree) -> None:
    tree.put(f"{put_v2(tree)}/io.stat", "")
    assert tree.reader().read() == Cgroup(True, 3, 4, 0, 0, False)


@pytest.mark.parametrize("text", ["", "nonsense", "file_dirty\nfile_writeback x\n", "\0\n" * 9000])
def test_garbage_is_unknown(tree: Tree, text: str) -> None:
    directory = put_v2(tree)
    for name in ("memory.stat", "cgroup.events", "cgroup.freeze"):
        tree.put(f"{directory}/{name}", text)
    tree.put(f"{directory}/io.stat", "8:0 wbytes=x wios=1\n")
    assert tree.reader().read() == Cgroup(True, None, None, None, 1, None)


def test_files_that_are_gone_are_unknown(tree: Tree) -> None:
    directory = put_v2(tree)
    for name in ("memory.stat", "io.stat", "cgroup.events", "cgroup.freeze"):
        (tree.top / directory / name).unlink()
    assert tree.reader().read() == Cgroup(False, None, None, None, None, None)


def test_no_group_is_no_answer(tree: Tree) -> None:
    put_v2(tree)
    (tree.proc / "7/cgroup").write_text("")
    assert tree.reader().read() is None
    (tree.proc / "7/cgroup").unlink()
    assert tree.reader().read() is None
    (tree.proc / "7/stat").unlink()
    (tree.proc / "7").rmdir()
    assert tree.reader().read() is None


@pytest.mark.parametrize(
    "membership", ["nonsense\n", "0:::\n", "0::/../../x\n", "::\n", "0::vm\n", "9:memory:/x\n"]
)
def test_a_group_that_cannot_be_found_is_unknown(tree: Tree, membership: str) -> None:
    tree.machine(V2, membership)
    assert tree.reader().read() == Cgroup(False, None, None, None, None, None)


@pytest.mark.parametrize("mounts", ["", "nonsense\n - cgroup2\n", "1 2 - cgroup2 x\n"])
def test_no_mounts(tree: Tree, mounts: str) -> None:
    put_v2(tree, mounts=mounts)
    assert tree.reader().read() == Cgroup(False, None, None, None, None, None)


def test_the_mount_of_a_container_shows_its_part(tree: Tree) -> None:
    put_v2(tree, mounts=V2.replace(" / ", " /box ", 1))
    (tree.proc / "7/cgroup").write_text("0::/box/vm\n")
    assert tree.reader().read() == Cgroup(True, 3, 4, 12, 14, False)
    (tree.proc / "7/cgroup").write_text("0::/boxer/vm\n")
    assert tree.reader().read() == Cgroup(False, None, None, None, None, None)


def test_both(tree: Tree) -> None:
    """systemd's hybrid mode: v2 has no controllers, but it can also freeze processes."""
    put_v1(tree)
    directory = put_v2(
        tree, mounts=V1 + V2, membership="3:memory:/vm\n2:blkio:/vm\n1:freezer:/vm\n"
    )
    for name in ("memory.stat", "io.stat"):
        (tree.top / directory / name).unlink()
    reader = tree.reader()
    assert reader.read() == Cgroup(True, 3, 4, 11, 7, False)
    tree.put(f"{directory}/cgroup.freeze", "1\n")
    assert reader.read() == Cgroup(True, 3, 4, 11, 7, True)
    tree.put(f"{directory}/cgroup.freeze", "0\n")
    tree.put("cg/freezer/vm/freezer.state", "FREEZING\n")
    assert reader.read() == Cgroup(True, 3, 4, 11, 7, True)
    (tree.top / "cg/freezer/vm/freezer.state").write_text("THAWED\n")
    assert reader.read() == Cgroup(True, 3, 4, 11, 7, False)


def frozen(reader: CgroupReader) -> bool | None:
    found = reader.read()
    assert found is not None
    return found.frozen


def test_a_freezer_that_is_out_of_sight_may_have_frozen_it(tree: Tree) -> None:
    put_v2(tree, membership="1:freezer:/vm\n")
    assert frozen(tree.reader()) is None
    (tree.proc / "7/cgroup").write_text("1:freezer:/\n0::/vm\n")
    assert frozen(tree.reader()) is False


def test_told_to_freeze_above_is_frozen(tree: Tree) -> None:
    directory = put_v2(tree, "a.slice/vm/leaf")
    above = Path(directory).parent.parent
    tree.put(f"{above}/cgroup.freeze", "0\n")
    tree.put(f"{above}/vm/cgroup.freeze", "0\n")
    reader = tree.reader()
    assert frozen(reader) is False
    tree.put(f"{above}/cgroup.freeze", "1\n")
    assert frozen(reader) is True
    tree.put(f"{above}/cgroup.freeze", "0\n")
    tree.put(f"{directory}/cgroup.events", "populated 1\nfrozen 1\n")
    assert frozen(reader) is True


def test_a_controller_that_does_not_reach_down_is_read_above(tree: Tree) -> None:
    directory = put_v2(tree, "vm")
    for name in ("cgroup.events", "cgroup.freeze"):
        tree.put(f"{directory}/emulator/{name}", "frozen 0\n")
    tree.put(f"{directory}/cgroup.procs", "7\n8\n")
    tree.put(f"{directory}/emulator/cgroup.procs", "7\n")
    (tree.proc / "7/cgroup").write_text("0::/vm/emulator\n")
    tree.process(8)
    reader = tree.reader()
    assert reader.read() == Cgroup(False, 3, 4, 12, 14, False)
    tree.process(8, parent=7)
    tree.now += cgroup.REFRESH_S
    assert reader.read() == Cgroup(True, 3, 4, 12, 14, False)


@pytest.mark.parametrize(
    ("members", "own"),
    [
        ("7\n", True),
        ("7\n8\n9\n", True),
        ("7\n10\n", False),
        ("7\n0\n", False),
        ("8\n9\n", False),
        ("", False),
        ("7\nx\n", False),
        ("7\n999\n", False),
        ("\n".join(map(str, [7, *range(100, 200)])), False),
    ],
)
def test_a_group_with_only_descendants_is_own(tree: Tree, members: str, own: bool) -> None:
    tree.put(f"{put_v2(tree)}/cgroup.procs", members)
    tree.process(8, parent=7)
    tree.process(9, parent=8)
    for pid in (10, *range(100, 200)):
        tree.process(pid, parent=pid if pid == 10 else 7)
    found = tree.reader().read()
    assert found is not None and found.own is own


def test_own_takes_the_groups_below_along(tree: Tree) -> None:
    directory = put_v2(tree)
    tree.put(f"{directory}/below/cgroup.procs", "8\n")
    tree.process(8)
    reader = tree.reader()
    found = reader.read()
    assert found is not None and not found.own
    for number in range(100):
        tree.put(f"{directory}/below/{number}/cgroup.procs", "")
    tree.put(f"{directory}/below/cgroup.procs", "")
    found = tree.reader().read()
    assert found is not None and not found.own, "there are too many to look"


def test_a_crowded_group_is_not_listed_for_each_guest(tree: Tree) -> None:
    path = f"{put_v2(tree)}/cgroup.procs"
    tree.put(path, "".join(f"{pid}\n" for pid in range(7, 107)))
    hierarchies = Hierarchies(tree.proc, tree.top, lambda: tree.now)

    def is_own() -> bool:
        tree.readers.append(CgroupReader(7, tree.proc, hierarchies, lambda: tree.now))
        found = tree.readers[-1].read()
        assert found is not None
        return found.own

    assert not is_own()
    tree.put(path, "7\n")
    assert not is_own()
    tree.now += CROWDED_S
    assert is_own()


def test_a_scope_of_machined_is_own_with_helpers_in_it(tree: Tree) -> None:
    directory = put_v2(tree, "machine.slice/machine-qemu\\x2d1\\x2dvm.scope/libvirt")
    tree.put(f"{directory}/cgroup.procs", "7\n8\n")
    tree.process(8)
    found = tree.reader().read()
    assert found is not None and found.own


def test_the_root_group_is_never_own(tree: Tree) -> None:
    put_v2(tree)
    for path in ((tree.top / UNIFIED) / "vm").iterdir():
        path.rename(tree.top / UNIFIED / path.name)
    (tree.proc / "7/cgroup").write_text("0::/\n")
    assert tree.reader().read() == Cgroup(False, 3, 4, 12, 14, False)


def test_figures_of_a_shared_group_are_not_mixed_with_its_own(tree: Tree) -> None:
    put_v1(tree)
    tree.put("cg/blkio/vm/cgroup.procs", "7\n8\n")
    tree.process(8)
    assert tree.reader().read() == Cgroup(True, 3, 4, None, None, False)
    tree.put("cg/memory/vm/cgroup.procs", "7\n8\n")
    assert tree.reader().read() == Cgroup(False, 3, 4, 11, 7, False)


def test_it_follows_a_process_that_is_moved(tree: Tree) -> None:
    put_v2(tree, "first")
    reader = tree.reader()
    assert reader.read() == Cgroup(True, 3, 4, 12, 14, False)
    tree.put(f"{put_v2(tree, 'second')}/memory.stat", "x 0\nfile_dirty 30\nfile_writeback 40\n")
    assert reader.read() == Cgroup(True, 30, 40, 12, 14, False)


# ---- real ones ----


def real_group(controller: str) -> Path | None:
    """Return this process's group, if groups can be made in it."""
    group = Hierarchies().groups(Path("/proc/self/cgroup").read_bytes()).get(controller)
    return Path(group.ways[0]) if group is not None and group.ways else None


@pytest.fixture
def read_group() -> Iterator[Callable[[int], Cgroup | None]]:
    """A function that reads the groups of a process, with one reader for each process."""
    readers: dict[int, CgroupReader] = {}

    def read(pid: int) -> Cgroup | None:
        if pid not in readers:
            readers[pid] = CgroupReader(pid)
        return readers[pid].read()

    yield read
    for reader in readers.values():
        reader.close()


ReadGroup = Callable[[int], Cgroup]


# The host may have the freezer of v1, that of v2, or both.
@pytest.mark.parametrize("controller", [name for name in ("freezer", "") if real_group(name)])
def test_a_freezer(qemu: Make, read_group: ReadGroup, controller: str) -> None:
    needs.root("a control group")
    parent = real_group(controller)
    assert parent is not None
    file, freeze, thaw = (
        ("freezer.state", "FROZEN", "THAWED") if controller else ("cgroup.freeze", "1", "0")
    )
    with temporary_group(parent) as group, temporary_group(group) as below:
        guest = qemu()
        assert read_group(guest.pid).frozen is False
        (below / "cgroup.procs").write_text(str(guest.pid))
        assert read_group(guest.pid).frozen is False
        (group / file).write_text(freeze)
        assert read_group(guest.pid).frozen is True
        if not controller:
            until(lambda: (below / "cgroup.events").read_text(), lambda text: "frozen 1" in text)
            assert read_group(guest.pid).frozen is True
        guest.signal(signal.SIGTERM)
        (group / file).write_text(thaw)
        assert guest.wait_gone() == 0
        assert read_group(guest.pid) is None


@contextlib.contextmanager
def groups_of_its_own(disk: SlowDisk, pid: int) -> Iterator[None]:
    """Put the process into groups that count its memory and its writes."""
    disk.join(pid)  # Sufficient in v2.
    with contextlib.ExitStack() as stack:
        for controller in ("memory", "blkio"):
            if (parent := real_group(controller)) is not None:
                group = stack.enter_context(temporary_group(parent))
                (group / "cgroup.procs").write_text(str(pid))
        yield


WRITE = """
import mmap, os, sys
page = mmap.mmap(-1, 1 << 20)
file = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
direct = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
for line in sys.stdin.buffer.raw:
    match line:
        case b"buffered\\n":
            os.pwrite(file, bytes(8 << 20), 0)
        case b"flush\\n":
            print(flush=True)
            os.fdatasync(file)
        case b"direct\\n":
            os.pwrite(direct, page, 16 << 20)
    print(flush=True)
"""


def test_writes_of_a_process_in_its_own_groups(read_group: ReadGroup) -> None:
    with slow_disk(1 << 30) as disk:
        assert disk.directory is not None
        process = spawn(
            [sys.executable, "-c", WRITE, disk.directory / "file"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

        def tell(text: bytes) -> None:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(text)
            process.stdin.flush()
            assert process.stdout.readline() == b"\n"

        try:
            with groups_of_its_own(disk, process.pid):
                assert read_group(process.pid).own
                tell(b"direct\n")
                direct = read_group(process.pid)
                assert direct.written is not None and direct.written >= 1 << 20
                assert direct.writes
                disk.slow(2 << 20)
                disk.join(process.pid)
                tell(b"buffered\n")
                dirty = read_group(process.pid)
                assert dirty.dirty is not None and dirty.dirty >= 4 << 20
                tell(b"flush\n")
                # The bytes are first in writeback, and then written.
                until(lambda: read_group(process.pid).writeback, bool)
                until(
                    lambda: read_group(process.pid),
                    lambda found: (found.dirty or 0) + (found.writeback or 0) < 4 << 20,
                )
                disk.fast()
                end(process)
        finally:
            disk.fast()
            end(process)
