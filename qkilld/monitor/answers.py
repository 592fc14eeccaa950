"""Parse the monitor's replies. Pure. Replies are hostile: each may be false or malformed.

The functions that parse text know the output of the human monitor of QEMU 7.2 to 10.0. For any
other output, they raise MonitorProtocolError or skip the lines that they do not recognize.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from qkilld.model.block_state import YankInstance
from qkilld.model.dataclass import dataclass
from qkilld.model.errors import MonitorProtocolError
from qkilld.model.text import printable
from qkilld.monitor.endpoints import TcpListener, UnixListener

MAX_VCPUS: Final = 4096
_RUNSTATE: Final = re.compile(r"VM status: (running|paused)(?: \(([\w-]+)\))?")
_EVENT_REGISTERS: Final = re.compile(
    r"([0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, i/o\): acpi-evt$", re.MULTILINE
)
_PORT: Final = re.compile(r"portw\[0x([0-9a-f]{4})\] = 0x([0-9a-f]{4})")
_THREAD: Final = re.compile(r"thread_id=([0-9]{1,10})")
_REQUESTS: Final = ("rd", "wr", "flush", "unmap")
_COUNTERS: Final = tuple(f"{name}_operations" for name in _REQUESTS)
_TIMES: Final = tuple(f"{name}_total_time_ns" for name in _REQUESTS)
_STATISTIC: Final = re.compile(r"\b(\w+)=([0-9]{1,20})\b")


@dataclass(frozen=True, slots=True)
class BlockTotals:
    """Totals over all disks."""

    requests: int
    time: int
    """The total time of all requests, µs."""
    idle: int | None
    """µs since the last request to any disk; None if unknown, or if there was no request yet."""


@dataclass(frozen=True, slots=True)
class AgentPort:
    """The host's side of the agent's virtio-serial port."""

    opened: bool
    """Whether a program in the guest, normally its agent, has the port open."""
    held: bool
    """Whether a client on the host is connected, in which case no other client can connect."""


def read_runstate(answer: object) -> str:
    """Parse query-status."""
    match answer:
        case {"status": str(status)}:
            return printable(status, 32)
    raise _unreadable("query-status")


def read_runstate_text(text: str) -> str:
    """Parse the output of `info status`: "running" or "paused" and, in parentheses, any other run
    state."""
    if (match := _RUNSTATE.match(text)) is None:
        raise _unreadable("info status")
    return match[2] or match[1]


def find_event_registers(tree: str) -> int | None:
    """Return the I/O port of the register PM1_STS in `info mtree`. The port of PM1_EN is 2 higher.

    Return None if the machine has no such register. Return 0 if the firmware has not mapped it yet.
    Until then, the guest's operating system cannot listen to the power button.
    """
    registers = [
        int(match[1], 16) for line in tree.splitlines() if (match := _EVENT_REGISTERS.search(line))
    ]
    if not registers:
        return None
    port = max(registers)
    if port > 0xFFFC:
        raise _unreadable("info mtree")
    # A low port means that the firmware has not mapped the register yet: `info mtree` then shows
    # only the register's offset in its memory region.
    return port if port >= 0x100 else 0


def read_port(text: str, port: int) -> int:
    """Parse i/2xh PORT."""
    match = _PORT.match(text)
    if match is None or int(match[1], 16) != port:
        raise _unreadable("an I/O port")
    return int(match[2], 16)


def read_block_totals(answer: object) -> BlockTotals:
    """Parse query-blockstats."""
    if not isinstance(answer, list):
        raise _unreadable("query-blockstats")
    disks = []
    for disk in answer:
        match disk:
            case {"stats": dict(stats)}:
                disks.append({key: n for key, n in stats.items() if _is_counter(n)})
            case _:
                raise _unreadable("query-blockstats")
    return _totals(disks)


def read_block_totals_text(text: str) -> BlockTotals:
    """Parse `info blockstats`."""
    lines = [line for line in text.splitlines() if "rd_operations=" in line]
    return _totals({key: int(n) for key, n in _STATISTIC.findall(line)} for line in lines)


def read_vcpu_threads(answer: object) -> tuple[int, ...]:
    """Return the thread ids in query-cpus-fast, which are those of QEMU's own PID namespace."""
    if not isinstance(answer, list) or len(answer) > MAX_VCPUS:
        raise _unreadable("query-cpus-fast")
    threads = []
    for vcpu in answer:
        match vcpu:
            case {"thread-id": int(number)} if number > 0:
                threads.append(number)
            case _:
                raise _unreadable("query-cpus-fast")
    return tuple(threads)


