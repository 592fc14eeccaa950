"""Read QEMU's storage from its command line: network nodes, images, and other connections.

Pure. The command line is a claim of the process's owner, and does not prove that a descriptor
exists. The command line lacks disks that were added later, so a connection that it does not name
has an unknown purpose. Sources: qemu-options.hx, qapi/block-core.json,
docs/system/device-url-syntax of QEMU 2.0 to 10.0.
"""

from __future__ import annotations

import os.path
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import field, replace
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from qkilld.adapters.qemu_args import (
    NETWORK_IMAGE,
    QemuOption,
    monitor_protocol,
    parse_command_line,
)
from qkilld.model.dataclass import dataclass
from qkilld.model.named_tuple import NamedTuple
from qkilld.model.sample import Node
from qkilld.model.text import printable

_DEFAULT_PORTS: Final = {
    "nbd": 10809, "iscsi": 3260, "ssh": 22, "http": 80, "https": 443, "ftp": 21, "ftps": 990,
    "gluster": 24007, "nfs": 2049, "rbd": None, "sheepdog": 7000, "vxhs": 9999,
}  # fmt: skip
"""Drivers whose storage is behind a connection, and their default ports."""
_DISK_OPTIONS: Final = frozenset(
    ("drive", "blockdev", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "mtdblock", "sd",
     "pflash")
)  # fmt: skip
_VHOST_USER: Final = re.compile(r"vhost-user-(blk|scsi|fs|vsock|gpu|input|i2c|rng|net)")
FOREVER_S: Final = 1_000_000_000
_OFF: Final = ("off", "no", "false", "n")
_ON: Final = ("on", "yes", "true", "y")
_READERS: Final = frozenset(("ide-cd", "scsi-cd"))
"""Devices that never write to their drive."""
_OF_ADDRESS: Final = ("node-name", "reconnect-delay")
"""If a node's address is given as a file name, these other options of the node are read, too."""
_MAX_DEPTH: Final = 8
_MAX_NODES: Final = 256


@dataclass(frozen=True, slots=True)
class ConnectionEnd:
    """One end of a connection: a path, a port, or a descriptor that QEMU was given."""

    path: str = ""
    port: int | None = None
    host: str = ""
    descriptor: int | None = None


class ImageUse(NamedTuple):
    """How a command line uses an image."""

    names: tuple[str, ...]
    """The names of the nodes and drives that use the image; sorted, printable."""
    raw: bool
    """The command line uses the image only with the format raw."""
    on_ring: bool
    """Requests to the image may be on an io_uring."""


