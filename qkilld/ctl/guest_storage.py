"""Find the storage of a guest's disks: file systems, local servers, block devices.

For a running guest, /proc shows its open files and the peers of its connections. For other guests,
only the command line is known; it is parsed as QEMU does. A guest's file systems are never
accessed, because they may hang.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final

from qkilld.adapters import procfs
from qkilld.adapters.qemu_args import QemuOption, parse_command_line, parse_config
from qkilld.adapters.target_files import MAX_CONFIGS, read_config
from qkilld.ctl.local_servers import (
    Owners,
    fuse_servers,
    owners_of,
    tcp_listeners,
    unix_listeners,
)
from qkilld.debug_log import ignore
from qkilld.evidence.block_graph import BlockGraph, ConnectionEnd, read_block_graph
from qkilld.evidence.files import read_descriptors
from qkilld.evidence.sockets import SocketReader, SocketTable
from qkilld.model.text import printable
from qkilld.model.unit import UnitFacts
from qkilld.monitor.reach import read_options
from qkilld.unitcheck.context import looks_like_qemu
from qkilld.unitcheck.shell import (
    Branch,
    CommandGroup,
    Loop,
    Node,
    Pipeline,
    SimpleCommand,
    read_shell,
)
from qkilld.unitcheck.storage import (
    LOCAL_HOSTS,
    REMOTE_TYPES,
    Storage,
    device_kind,
    mount_unit,
)

SYS: Final = Path("/sys")
_IMAGE_KEYS: Final = ("file", "filename", "backing")
_MANAGER: Final = "init.scope"
"""The unit of systemd itself."""
_MAX_DEPTH: Final = 8
_MAX_DEVICES: Final = 64


def read_storage(facts: UnitFacts, pids: Sequence[int]) -> list[Storage]:
    """Read the storage of the unit's running guests or, if none run, of the guests in its
    ExecStart=."""
    places: list[Storage] = []
    for pid in pids:
        options = _options_of_process(pid)
        places += [*_of_options(options), *_of_process(pid, options)]
    if not pids:
        for options in planned_options(facts):
            places += _of_options(options)
    own = {facts.id, *facts.names}
    return [each for each in dict.fromkeys(places) if each.server not in own or not each.server]


def for_all_instances(places: Iterable[Storage], instance: str) -> list[Storage]:
    """Convert the storage of an instance to that of its template: replace the instance name by %i.
    An instance name that is only a part of a word, as in nbd-web.service, is not replaced, because
    other instances may use another server or none. A mount point gets `may_differ` in this case, so
    the unit is ordered after remote-fs.target, which includes other instances' mounts."""
    generalized = []
    for place in places:
        text = place.server or place.mount_point
        parts = re.split(r"(?<![\w.:-])" + re.escape(instance) + r"(?![\w:-])", text)
        if instance and len(parts) > 1:
            place = replace(place, text="%i".join(part.replace("%", "%%") for part in parts))
        elif instance and re.search(rf"(?<![A-Za-z0-9]){re.escape(instance)}(?![A-Za-z0-9])", text):
            if place.server or place.outside_target:
                why = f"{printable(text)} may be that of the instance {printable(instance)} alone"
                place = Storage(protocol=place.protocol or "a mount", unseen=why)
            else:
                place = replace(place, may_differ=True)
        generalized.append(place)
    return generalized


def qemu_command_lines(facts: UnitFacts) -> list[list[str]]:
    """Return the QEMU command lines in ExecStart=, including those in a text for `sh -c`."""
    command_lines: list[list[str]] = []
    for start in facts.exec_start:
        words = list(start.arguments) or [start.path]
        if looks_like_qemu(start.path):
            command_lines.append(words)
            continue
        with ignore(f"reading the ExecStart= of {facts.id} as a shell does", ValueError):
            for word in words[1:]:
                command_lines += (
                    _qemus_in(read_shell(word)) if "qemu" in word or "kvm" in word else []
                )
    return command_lines


def _qemus_in(nodes: Iterable[Node]) -> Iterator[list[str]]:
    for node in nodes:
        match node:
            case SimpleCommand():
                place = next((n for n, w in enumerate(node.words) if looks_like_qemu(w)), None)
                if place is not None:
                    yield list(node.words[place:])
            case Pipeline():
                yield from _qemus_in(node.parts)
            case CommandGroup():
                yield from _qemus_in(node.body)
            case Loop():
                yield from _qemus_in((*node.condition, *node.body))
            case Branch():
                for body in node.bodies:
                    yield from _qemus_in(body)


def planned_options(facts: UnitFacts) -> list[list[QemuOption]]:
    """Return the options of each QEMU in ExecStart=, including those in -readconfig files."""
    return [_with_configs(parse_command_line(words)) for words in qemu_command_lines(facts)]


