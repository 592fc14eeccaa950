"""Decide which sockets of a QEMU process lead to its monitor and to the guest agent. Pure.

The kernel reports on which sockets the process listens. The command line names the role of each
socket, but may be wrong. A socket without a clear role is not used.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import islice
from typing import Final

from qkilld.adapters.qemu_args import QemuOption, monitor_protocol
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import InvalidArgs
from qkilld.model.text import printable

AGENT_PORT: Final = "org.qemu.guest_agent.0"
LIBVIRT: Final = "libvirt holds the monitor; use virsh shutdown"
NO_MONITOR: Final = "the guest has no monitor"
NOT_PASSED: Final = "is reached over a connection that qkilld-stop or qkillctl passes"
_ADVICE: Final = "give the guest a unix socket: -qmp unix:PATH,server=on,wait=off"
_LIBVIRT_PATH: Final = re.compile(r"(?:^|/)libvirt/qemu/(?:.*/)?domain-[^/]*/monitor\.sock$")
_ADDRESS: Final = re.compile(r"[0-9.]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_FULL_NAME: Final = 107
"""The length of the longest abstract name or path in bytes: sun_path without one NUL, unix(7)."""
WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""The address to connect to if a socket listens on all addresses of the host."""
_NO_DEVICE: Final = frozenset({"null", "none"})
MAX_CLAIMS: Final = 1000
"""If more character devices than this have a role, the guest's monitor is not used, because
comparing each device with each socket would take too long."""


class Role(StrEnum):
    QMP = "qmp"
    HMP = "hmp"
    AGENT = "agent"
    OTHER = "other"
    """Any other role, such as a serial port or a vhost-user device."""


@dataclass(frozen=True, slots=True)
class UnixListener:
    inode: int
    """The socket's inode, as in /proc/PID/fd; not the inode of the socket's file."""
    paths: tuple[str, ...]
    """The path that the socket is bound to. There are several paths only if a hostile path contains
    line breaks. An abstract name begins with "@"."""
    descriptors: frozenset[int] = frozenset()
    in_use: bool = False
    """Whether a client is connected. If so, others must wait."""


@dataclass(frozen=True, slots=True)
class TcpListener:
    inode: int
    host: str
    """A numeric address, perhaps a wildcard."""
    port: int
    descriptors: frozenset[int] = frozenset()
    in_use: bool = False
    """Whether a client is connected. If so, others must wait."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A socket of the process with a known role."""

    role: Role
    listener: UnixListener | TcpListener

    @property
    def title(self) -> str:
        """Describe the socket for a message, such as `the monitor at /run/web/qmp`."""
        what = "agent" if self.role is Role.AGENT else "monitor"
        if isinstance(self.listener, TcpListener):
            return f"the {what} on {_place(self.listener.host, str(self.listener.port))}"
        return f"the {what} at {printable(next(iter(self.listener.paths), ''))}"


@dataclass(frozen=True, slots=True)
class GuestEndpoints:
    """The ways to reach a guest."""

    endpoints: tuple[Endpoint, ...] = ()
    """QMP first, then HMP, then the agent."""
    passable: tuple[Endpoint, ...] = ()
    """Monitors on TCP or an abstract socket, in the same order. Only a program in the guest's
    network namespace can connect to them, and pass the connection to the daemon."""
    obstacles: tuple[str, ...] = ()
    """Texts that say which monitors and agents cannot be used, and why. The plan shows them."""
    libvirt: bool = False
    expected: bool = False
    """The command line names a monitor socket on which the process does not listen. A QEMU that
    has just started may not listen yet."""
    agent_chardev: str = ""
    """The agent's label in query-chardev."""
    agent_device: str = ""
    """The id of the agent's port in VSERPORT_CHANGE events."""

    def with_role(self, role: Role) -> tuple[Endpoint, ...]:
        return tuple(endpoint for endpoint in self.endpoints if endpoint.role is role)


@dataclass(frozen=True, slots=True)
class _Claim:
    """A role that the command line gives to one character device."""

    role: Role
    chardev: Mapping[str, str]
    """The properties of the device. If the command line does not define the device, only its id."""


def may_use_tcp(options: Sequence[QemuOption], unclear: Collection[int]) -> bool:
    """Return whether a monitor may be on TCP. If so, TCP listeners must be read.

    `unclear`: the descriptors of the process's sockets that may be TCP listeners.
    """
    return any(
        claim.role in (Role.QMP, Role.HMP)
        and _serves_tcp(claim.chardev)
        and ("port" in claim.chardev or _descriptor(claim.chardev) in unclear)
        for claim in _claims(options)
    )