@dataclass(slots=True)
class BlockGraph:
    nodes: list[Node] = field(default_factory=list)
    ends: list[Sequence[ConnectionEnd]] = field(default_factory=list)
    """The connections of each node."""
    endpoints: dict[ConnectionEnd, Node | None] = field(default_factory=dict)
    """The purpose of each connection: its node, or None if the connection is not for storage."""
    images: dict[str, ImageUse] = field(default_factory=dict)
    """The images, keyed by their paths."""
    unlocated: list[Node] = field(default_factory=list)
    """Nodes whose options do not name a server, such as those of rbd."""
    pluggable: bool = False
    """QEMU has a monitor, through which storage may have been added since QEMU started."""
    shared_memory: bool = False
    """Other processes may use the guest's memory."""

    @property
    def descriptors(self) -> frozenset[int]:
        """Return the descriptors that QEMU was given for connections."""
        numbers = (endpoint.descriptor for endpoint in self.endpoints)
        return frozenset(number for number in numbers if number is not None)

    def add(
        self,
        protocol: str,
        name: str,
        endpoints: Sequence[ConnectionEnd],
        export: str = "",
        reconnect: int | None = None,
        read_only: bool = False,
    ) -> None:
        if len(self.nodes) >= _MAX_NODES:
            return
        title = printable(name) or f"{protocol}{len(self.nodes)}"
        if any(node.name == title for node in self.nodes):
            title = f"{title}-{len(self.nodes)}"
        node = Node(
            title, protocol, export=printable(export), reconnect=reconnect, read_only=read_only
        )
        self.nodes.append(node)
        self.ends.append(endpoints)
        if not endpoints:
            self.unlocated.append(node)
        for endpoint in endpoints:
            self.endpoints[endpoint] = node

    def ends_of(self, names: Set[str]) -> dict[ConnectionEnd, list[str]]:
        """Return the ends of the connections of these nodes, each with the names of its nodes."""
        users: dict[ConnectionEnd, list[str]] = {}
        for node, ends in zip(self.nodes, self.ends, strict=True):
            for end in ends if node.name in names else ():
                users.setdefault(end, []).append(node.name)
        return users

    def group_nodes(self) -> None:
        """Set Node.group."""
        parents = list(range(len(self.nodes)))

        def leader(index: int) -> int:
            while parents[index] != index:
                index = parents[index]
            return index

        paths = {end.path for end in self.endpoints if end.path}
        relative = {os.path.basename(path) for path in paths if not path.startswith("/")}  # noqa: PTH119
        firsts: dict[str | int, int] = {}
        for index, node in enumerate(self.nodes):
            for end in self.ends[index] if node.protocol != "vhost-user" else ():
                if (key := _appearance(end, relative)) is not None:
                    one, other = leader(index), leader(firsts.setdefault(key, index))
                    parents[max(one, other)] = min(one, other)
        leaders = [leader(index) for index in range(len(self.nodes))]
        names = [node.name for node in self.nodes]
        self.nodes = [
            replace(node, group=names[first]) if leaders.count(first) > 1 else node
            for node, first in zip(self.nodes, leaders, strict=True)
        ]

    def locate_images(self, directory: str) -> None:
        """Add the absolute path of each image, because the kernel shows absolute paths. Symbolic
        links are not resolved. `directory` is QEMU's working directory."""
        for path, use in list(self.images.items()):
            located = os.path.normpath(os.path.join(directory, path))  # noqa: PTH118
            same = self.images.get(located)
            self.images[located] = use if same is None else _merged(use, same)


def _appearance(end: ConnectionEnd, relative: Collection[str]) -> str | int | None:
    """Return the path or port that the kernel shows for a connection's server. `relative`: the file
    names of all relative paths. A path that ends in one of these is compared by file name alone."""
    if not end.path:
        return end.port
    path = without_link(end.path)
    name = os.path.basename(path)  # noqa: PTH119
    return name if name in relative else path


def without_link(path: str) -> str:
    """Replace /var/run, a symbolic link, by /run, so that paths can be compared as text. QEMU may
    have been started with one of these paths, and the server of the socket with the other."""
    return path.removeprefix("/var") if path.startswith("/var/run/") else path


def _merged(one: ImageUse, other: ImageUse) -> ImageUse:
    names = tuple(sorted({*one.names, *other.names}))
    return ImageUse(names, one.raw and other.raw, one.on_ring or other.on_ring)


def read_block_graph(argv: Sequence[str], sections: Sequence[QemuOption] = ()) -> BlockGraph:
    """Read the words of a command line and the sections of its -readconfig files."""
    options = [*parse_command_line(argv), *sections]
    graph = BlockGraph()
    _read_disks(graph, options)
    _read_connections(graph, options)
    graph.group_nodes()
    graph.pluggable = any(
        monitor_protocol(option) and option.text not in ("", "none") for option in options
    )
    graph.shared_memory = any(_shares_memory(option) for option in options)
    return graph


def requested_exports(nodes: Sequence[Node]) -> dict[str, str | None]:
    """Return the export that each node requests, keyed by the node's name. The export is None if a
    node with another export has the same server, because the connections of the two nodes cannot be
    told apart."""
    groups: dict[str, set[str]] = {}
    for node in nodes:
        groups.setdefault(node.group or node.name, set()).add(node.export)
    return {
        node.name: node.export if len(groups[node.group or node.name]) == 1 else None
        for node in nodes
    }


