"""A file system in user space in which every kind of call can be slow, hang or fail.

    fuse_store    mount the files of a directory, and control the server

    python -m tests.lab.fuse DIRECTORY MOUNTPOINT

This command is the server. It implements the kernel's protocol on /dev/fuse itself (fuse(4),
linux/fuse.h), so that the lab decides when each call is answered. It reads commands from its
standard input, one on each line:

    delay CALL SECONDS    answer this kind of call late ("inf": never); one of _CALLS, or "all"
    fail ERRNO            answer write, fsync and flush with this error; 0 for none
    upload PORT BYTES     fsync sends so many bytes to a TCP server on this port before the answer

The first two apply to pending calls, too. At the end of its input, the server answers all calls and
exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.process import TOP, end, spawn
from tests.lab.scratch import scratch

_CALLS: Final = {
    1: "lookup",
    3: "getattr",
    4: "setattr",
    14: "open",
    15: "read",
    16: "write",
    17: "statfs",
    18: "release",
    20: "fsync",
    25: "flush",
    26: "init",
    27: "opendir",
    29: "releasedir",
}
"""Calls by their number in the protocol. The kernel needs no other calls."""
_UNANSWERED: Final = frozenset({2, 36, 42})
"""FORGET, INTERRUPT and BATCH_FORGET, which have no reply."""
_IN: Final = struct.Struct("<IIQQIIII")
_OUT: Final = struct.Struct("<IiQ")
_MAX_WRITE: Final = 128 << 10
_ROOT: Final = 1
_SET_SIZE: Final = 1 << 3
_BIG_WRITES: Final = 1 << 5
_WRITING: Final = frozenset({"write", "fsync", "flush"})

_libc: Final = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH: Final = 2


@dataclass
class FuseStore:
    """A mounted file system and its server."""

    directory: Path
    """The mount point."""
    process: subprocess.Popen[bytes]

    def delay(self, call: str, seconds: float) -> None:
        """Delay calls of this kind, including pending ones; 0 answers them at once."""
        self._say(f"delay {call} {seconds}")

    def hang(self, call: str = "all") -> None:
        """Leave calls of this kind unanswered until delay(). The server continues to run."""
        self._say(f"delay {call} inf")

    def fail(self, error: int = errno.EIO) -> None:
        """Fail writes with this error; 0 for none."""
        self._say(f"fail {error}")

    def upload(self, port: int, size: int) -> None:
        """Let each fsync upload so many bytes to a TCP server, to which the file system connects
        now. Other calls wait meanwhile."""
        self._say(f"upload {port} {size}")

    def fast(self) -> None:
        self._say("fail 0")
        self._say("delay all 0")

    def freeze(self) -> None:
        """Stop the server with SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def leave(self) -> None:
        """Kill the server. From now on, all calls fail with ENOTCONN."""
        self.process.kill()
        self.process.wait()

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()