def find_endpoints(
    options: Sequence[QemuOption],
    listeners: Sequence[UnixListener],
    tcp_listeners: Sequence[TcpListener] = (),
) -> GuestEndpoints:
    """Find a guest's monitor and agent. `options`: from the command line and its -readconfig
    files."""
    claims = list(islice(_claims(options), MAX_CLAIMS + 1))
    if len(claims) > MAX_CLAIMS:
        return GuestEndpoints(
            obstacles=(f"the guest has more than {MAX_CLAIMS} character devices",)
        )
    if any(_is_libvirts(claim, listeners) for claim in claims):
        return GuestEndpoints(obstacles=(LIBVIRT,), libvirt=True)
    roles: dict[int, set[Role]] = {}
    obstacles = []
    expected = False
    for claim in claims:
        claimed: list[UnixListener | TcpListener] = [
            listener for listener in listeners if _is_on(claim.chardev, listener)
        ]
        claimed += [each for each in tcp_listeners if _is_on_tcp(claim.chardev, each)]
        for listener in claimed:
            roles.setdefault(listener.inode, set()).add(claim.role)
        if not claimed and claim.role is not Role.OTHER:
            obstacles += _obstacle(claim)
            expected = expected or (claim.role is not Role.AGENT and _is_to_listen(claim.chardev))
    endpoints, passable = [], []
    every: list[UnixListener | TcpListener] = [*listeners, *tcp_listeners]
    for listener in every:
        match list(roles.get(listener.inode, ())):
            case [role] if role is not Role.OTHER:
                endpoint = Endpoint(role, listener)
                if _has_path(listener):
                    endpoints.append(endpoint)
                elif role is Role.AGENT:
                    obstacles.append(f"{endpoint.title} cannot be reached by qkilld")
                else:
                    passable.append(endpoint)
    if not any(claim.role in (Role.QMP, Role.HMP) for claim in claims):
        obstacles.append(f"{NO_MONITOR}; {_ADVICE}")
    chardev, device = _agent(options)
    return GuestEndpoints(
        endpoints=_in_order(endpoints),
        passable=_in_order(passable),
        obstacles=tuple(dict.fromkeys(obstacles)),
        expected=expected,
        agent_chardev=chardev,
        agent_device=device,
    )


def endpoint_of_peer(guest_endpoints: GuestEndpoints, address: object) -> Endpoint | None:
    """Return the monitor to which a connection leads; None if it leads to no monitor.

    `address` is from getpeername(2); an IPv4 address must not be in its IPv6-mapped form.
    """
    for endpoint in (*guest_endpoints.endpoints, *guest_endpoints.passable):
        if endpoint.role is not Role.AGENT and _is_at(endpoint.listener, address):
            return endpoint
    return None


def abstract_address(path: str) -> bytes:
    """Return the address of an abstract socket, given its name in /proc/net/unix, which shows each
    NUL as an "@". With tight=off, QEMU fills the address with NULs."""
    name = path[1:]
    if len(name) == _FULL_NAME:
        name = name.rstrip("@").ljust(len(name), "\0")
    return b"\0" + os.fsencode(name)


