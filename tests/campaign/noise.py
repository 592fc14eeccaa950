"""Noise: what a run has besides its storage, such as a busy neighbour or a quota. It is neither
progress nor a hang.

Each noise gets the run's Surroundings before QEMU starts, and may add arguments. It returns a
function that is called with the running QEMU.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.bare import MIB, BareGuest
from tests.lab.groups import temporary_group
from tests.lab.guest import QEMU
from tests.lab.nbd import NbdClient, free_port
from tests.lab.process import end, run, spawn

_CLONE_NEWNET: Final = 0x40000000
_libc: Final = ctypes.CDLL(None, use_errno=True)

Start = Callable[[BareGuest], None]
_BUSY: Final = """
while :; do dd if=/dev/zero of="$1" bs=64K count=16 conv=notrunc,fdatasync status=none; sleep 0.2
done"""


@dataclass
class Surroundings:
    directory: Path
    """The directory of the run."""
    image_directory: Path
    """The directory of the first image."""
    stack: contextlib.ExitStack
    arguments: list[str] = field(default_factory=list)
    """More arguments for QEMU."""
    before: Callable[[], None] | None = None
    """Called in the child before it executes QEMU."""


def _nothing(guest: BareGuest) -> None:
    pass


def netdev(around: Surroundings) -> Start:
    """A network peer (like passt) that sends a frame four times a second."""
    path = around.directory / "net"
    frame = struct.pack(">I", 60) + b"\xff" * 60
    _talker(around, path, frame, 0.25)
    around.arguments += ["-netdev", f"stream,id=n0,addr.type=unix,addr.path={path},server=off"]
    around.arguments += ["-device", "virtio-net-pci,netdev=n0,addr=1e,romfile="]
    return _nothing


def console(around: Surroundings) -> Start:
    """A serial console whose user types."""
    path = around.directory / "console"
    _talker(around, path, b"x", 0.5)
    around.arguments += ["-chardev", f"socket,id=con,path={path}", "-serial", "chardev:con"]
    return _nothing


def timers(around: Surroundings) -> Start:
    """A character device that tries to reconnect every second."""
    path = around.directory / "nobody"
    # QEMU 9.2 has introduced reconnect-ms, and a later version has removed reconnect.
    version = run([needs.program(QEMU, "qemu-system-x86"), "--version"], check=True).stdout
    is_new = [int(number) for number in re.findall(r"\d+", version)[:2]] >= [9, 2]
    reconnect = "reconnect-ms=1000" if is_new else "reconnect=1"
    around.arguments += ["-chardev", f"socket,id=timer,path={path},{reconnect}"]
    return _nothing


def vnc(around: Surroundings) -> Start:
    """A viewer that is connected and idle."""
    path = around.directory / "vnc"
    around.arguments += ["-vnc", f"unix:{path}"]

    def start(guest: BareGuest) -> None:
        viewer = around.stack.enter_context(socket.socket(socket.AF_UNIX))
        viewer.connect(str(path))

    return start


def threads(around: Surroundings) -> Start:
    """QEMU has so many threads that reading them is expensive."""
    for number in range(150):
        around.arguments += ["-object", f"iothread,id=io{number}"]
    return _nothing


def neighbour(around: Surroundings) -> Start:
    """Another process writes to the file system of the first image."""

    def start(guest: BareGuest) -> None:
        busy = around.image_directory.parent / f"busy{os.getpid()}"
        around.stack.callback(busy.unlink, missing_ok=True)
        around.stack.callback(end, spawn(["sh", "-c", _BUSY, "sh", busy]))

    return start


def group(around: Surroundings) -> Start:
    """QEMU has its own control group, and another process in this group writes."""

    def start(guest: BareGuest) -> None:
        busy = around.directory / "busy"
        writer = spawn(["sh", "-c", _BUSY, "sh", busy])
        around.stack.callback(end, writer)
        for parent in parents("memory", "blkio"):
            made = around.stack.enter_context(temporary_group(parent))
            for pid in (guest.pid, writer.pid):
                (made / "cgroup.procs").write_text(str(pid))

    return start


def quota(around: Surroundings) -> Start:
    """QEMU may use only a twentieth of a processor."""

    def start(guest: BareGuest) -> None:
        for parent in parents("cpu"):
            made = around.stack.enter_context(temporary_group(parent))
            if (made / "cpu.max").exists():
                (made / "cpu.max").write_text("5000 100000")
            else:
                (made / "cpu.cfs_quota_us").write_text("5000")
            (made / "cgroup.procs").write_text(str(guest.pid))

    return start


def netns(around: Surroundings) -> Start:
    """QEMU has its own network namespace. Use this only with storage on unix sockets and files."""
    around.before = unshare_network
    return _nothing


def unshare_network() -> None:
    """Enter a new network namespace. Call this in a child, before it executes a program."""
    if _libc.unshare(_CLONE_NEWNET):
        os._exit(1)


def export(around: Surroundings) -> Start:
    """QEMU exports a disk over NBD, as for a backup, and the export's client is busy."""
    around.arguments += ["-object", "iothread,id=exports"]

    def start(guest: BareGuest) -> None:
        port = free_port()
        address = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}
        copied = around.directory / "copied"
        copied.touch()
        os.truncate(copied, 64 * MIB)
        guest.add({"driver": "file", "node-name": "copied", "filename": str(copied)})
        guest.call("nbd-server-start", addr=address)
        shown = {"type": "nbd", "id": "e", "node-name": "copied", "writable": True}
        guest.call("block-export-add", **shown, iothread="exports", **{"fixed-iothread": True})
        client = NbdClient(("127.0.0.1", port), "copied")
        offsets = itertools.cycle(range(0, 64 * MIB, 65536))
        _repeat(around, lambda: client.write(next(offsets), b"x" * 65536), 0.25, client.close)

    return start


def no_monitor(around: Surroundings) -> Start:
    """The monitor of QEMU has no client."""
    return _nothing


NOISES: Final[Mapping[str, Callable[[Surroundings], Start]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(netdev, console, timers, vnc, threads, neighbour, group, quota, netns, no_monitor),
        export,
    )
}


def _repeat(
    around: Surroundings, call: Callable[[], None], interval: float, stop: Callable[[], None]
) -> None:
    """Call a function periodically, until it raises OSError or the run is over. `stop` must make a
    pending call raise."""
    over = threading.Event()

    def repeat() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(interval):
                call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()

    def end_thread() -> None:
        over.set()
        stop()
        thread.join(5)

    around.stack.callback(end_thread)


def _talker(around: Surroundings, path: Path, what: bytes, interval: float) -> None:
    """Listen at the path, and send the data periodically to the peer that connects."""
    listener = around.stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(path))
    listener.listen()
    over = threading.Event()

    def talk() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.setblocking(False)
                while not over.wait(interval):
                    with contextlib.suppress(BlockingIOError):
                        connection.send(what)

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()

    def stop() -> None:
        over.set()
        # The thread may still be in accept().
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)

    around.stack.callback(stop)


def parents(*controllers: str) -> Iterator[Path]:
    """Yield the roots of the v1 hierarchies of these controllers, or the root of v2."""
    found, unified = set(), None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = (part.split() for part in line.split(" - ", 1))
        if after[0] == "cgroup" and set(controllers) & set(after[-1].split(",")):
            found.add(Path(before[4]))
        elif after[0] == "cgroup2":
            unified = Path(before[4])
    if found:
        yield from sorted(found)
    elif unified:
        yield unified