def lonely_nodes(nodes: Sequence[Node], connected: Iterable[str]) -> set[str]:
    """Return the names of the nodes that have, or may have, no connection: of each group that has
    fewer connections than nodes, all nodes. `connected`: the node of each connection."""
    group_of = {node.name: node.group or node.name for node in nodes}
    sizes = Counter(group_of.values())
    sizes.subtract(group_of[name] for name in connected if name in group_of)
    return {name for name, group in group_of.items() if sizes[group] > 0}


def _shares_memory(option: QemuOption) -> bool:
    """Return whether the option creates memory that other processes may use. memory-backend-file
    and memory-backend-ram do so only with share=on; the other memory backends do so by default."""
    kind = option.flat.get("qom-type", "") if option.name == "object" else ""
    default = "off" if kind in ("memory-backend-file", "memory-backend-ram") else "on"
    return kind.startswith("memory-backend-") and option.flat.get("share", default) not in _OFF


def config_paths(argv: Sequence[str]) -> list[str]:
    """Return the -readconfig files that a command line names."""
    return [option.text for option in parse_command_line(argv) if option.name == "readconfig"]


# ---- disks ----


def _read_disks(graph: BlockGraph, options: Sequence[QemuOption]) -> None:
    disks: list[_DiskOption] = []
    in_use: set[str] = set()
    only_read = _only_read(options)
    names: dict[str, set[str]] = {}
    on_rings: set[str] = set()
    for number, option in enumerate(options):
        flat = dict(option.flat)
        if option.name not in _DISK_OPTIONS:
            in_use.update(flat.values())
            continue
        name = flat.get("node-name") or flat.get("id") or f"{option.name}{number}"
        read_only = option.name == "cdrom" or flat.get("media") == "cdrom" or name in only_read
        _read_nodes(graph, name, flat, 0, read_only=read_only)
        disk = _read_disk_option(name, option.name == "blockdev", flat)
        disks.append(disk)
        own = {flat[key] for key in ("node-name", "id", "file.node-name") if key in flat}
        on_ring = "io_uring" in flat.values()
        for path, values in _unfolded(disk.paths):
            names.setdefault(path, set()).update(own)
            if on_ring or "io_uring" in values:
                on_rings.add(path)
    raw = _images(disks, in_use)
    graph.images = {
        path: ImageUse(tuple(sorted(map(printable, given))), raw.get(path, False), path in on_rings)
        for path, given in names.items()
    }


@dataclass(frozen=True, slots=True)
class _DiskOption:
    """One option that describes a disk: a node and the nodes nested in it."""

    name: str
    formats: frozenset[str]
    """The formats of the option's nodes; "" for a format that QEMU probes."""
    paths: tuple[str, ...]
    children: frozenset[str]
    """The values of the option's other keys, such as the names of nodes that it uses."""


def _read_disk_option(name: str, is_node: bool, flat: Mapping[str, str]) -> _DiskOption:
    formats, paths, children = set(), [], set()
    for key, value in flat.items():
        last = key.rpartition(".")[2]
        if last in ("driver", "format"):
            formats.add(value)
        elif last == "filename" or (key == "file" and not is_node):
            paths.append(value)
        elif key not in ("node-name", "id"):
            children.add(value)
    formats -= {"file", "host_device"}
    if not is_node and not {"format", "driver"} & flat.keys():
        formats.add("")
    return _DiskOption(name, frozenset(formats), tuple(paths), frozenset(children))


def _unfolded(paths: Iterable[str]) -> Iterator[tuple[str, Collection[str]]]:
    """Yield each path with the values of the options in it. Only a path of the form `json:{...}`
    has options."""
    for path in paths:
        if not path.startswith("json:"):
            yield _bare(path), ()
            continue
        inner = QemuOption("blockdev", path.removeprefix("json:")).flat
        values = frozenset(inner.values())
        for key, value in inner.items():
            if key.rpartition(".")[2] == "filename":
                yield _bare(value), values


