"""Reading storage connections and images from a command line."""

from __future__ import annotations

import shlex

import pytest

from qkilld.adapters.qemu_args import NETWORK_DRIVERS, names_network_storage, parse_config
from qkilld.evidence.block_graph import (
    _DEFAULT_PORTS,
    FOREVER_S,
    BlockGraph,
    ConnectionEnd,
    config_paths,
    lonely_nodes,
    read_block_graph,
    requested_exports,
)


def graph_of(text: str, config: str = "") -> BlockGraph:
    return read_block_graph(["qemu-system-x86_64", *shlex.split(text)], parse_config(config))


def storage(graph: BlockGraph) -> set[tuple[str, str]]:
    return {(node.protocol, node.name) for node in graph.nodes}


def ends(graph: BlockGraph) -> dict[ConnectionEnd, str | None]:
    return {end: node.name if node else None for end, node in graph.endpoints.items()}


UNIX = ConnectionEnd(path="/run/nbd.sock")


@pytest.mark.parametrize(
    ("text", "nodes", "endpoints"),
    [
        ("-drive file=/a.qcow2,format=qcow2", set(), {}),
        ("-drive file=nbd:unix:/run/nbd.sock,id=d", {("nbd", "d")}, {UNIX: "d"}),
        ("-drive file=nbd:unix:/run/nbd.sock:exportname=x,id=d", {("nbd", "d")}, {UNIX: "d"}),
        (
            "-drive file=nbd:host:99,id=d",
            {("nbd", "d")},
            {ConnectionEnd(host="host", port=99): "d"},
        ),
        (
            "-drive file=nbd+unix:///x?socket=/run/nbd.sock,id=d",
            {("nbd", "d")},
            {UNIX: "d"},
        ),
        # The address and the other options describe one node.
        (
            "-drive driver=nbd,file=nbd:unix:/run/nbd.sock,id=d",
            {("nbd", "d")},
            {UNIX: "d"},
        ),
        (
            "-drive file=nbd:unix:/run/nbd.sock,format=nbd,id=d",
            {("nbd", "d")},
            {UNIX: "d"},
        ),
        (
            "-drive file=nbd:unix:/run/nbd.sock,file.driver=nbd,format=raw,id=d",
            {("nbd", "d")},
            {UNIX: "d"},
        ),
        ("nbd://host/x", {("nbd", "hda0")}, {ConnectionEnd(host="host", port=10809): "hda0"}),
        (
            "-drive driver=qcow2,file.driver=nbd,file.path=/run/nbd.sock,id=d",
            {("nbd", "d")},
            {UNIX: "d"},
        ),
        (
            "-blockdev driver=nbd,node-name=n,server.type=unix,server.path=/run/nbd.sock,"
            "reconnect-delay=300",
            {("nbd", "n")},
            {UNIX: "n"},
        ),
        (
            '-blockdev \'{"driver":"nbd","node-name":"n","server":{"type":"fd","str":"7"}}\'',
            {("nbd", "n")},
            {ConnectionEnd(descriptor=7): "n"},
        ),
        (
            '-drive \'file=json:{"driver":"qcow2",,"file":{"driver":"nbd",,'
            '"server":{"type":"unix",,"path":"/run/nbd.sock"}}},id=d\'',
            {("nbd", "d")},
            {UNIX: "d"},
        ),
        (
            "-drive file=iscsi://1.2.3.4:3261/iqn.x/1,id=lun",
            {("iscsi", "lun")},
            {ConnectionEnd(host="1.2.3.4", port=3261): "lun"},
        ),
        (
            "-blockdev driver=iscsi,node-name=n,transport=tcp,portal=1.2.3.4,target=iqn.x,lun=1",
            {("iscsi", "n")},
            {ConnectionEnd(host="1.2.3.4", port=3260): "n"},
        ),
        ("-drive file=rbd:pool/image,id=r", {("rbd", "r")}, {}),
        (
            "-chardev socket,id=c,path=/v.sock -device vhost-user-blk-pci,chardev=c",
            {("vhost-user", "c (vhost-user-blk)")},
            {ConnectionEnd(path="/v.sock"): "c (vhost-user-blk)"},
        ),
        # Not storage
        ("-qmp unix:/q.sock,server=on,wait=off", set(), {ConnectionEnd(path="/q.sock"): None}),
        (
            "-chardev socket,id=m,fd=9,server=on -mon chardev=m",
            set(),
            {ConnectionEnd(descriptor=9): None},
        ),
        (
            "-monitor tcp:127.0.0.1:4444,server",
            set(),
            {ConnectionEnd(host="127.0.0.1", port=4444): None},
        ),
        (
            "-netdev stream,id=n,addr.type=unix,addr.path=/passt.sock",
            set(),
            {ConnectionEnd(path="/passt.sock"): None},
        ),
        ("-vnc 127.0.0.1:3", set(), {ConnectionEnd(port=5903): None}),
        ("-vnc unix:/v.sock", set(), {ConnectionEnd(path="/v.sock"): None}),
        ("-spice port=5930,disable-ticketing=on", set(), {ConnectionEnd(port=5930): None}),
        # Text that looks like storage, but is not storage for QEMU
        ("-smbios type=1,serial=ds=nocloud-net;s=http://10.0.2.2:8000/", set(), {}),
        ("-name nbd:unix:/run/nbd.sock", set(), {}),
    ],
)
def test_nodes_and_connections(
    text: str, nodes: set[tuple[str, str]], endpoints: dict[ConnectionEnd, str | None]
) -> None:
    graph = graph_of(text)
    assert storage(graph) == nodes
    assert ends(graph) == endpoints


