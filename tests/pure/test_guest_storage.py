"""Reading a guest's disks from its command line, as QEMU does."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

from qkilld.adapters import procfs
from qkilld.adapters.qemu_args import parse_command_line
from qkilld.ctl.guest_storage import (
    for_all_instances,
    image_paths,
    planned_options,
    qemu_command_lines,
    read_storage,
)
from qkilld.ctl.unit_context import with_target
from qkilld.model.errors import BusError
from qkilld.model.guest import Unit
from qkilld.model.unit import Command
from qkilld.monitor import tcp
from qkilld.unitcheck.storage import Storage, device_kind, is_ordered, mount_unit
from tests.pure.test_unitcheck import SAFE

QEMU = "/usr/bin/qemu-system-x86_64"


def places(*words: str) -> list[Storage]:
    command = Command(QEMU, (QEMU, *words))
    return read_storage(replace(SAFE, exec_start=(command,)), ())


def test_images() -> None:
    words = ["q", "-drive", "file=/srv/a.qcow2,if=none", "-hda", "/srv/b", "-blockdev"]
    words += ['{"driver": "file", "filename": "/srv/c"}', "-drive", "file=nbd://host:1/x"]
    words += ["-virtfs", "local,path=/srv/d,mount_tag=d", "-chardev", "socket,path=/run/x,id=y"]
    assert image_paths(parse_command_line(words)) == ["/srv/a.qcow2", "/srv/b", "/srv/c", "/srv/d"]
    inner = '{"driver": "qcow2", "file": {"driver": "host_device", "filename": "/dev/drbd0"}}'
    words = ["q", "-drive", f"file=json:{inner.replace(',', ',,')}"]
    assert image_paths(parse_command_line(words)) == ["/dev/drbd0"]
    words = ["q", "-blockdev", '{"driver": "nfs", "path": "/export/a", "server": {"host": "h"}}']
    assert image_paths(parse_command_line(words)) == [], "a path on the server"


@pytest.mark.parametrize(
    ("words", "protocols"),
    [
        (["-drive", "file=nbd://storage.example:1/x"], ["nbd"]),
        (["-drive", "file=iscsi://10.0.0.1/iqn/1"], ["iscsi"]),
        (["-drive", "file=nbd://127.0.0.1:1/x"], []),
        (["-drive", "file=nbd:unix:/run/nobody", "-name", "nbd"], []),
        (["-smbios", "type=1,serial=ds=nocloud-net;s=http://10.0.2.2:8000/"], []),
        (["-kernel", "/srv/nbd://x"], []),
        (
            [
                *("-blockdev", '{"driver":"rbd","pool":"p","image":"i","node-name":"d"}'),
                *("-netdev", '{"type":"stream","id":"n","addr":{"type":"unix","path":"/run/p"}}'),
            ],
            ["rbd"],
        ),
        (["-blockdev", "driver=iscsi,transport=tcp,portal=10.0.0.1,target=t,lun=1"], ["iscsi"]),
        # Two disks on a local server whose unit is unknown.
        (
            [
                *("-drive", "file=nbd:unix:/run/nobody:exportname=a"),
                *("-drive", "file=nbd:unix:/run/nobody:exportname=b"),
            ],
            [],
        ),
        (
            [
                "-blockdev",
                '{"driver":"qcow2","node-name":"d","file":{"driver":"nbd","server":'
                '{"type":"inet","host":"storage.example","port":"10809"}}}',
            ],
            ["nbd"],
        ),
    ],
)
def test_servers(words: list[str], protocols: list[str]) -> None:
    assert [place.protocol for place in places(*words)] == protocols


def test_a_socket_whose_name_breaks_the_table_of_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user can bind such a socket. psutil raises RuntimeError for it, but the server is
    found."""
    path = tmp_path / f"server-{os.getpid()}"
    monkeypatch.setattr(procfs, "read_unit", lambda pid: Unit(system=f"{pid}.service"))
    with socket.socket(socket.AF_UNIX) as hostile, socket.socket(socket.AF_UNIX) as server:
        hostile.bind(os.fsencode(tmp_path / "a\nb c"))
        server.bind(str(path))
        server.listen()
        (place,) = places("-drive", f"file=nbd+unix:///?socket={path}")
        assert places("-drive", f"file=nbd+unix:///?socket={path}-of-nobody") == []
    assert (place.protocol, place.server, place.unseen) == ("nbd", f"{os.getpid()}.service", "")


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_a_server_that_cannot_be_seen(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"server-{os.getpid()}"
    with socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET) as server:
        server.bind(str(path) if family == "unix" else ("127.0.0.1", 0))
        server.listen()
        port = 0 if family == "unix" else server.getsockname()[1]
        disk = f"nbd+unix:///?socket={path}" if family == "unix" else f"nbd://127.0.0.1:{port}/x"
        assert not [place for place in places("-drive", f"file={disk}") if place.unseen]
        monkeypatch.setattr(procfs, "read_unit", lambda pid: None)
        (place,) = places("-drive", f"file={disk}")
        assert f"the unit of process {os.getpid()}" in place.unseen and not place.server
        # The same happens if the server's process cannot be seen, because it belongs to another
        # user or is outside the container.
        monkeypatch.setattr(procfs, "pids", list)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        (place,) = places("-drive", f"file={disk}")
        assert "cannot be seen; root can see it" in place.unseen and not place.server
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert places("-drive", f"file={disk}") == []


