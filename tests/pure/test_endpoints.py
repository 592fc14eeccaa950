"""The roles of a QEMU's sockets, according to its command line."""

from __future__ import annotations

import shlex

import pytest

from qkilld.adapters.qemu_args import parse_command_line, parse_config
from qkilld.model.errors import InvalidArgs
from qkilld.monitor.endpoints import (
    GuestEndpoints,
    TcpListener,
    UnixListener,
    endpoint_at,
    endpoint_of_peer,
    find_endpoints,
    may_use_tcp,
)

QMP_ADVICE = "; give the guest a unix socket: -qmp unix:PATH,server=on,wait=off"
JSON_CHARDEV = (
    """'{"id": "m", "backend": {"type": "socket", "data": {"server": true,"""
    """ "addr": {"type": "unix", "data": {"path": "/a"}}}}}'"""
)


def find(arguments: str, *listeners: UnixListener, config: str = "") -> GuestEndpoints:
    options = parse_command_line(["qemu", *shlex.split(arguments)])
    return find_endpoints(options + parse_config(config), listeners)


def roles(guest_endpoints: GuestEndpoints) -> list[tuple[str, int]]:
    return [
        (endpoint.role.value, endpoint.listener.inode) for endpoint in guest_endpoints.endpoints
    ]


A, B = UnixListener(1, ("/a",), frozenset({9})), UnixListener(2, ("/b",), frozenset({10, 11}))
AGENT = "-device virtio-serial -device virtserialport,chardev=g,id=p,name=org.qemu.guest_agent.0"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-qmp unix:/a,server=on,wait=off", [("qmp", 1)]),
        ("-qmp-pretty unix:/a,server,nowait", [("qmp", 1)]),
        ("-monitor unix:/a,server,nowait", [("hmp", 1)]),
        ("-monitor unix:/b,server -qmp unix:/a,server", [("qmp", 1), ("hmp", 2)]),
        ("-chardev socket,id=m,path=/a,server=on -mon m,mode=control", [("qmp", 1)]),
        ("-mon chardev=m,mode=control -chardev socket,id=m,path=/a,server=on", [("qmp", 1)]),
        ("-chardev socket,id=m,path=/a,server=on -mon chardev=m", [("hmp", 1)]),
        ("-chardev socket,id=m,path=/a,server=on -qmp chardev:m", [("qmp", 1)]),
        ("-chardev socket,id=m,fd=11,server=on -mon m,mode=control", [("qmp", 2)]),
        (f"-chardev {JSON_CHARDEV} -mon m,mode=control", [("qmp", 1)]),
        ("-chardev socket,id=m,path=/a,server=on -object monitor-qmp,chardev=m", [("qmp", 1)]),
        ("-chardev socket,id=m,path=/a,server=on -object monitor-hmp,chardev=m", [("hmp", 1)]),
        (f"{AGENT} -chardev socket,id=g,path=/b,server=on", [("agent", 2)]),
        # Sockets without a role, with two roles, or with another role are not used.
        ("", []),
        ("-chardev socket,id=m,path=/a,server=on", []),
        ("-serial unix:/a,server", []),
        ("-qmp unix:/a,server -monitor unix:/a,server", []),
        ("-chardev socket,id=m,path=/a,mux=on -mon m -serial chardev:m", []),
        ("-chardev socket,id=m,path=/a -device virtserialport,chardev=m,name=other", []),
        ("-chardev socket,id=m,path=/a -object x,chardev=m -mon m,mode=control", []),
        ("-qmp unix:/c,server", []),
        ("-qmp unix:/a,abstract=on,server", []),
        ("-mon missing,mode=control", []),
        ("-chardev socket,id=m,fd=x,server=on -mon m,mode=control", []),
    ],
)
def test_roles(arguments: str, expected: list[tuple[str, int]]) -> None:
    assert roles(find(arguments, A, B)) == expected


def test_a_config_file_says_it_too() -> None:
    config = """
        [chardev "m"]
        backend = "socket"
        path = "/a"
        server = "on"
        [mon "x"]
        chardev = "m"
        mode = "control"
    """
    assert roles(find("-readconfig /x", A, config=config))