def test_config_files_count_as_well() -> None:
    assert config_paths(["qemu", "-readconfig", "/a.cfg", "-m", "1G"]) == ["/a.cfg"]
    text = '[drive "d"]\n  file = "nbd:unix:/run/nbd.sock"\n'
    assert storage(graph_of("-m 1G", text)) == {("nbd", "d")}


@pytest.mark.parametrize(
    ("text", "raw"),
    [
        ("-drive file=/a,format=raw", {"/a"}),
        ("-drive file=/a,format=qcow2", set()),
        ("-drive file=/a", set()),
        ("-hda /a", set()),
        ("-drive driver=raw,file.filename=/a", {"/a"}),
        ("-blockdev driver=raw,node-name=r,file.driver=file,file.filename=/a", {"/a"}),
        (
            "-blockdev driver=file,node-name=f,filename=/a -blockdev driver=raw,node-name=r,file=f",
            {"/a"},
        ),
        (
            "-blockdev driver=file,node-name=f,filename=/a -blockdev driver=qcow2,file=f",
            set(),
        ),
        ("-blockdev driver=file,node-name=f,filename=/a -device virtio-blk,drive=f", {"/a"}),
        ("-blockdev driver=file,node-name=f,filename=/a -machine pc,pflash0=f", {"/a"}),
        # A format layer may have been added to the running QEMU.
        ("-blockdev driver=file,node-name=f,filename=/a", set()),
        # A slice, as libvirt writes it.
        (
            "-blockdev driver=file,node-name=f,filename=/a -blockdev driver=raw,node-name=s,file=f"
            " -blockdev driver=qcow2,node-name=q,file=s",
            set(),
        ),
        (
            "-blockdev driver=file,node-name=f,filename=/a"
            " -blockdev driver=qcow2,node-name=q,file.driver=raw,file.file=f",
            set(),
        ),
        (
            "-blockdev driver=raw,node-name=s,file.driver=file,file.filename=/a"
            " -blockdev driver=qcow2,node-name=q,file=s",
            set(),
        ),
        (
            "-blockdev driver=raw,node-name=r,file.driver=qcow2,file.file.driver=file,"
            "file.file.filename=/a",
            set(),
        ),
        ("-drive file=/a,format=raw -drive file=/a,format=qcow2", set()),
    ],
)
def test_images_known_to_be_raw(text: str, raw: set[str]) -> None:
    assert {path for path, use in graph_of(text).images.items() if use.raw} == raw


