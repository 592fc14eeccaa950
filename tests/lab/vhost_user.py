"""A vhost-user backend for one small disk that answers QEMU's messages and transfers no data.

    vhost_backend    run a backend, which listens for QEMU or connects to QEMU

    python -m tests.lab.vhost_user listen|connect PATH [LOG]

When QEMU exits, it waits until the backend answers with the ring state of a started device
(BareGuest.start_virtio). Source: QEMU's docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lab.log import wait_for_path
from tests.lab.process import TOP, end, spawn

_HEADER: Final = struct.Struct("<III")
_VERSION: Final = 1
_REPLY: Final = 1 << 2
_FEATURES: Final = 1 << 30 | 1 << 32
"""The bits for vhost-user's protocol features and for virtio 1."""
_PROTOCOL_FEATURES: Final = 1 << 0 | 1 << 9
"""The bits for multiple queues and for a configuration space."""
_SECTORS: Final = 1 << 15


@dataclass
class VhostBackend:
    path: Path
    """The socket. A backend that connects waits until QEMU listens there."""
    process: subprocess.Popen[bytes]
    logs: bool = False
    """Whether the backend writes a line to a file five times a second, even while it hangs."""

    def freeze(self) -> None:
        """Stop answering. A backend that logs continues to log."""
        self.process.send_signal(signal.SIGUSR1 if self.logs else signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGUSR2 if self.logs else signal.SIGCONT)

    def leave(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def vhost_backend(path: Path, *, connects: bool, log: Path | None = None) -> Iterator[VhostBackend]:
    """Run a backend at this path. It listens, unless `connects` is set."""
    argv = [sys.executable, "-m", "tests.lab.vhost_user", "connect" if connects else "listen"]
    argv += [str(path), *([str(log)] if log else [])]
    process = spawn(argv, cwd=TOP, stdout=subprocess.PIPE)
    try:
        if not connects:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listens\n", "it cannot listen; see above"
        yield VhostBackend(path, process, log is not None)
    finally:
        end(process)


def _serve(connection: socket.socket, runs: threading.Event) -> None:
    while True:
        head, descriptors, _, _ = socket.recv_fds(connection, _HEADER.size, 16)
        runs.wait()
        for descriptor in descriptors:
            os.close(descriptor)
        if len(head) < _HEADER.size:
            return
        request, _, size = _HEADER.unpack(head)
        body = connection.recv(size, socket.MSG_WAITALL) if size else b""
        if (answer := _answer(request, body)) is not None:
            head = _HEADER.pack(request, _VERSION | _REPLY, len(answer))
            connection.sendall(head + answer)


def _answer(request: int, body: bytes) -> bytes | None:
    match request:
        case 1:  # GET_FEATURES
            return struct.pack("<Q", _FEATURES)
        case 11:  # GET_VRING_BASE
            return struct.pack("<II", struct.unpack_from("<I", body)[0], 0)
        case 15:  # GET_PROTOCOL_FEATURES
            return struct.pack("<Q", _PROTOCOL_FEATURES)
        case 17:  # GET_QUEUE_NUM
            return struct.pack("<Q", 1)
        case 24:  # GET_CONFIG
            offset, size, flags = struct.unpack_from("<III", body)
            space = struct.pack("<Q", _SECTORS).ljust(offset + size, b"\0")
            return struct.pack("<III", offset, size, flags) + space[offset : offset + size]
    return None


def _keep_log(path: Path, runs: threading.Event) -> None:
    """Write lines until the process ends. Between SIGUSR1 and SIGUSR2, answer nothing."""
    signals = (signal.SIGUSR1, signal.SIGUSR2)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    # A signal handler of Python runs in the main thread alone. If the kernel delivers the signal to
    # another thread, the main thread remains in Event.wait.
    def follow() -> None:
        while True:
            (runs.clear if signal.sigwait(signals) == signal.SIGUSR1 else runs.set)()

    threading.Thread(target=follow, daemon=True).start()

    def write() -> None:
        with path.open("a") as file:
            while True:
                file.write(f"{time.time():.3f} the upstream does not answer, attempt failed\n")
                file.flush()
                time.sleep(0.2)

    threading.Thread(target=write, daemon=True).start()


def _connect(path: Path) -> socket.socket:
    wait_for_path(path, 60)
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
        except ConnectionRefusedError:
            # QEMU has bound the socket, but does not listen yet. Nothing announces that it listens.
            connection.close()
            time.sleep(0.01)
        else:
            return connection


def _accept(path: Path) -> socket.socket:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        print("listens", flush=True)
        return listener.accept()[0]


if __name__ == "__main__":
    where = Path(sys.argv[2])
    running = threading.Event()
    running.set()
    if len(sys.argv) > 3:
        _keep_log(Path(sys.argv[3]), running)
    # QEMU may have exited while this process was frozen.
    with (
        _accept(where) if sys.argv[1] == "listen" else _connect(where) as peer,
        contextlib.suppress(ConnectionError),
    ):
        _serve(peer, running)