def _with_configs(options: Iterable[QemuOption]) -> list[QemuOption]:
    """Add the options in -readconfig files. QEMU is not running, so relative paths cannot
    be resolved, and are skipped."""
    options_read = []
    remaining = MAX_CONFIGS
    for option in options:
        options_read.append(option)
        if option.name == "readconfig" and option.text.startswith("/") and remaining:
            remaining -= 1
            with ignore(f"reading {option.text}", OSError, ValueError):
                options_read += parse_config(read_config(os.getpid(), option.text))
    return options_read


def _options_of_process(pid: int) -> list[QemuOption]:
    with ignore(f"reading the command line of process {pid}", OSError):
        return read_options(procfs.read_identity(pid))
    return []


# ---- from the command line ----


def _of_options(options: Sequence[QemuOption]) -> Iterator[Storage]:
    graph = read_block_graph((), options)
    for end, node in graph.endpoints.items():
        if node is None:
            continue
        if end.path or end.host in LOCAL_HOSTS:
            yield from _local_server(node.protocol, end)
        elif end.host:
            yield Storage(protocol=node.protocol)
    for node in graph.unlocated:
        yield Storage(protocol=node.protocol)
    for path in _tpm_sockets(options):
        yield from _local_server("swtpm", ConnectionEnd(path=path))
    for path in image_paths(options):
        if kind := device_kind(path) or _kind_of_device(path):
            yield Storage(device=path, protocol=kind)
        yield from _mounts_of(path)


def _tpm_sockets(options: Sequence[QemuOption]) -> Iterator[str]:
    """Yield the sockets of TPM emulators. An emulator counts as storage, because it writes its
    state even after the guest has exited."""
    users = {o.flat.get("chardev") for o in options if o.name == "tpmdev"}
    for option in options:
        if option.name == "chardev" and option.flat.get("id") in users:
            yield option.flat.get("path") or option.flat.get("addr.path", "")


def image_paths(options: Iterable[QemuOption]) -> list[str]:
    """Return the absolute paths of images and of directories shared with the guest."""
    paths: dict[str, None] = {}
    for option in options:
        if option.name in _SHARES and (path := option.flat.get("path", "")).startswith("/"):
            paths[path] = None
        elif option.name in _DISKS:
            paths.update(dict.fromkeys(_image_paths(option.flat)))
    return list(paths)


def _image_paths(flat: Mapping[str, str], depth: int = 0) -> Iterator[str]:
    for key, value in flat.items():
        if key.rpartition(".")[2] not in _IMAGE_KEYS:
            continue
        if value.startswith("json:") and depth < _MAX_DEPTH:
            inner = QemuOption("blockdev", value.removeprefix("json:"))
            yield from _image_paths(inner.flat, depth + 1)
        path = value.removeprefix("file:").removeprefix("host_device:")
        if path.startswith("/"):
            yield path


_DISKS: Final = frozenset(
    ("drive", "blockdev", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "mtdblock", "sd",
     "pflash")
)  # fmt: skip
_SHARES: Final = ("virtfs", "fsdev")


def _local_server(protocol: str, end: ConnectionEnd) -> Iterator[Storage]:
    """Yield the unit of each process that listens at this address of the host. If all processes
    could be read and none listens, yield nothing: the server is in the kernel or outside this
    container."""
    place = printable(end.path) or f"port {end.port}"
    try:
        inodes = (
            unix_listeners(end.path, _is_remote) if end.path else tcp_listeners(end.host, end.port)
        )
    except (OSError, ValueError) as error:
        why = f"the server at {place} cannot be found: {printable(str(error))}"
        yield Storage(protocol=protocol, unseen=why)
        return
    owners = owners_of(inodes)
    for inode in inodes:
        yield from _units_of(protocol, place, owners.pids.get(inode, set()), owners)


def _units_of(protocol: str, place: str, pids: Set[int], owners: Owners) -> Iterator[Storage]:
    """Yield the unit of each process that owns the server's socket, or the reason why the unit is
    not known."""
    units: dict[str, None] = {}
    for pid in sorted(pids):
        if (unit := procfs.read_unit(pid)) is None:
            why = f"the unit of process {pid}, which has the socket of {place}, cannot be read"
            yield Storage(protocol=protocol, unseen=why)
        elif unit.system:
            units[unit.system] = None
    if len(units) > 1:
        units.pop(_MANAGER, None)  # systemd has passed the socket to a service.
    for name in units:
        yield Storage(protocol=protocol, server=name)
    if not pids and not owners.is_complete:
        why = f"the process that has the socket of {place} cannot be seen"
        if os.geteuid() != 0:
            why += "; root can see it"
        yield Storage(protocol=protocol, unseen=why)


def _mounts_of(path: str) -> Iterator[Storage]:
    """Yield the network file system that contains a path. The path itself is not accessed."""
    points = {name: (kind, number) for name, kind, number in _mounts("self").values()}
    parents = [path, *map(str, PurePosixPath(path).parents)]
    point = next((parent for parent in parents if parent in points), "/")
    if point in points:
        yield from _of_mount(point, *points[point])