@contextlib.contextmanager
def fuse_store(files: Path) -> Iterator[FuseStore]:
    """Within the context, mount the files of a directory at another place.

    At the end, all calls are answered, and the mount is removed. Raises needs.Missing without root
    or FUSE.
    """
    needs.root("to mount a file system")
    if not Path("/dev/fuse").exists():
        raise needs.Missing(
            "there is no /dev/fuse: the kernel has no FUSE, or a container hides it"
        )
    with scratch("f") as directory:
        process = spawn(
            [sys.executable, "-m", "tests.lab.fuse", str(files), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=TOP,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            if process.stdout.readline() != b"mounted\n":
                raise needs.Missing("failed to mount a FUSE file system; see the messages above")
            yield FuseStore(directory, process)
        finally:
            process.send_signal(signal.SIGCONT)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            _libc.umount2(os.fsencode(directory), _MNT_DETACH)
            end(process)


class _Server:
    def __init__(self, files: Path, mountpoint: Path) -> None:
        self._fuse = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._fuse},rootmode=40000,user_id=0,group_id=0,allow_other"
        if _libc.mount(b"lab", os.fsencode(mountpoint), b"fuse.lab", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount", str(mountpoint))
        self._mountpoint = mountpoint
        self._files = {
            number: os.open(path, os.O_RDWR)
            for number, path in enumerate(sorted(files.iterdir()), _ROOT + 1)
        }
        names = [os.fsencode(path.name) for path in sorted(files.iterdir())]
        self._numbers = {name: number for number, name in enumerate(names, _ROOT + 1)}
        self._delays: dict[str, float] = {}
        self._error = 0
        self._upload: tuple[socket.socket, int] | None = None
        self._waiting: list[tuple[float, bytes]] = []

    def serve(self) -> None:
        sources, rest = [0, self._fuse], b""
        while True:
            now = time.monotonic()
            ready, _, _ = select.select(sources, [], [], self._answer_due(now))
            if 0 in ready:
                data = os.read(0, 4096)
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._obey(line.decode().split())
                if not data:
                    self._end()
                    return
            if self._fuse in ready:
                try:
                    request = os.read(self._fuse, _MAX_WRITE + 4096)
                except OSError as error:
                    if error.errno == errno.ENODEV:  # Somebody unmounted it.
                        return
                    continue  # The caller was killed.
                self._take(request)

    def _end(self) -> None:
        """Answer all calls and detach the mount, even if files are open."""
        self._delays, self._error = {}, 0
        self._answer_due(time.monotonic())
        _libc.umount2(os.fsencode(self._mountpoint), _MNT_DETACH)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            if select.select([self._fuse], [], [], 0.2)[0]:
                try:
                    self._take(os.read(self._fuse, _MAX_WRITE + 4096))
                except OSError:
                    return
                self._answer_due(time.monotonic())

    def _obey(self, words: list[str]) -> None:
        match words:
            case ["delay", call, seconds]:
                for name in _CALLS.values() if call == "all" else (call,):
                    self._delays[name] = float(seconds)
            case ["fail", number]:
                self._error = int(number)
            case ["upload", port, size]:
                self._upload = socket.create_connection(("127.0.0.1", int(port))), int(size)
                self._upload[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)

    def _take(self, request: bytes) -> None:
        if _IN.unpack_from(request)[1] not in _UNANSWERED:
            self._waiting.append((time.monotonic(), request))

    def _answer_due(self, now: float) -> float | None:
        """Answer the calls that are due. Return the seconds until the next call is due."""
        soonest, remaining = None, []
        for since, request in self._waiting:
            due = since + self._delays.get(_CALLS.get(_IN.unpack_from(request)[1], ""), 0)
            if due <= now:
                self._answer(request)
                continue
            remaining.append((since, request))
            if due != float("inf"):
                soonest = min(due - now, soonest if soonest is not None else due - now)
        self._waiting = remaining
        return soonest

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        call = _CALLS.get(opcode, "")
        try:
            if self._error and call in _WRITING:
                raise OSError(self._error, call)
            body, code = self._do(call, node, memoryview(request)[_IN.size :]), 0
        except OSError as error:
            body, code = b"", -(error.errno or errno.EIO)
        with contextlib.suppress(OSError):  # The caller was killed.
            os.write(self._fuse, _OUT.pack(_OUT.size + len(body), code, unique) + body)

    def _do(self, call: str, node: int, body: memoryview) -> bytes:
        match call:
            case "init":
                flags = struct.unpack_from("<IIII", body)[3] & _BIG_WRITES
                return struct.pack(
                    "<IIIIHHIIHH32x", 7, 31, _MAX_WRITE, flags, 16, 12, _MAX_WRITE, 1, 0, 0
                )
            case "lookup":
                number = self._numbers.get(bytes(body).rstrip(b"\0"))
                if number is None:
                    raise FileNotFoundError(errno.ENOENT, "lookup")
                return struct.pack("<QQQQII", number, 0, 1, 1, 0, 0) + self._attributes(number)
            case "getattr":
                return struct.pack("<QII", 1, 0, 0) + self._attributes(node)
            case "setattr":
                valid, _, _, size = struct.unpack_from("<IIQQ", body)
                if valid & _SET_SIZE:
                    os.ftruncate(self._files[node], size)
                return struct.pack("<QII", 1, 0, 0) + self._attributes(node)
            case "open" | "opendir":
                return struct.pack("<QII", node, 0, 0)
            case "read":
                _, offset, size = struct.unpack_from("<QQI", body)
                return os.pread(self._files[node], size, offset)
            case "write":
                _, offset, size = struct.unpack_from("<QQI", body)
                data = body[40 : 40 + size]
                return struct.pack("<II", os.pwrite(self._files[node], data, offset), 0)
            case "statfs":
                return struct.pack(
                    "<QQQQQIIII24x", 1 << 30, 1 << 29, 1 << 29, 9, 9, 4096, 255, 0, 0
                )
            case "fsync":
                if self._upload is not None:
                    connection, size = self._upload
                    connection.sendall(bytes(size))
                os.fsync(self._files[node])
                return b""
            case "release" | "releasedir" | "flush":
                return b""
        raise OSError(errno.ENOSYS, call)

    def _attributes(self, node: int) -> bytes:
        size, mode = (0, stat.S_IFDIR | 0o755)
        if node != _ROOT:
            size, mode = os.fstat(self._files[node]).st_size, stat.S_IFREG | 0o644
        times = (0,) * 6
        return struct.pack("<6Q10I", node, size, -(-size // 512), *times, mode, 1, 0, 0, 0, 4096, 0)


if __name__ == "__main__":
    server = _Server(Path(sys.argv[1]), Path(sys.argv[2]))
    print("mounted", flush=True)
    server.serve()