def _images(disks: Sequence[_DiskOption], in_use: set[str]) -> dict[str, bool]:
    """Return the path of each image, and whether the command line uses it only as raw.

    If nothing on the command line uses a node, its image does not count as raw: a disk that was
    added to the running QEMU may use the node with another format.
    """
    parents: dict[str, list[_DiskOption]] = {}
    for disk in disks:
        for child in disk.children:
            parents.setdefault(child, []).append(disk)
    images: dict[str, bool] = {}
    for disk in disks:
        users = parents.get(disk.name, [])
        if disk.formats:
            raw = disk.formats == {"raw"} and not users
        else:
            raw = all(user.formats == {"raw"} and user.name not in parents for user in users)
            raw = raw and bool(users or disk.name in in_use)
        for path in map(_bare, disk.paths):
            images[path] = raw and images.get(path, True)
    return images


def _bare(filename: str) -> str:
    return filename.removeprefix("file:").removeprefix("host_device:")


def _only_read(options: Sequence[QemuOption]) -> frozenset[str]:
    """Return the nodes and drives that are used only for reading."""
    used: set[str] = set()
    written: set[str] = set()
    for option in options:
        if option.name not in ("drive", "blockdev", "device"):
            continue
        reads = option.name == "device" and option.flat.get("driver") in _READERS
        for key, value in option.flat.items():
            if key in ("node-name", "id"):
                continue
            used.add(value)
            if not (reads or _is_read_only(option.flat, key)):
                written.add(value)
    return frozenset(used - written)


def _is_read_only(flat: Mapping[str, str], key: str) -> bool:
    """Return whether QEMU only reads from the node at `key` of a disk option. This is so if the
    node, or a node above it, is read-only or is a backing file."""
    *levels, last = key.split(".")
    above = ["".join(f"{level}." for level in levels[:count]) for count in range(len(levels) + 1)]
    names = [f"{prefix}{name}" for prefix in above for name in ("read-only", "readonly")]
    return "backing" in (*levels, last) or any(flat.get(name) in _ON for name in names)


def _read_nodes(
    graph: BlockGraph, name: str, flat: Mapping[str, str], depth: int, *, read_only: bool
) -> None:
    """Add those nodes of one disk option whose storage is behind a connection. `read_only`: whether
    QEMU writes to none of these nodes."""
    addressed = _prefix_of_address(flat)
    for key, value in flat.items():
        prefix, _, last = key.rpartition(".")
        dotted = f"{prefix}." if prefix else ""
        if last == "driver" and value in _DEFAULT_PORTS:
            if dotted == addressed:
                continue
            node = flat.get(f"{dotted}node-name") or name
            ends = list(_endpoints_of_options(value, flat, dotted))
            export = flat.get(f"{dotted}export", "")
            graph.add(
                value,
                node,
                ends,
                export,
                _reconnects(value, flat, dotted),
                read_only=read_only or _is_read_only(flat, key),
            )
        elif last in ("file", "filename", "backing", "hda", "cdrom", "url"):
            only_read = read_only or _is_read_only(flat, key)
            options = {}
            if key == "file" and addressed is not None:
                options = {word: flat.get(f"{addressed}{word}", "") for word in _OF_ADDRESS}
            _read_filename(graph, name, value, depth, options, read_only=only_read)


def _prefix_of_address(flat: Mapping[str, str]) -> str | None:
    """If the option `file` is the address of a node, return the prefix of the node's other options;
    else None. In driver=nbd,file=nbd://host,reconnect-delay=9 the prefix is ""."""
    if (match := NETWORK_IMAGE.match(flat.get("file", ""))) is None:
        return None
    return "" if match[1] in (flat.get("driver"), flat.get("format")) else "file."