def _in_order(endpoints: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
    return tuple(sorted(endpoints, key=lambda one: list(Role).index(one.role)))


def _has_path(listener: UnixListener | TcpListener) -> bool:
    return isinstance(listener, UnixListener) and any(
        not path.startswith("@") for path in listener.paths
    )


def _is_at(listener: UnixListener | TcpListener, address: object) -> bool:
    if isinstance(listener, UnixListener):
        if isinstance(address, str):
            return address in listener.paths
        return any(
            path.startswith("@") and abstract_address(path) == address for path in listener.paths
        )
    match address:
        case (str(host), int(port), *_):
            return port == listener.port and (listener.host in WILDCARDS or host == listener.host)
    return False


def endpoint_at(path: str, listeners: Sequence[UnixListener]) -> Endpoint:
    """Return the process's socket at `path`, which is the QMP monitor according to a caller.

    Raises InvalidArgs if the process does not listen there.
    """
    for listener in listeners:
        if any(posixpath.normpath(path) == posixpath.normpath(own) for own in listener.paths):
            return Endpoint(Role.QMP, listener)
    raise InvalidArgs("The socket given as qmp-socket is not one of the guest's")


def _claims(options: Sequence[QemuOption]) -> Iterator[_Claim]:
    chardevs = {
        option.flat["id"]: _chardev(option.flat)
        for option in options
        if option.name == "chardev" and "id" in option.flat
    }
    for option in options:
        flat = option.flat
        if option.name == "chardev" or not ("chardev" in flat or "backend" in flat):
            continue
        if "chardev" in flat:
            chardev = chardevs.get(flat["chardev"], {"id": flat["chardev"]})
        else:
            chardev = flat
        yield _Claim(_role(option), chardev)


def _role(option: QemuOption) -> Role:
    if protocol := monitor_protocol(option):
        return Role(protocol)
    if option.name == "device" and option.flat.get("name") == AGENT_PORT:
        return Role.AGENT
    return Role.OTHER


def _chardev(flat: Mapping[str, str]) -> Mapping[str, str]:
    """Flatten the JSON form of the option, which has the structure of the QMP command
    chardev-add."""
    place = "backend.data.addr.data."
    if "backend.type" not in flat:
        return flat
    values = {
        key.removeprefix(place): value for key, value in flat.items() if key.startswith(place)
    }
    values |= {"id": flat["id"], "backend": flat["backend.type"]}
    if "backend.data.server" in flat:
        values["server"] = flat["backend.data.server"]
    return values


def _is_on(chardev: Mapping[str, str], listener: UnixListener) -> bool:
    if "fd" in chardev:
        return _descriptor(chardev) in listener.descriptors
    name = chardev.get("path")
    if not name or chardev.get("backend") != "socket":
        return False
    if _is_on_off(chardev, "abstract"):
        return any(path[:1] == "@" and path[1:].rstrip("@") == name for path in listener.paths)
    return name in listener.paths


def _is_on_tcp(chardev: Mapping[str, str], listener: TcpListener) -> bool:
    if not _serves_tcp(chardev):
        return False
    if "fd" in chardev:
        return _descriptor(chardev) in listener.descriptors
    first, last = chardev.get("port", ""), chardev.get("to", "")
    if not (first.isdecimal() and len(first) < 6):
        return False
    end = int(last) if last.isdecimal() and len(last) < 6 else int(first)
    if not int(first) <= listener.port <= max(int(first), end):
        return False
    host = chardev.get("host", "")
    # If `host` is a name, accept any address, because only QEMU knows the address to which it has
    # resolved the name.
    return not _ADDRESS.fullmatch(host) or host == listener.host


def _serves_tcp(chardev: Mapping[str, str]) -> bool:
    """Return whether the character device may be a server on TCP without TLS or WebSocket."""
    if chardev.get("backend") != "socket" or not _is_on_off(chardev, "server"):
        return False
    return "tls-creds" not in chardev and not _is_on_off(chardev, "websocket")


def _descriptor(chardev: Mapping[str, str]) -> int | None:
    """Return the number of the descriptor that QEMU was given for the device, or None."""
    number = chardev.get("fd", "")
    return int(number) if number.isdecimal() and len(number) < 10 else None


def _is_to_listen(chardev: Mapping[str, str]) -> bool:
    """Return whether QEMU itself creates the device's unix socket at a path, and listens on it."""
    named = chardev.get("backend") == "socket" and "path" in chardev
    return named and _is_on_off(chardev, "server") and not _is_on_off(chardev, "abstract")


def _is_libvirts(claim: _Claim, listeners: Sequence[UnixListener]) -> bool:
    if claim.role is not Role.QMP:
        return False
    paths = [claim.chardev.get("path", "")]
    paths += [path for one in listeners if _is_on(claim.chardev, one) for path in one.paths]
    # If the descriptor that libvirt has passed is closed, only the id shows that this is libvirt's
    # monitor.
    unseen = "fd" in claim.chardev and len(paths) == 1
    return any(_LIBVIRT_PATH.search(path) for path in paths if len(path) <= _FULL_NAME) or (
        unseen and claim.chardev.get("id") == "charmonitor"
    )


def _obstacle(claim: _Claim) -> list[str]:
    """Return why the device has no usable socket; [] if it needs no socket (null, none)."""
    chardev = claim.chardev
    backend = chardev.get("backend", "")
    what = "agent" if claim.role is Role.AGENT else "monitor"
    advice = "" if claim.role is Role.AGENT else f"; {_ADVICE}"
    if backend in _NO_DEVICE:
        return []
    if backend != "socket":
        place = backend or f'a device called "{chardev.get("id", "")}"'
        return [printable(f"the {what} on {place} cannot be used by qkilld{advice}")]
    if "port" in chardev:
        place = _place(chardev.get("host", ""), chardev["port"])
        return [printable(f"the {what} on {place} cannot be reached by qkilld{advice}")]
    path = chardev.get("path", "")
    if _is_on_off(chardev, "abstract"):
        text = f'the {what} on the abstract socket "{path}" cannot be reached by qkilld{advice}'
        return [printable(text)]
    if not _is_on_off(chardev, "server"):
        holder = f"the program that listens at {path}" if path else "the program that started it"
        return [printable(f"{holder} holds the {what}")]
    return [printable(f"the guest does not listen at {path or 'the descriptor it was given'}")]


def _place(host: str, port: str) -> str:
    if not host:
        return f"port {port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_on_off(chardev: Mapping[str, str], key: str) -> bool:
    return chardev.get(key) in ("on", "yes", "true", "y")


def _agent(options: Sequence[QemuOption]) -> tuple[str, str]:
    for option in options:
        if _role(option) is Role.AGENT:
            return option.flat.get("chardev", ""), option.flat.get("id", "")
    return "", ""