ON_RING = 'json:{"filename":"/a",,"aio":"io_uring"}'
IN_JSON = 'json:{"driver":"qcow2",,"file":{"driver":"file",,"filename":"/a"}}'


@pytest.mark.parametrize(
    ("text", "ringless"),
    [
        ("-drive file=/a,format=raw", {"/a"}),
        ("-drive file=/a,format=raw,aio=native", {"/a"}),
        ("-drive file=/a,format=raw,aio=io_uring", set()),
        ("-drive file=b,aio=io_uring -drive file=/vm/b,format=raw", set()),
        ("-blockdev driver=qcow2,node-name=x,file.driver=file,file.filename=/a", {"/a"}),
        ("-blockdev driver=qcow2,file.driver=file,file.filename=/a,file.aio=io_uring", set()),
        (f"-drive 'file={IN_JSON}'", {"/a"}),
        (f"-drive 'file={IN_JSON},aio=io_uring'", set()),
        ('-drive file=json:{"filename":"/a",,"aio":"io_uring"}', set()),
    ],
)
def test_images_without_an_io_uring(text: str, ringless: set[str]) -> None:
    graph = graph_of(text)
    graph.locate_images("/vm")
    found = {path for path, use in graph.images.items() if not use.on_ring}
    assert found & {"/a", "/vm/b"} == ringless


def test_a_relative_name_is_of_the_working_directory() -> None:
    graph = graph_of("-drive file=disks/a.raw,format=raw")
    assert list(graph.images) == ["disks/a.raw"]
    graph.locate_images("/vm")
    assert {path: use.raw for path, use in graph.images.items()} == {
        "disks/a.raw": True,
        "/vm/disks/a.raw": True,
    }


def test_names_are_printable_and_unlike_each_other() -> None:
    graph = graph_of("-drive file=nbd:h:1,id=a\x1b[2J -drive file=nbd:h:2,id=a\x1b[2J")
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == 2
    assert all(name.isprintable() for name in names)


@pytest.mark.parametrize(
    ("node", "seconds"),
    [
        ("driver=nbd,server.type=unix,server.path=/s,reconnect-delay=30", 30),
        ("driver=nbd,server.type=unix,server.path=/s", None),
        ("driver=nbd,server.type=unix,server.path=/s,reconnect-delay=soon", None),
        ("driver=iscsi,transport=tcp,portal=1.2.3.4,target=iqn.x,lun=1", FOREVER_S),
        ("driver=iscsi,transport=tcp,portal=1.2.3.4,target=iqn.x,lun=1,timeout=0", FOREVER_S),
        ("driver=iscsi,transport=tcp,portal=1.2.3.4,target=iqn.x,lun=1,timeout=9", None),
        ("driver=ssh,server.host=h,server.port=22,path=/x,reconnect-delay=30", None),
    ],
)
def test_how_long_requests_are_held_for_a_lost_server(node: str, seconds: int | None) -> None:
    argv = ["qemu", "-blockdev", f"node-name=n,{node}"]
    assert [each.reconnect for each in read_block_graph(argv).nodes] == [seconds]
    if "reconnect" in node and "nbd" in node:
        url = f"file=nbd:unix:/s,{node.rpartition(',')[2]}"
        argv = ["qemu", "-drive", f"driver=nbd,{url}"]
        assert [each.reconnect for each in read_block_graph(argv).nodes] == [seconds]
        argv = ["qemu", "-drive", f"format=raw,{url.replace(',', ',file.')}"]
        assert [each.reconnect for each in read_block_graph(argv).nodes] == [seconds]
    nested = ",".join(f"file.{word}" for word in node.split(","))
    argv = ["qemu", "-drive", f"format=qcow2,{nested}"]
    assert [each.reconnect for each in read_block_graph(argv).nodes] == [seconds]