def test_the_agent_is_named_as_events_name_it() -> None:
    guest_endpoints = find(f"{AGENT} -chardev socket,id=g,path=/b,server=on", A, B)
    assert (guest_endpoints.agent_chardev, guest_endpoints.agent_device) == ("g", "p")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            "-qmp tcp:127.0.0.1:4444,server",
            "the monitor on 127.0.0.1:4444 cannot be reached by qkilld",
        ),
        ("-monitor telnet::4444,server", "the monitor on port 4444 cannot be reached by qkilld"),
        ("-monitor tcp:[::1]:44,server", "the monitor on [::1]:44 cannot be reached by qkilld"),
        (
            "-chardev socket,id=m,host=h,port=1,server=on -mon m,mode=control",
            "the monitor on h:1 cannot be reached by qkilld",
        ),
        (
            "-qmp unix:x,abstract=on,server",
            'the monitor on the abstract socket "x" cannot be reached by qkilld',
        ),
        ("-monitor stdio", "the monitor on stdio cannot be used by qkilld"),
        ("-monitor pipe:/x", "the monitor on pipe cannot be used by qkilld"),
        ("-monitor pty", "the monitor on pty cannot be used by qkilld"),
    ],
)
def test_obstacles_of_unreachable_monitors(arguments: str, expected: str) -> None:
    assert find(arguments, A).obstacles == (expected + QMP_ADVICE,)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-monitor none", ()),
        ("-qmp unix:/c", ("the program that listens at /c holds the monitor",)),
        ("-qmp unix:/c,server", ("the guest does not listen at /c",)),
        ("-qmp unix:/a,server", ()),
        ("", ("the guest has no monitor" + QMP_ADVICE,)),
        (
            f"-qmp unix:/a,server {AGENT} -chardev socket,id=g,host=h,port=1,server=on",
            ("the agent on h:1 cannot be reached by qkilld",),
        ),
    ],
)
def test_other_obstacles(arguments: str, expected: tuple[str, ...]) -> None:
    assert find(arguments, A).obstacles == expected


T4, T6 = TcpListener(3, "127.0.0.1", 4444, frozenset({12})), TcpListener(4, "::", 4445)
X = UnixListener(5, ("@x",), frozenset({13}))
PADDED = UnixListener(6, ("@y".ljust(108, "@"),))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-qmp tcp:127.0.0.1:4444,server=on", [("qmp", 3)]),
        ("-qmp tcp:localhost:4444,server=on", [("qmp", 3)]),
        ("-monitor telnet::4445,server,nowait", [("hmp", 4)]),
        ("-qmp tcp::4440,to=4446,server=on", [("qmp", 3), ("qmp", 4)]),
        ("-chardev socket,id=m,fd=12,server=on -mon m", [("hmp", 3)]),
        ("-qmp unix:x,abstract=on,server", [("qmp", 5)]),
        ("-chardev socket,id=m,fd=13,server=on -mon m,mode=control", [("qmp", 5)]),
        ("-qmp unix:y,abstract=on,tight=off,server", [("qmp", 6)]),
        ("-monitor unix:x,abstract=on,server -qmp tcp::4444,server", [("qmp", 3), ("hmp", 5)]),
        # QEMU connects instead of listening, encrypts, listens elsewhere, or also uses the socket
        # for something else.
        ("-qmp tcp:127.0.0.1:4444", []),
        ("-chardev socket,id=m,port=4444,host=h,server=on,tls-creds=t -mon m", []),
        ("-chardev socket,id=m,port=4444,host=h,server=on,websocket=on -mon m", []),
        ("-qmp tcp:127.0.0.2:4444,server=on", []),
        ("-qmp tcp:127.0.0.1:4443,server=on", []),
        ("-qmp tcp::4444,server -serial tcp::4444,server", []),
        ("-qmp tcp::99999999999999,server", []),
        (f"{AGENT} -chardev socket,id=g,host=h,port=4444,server=on", []),
    ],
)
def test_listeners_that_a_caller_may_connect_to(
    arguments: str, expected: list[tuple[str, int]]
) -> None:
    options = parse_command_line(["qemu", *shlex.split(arguments)])
    guest_endpoints = find_endpoints(options, [X, PADDED], [T4, T6])
    assert [(one.role.value, one.listener.inode) for one in guest_endpoints.passable] == expected
    assert not guest_endpoints.endpoints
    if expected:
        assert not guest_endpoints.obstacles
        on_tcp = any(word in arguments for word in ("tcp", "telnet", "fd=12"))
        assert may_use_tcp(options, {12}) == on_tcp


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-chardev socket,id=m,fd=12,server=on -mon m,mode=control", True),
        ("-chardev socket,id=m,fd=12 -mon m", False),
        # The descriptor is not a TCP socket.
        ("-chardev socket,id=m,fd=13,server=on -mon m,mode=control", False),
        ("-chardev socket,id=m,fd=name,server=on -mon m", False),
        (f"-chardev socket,id=m,fd={'9' * 5000},server=on -mon m", False),
        ("-serial tcp::4444,server", False),
        ("-qmp tcp::4444", False),
        ("-qmp unix:/a,server", False),
    ],
)
def test_when_tcp_sockets_are_worth_a_look(arguments: str, expected: bool) -> None:
    options = parse_command_line(["qemu", *shlex.split(arguments)])
    assert may_use_tcp(options, {12}) == expected
    assert bool(find_endpoints(options, [X], [T4]).passable) == (expected or "fd=13" in arguments)


