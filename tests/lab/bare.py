"""A real QEMU without a guest system, whose disks take records at almost no cost.

Its one processor halts at the first instruction. The records are written through the block layer of
that QEMU itself, by `qemu-io` of its human monitor, on a socket pair that nobody else can find: to
the disk it is the write of a guest, and QEMU acknowledges it in the same way. A record costs 0.3 ms
of a processor (a Linux guest: 4 s to boot), so dozens of these run at a time on two cores.
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
"""Commands that are sent before their answers are read; more would fill the sockets' buffers."""
_HELD_S: Final = 1.0
_FIRMWARE_BYTES: Final = 65536
_RESET_VECTOR: Final = b"\xfa\xf4\xeb\xfd"
"""At 16 bytes below the end: cli; hlt; back to the hlt."""


@dataclass(frozen=True)
class Layout:
    """Where the records of a disk are: one after the other, once for each pass."""

    count: int
    """Of a pass."""
    passes: int = 2
    """In a qcow2 with clusters of 4 KiB, the first pass makes an L2 table for each record and the
    later ones leave them dirty in QEMU's memory."""
    stride: int = 32 * MIB

    def offsets(self) -> Iterator[tuple[int, int]]:
        """(offset, the byte that fills the record); the passes overwrite nothing."""
        for number in range(self.count * self.passes):
            turn, index = divmod(number, self.count)
            yield index * self.stride + turn * BLOCK, number * 7 % 255 + 1

    def kept(self, image: Path, format: str) -> int:
        """How many of them an image holds that nobody has open."""
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
    """A running one. `monitor` is a connection to a monitor of its own, mostly a socket pair."""

    def __init__(self, process: subprocess.Popen[bytes] | Orphan, monitor: socket.socket) -> None:
        self.process = process
        self.pid = process.pid
        self.pidfd = os.pidfd_open(process.pid)
        self._monitor = monitor
        self._stream = monitor.makefile("rwb")
        self._next()
        self._command("qmp_capabilities")

    def hmp(self, line: str) -> str:
        """A line for the human monitor; what it printed."""
        return str(self._command("human-monitor-command", **{"command-line": line}))

    def add(self, node: Mapping[str, object]) -> None:
        """A node of the block layer (blockdev-add), which the command line does not tell of."""
        self._command("blockdev-add", **node)

    def mirror(self, source: str, target: str) -> None:
        """Begin to copy one node to another."""
        arguments = {"device": source, "target": target, "job-id": "mirror", "sync": "full"}
        self._command("blockdev-mirror", **arguments)

    def write(self, drive: str, layout: Layout) -> int:
        """Write the records and return how many were acknowledged, which is all of them.

        AssertionError with what QEMU says where one is not.
        """
        lines = [f'qemu-io {drive} "write -q -P {b} {o} {BLOCK}"' for o, b in layout.offsets()]
        return self._all(lines)

    def write_later(self, drive: str, offset: int, count: int, length: int = BLOCK) -> None:
        """Hand over so many writes, side by side from `offset` on, and wait for none.

        A QEMU that is held by the first of them answers no more; nothing can be asked of it then.
        """
        for number in range(count):
            line = f'qemu-io {drive} "aio_write -q {offset + number * length} {length}"'
            self._send("human-monitor-command", {"command-line": line})
        for _ in range(count):
            if not select.select([self._monitor], [], [], _HELD_S)[0]:
                return
            self._answer()

    def flush(self, drive: str) -> None:
        self.hmp(f'qemu-io {drive} "flush"')

    def start_virtio(self, slot: int) -> None:
        """Do what a driver does to a transitional virtio device on PCI: set up its first queue, in
        memory that is all zero, and say that it is there. From then on a vhost backend runs."""
        ports = 0xC000 + slot * 0x100
        config = 0x80000000 | slot << 11
        for register, value in ((0x10, ports), (0x04, 0x5)):
            self.hmp(f"o/w 0xcf8 {config | register:#x}")
            self.hmp(f"o/w 0xcfc {value:#x}")
        for size, port, value in (("b", 18, 3), ("w", 4, 0), ("h", 14, 0), ("w", 8, 16 + slot * 8)):
            self.hmp(f"o/{size} {ports + port:#x} {value:#x}")
        self.hmp(f"o/b {ports + 18:#x} 0x7")

    def close_monitor(self) -> None:
        """As if its owner had gone: the human monitor is not there any more."""
        self._stream.close()
        self._monitor.close()

    @property
    def alive(self) -> bool:
        return not wait_gone(self.pidfd, 0)

    def signal(self, number: signal.Signals) -> None:
        """Raises ProcessLookupError where it is gone."""
        signal.pidfd_send_signal(self.pidfd, number)

    def close(self) -> None:
        """It is gone afterwards; nothing where it is already. Takes as long as what holds it in the
        kernel."""
        with contextlib.suppress(OSError):
            self.close_monitor()
        if not isinstance(self.process, Orphan):
            end(self.process)
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def call(self, command: str, **arguments: object) -> Any:
        """What QMP returns."""
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
    """For -bios: it halts the processor."""
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
    """A QEMU with these arguments (disks as `-drive …,if=none,id=…`), up at entry.

    `directory`: for its firmware and, without `stderr`, for what it says. `before`: called in the
    child before it executes QEMU. Its memory is shared, as vhost-user needs it. Afterwards it is
    gone.
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