def read_vcpu_threads_text(text: str) -> tuple[int, ...]:
    """Return the thread ids in `info cpus`."""
    return tuple(int(number) for number in _THREAD.findall(text)[:MAX_VCPUS])


def read_agent_port(answer: object, label: str) -> AgentPort | None:
    """Find the agent's character device (`label`) in query-chardev; None if it is not there."""
    if not isinstance(answer, list):
        raise _unreadable("query-chardev")
    for chardev in answer:
        match chardev:
            case {"label": str(name), "frontend-open": bool(opened), "filename": str(filename)}:
                if name == label:
                    return AgentPort(opened, not filename.startswith("disconnected:"))
    return None


def chardev_places(listener: UnixListener | TcpListener, own: object) -> tuple[str, ...]:
    """Return the names by which query-chardev may show a listener. `own` is the address of our end
    of the connection, which query-chardev shows for a connected TCP device."""
    if isinstance(listener, UnixListener):
        # QEMU shows no name for a connected abstract socket (measured, 7.2).
        names = ["" if path.startswith("@") else path for path in listener.paths]
        return tuple(f"unix:{name}" for name in names)
    match own:
        case (str(host), int(port), *_):
            return (f"{host}:{port}", f"[{host}]:{port}", f"[::ffff:{host}]:{port}")
    return ()


def read_chardevs_at(answer: object, places: Iterable[str]) -> frozenset[str]:
    """Return the labels of devices in query-chardev that listen at one of these places, or are
    connected there."""
    if not isinstance(answer, list):
        raise _unreadable("query-chardev")
    wanted = frozenset(places)
    labels = set()
    for chardev in answer:
        match chardev:
            case {"label": str(name), "filename": str(filename)}:
                place = filename.removeprefix("disconnected:").partition(",")[0]
                peer = filename.rpartition(" <-> ")[2]
                if not wanted.isdisjoint((place, peer)):
                    labels.add(name)
    return frozenset(labels)


def read_yank_instances(answer: object) -> tuple[YankInstance, ...]:
    """Parse query-yank."""
    if not isinstance(answer, list):
        raise _unreadable("query-yank")
    instances = []
    for instance in answer:
        match instance:
            case {"type": str(kind)}:
                name = instance.get("node-name", instance.get("id", ""))
                instances.append(YankInstance(printable(kind), printable(str(name)), instance))
            case _:
                raise _unreadable("query-yank")
    return tuple(instances)


def says_powered_off(message: Mapping[str, object]) -> bool:
    """Return whether a message reports that the guest powered off, or restarted with -no-reboot.

    A panic does not count. Never raises.
    """
    match message:
        case {"event": "SHUTDOWN", "data": {"guest": True, **data}}:
            return data.get("reason") != "guest-panic"
    return False


def _totals(disks: Iterable[Mapping[str, int]]) -> BlockTotals:
    requests, time, idle, is_complete = 0, 0, [], True
    for disk in disks:
        own = sum(disk.get(key, 0) for key in _COUNTERS)
        requests += own
        time += sum(disk.get(key, 0) for key in _TIMES) // 1000
        if "idle_time_ns" in disk and own:
            idle.append(disk["idle_time_ns"] // 1000)
        elif own:
            is_complete = False
    return BlockTotals(requests, time, min(idle, default=None) if is_complete else None)


def _is_counter(value: object) -> bool:
    """Return whether the value is an integer from 0 to 2**64 - 1. JSON allows integers that are too
    large to be converted to a float later."""
    return type(value) is int and 0 <= value < 1 << 64


def _unreadable(what: str) -> MonitorProtocolError:
    return MonitorProtocolError(f"The reply to {what} does not have QEMU's format")