def _of_mount(point: str, kind: str, number: str) -> Iterator[Storage]:
    """Yield a remote mount and, for FUSE, the unit of the process that serves it."""
    if not _is_remote(kind):
        return
    yield Storage(mount_point=point, unit=mount_unit(point))
    (fuse, _, name), (major, _, minor) = kind.partition("."), number.partition(":")
    if fuse != "fuse" or major != "0":
        return
    servers, is_complete = fuse_servers(int(minor), name)
    found = list(_units_of("fuse", point, set(servers.pids), Owners({}, is_complete)))
    # Leave out a server that systemd has started for the mount: it is in the unit of the mount.
    found = [place for place in found if place.server != mount_unit(point)]
    if len(found) > 1 and not servers.certain:
        names = ", ".join(place.server for place in found if place.server)
        why = f"the kernel does not show which of these serves {printable(point)}: {names}"
        found = [Storage(protocol="fuse", unseen=why)]
    elif servers.pids and not servers.certain and not is_complete:
        why = f"another process may serve {printable(point)}, because not all can be seen"
        found.append(Storage(protocol="fuse", unseen=why))
    yield from found


# ---- from the process ----


def _of_process(pid: int, options: Sequence[QemuOption]) -> Iterator[Storage]:
    mounts = _mounts(str(pid))
    points = {mounts[number] for number in _open_mounts(pid) if number in mounts}
    for point, kind, number in sorted(points):
        yield from _of_mount(point, kind, number)
    for path in _open_devices(pid):
        if kind := device_kind(path) or _kind_of_device(path):
            yield Storage(device=path, protocol=kind)
    yield from _served(pid, read_block_graph((), options))


def _served(pid: int, graph: BlockGraph) -> Iterator[Storage]:
    """Yield the storage that processes of this host serve to the guest."""
    reader = SocketReader(pid)
    reader.refresh(read_descriptors(pid), graph)
    table = SocketTable()
    try:
        sockets = reader.read(table) or ()
        ends = reader.peers(sockets, table)
    finally:
        reader.close()
    owners = owners_of(ends.values())
    for socket in sockets:
        if socket.role != "storage" or (end := ends.get(socket.inode)) is None:
            continue
        node = next((each for each in graph.nodes if each.name == socket.node), None)
        protocol = node.protocol if node else "storage"
        pids = owners.pids.get(end, set())
        if pid not in pids:
            yield from _units_of(protocol, f"connection {socket.inode}", pids, owners)


def _open_devices(pid: int) -> list[str]:
    devices: dict[str, None] = {}
    with ignore(f"reading the open files of process {pid}", OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with ignore(f"reading {entry}", OSError):
                target = str(entry.readlink())
                if target.startswith("/dev/") and len(devices) < _MAX_DEVICES:
                    devices[target] = None
    return list(devices)


def _kind_of_device(path: str) -> str:
    """Return the network transport of a block device or of a device below it; "" if there is
    none."""
    if not path.startswith("/dev/"):
        return ""
    name = PurePosixPath(os.path.realpath(path)).name
    pending, seen = [name], set[str]()
    while pending and len(seen) < _MAX_DEVICES:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if kind := device_kind(f"/dev/{name}") or _transport(name):
            return kind
        with ignore(f"reading what {name} lies on", OSError):
            pending += [each.name for each in (SYS / "class/block" / name / "slaves").iterdir()]
    return ""


def _transport(name: str) -> str:
    """Return the transport of one block device: iscsi, nvme-of, multipath or ""."""
    device = SYS / "class/block" / name
    with ignore(f"reading what {name} is", OSError):
        if "/session" in str(device.resolve()):
            return "iscsi"
    for file, pattern, kind in (
        ("dm/uuid", "mpath-", "multipath"),
        ("device/transport", "tcp|rdma|fc", "nvme-of"),
    ):
        path = device / file
        if path.is_file() and re.match(pattern, path.read_text(errors="replace")):
            return kind
    return ""


def _is_remote(kind: str) -> bool:
    # A FUSE file system counts as remote, because it ends when its daemon ends, and the daemon may
    # use the network.
    return kind in REMOTE_TYPES or kind.startswith("fuse")


def _mounts(pid: str) -> dict[str, tuple[str, str, str]]:
    """Return the mount point, file system type and MAJOR:MINOR of each mount, by the id of the
    mount."""
    return {
        str(mount.id): (os.fsdecode(procfs.unescape(mount.point)), mount.kind, mount.number)
        for mount in procfs.Mounts(pid).every()
    }


def _open_mounts(pid: int) -> set[str]:
    """Return the mount ids of a process's open files."""
    ids = set()
    with ignore(f"reading the open files of process {pid}", OSError):
        for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
            with ignore(f"reading {entry}", OSError):
                if match := re.search(r"^mnt_id:\s*(\d+)$", entry.read_text(), re.MULTILINE):
                    ids.add(match[1])
    return ids
