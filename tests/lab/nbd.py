"""NBD servers of several programs that can be frozen, killed and started again.

nbd_store runs nbdkit, qemu-nbd or qemu-storage-daemon on a unix socket or TCP, or nbdkit on a
socket pair.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.lab import needs
from tests.lab.process import end, spawn
from tests.lab.scratch import scratch

MAKES: Final = {
    "nbdkit": "nbdkit",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-utils",
}
"""The server programs, and the Debian packages that contain them."""
_UNLIMITED: Final = "100G"


@dataclass
class NbdStore:
    """A server for one file."""

    file: Path
    make: str
    transport: str
    directory: Path
    port: int = 0
    pair: socket.socket | None = None
    """QEMU's end of a socket pair. Pass it to QEMU, then close it."""
    other: Path | None = None
    """A second file, exported as `other` (only qemu-storage-daemon)."""
    upstream: NbdStore | None = None
    """Another server, to which this one forwards requests instead of using a file (only nbdkit)."""
    before: Callable[[], None] | None = None
    """Called in the child before it executes the server."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def server(self) -> dict[str, object]:
        """Return the value of `"server":` in QEMU's NBD node. With a socket pair, QEMU must get the
        same descriptor number."""
        match self.transport:
            case "unix":
                return {"type": "unix", "path": str(self.directory / "socket")}
            case "tcp":
                return {"type": "inet", "host": "127.0.0.1", "port": str(self.port)}
        assert self.pair is not None
        return {"type": "fd", "str": str(self.pair.fileno())}

    @property
    def address(self) -> str | tuple[str, int]:
        """Return the server's address for NbdClient."""
        if self.transport == "unix":
            return str(self.directory / "socket")
        return "127.0.0.1", self.port

    def slow(self, bits_per_second: str) -> None:
        """Limit the rate of later requests, for example to "400K" (only nbdkit)."""
        new = self.directory / "rate.new"
        new.write_text(bits_per_second)
        new.rename(self.directory / "rate")

    def fast(self) -> None:
        self.slow(_UNLIMITED)

    def fail(self, failing: bool = True) -> None:
        """Answer writes and flushes with EIO (only nbdkit)."""
        if failing:
            (self.directory / "fail").touch()
        else:
            (self.directory / "fail").unlink(missing_ok=True)

    def freeze(self, still: str = "T") -> None:
        """Stop the server with SIGSTOP. Its connections stay open.

        `still`: the states of threads that count as stopped. Include "D" if the storage below the
        server hangs, because a thread that waits for this storage never reaches state "T".
        """
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        # Each thread stops only when it next handles signals, so wait.
        deadline = time.monotonic() + 30
        while not all(state in still for state in _states(self.process.pid)):
            assert time.monotonic() < deadline, "the NBD server does not stop"
            time.sleep(0.001)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def leave(self) -> None:
        """Kill the server. Its connections break, and nothing listens any more."""
        assert self.process is not None
        end(self.process)
        (self.directory / "socket").unlink(missing_ok=True)

    def start(self) -> None:
        """Start the server at the same address. Return when it accepts connections.

        A server on a socket pair cannot be started again after leave().
        """
        ends = socket.socketpair() if self.transport == "pair" else None
        argv = self._argv()
        with contextlib.ExitStack() as stack:
            if ends is not None:
                self.pair = ends[0]
                stack.enter_context(ends[1])
            stdin = ends[1].fileno() if ends else subprocess.DEVNULL
            stdout = ends[1].fileno() if ends else None
            said = stack.enter_context((self.directory / "said").open("ab"))
            self.process = spawn(
                argv, stdin=stdin, stdout=stdout or said, stderr=said, before=self.before
            )
        if ends is None:
            self._wait()

    def _argv(self) -> list[str]:
        program, file = str(needs.program(self.make, MAKES[self.make])), str(self.file)
        path, port = self.directory / "socket", str(self.port)
        if self.make == "nbdkit":
            where = {
                "unix": ["-U", str(path)],
                "tcp": ["-i", "127.0.0.1", "-p", port],
                "pair": ["-s"],
            }[self.transport]
            failing = ["error=EIO", "error-rate=100%", f"error-file={self.directory / 'fail'}"]
            failing += ["error-pread-rate=0%"]
            filters = ["--filter=rate", "--filter=error"]
            if self.upstream is not None:
                socket_path = self.upstream.directory / "socket"
                return [program, "--foreground", *where, "nbd", f"socket={socket_path}"]
            argv = [program, "--foreground", "--threads=16", *where, *filters, "file", file]
            return [*argv, f"rate-file={self.directory / 'rate'}", *failing]
        if self.make == "qemu-nbd":
            where = (
                ["-k", str(path)] if self.transport == "unix" else ["-b", "127.0.0.1", "-p", port]
            )
            return [program, "-t", "-e", "0", "-f", "raw", "--cache=writeback", *where, file]
        address = f"addr.type=unix,addr.path={path}"
        if self.transport == "tcp":
            address = f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}"
        node = f"driver=file,node-name=store,filename={self.file}"
        export = "type=nbd,id=export,node-name=store,name=,writable=on"
        argv = [program, "--blockdev", node, "--nbd-server", address, "--export", export]
        if self.other is not None:
            argv += ["--blockdev", f"driver=file,node-name=other,filename={self.other}"]
            argv += ["--export", "type=nbd,id=other,node-name=other,name=other,writable=on"]
        return argv

    def _wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + 30
        while True:
            family = socket.AF_UNIX if self.transport == "unix" else socket.AF_INET
            with socket.socket(family) as probe, contextlib.suppress(OSError):
                path = str(self.directory / "socket")
                probe.connect(path if self.transport == "unix" else ("127.0.0.1", self.port))
                return
            said = (self.directory / "said").read_text()
            assert self.process.poll() is None, f"{self.make}: {said}"
            assert time.monotonic() < deadline, f"{self.make} does not listen: {said}"
            # None of the three programs announces that it listens.
            time.sleep(0.02)


