"""A guest's file, and the command line made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkilld.launcher.options import GuestFile, command, parse
from qkilld.model.errors import ConfigError
from tests.lab import needs
from tests.lab.process import run


def argv(text: str, name: str = "web") -> list[str]:
    file = parse(text, "x.conf")
    runtime = "/run/qemu-guest/a,b"
    return command(
        file, name=name, machine="x86_64", qmp=f"{runtime}/qmp", agent=f"{runtime}/agent"
    )


AGENT = [
    *("-chardev", "socket,id=qkilld-agent,path=/run/qemu-guest/a,,b/agent,server=on,wait=off"),
    *("-device", "virtio-serial,id=qkilld-serial", "-device"),
    "virtserialport,bus=qkilld-serial.0,chardev=qkilld-agent,name=org.qemu.guest_agent.0",
]


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


def test_missing_options_are_added() -> None:
    assert argv("-m 1G", "a,b") == [
        *("/usr/bin/qemu-system-x86_64", "-name", "guest=a,,b", "-display", "none"),
        *("-qmp", "unix:/run/qemu-guest/a,,b/qmp,server=on,wait=off", "-m", "1G"),
        *AGENT,
    ]


@pytest.mark.parametrize(
    ("text", "added"),
    [
        ("-machine q35,accel=kvm", True),
        ("-machine accel=tcg", True),
        ("-M type=pc-i440fx-7.2", True),
        ("/usr/bin/qemu-system-aarch64\n-M virt", True),
        ("/usr/bin/qemu-system-aarch64\n-m 1G", False),
        ("-M microvm", False),
        ("-M isapc", False),
        ("-M none", False),
        ("-m 1G\n-loadvm up", False),
        ("-m 1G\n-readconfig x.cfg", False),
        ("-device virtserialport,chardev=own,name=org.qemu.guest_agent.0", False),
    ],
)
def test_the_agents_port_is_added_to_what_can_have_it(text: str, added: bool) -> None:
    assert (argv(text)[-6:] == AGENT) is added
    assert any("qkilld-serial" in word for word in argv(text)) is added


@pytest.mark.parametrize(
    ("program", "machine"),
    [
        ("qemu-system-x86_64", "q35"),
        ("qemu-system-x86_64", "pc"),
        ("qemu-system-x86_64", ""),
    ],
)
def test_a_real_qemu_starts_with_the_port(lab_dir: Path, program: str, machine: str) -> None:
    path = needs.program(program, "a QEMU of that architecture")
    file = parse(f"{path}\n-nodefaults\n" + (f"-M {machine}\n" if machine else ""), "x.conf")
    qmp, agent = lab_dir / "qmp", lab_dir / "agent"
    words = command(file, name="web", machine="x86_64", qmp=str(qmp), agent=str(agent))
    # QEMU creates everything, and then exits, because the monitor gets `quit`.
    words = [word.replace(f"unix:{qmp},server=on,wait=off", "stdio") for word in words]
    done = run(words, input='{"execute": "qmp_capabilities"}{"execute": "quit"}')
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line", ["-vnc :1", "--display gtk", "-nographic", "-spice port=1"])
def test_its_own_display_and_name_stand(line: str) -> None:
    given = argv(f"{line}\n-name own")
    assert "none" not in given
    assert given.count("-name") == 1


def test_a_value_is_no_option() -> None:
    assert argv("-append -name")[1:3] == ["-name", "guest=web"]


@pytest.mark.parametrize("machine, program", [("ppc64le", "ppc64"), ("aarch64", "aarch64")])
def test_the_machines_own_qemu(machine: str, program: str) -> None:
    given = command(parse("-m 1G", ""), name="x", machine=machine, qmp="/q", agent="/a")
    assert given[0] == f"/usr/bin/qemu-system-{program}"


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "x.conf: the file has no options"),
        ("# nothing\n", "x.conf: the file has no options"),
        ("-m 1G\nsmp 2\n", 'x.conf:2: "smp" is not an option'),
        ("-\n", 'x.conf:1: "-" is not an option'),
        ("-m 1G\n-daemonize", "x.conf:2: leave -daemonize out"),
        ("--pidfile /run/x", "x.conf:1: leave -pidfile out"),
        ("-m 1\0G", "x.conf:1: the line has a NUL byte"),
        ("/a\n/b\n-m 1G", "x.conf:2: the file names a QEMU program twice"),
        ("\x1b[31m 1\n", "x.conf:1: "),
    ],
)
def test_errors_name_their_line(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.conf")
    assert str(caught.value).startswith(complaint)
    assert "\x1b" not in str(caught.value)