@pytest.mark.parametrize(
    ("address", "inode"),
    [
        (("127.0.0.1", 4444), 3),
        (("127.0.0.2", 4444), None),
        (("192.0.2.1", 4445), 4),
        (b"\0x", 5),
        (b"\0y".ljust(108, b"\0"), 6),
        (b"\0y", None),
        ("/a", 1),
        ("", None),
        (None, None),
    ],
)
def test_where_a_connection_ends(address: object, inode: int | None) -> None:
    text = "-qmp tcp::4444,server -qmp tcp::4445,server -qmp unix:x,abstract=on,server"
    text += " -qmp unix:y,abstract=on,tight=off,server -qmp unix:/a,server"
    options = parse_command_line(["qemu", *text.split()])
    endpoint = endpoint_of_peer(find_endpoints(options, [A, X, PADDED], [T4, T6]), address)
    assert (None if endpoint is None else endpoint.listener.inode) == inode


def test_hostile_names_are_made_printable() -> None:
    (obstacle,) = find("-qmp unix:/c\x1b[2J,server", A).obstacles
    assert obstacle.isprintable()


LIBVIRT_SOCKET = "/var/lib/libvirt/qemu/domain-3-web/monitor.sock"


@pytest.mark.parametrize(
    ("path", "listeners", "libvirt"),
    [
        (f"path={LIBVIRT_SOCKET}", [UnixListener(1, (LIBVIRT_SOCKET,))], True),
        ("fd=9", [UnixListener(1, (LIBVIRT_SOCKET,), frozenset({9}))], True),
        ("fd=9", [], True),
        ("fd=9", [A], False),
        ("path=/home/u/.config/libvirt/qemu/lib/domain-1-web/monitor.sock", [], True),
        ("path=/run/web/monitor.sock", [], False),
    ],
)
@pytest.mark.parametrize(
    "monitor",
    [
        "-mon chardev=charmonitor,id=monitor,mode=control",
        # libvirt 12.8 with QEMU 11.1
        """-object '{"qom-type":"monitor-qmp","id":"monitor","chardev":"charmonitor"}'""",
    ],
)
def test_libvirts_guests(
    path: str, listeners: list[UnixListener], libvirt: bool, monitor: str
) -> None:
    arguments = f"-chardev socket,id=charmonitor,{path},server=on,wait=off"
    guest_endpoints = find(f"{arguments} {monitor}", *listeners)
    assert guest_endpoints.libvirt is libvirt
    if libvirt:
        assert (guest_endpoints.endpoints, guest_endpoints.obstacles) == (
            (),
            ("libvirt holds the monitor; use virsh shutdown",),
        )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-qmp unix:/c,server", True),
        ("-monitor unix:/c,server=on,wait=off", True),
        ("-qmp unix:/a,server", False),
        ("-qmp unix:/c", False),
        ("-qmp unix:c,abstract=on,server", False),
        ("-qmp tcp:127.0.0.1:4444,server", False),
        (f"{AGENT} -chardev socket,id=g,path=/c,server=on", False),
        ("-monitor stdio", False),
        ("", False),
    ],
)
def test_a_monitor_that_is_still_to_come(arguments: str, expected: bool) -> None:
    assert find(arguments, A).expected is expected


def test_a_named_socket_has_to_be_the_guests_own() -> None:
    assert endpoint_at("/b", [A, B]).listener is B
    assert endpoint_at("/x/..//b", [A, B]).listener is B
    with pytest.raises(InvalidArgs):
        endpoint_at("/c", [A, B])