def test_the_names_of_each_image() -> None:
    argv = [
        *("qemu", "-drive", "file=a.qcow2,if=none,id=local", "-hda", "/d/b"),
        *("-blockdev", "driver=file,node-name=low,filename=/d/c"),
        *(
            "-blockdev",
            "driver=qcow2,node-name=top,file.driver=file,file.node-name=f,file.filename=/e",
        ),
        *("-drive", "file=/d/c,id=second,format=raw"),
    ]
    graph = read_block_graph(argv)
    graph.locate_images("/d")
    assert {path: use.names for path, use in graph.images.items()} == {
        "a.qcow2": ("local",),
        "/d/a.qcow2": ("local",),
        "/d/b": (),
        "/d/c": ("low", "second"),
        "/e": ("f", "top"),
    }


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("-m 64", False),
        ("-object memory-backend-memfd,id=ram,size=16M,share=on -m 16", True),
        ("-object memory-backend-memfd,id=ram,size=16M", True),
        ("-object memory-backend-file,id=ram,size=16M,mem-path=/dev/shm,share=yes", True),
        ("-object memory-backend-file,id=ram,size=16M,mem-path=/dev/hugepages", False),
        ("-object memory-backend-ram,id=ram,size=16M", False),
        ("""-object '{"qom-type":"memory-backend-memfd","id":"ram","share":false}'""", False),
        ("""-object '{"qom-type":"memory-backend-file","id":"ram","share":true}'""", True),
    ],
)
def test_whether_others_may_use_the_memory(text: str, shared: bool) -> None:
    assert graph_of(text).shared_memory is shared


@pytest.mark.parametrize(
    ("text", "pluggable"),
    [
        ("-drive file=/a", False),
        ("-monitor none", False),
        ("-monitor stdio", True),
        ("-chardev null,id=m -mon m", True),
        ("-chardev null,id=m -object monitor-qmp,id=q,chardev=m", True),
        ("-object rng-builtin,id=r", False),
    ],
)
def test_a_monitor_can_plug_further_disks(text: str, pluggable: bool) -> None:
    assert graph_of(text).pluggable is pluggable


NBD = "driver=nbd,server.type=unix,server.path=/s"


@pytest.mark.parametrize(
    ("text", "read_only"),
    [
        (f"-blockdev {NBD},node-name=n", False),
        (f"-blockdev {NBD},node-name=n,read-only=on", True),
        (f"-blockdev {NBD},node-name=n -blockdev driver=raw,node-name=r,file=n", False),
        (f"-blockdev {NBD},node-name=n -blockdev driver=raw,node-name=r,file=n,read-only=on", True),
        (f"-blockdev {NBD},node-name=n -blockdev driver=qcow2,file=f,backing=n", True),
        (
            f"-blockdev {NBD},node-name=n -blockdev driver=qcow2,file=f,backing=n"
            " -device virtio-blk-pci,drive=n",
            False,
        ),
        (f"-blockdev {NBD},node-name=n -device virtio-blk-pci,drive=n", False),
        (f"-blockdev {NBD},node-name=n -device scsi-cd,drive=n", True),
        ("-drive file=nbd:unix:/s,id=n", False),
        ("-drive file=nbd:unix:/s,id=n,readonly=on", True),
        ("-drive file=nbd:unix:/s,id=n,read-only=off", False),
        ("-drive file=nbd:unix:/s,id=n,media=cdrom", True),
        ("-cdrom nbd:unix:/s", True),
        ("-drive driver=qcow2,file.driver=nbd,file.path=/s,id=n,read-only=on", True),
        ("-drive driver=qcow2,file=f,backing.driver=nbd,backing.path=/s,id=n", True),
        ("-drive driver=qcow2,file.driver=nbd,file.path=/s,backing=b,id=n", False),
        ("""-blockdev '{"driver":"nbd","node-name":"n","read-only":true,"path":"/s"}'""", True),
        (
            """-drive 'file=json:{"driver":"nbd",,"path":"/s"},id=n,readonly=on'""",
            True,
        ),
    ],
)
def test_nodes_that_are_only_read(text: str, read_only: bool) -> None:
    (node,) = graph_of(text).nodes
    assert node.read_only is read_only