def _reconnects(protocol: str, flat: Mapping[str, str], prefix: str) -> int | None:
    """Return Node.reconnect (s). libiscsi reconnects forever unless requests have a timeout."""
    if protocol == "iscsi":
        return None if flat.get(f"{prefix}timeout", "0") != "0" else FOREVER_S
    delay = flat.get(f"{prefix}reconnect-delay", "") if protocol == "nbd" else ""
    return int(delay) if delay.isdecimal() and len(delay) < 10 else None


def _read_filename(
    graph: BlockGraph,
    name: str,
    text: str,
    depth: int,
    options: Mapping[str, str],
    *,
    read_only: bool,
) -> None:
    """Add the nodes that a file name describes. `options`: the node's _OF_ADDRESS options, if the
    file name is the address of a node."""
    if text.startswith("json:"):
        if depth < _MAX_DEPTH:
            inner = QemuOption("blockdev", text.removeprefix("json:"))
            _read_nodes(graph, name, inner.flat, depth + 1, read_only=read_only)
        return
    if not (match := NETWORK_IMAGE.match(text)):
        return
    protocol = match[1]
    ends = list(_endpoints_of_url(protocol, text))
    graph.add(
        protocol,
        options.get("node-name") or name,
        ends,
        _export_of_url(text),
        _reconnects(protocol, options, "") if protocol == "nbd" else None,
        read_only=read_only,
    )


def _endpoints_of_options(
    protocol: str, flat: Mapping[str, str], prefix: str
) -> Iterator[ConnectionEnd]:
    port = _DEFAULT_PORTS[protocol]
    for server in (f"{prefix}server.", f"{prefix}server.0.", prefix):
        kind = flat.get(f"{server}type", "")
        if kind == "fd" or f"{server}str" in flat:
            number = flat.get(f"{server}str", "")
            yield ConnectionEnd(descriptor=int(number) if number.isdecimal() else None)
        elif path := flat.get(f"{server}path") if protocol == "nbd" or kind == "unix" else None:
            yield ConnectionEnd(path=path)
        elif host := flat.get(f"{server}host"):
            yield _tcp(host, flat.get(f"{server}port", ""), port)
    if portal := flat.get(f"{prefix}portal"):
        host, _, number = portal.rpartition(":") if ":" in portal else (portal, "", "")
        yield _tcp(host.strip("[]"), number.partition(",")[0], port)
    if url := flat.get(f"{prefix}url"):
        yield from _endpoints_of_url(protocol, url)


def _export_of_url(text: str) -> str:
    """Return the export that an NBD address names. The address is a URL or has the older form."""
    if text.startswith(("nbd://", "nbd+")):
        return unquote(re.sub(r"[^:]*://[^/?]*/?", "", text, count=1).partition("?")[0])
    return text.partition(":exportname=")[2]


def _endpoints_of_url(protocol: str, text: str) -> Iterator[ConnectionEnd]:
    port = _DEFAULT_PORTS[protocol]
    if protocol == "nbd" and not text.startswith(("nbd://", "nbd+")):
        # Parse the old form: nbd:unix:PATH[:exportname=…], nbd:HOST:PORT[:…]
        address = text.removeprefix("nbd:")
        if address.startswith("unix:"):
            yield ConnectionEnd(path=address.removeprefix("unix:").partition(":exportname=")[0])
        elif match := re.match(r"(\[[^\]]*\]|[^:]*):(\d+)", address):
            yield _tcp(match[1].strip("[]"), match[2], port)
        return
    try:
        url = urlsplit(text)
        number = url.port
    except ValueError:
        return
    if "+unix:" in text:
        for path in parse_qs(url.query).get("socket", []):
            yield ConnectionEnd(path=unquote(path))
    elif url.hostname:
        yield _tcp(url.hostname, "" if number is None else str(number), port)


