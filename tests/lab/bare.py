"""A real QEMU without a guest system. Writing records to its disks takes almost no processor time.

Its one processor halts at the first instruction. The command `qemu-io` of the human monitor writes
the records through QEMU's own block layer. So a disk gets the same writes as from a guest, and QEMU
acknowledges them in the same way. The monitor is on a socket pair, which no other program can find.
A record takes 0.3 ms of a processor, and there is nothing to boot (a Linux guest takes 4 s), so
dozens of these guests run at a time on two cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.lab import needs
from tests.lab.guest import QEMU
from tests.lab.process import Orphan, end, run, spawn, wait_gone
from tests.lab.scratch import scratch

BLOCK: Final = 4096
MIB: Final = 1 << 20
_WINDOW: Final = 64
"""How many commands are sent before their replies are read. More would fill the buffers of the
sockets."""
_HELD_S: Final = 1.0
_FIRMWARE_BYTES: Final = 65536
_RESET_VECTOR: Final = b"\xfa\xf4\xeb\xfd"
"""The code 16 bytes before the end of the firmware: cli; hlt; jump to the hlt."""


@dataclass(frozen=True)
class Layout:
    """The places of the records on a disk. Each pass has `count` records, `stride` bytes apart."""

    count: int
    """The number of records in one pass."""
    passes: int = 2
    """In a qcow2 with clusters of 4 KiB, the first pass makes an L2 table for each record. The
    later passes leave these tables dirty in QEMU's memory."""
    stride: int = 32 * MIB

    def offsets(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, the byte that fills the record). No pass overwrites another one."""
        for number in range(self.count * self.passes):
            turn, index = divmod(number, self.count)
            yield index * self.stride + turn * BLOCK, number * 7 % 255 + 1

    def kept(self, image: Path, format: str) -> int:
        """Return how many records an image contains. No process may have the image open."""
        with contextlib.ExitStack() as stack:
            raw = image
            if format != "raw":
                raw = stack.enter_context(scratch("r")) / "raw"
                argv = [str(needs.program("qemu-img", "qemu-utils")), "convert", "-O", "raw"]
                run([*argv, "-f", format, image, raw], check=True, timeout=600)
            file = stack.enter_context(raw.open("rb"))
            return sum(
                os.pread(file.fileno(), BLOCK, offset) == bytes([byte]) * BLOCK
                for offset, byte in self.offsets()
            )


class BareGuest:
    """A running guest. `monitor` is a connection to its QMP monitor, usually a socket pair."""

    def __init__(self, process: subprocess.Popen[bytes] | Orphan, monitor: socket.socket) -> None:
        self.process = process
        self.pid = process.pid
        self.pidfd = os.pidfd_open(process.pid)
        self._monitor = monitor
        self._stream = monitor.makefile("rwb")
        self._next()
        self._command("qmp_capabilities")

    def hmp(self, line: str) -> str:
        """Run a line in the human monitor, and return its output."""
        return str(self._command("human-monitor-command", **{"command-line": line}))

    def add(self, node: Mapping[str, object]) -> None:
        """Add a node to the block layer with blockdev-add, so that no command line names it."""
        self._command("blockdev-add", **node)

    def mirror(self, source: str, target: str) -> None:
        """Begin to copy one node to another."""
        arguments = {"device": source, "target": target, "job-id": "mirror", "sync": "full"}
        self._command("blockdev-mirror", **arguments)

    def write(self, drive: str, layout: Layout) -> int:
        """Write the records, wait until all are acknowledged, and return their number.

        Raises AssertionError with QEMU's message if one fails.
        """
        lines = [f'qemu-io {drive} "write -q -P {b} {o} {BLOCK}"' for o, b in layout.offsets()]
        return self._all(lines)

    def write_later(self, drive: str, offset: int, count: int, length: int = BLOCK) -> None:
        """Start `count` writes at consecutive offsets, without waiting for them.

        If the first write blocks QEMU's main loop, QEMU answers no further command.
        """
        for number in range(count):
            line = f'qemu-io {drive} "aio_write -q {offset + number * length} {length}"'
            self._send("human-monitor-command", {"command-line": line})
        for _ in range(count):
            if not select.select([self._monitor], [], [], _HELD_S)[0]:
                return
            self._answer()

    def flush_later(self, drive: str) -> None:
        """Start a flush, without waiting for it. The flush blocks QEMU's main loop, so QEMU handles
        no signal meanwhile."""
        self._send("human-monitor-command", {"command-line": f'qemu-io {drive} "flush"'})

    def begin_hmp(self, line: str) -> None:
        """Run a line in the human monitor, without waiting for it."""
        self._send("human-monitor-command", {"command-line": line})

    def flush(self, drive: str) -> None:
        self.hmp(f'qemu-io {drive} "flush"')

    def start_virtio(self, slot: int) -> None:
        """Start a transitional virtio device on PCI as a driver does: set up its first queue, in
        memory that is all zero, and set DRIVER_OK. This starts a vhost backend."""
        ports = 0xC000 + slot * 0x100
        config = 0x80000000 | slot << 11
        for register, value in ((0x10, ports), (0x04, 0x5)):
            self.hmp(f"o/w 0xcf8 {config | register:#x}")
            self.hmp(f"o/w 0xcfc {value:#x}")
        for size, port, value in (("b", 18, 3), ("w", 4, 0), ("h", 14, 0), ("w", 8, 16 + slot * 8)):
            self.hmp(f"o/{size} {ports + port:#x} {value:#x}")
        self.hmp(f"o/b {ports + 18:#x} 0x7")

    def close_monitor(self) -> None:
        """Close the monitor, as if its owner had exited."""
        self._stream.close()
        self._monitor.close()

    @property
    def alive(self) -> bool:
        return not wait_gone(self.pidfd, 0)

    def signal(self, number: signal.Signals) -> None:
        """Raises ProcessLookupError if the process is gone."""
        signal.pidfd_send_signal(self.pidfd, number)

    def close(self) -> None:
        """Kill the process, and wait until it is gone, without a timeout. May be called again."""
        with contextlib.suppress(OSError):
            self.close_monitor()
        if not isinstance(self.process, Orphan):
            end(self.process)
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def call(self, command: str, **arguments: object) -> Any:
        """Run a QMP command, and return its result."""
        return self._command(command, **arguments)

    def _all(self, lines: Sequence[str]) -> int:
        sent = 0
        for answered in range(len(lines)):
            while sent < len(lines) and sent < answered + _WINDOW:
                self._send("human-monitor-command", {"command-line": lines[sent]})
                sent += 1
            printed = self._answer()
            assert not printed, f"{lines[answered]}: {printed}"
        return sent

    def _command(self, command: str, **arguments: object) -> Any:
        self._send(command, arguments)
        return self._answer()

    def _send(self, command: str, arguments: Mapping[str, object]) -> None:
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}).encode())
        self._stream.write(b"\n")
        self._stream.flush()

    def _answer(self) -> Any:
        while True:
            answer = self._next()
            if "event" not in answer:
                assert "return" in answer, f"QEMU refuses: {answer}"
                return answer["return"]

    def _next(self) -> Any:
        line = self._stream.readline()
        assert line, "QEMU closed its monitor"
        return json.loads(line)


def halting_firmware(directory: Path) -> Path:
    """Write a firmware for -bios that halts the processor; return its path."""
    firmware = directory / "halt.bin"
    firmware.write_bytes(_RESET_VECTOR.rjust(_FIRMWARE_BYTES - 12, b"\xf4").ljust(_FIRMWARE_BYTES))
    return firmware


@contextlib.contextmanager
def bare_guest(
    directory: Path,
    arguments: Sequence[str] = (),
    *,
    name: str = "bare",
    pass_fds: Sequence[int] = (),
    stderr: int | None = None,
    before: Callable[[], None] | None = None,
) -> Iterator[BareGuest]:
    """Run a QEMU with these arguments (disks as `-drive …,if=none,id=…`) inside the context.

    `directory` is for the firmware and, without `stderr`, for QEMU's messages. `before` is called
    in the child before it executes QEMU. The guest's memory is shared, because vhost-user needs
    shared memory.
    """
    program = str(needs.program(QEMU, "qemu-system-x86").resolve())
    firmware = halting_firmware(directory)
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    with contextlib.ExitStack() as stack:
        stack.callback(ours.close)
        argv = [program, "-name", f"guest={name}", "-nodefaults", "-no-user-config"]
        argv += ["-display", "none", "-M", "pc,memory-backend=ram", "-accel", "tcg,tb-size=1"]
        argv += ["-object", "memory-backend-memfd,id=ram,size=16M,share=on", "-m", "16"]
        argv += ["-bios", str(firmware)]
        argv += ["-chardev", f"socket,fd={theirs.fileno()},id=monitor"]
        argv += ["-mon", "chardev=monitor,mode=control", *arguments]
        with theirs, (directory / "stderr").open("wb") as said:
            process = spawn(
                argv,
                stdout=said,
                stderr=said if stderr is None else stderr,
                pass_fds=[theirs.fileno(), *pass_fds],
                before=before,
            )
        stack.callback(end, process)
        try:
            guest = BareGuest(process, ours)
        except (AssertionError, OSError):
            end(process)
            raise AssertionError(f"QEMU: {(directory / 'stderr').read_text()}") from None
        stack.callback(guest.close)
        yield guest