@pytest.mark.parametrize(
    ("text", "is_named"),
    [
        ("-drive file=/a.qcow2,id=d -name nbd -netdev user,id=ssh -device driver=nbd", False),
        ("-drive file=nbd:unix:/s,id=d", True),
        ("-blockdev driver=raw,file.driver=iscsi,file.portal=p,node-name=n", True),
        ("-hda rbd:pool/image", True),
        ("-cdrom https://host/image", True),
        ("nbd+unix:///?socket=/s", True),
        ("""-drive 'file=json:{"driver":"nbd"}'""", True),
        ("-readconfig /config", True),
    ],
)
def test_command_lines_that_name_network_storage(text: str, is_named: bool) -> None:
    assert names_network_storage(["qemu-system-x86_64", *shlex.split(text)]) is is_named


def test_all_drivers_for_network_storage_are_known() -> None:
    assert set(_DEFAULT_PORTS) == NETWORK_DRIVERS


ONE = "-drive file=nbd:unix:/run/a.sock:exportname=one,if=none,id=a"
TWO = "-drive file=nbd:unix:/run/a.sock:exportname=two,if=none,id=b"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        (f"{ONE} {TWO}", ["a", "a"]),
        (f"{ONE} {TWO} -drive file=nbd:unix:/run/c.sock,id=c", ["a", "a", ""]),
        # The kernel shows no host names, and no directory if a path is relative.
        ("-drive file=nbd://one,id=a -drive file=nbd://two:10809/x,id=b", ["a", "a"]),
        ("-drive file=nbd://one,id=a -drive file=nbd://one:10810,id=b", ["", ""]),
        (f"{ONE} -drive file=nbd:unix:a.sock,id=b", ["a", "a"]),
        (f"{ONE} -drive file=nbd:unix:/a.sock,id=b", ["", ""]),
        (
            "-drive file=nbd:unix:/a/x,id=a -drive file=nbd:unix:/b/x,id=b"
            " -drive file=nbd:unix:x,id=c",
            ["a", "a", "a"],
        ),
        ("-drive file=rbd:pool/one,id=a -drive file=rbd:pool/two,id=b", ["", ""]),
    ],
)
def test_nodes_whose_connections_look_the_same(text: str, groups: list[str]) -> None:
    assert [node.group for node in graph_of(text).nodes] == groups


@pytest.mark.parametrize(
    ("connected", "lonely", "ends"),
    [
        ("cbb", "", {}),
        ("bb", "c", {"/run/c.sock": ["c"]}),
        ("cb", "ab", {"/run/a.sock": ["a", "b"]}),
        ("", "abc", {"/run/a.sock": ["a", "b"], "/run/c.sock": ["c"]}),
    ],
)
def test_all_nodes_of_a_group_that_lacks_a_connection_may_have_lost_their_server(
    connected: str, lonely: str, ends: dict[str, list[str]]
) -> None:
    graph = graph_of(f"{ONE} {TWO} -drive file=nbd:unix:/run/c.sock,id=c")
    found = lonely_nodes(graph.nodes, ["", *connected])
    assert found == set(lonely)
    assert {end.path: names for end, names in graph.ends_of(found).items()} == ends


@pytest.mark.parametrize(
    ("text", "exports"),
    [
        (f"{ONE} {TWO}", {"a": None, "b": None}),
        (f"{ONE} {ONE.replace('=a', '=b')}", {"a": "one", "b": "one"}),
        (f"{ONE} {TWO.replace('/run', '/other')}", {"a": "one", "b": "two"}),
    ],
)
def test_the_export_over_a_connection(text: str, exports: dict[str, str | None]) -> None:
    """With a wrong export, the progress of another image would count."""
    assert requested_exports(graph_of(text).nodes) == exports
