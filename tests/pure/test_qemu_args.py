"""Command lines of QEMU and -readconfig files."""

from __future__ import annotations

from typing import Any

import pytest

from qkilld.adapters.qemu_args import (
    QemuOption,
    has_qmp,
    monitor_protocol,
    parse_command_line,
    parse_config,
)


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("chardev", "socket,id=m,path=/a,server", {"backend": "socket", "id": "m", "path": "/a"}),
        ("chardev", "socket,path=/a,,b,nowait", {"path": "/a,b", "wait": "off"}),
        ("chardev", "socket,path=/a=b", {"path": "/a=b"}),
        ("chardev", "id=m,backend=pty", {"backend": "pty", "id": "m"}),
        ("chardev", "socket,path=/a,path=/b", {"path": "/b"}),
        ("mon", "m,mode=control", {"chardev": "m", "mode": "control"}),
        ("qmp", "unix:/a,server=on,wait=off", {"backend": "socket", "path": "/a", "server": "on"}),
        ("qmp", "unix:/a:b,,c,server,nowait", {"path": "/a:b,c", "server": "on", "wait": "off"}),
        ("qmp", "unix:path=/a,server", {"path": "/a"}),
        ("qmp", "chardev:m", {"chardev": "m"}),
        ("qmp-pretty", "tcp:127.0.0.1:44,server", {"host": "127.0.0.1", "port": "44"}),
        ("monitor", "telnet::44,server", {"backend": "socket", "host": "", "port": "44"}),
        ("monitor", "tcp:[::1]:44,server", {"host": "::1", "port": "44", "server": "on"}),
        ("monitor", "stdio", {"backend": "stdio"}),
        ("monitor", "none", {"backend": "none"}),
        ("monitor", "pipe:/a", {"backend": "pipe", "path": "/a"}),
        ("serial", "mon:stdio", {"backend": "stdio"}),
        ("drive", "file.driver=nbd,file.server.path=/s", {"file.driver": "nbd"}),
        ("device", "virtserialport,chardev=a", {"driver": "virtserialport", "chardev": "a"}),
        ("device", '{"driver": "nvme", "id": "x"}', {"driver": "nvme", "id": "x"}),
        ("blockdev", '{"file": {"path": "/a,b"}}', {"file": {"path": "/a,b"}}),
        ("blockdev", "{'driver': 'it\\'s \"x\"'}", {"driver": 'it\'s "x"'}),
        ("name", "{web", {"guest": "{web"}),
        ("kernel", "/a", {}),
        ("hda", "/a,b", {"file": "/a,b"}),
    ],
)
def test_properties(option: str, text: str, expected: dict[str, Any]) -> None:
    (parsed,) = parse_command_line(["qemu", f"-{option}", text])
    assert (parsed.name, parsed.text) == (option, text)
    assert expected.items() <= dict(parsed.properties).items()


@pytest.mark.parametrize(
    "text", ["{", "{}{}", '{"a": NaN}', "{" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000]
)
def test_malformed_json_has_no_properties(text: str) -> None:
    (parsed,) = parse_command_line(["qemu", "-blockdev", text])
    assert not parsed.properties


def test_json_and_key_values_are_the_same_when_flat() -> None:
    text = '{"driver": "qcow2", "ro": true, "file": {"path": "/a", "l": [{"x": 1}, null]}}'
    assert QemuOption("blockdev", text).flat == {
        "driver": "qcow2",
        "ro": "on",
        "file.path": "/a",
        "file.l.0.x": "1",
        "file.l.1": "",
    }
    assert QemuOption("drive", "file.path=/a,b=1").flat == {"file.path": "/a", "b": "1"}


def test_a_command_line() -> None:
    argv = ["qemu", "disk.img", "--nodefaults", "-append", "-qmp", "-S", "-M", "pc", "", "-qmp"]
    assert [(option.name, option.text) for option in parse_command_line(argv)] == [
        ("hda", "disk.img"),
        ("nodefaults", ""),
        ("append", "-qmp"),
        ("S", ""),
        ("M", "pc"),
        ("qmp", ""),
    ]


def test_a_config_file() -> None:
    text = """
# qemu config file
path = "before any section"
[chardev "m,1"]
  backend = "socket"
  path = "/a,b = c"
  server = "on" trailing
  wait= "off"
[mon "x"]
  chardev = "m,1"
  mode = "control"
[broken
  mode = readline
"""
    chardev, mon = parse_config(text)
    assert (chardev.name, mon.name) == ("chardev", "mon")
    assert chardev.properties == {
        "id": "m,1",
        "backend": "socket",
        "path": "/a,b = c",
        "server": "on",
    }
    assert mon.properties == {"id": "x", "chardev": "m,1", "mode": "control"}


@pytest.mark.parametrize(
    ("text", "protocol"),
    [
        ("-qmp stdio", "qmp"),
        ("-monitor stdio", "hmp"),
        ("-mon m,mode=control", "qmp"),
        ("-mon m", "hmp"),
        ("-object monitor-qmp,id=q,chardev=m", "qmp"),
        ('-object {"qom-type":"monitor-hmp","id":"h","chardev":"m"}', "hmp"),
        ("-object rng-builtin,id=r", ""),
        ("-device virtio-serial", ""),
    ],
)
def test_the_protocol_of_a_monitor(text: str, protocol: str) -> None:
    argv = ["qemu-system-x86_64", *text.split()]
    (option,) = parse_command_line(argv)
    assert monitor_protocol(option) == protocol
    assert has_qmp(argv) is (protocol == "qmp")


@pytest.mark.parametrize(
    ("text", "is_there"),
    [
        # libvirt 9.0 starts QEMU like this. The user may have added a monitor.
        ("-chardev socket,id=charmonitor,fd=29,server=on,wait=off "
         "-mon chardev=charmonitor,id=monitor,mode=control", False),
        ("-chardev socket,id=charmonitor,fd=29,server=on,wait=off "
         "-mon chardev=charmonitor,id=monitor,mode=control -qmp unix:/a,server=on", False),
        # The monitor does not belong to libvirt, or only the path of its socket shows that it does.
        ("-chardev socket,id=charmonitor,path=/a,server=on -mon charmonitor,mode=control", True),
        ("-chardev socket,id=mine,fd=29,server=on,wait=off -mon mine,mode=control", True),
        ("-readconfig /a", True),
    ],
)  # fmt: skip
def test_libvirts_monitor_is_not_for_us(text: str, is_there: bool) -> None:
    assert has_qmp(["qemu-system-x86_64", *text.split()]) is is_there
