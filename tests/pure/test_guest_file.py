"""The file of a guest, and the command line that it becomes."""

from __future__ import annotations

import pytest

from qkilld.guest.options import GuestFile, command, parse
from qkilld.model.errors import ConfigError


def argv(text: str, name: str = "web") -> list[str]:
    file = parse(text, "x.conf")
    return command(file, name=name, machine="x86_64", qmp="/run/qemu-guest/a,b/qmp")


def test_each_line_is_an_option_and_its_value_as_it_stands() -> None:
    file = parse(
        "# -m 1G\n\n  -m   2G  \n-drive file=a b \"c\" $d 'e',if=virtio # f\n\t-nodefaults\r\n"
        "--accel tcg\n/opt/my qemu/bin/qemu-system-arm\n",
        "x.conf",
    )
    assert file == GuestFile(
        "/opt/my qemu/bin/qemu-system-arm",
        (
            ("-m", "2G"),
            ("-drive", "file=a b \"c\" $d 'e',if=virtio # f"),
            ("-nodefaults",),
            ("--accel", "tcg"),
        ),
    )


def test_what_it_leaves_open_is_added() -> None:
    assert argv("-m 1G", "a,b") == [
        *("/usr/bin/qemu-system-x86_64", "-name", "guest=a,,b", "-display", "none"),
        *("-qmp", "unix:/run/qemu-guest/a,,b/qmp,server=on,wait=off", "-m", "1G"),
    ]


@pytest.mark.parametrize("line", ["-vnc :1", "--display gtk", "-nographic", "-spice port=1"])
def test_its_own_display_and_name_stand(line: str) -> None:
    given = argv(f"{line}\n-name own")
    assert "none" not in given
    assert given.count("-name") == 1


def test_a_value_is_no_option() -> None:
    assert argv("-append -name")[1:3] == ["-name", "guest=web"]


@pytest.mark.parametrize("machine, program", [("ppc64le", "ppc64"), ("aarch64", "aarch64")])
def test_the_machines_own_qemu(machine: str, program: str) -> None:
    given = command(parse("-m 1G", ""), name="x", machine=machine, qmp="/q")
    assert given[0] == f"/usr/bin/qemu-system-{program}"


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "x.conf: there is no option in it"),
        ("# nothing\n", "x.conf: there is no option in it"),
        ("-m 1G\nsmp 2\n", 'x.conf:2: "smp" is no option'),
        ("-\n", 'x.conf:1: "-" is no option'),
        ("-m 1G\n-daemonize", "x.conf:2: leave -daemonize out"),
        ("--pidfile /run/x", "x.conf:1: leave -pidfile out"),
        ("-m 1\0G", "x.conf:1: it has a NUL byte"),
        ("/a\n/b\n-m 1G", "x.conf:2: a QEMU is named already"),
        ("\x1b[31m 1\n", "x.conf:1: "),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.conf")
    assert str(caught.value).startswith(complaint)
    assert "\x1b" not in str(caught.value)