def _tcp(host: str, number: str, default: int | None) -> ConnectionEnd:
    return ConnectionEnd(host=host, port=int(number) if number.isdecimal() else default)


# ---- other connections ----


def _read_connections(graph: BlockGraph, options: Sequence[QemuOption]) -> None:
    """Add the connections of options that do not define disks. Among these, only a vhost-user
    connection can be for storage."""
    users: dict[str, str] = {}
    for option in options:
        flat = option.flat
        if option.name == "device" and (match := _VHOST_USER.match(flat.get("driver", ""))):
            users[flat.get("chardev", "")] = f"vhost-user-{match[1]}"
        elif option.name == "netdev" and flat.get("type") == "vhost-user":
            users[flat.get("chardev", "")] = "vhost-user-net"
    for option in options:
        flat = option.flat
        match option.name:
            case "chardev":
                name = flat.get("id", "")
                ends = list(_endpoints_of_chardev(flat))
                if name in users:
                    graph.add("vhost-user", f"{name} ({users[name]})", ends)
                else:
                    graph.endpoints.update(dict.fromkeys(ends))
            case "monitor" | "qmp" | "qmp-pretty" | "serial" | "parallel" | "debugcon" | "gdb":
                graph.endpoints.update(dict.fromkeys(_endpoints_of_chardev(flat)))
            case "s":
                graph.endpoints[ConnectionEnd(port=1234)] = None
            case "netdev" | "nic" | "net":
                graph.endpoints.update(dict.fromkeys(_endpoints_of_netdev(flat)))
            case "vnc":
                graph.endpoints.update(dict.fromkeys(_endpoints_of_vnc(option.text)))
            case "spice":
                graph.endpoints.update(dict.fromkeys(_endpoints_of_spice(flat)))
            case "display" if flat.get("type") == "vnc" or option.text.startswith("vnc="):
                text = option.text.removeprefix("vnc=")
                graph.endpoints.update(dict.fromkeys(_endpoints_of_vnc(text)))


def _endpoints_of_chardev(flat: Mapping[str, str]) -> Iterator[ConnectionEnd]:
    if path := flat.get("path") or flat.get("addr.path"):
        yield ConnectionEnd(path=path)
    number = flat.get("fd") or flat.get("addr.str", "")
    if number.isdecimal():
        yield ConnectionEnd(descriptor=int(number))
    port = flat.get("port") or flat.get("addr.port", "")
    if port.isdecimal():
        yield ConnectionEnd(host=flat.get("host", ""), port=int(port))


def _endpoints_of_netdev(flat: Mapping[str, str]) -> Iterator[ConnectionEnd]:
    if path := flat.get("addr.path") or flat.get("path") or flat.get("sock"):
        yield ConnectionEnd(path=path)
    for key in ("fd", "addr.str"):
        if flat.get(key, "").isdecimal():
            yield ConnectionEnd(descriptor=int(flat[key]))
    for key in ("connect", "listen"):
        host, _, port = flat.get(key, "").rpartition(":")
        if port.isdecimal():
            yield ConnectionEnd(host=host, port=int(port))
    if flat.get("addr.port", "").isdecimal():
        yield ConnectionEnd(host=flat.get("addr.host", ""), port=int(flat["addr.port"]))


def _endpoints_of_vnc(text: str) -> Iterator[ConnectionEnd]:
    first = text.partition(",")[0]
    if first.startswith("unix:"):
        yield ConnectionEnd(path=first.removeprefix("unix:"))
    number = first.rpartition(":")[2]
    if number.isdecimal():
        yield ConnectionEnd(port=5900 + int(number))


def _endpoints_of_spice(flat: Mapping[str, str]) -> Iterator[ConnectionEnd]:
    if flat.get("unix") == "on" and "addr" in flat:
        yield ConnectionEnd(path=flat["addr"])
    for key in ("port", "tls-port"):
        if flat.get(key, "").isdecimal():
            yield ConnectionEnd(port=int(flat[key]))