@pytest.fixture
def unit_is_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "read_unit", lambda pid: Unit(system=f"{pid}.service"))


@pytest.mark.usefixtures("unit_is_process")
def test_a_forged_row_makes_no_server() -> None:
    """The name of a user's abstract socket contains a forged row of /proc/net/unix, for another
    socket of this user."""
    path = f"/run/{os.getpid()}.nbd"
    with socket.socket(socket.AF_UNIX) as mine, socket.socket(socket.AF_UNIX) as hostile:
        mine.bind(f"\0{path}")
        mine.listen()
        inode = os.fstat(mine.fileno()).st_ino
        row = f"0: 00000002 00000000 00010000 0001 01 {inode} {path}"
        hostile.bind(f"\0z\n{row}")
        assert places("-drive", f"file=nbd+unix:///?socket={path}") == []


@pytest.mark.usefixtures("unit_is_process")
def test_only_the_socket_of_the_file_is_the_server(tmp_path: Path) -> None:
    path = tmp_path / f"server-{os.getpid()}"
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()"
    run = f"{code}; print(flush=True); input()"
    with (
        subprocess.Popen(
            [sys.executable, "-c", run, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as first,
        socket.socket(socket.AF_UNIX) as second,
    ):
        assert first.stdin is not None and first.stdout is not None
        first.stdout.readline()
        disk = f"file=nbd+unix:///?socket={path}"
        assert [place.server for place in places("-drive", disk)] == [f"{first.pid}.service"]
        # The first server's socket keeps the name, but loses the file.
        path.unlink()
        second.bind(str(path))
        # If another test has a network namespace, the server is unknown.
        assert not any(place.server for place in places("-drive", disk))
        second.listen()
        assert [place.server for place in places("-drive", disk)] == [f"{os.getpid()}.service"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network namespace")
def test_a_server_in_another_network_namespace_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / f"server-{os.getpid()}"
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()"
    run = ("unshare", "--net", sys.executable, "-c", f"{code}; print(flush=True); input()", path)
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        (place,) = places("-drive", f"file=nbd+unix:///?socket={path}")
        assert "another network namespace" in place.unseen and not place.server
        server.communicate(b"\n")


@pytest.mark.usefixtures("unit_is_process")
@pytest.mark.parametrize(("host", "is_found"), [("127.0.0.2", False), ("0.0.0.0", True)])
def test_a_port_of_another_address_is_not_the_server(host: str, is_found: bool) -> None:
    with socket.socket(socket.AF_INET) as server:
        server.bind((host, 0))
        server.listen()
        port = server.getsockname()[1]
        assert bool(places("-drive", f"file=nbd://127.0.0.1:{port}/x")) is is_found


@pytest.mark.usefixtures("unit_is_process")
def test_a_server_with_too_many_descriptors_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"server-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        monkeypatch.setattr(tcp, "MAX_DESCRIPTORS", 3)
        (place,) = places("-drive", f"file=nbd+unix:///?socket={path}")
    assert "cannot be seen" in place.unseen and not place.server


def test_a_relative_path_is_unknown() -> None:
    (place,) = places("-drive", "file=nbd:unix:server")
    assert "relative" in place.unseen


CONFIG = """\
[drive "d"]
  file = "nbd://storage.example/disk"
  if = "none"
[drive "e"]
  file = "/dev/drbd/by-res/web/0"
[chardev "m"]
  backend = "socket"
  path = "/run/web.qmp"
  server = "on"
  wait = "off"
[mon "mon"]
  chardev = "m"
  mode = "control"
"""


def test_configuration_files_of_qemu(tmp_path: Path) -> None:
    """QEMU is not running. Files that are not regular are not opened."""
    (tmp_path / "web.cfg").write_text(CONFIG)
    os.mkfifo(tmp_path / "fifo")
    words = (QEMU, "-readconfig", f"{tmp_path}/web.cfg", "-readconfig", f"{tmp_path}/fifo")
    facts = replace(SAFE, exec_start=(Command(QEMU, (*words, "-readconfig", "/nonexistent")),))
    assert [place.protocol for place in read_storage(facts, ())] == ["nbd", "drbd"]
    (options,) = planned_options(facts)
    assert [option.name for option in options if option.name == "mon"] == ["mon"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/dev/disk/by-path/ip-10.0.0.1:3260-iscsi-iqn.x-lun-1", "iscsi"),
        ("/dev/drbd/by-res/web/0", "drbd"),
        ("/dev/drbd3", "drbd"),
        ("/dev/rbd/rbd/web", "rbd"),
        ("/dev/nbd0", "nbd"),
        ("/dev/mapper/mpatha", "multipath"),
        ("/dev/sda", ""),
        ("/srv/drbd", ""),
    ],
)
def test_block_devices_of_the_host(path: str, kind: str) -> None:
    assert device_kind(path) == kind
    found = places("-drive", f"file={path},format=raw")
    assert [place.protocol for place in found] == ([kind] if kind else [])
    for place in found:
        assert not is_ordered(SAFE, place)
        assert is_ordered(replace(SAFE, after=("remote-fs-pre.target",)), place)
        assert "remote-fs-pre.target" in place.line


def test_qemus_in_shells() -> None:
    shell = Command("/bin/sh", ("/bin/sh", "-c", f"cd /srv && exec {QEMU} -hda 'a b' -S; true"))
    assert qemu_command_lines(replace(SAFE, exec_start=(shell,))) == [[QEMU, "-hda", "a b", "-S"]]
    script = Command("/bin/sh", ("/bin/sh", "/opt/run"))
    assert qemu_command_lines(replace(SAFE, exec_start=(script,))) == []


def test_templates_have_the_specifier() -> None:
    own = Storage(protocol="nbd", server="nbd@web.service")
    mount = Storage(mount_point="/srv/web", unit="srv-web.mount")
    shared = Storage(mount_point="/srv/website", unit="srv-website.mount")
    lines = [place.line for place in for_all_instances([own, mount, shared], "web")]
    assert lines == ["After=nbd@%i.service", "RequiresMountsFor=/srv/%i",
                     "RequiresMountsFor=/srv/website"]  # fmt: skip


def test_templates_do_not_get_the_server_of_one_instance() -> None:
    own = Storage(protocol="nbd", server="nbd-web.service")
    (place,) = for_all_instances([own], "web")
    assert place.unseen.endswith("may be that of the instance web alone") and not place.server
    assert not is_ordered(replace(SAFE, after=(own.server, own.unit)), place)
    assert for_all_instances([own], "we") == [own]


@pytest.mark.parametrize(
    ("answer", "ordered"), [(True, True), (None, True), (False, False), (BusError(), False)]
)
def test_a_mount_that_its_target_does_not_order(
    answer: bool | BusError | None, ordered: bool
) -> None:
    """A mount with the option nofail is not ordered before its target. At shutdown, such a mount is
    unmounted while the guest still writes."""
    systemd = Mock()
    systemd.is_before = AsyncMock(side_effect=[answer])
    place = asyncio.run(with_target(systemd, Storage(mount_point="/srv", unit="srv.mount")))
    assert is_ordered(replace(SAFE, after=("remote-fs.target",)), place) is ordered
    assert is_ordered(replace(SAFE, after=("srv.mount",)), place)
    assert place.line == "RequiresMountsFor=/srv"
    other = replace(place, mount_point="/srv/vm_web", unit="srv-vm_web.mount")
    (of_template,) = for_all_instances([other], "web")
    assert bool(of_template.unseen) is not ordered


@pytest.mark.parametrize(
    ("instance", "mount_point"), [("web", "/srv/vm_web"), ("vm", "/srv/vm-images"), ("1", "/d-1")]
)
def test_templates_are_ordered_after_a_mount_that_may_be_shared(
    instance: str, mount_point: str
) -> None:
    unit = mount_unit(mount_point)
    (place,) = for_all_instances([Storage(mount_point=mount_point, unit=unit)], instance)
    assert (place.unseen, place.line) == ("", f"After=remote-fs.target {unit}")
    assert not is_ordered(SAFE, place)
    assert is_ordered(replace(SAFE, after=("remote-fs.target", unit)), place)