def free_port() -> int:
    """Return a free TCP port. If another program takes it meanwhile, the server fails with a
    message."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _states(pid: int) -> list[str]:
    """Return the states of all threads. A server on a socket pair exits with its client, and then
    has no threads."""
    states = []
    with contextlib.suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                stat = (task / "stat").read_text()
                states.append(stat[stat.rindex(")") + 2])
    return states


class NbdClient:
    """A client for servers with the fixed-newstyle handshake. Source: the NBD protocol's
    doc/proto.md."""

    def __init__(self, address: str | tuple[str, int], export: str) -> None:
        """`address`: the path of a unix socket, or a host and a port."""
        unix = isinstance(address, str)
        self.connection = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        self.connection.connect(address)
        self._read(16)
        flags = struct.unpack(">H", self._read(2))[0]
        assert flags & 2, "the server sends zeroes"
        name = export.encode()
        self.connection.sendall(
            struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, len(name))
        )
        self.connection.sendall(name)
        self._read(10)

    def write(self, offset: int, data: bytes) -> None:
        """Write, and wait for the reply."""
        head = struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, offset, len(data))
        self.connection.sendall(head + data)
        self._read(16)

    def read(self, offset: int, length: int) -> None:
        """Read, and drop the data."""
        self.connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, offset, length))
        self._read(16 + length)

    def close(self) -> None:
        """Close the connection, from any thread. Pending calls raise ConnectionError."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def _read(self, size: int) -> bytes:
        data = self.connection.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise ConnectionError("the NBD server closed the connection")
        return data


@contextlib.contextmanager
def nbd_store(
    file: Path,
    make: str = "nbdkit",
    transport: str = "unix",
    *,
    other: Path | None = None,
    upstream: NbdStore | None = None,
    before: Callable[[], None] | None = None,
) -> Iterator[NbdStore]:
    """Within the context, run a server for a file, whose size must not change. The server is ready
    at entry.

    Raises needs.Missing.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(scratch("n"))
        port = free_port() if transport == "tcp" else 0
        store = NbdStore(file, make, transport, directory, port)
        store.other, store.upstream, store.before = other, upstream, before
        store.fast()
        store.start()
        stack.callback(lambda: store.process and end(store.process))
        if store.pair is not None:
            stack.callback(store.pair.close)
        yield store
