"""An NBD server that closes each connection after a while, and accepts new ones.

    breaking_nbd    run the server on a unix or TCP socket

    python -m tests.lab.breaking_nbd ADDRESS FILE REPLIES BYTES SECONDS

This command is the server. ADDRESS is a path or a port of the loopback. Each connection lasts
SECONDS. In the first half of this time, the server carries out and answers REPLIES requests. In the
second half, it reads at most BYTES more. So if a client repeats the unanswered requests, it makes
progress only if REPLIES is not 0. Source of the protocol: the NBD protocol's doc/proto.md.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab.nbd import free_port
from tests.lab.process import TOP, end, spawn
from tests.lab.scratch import scratch

_PAUSE_S = 0.1


@contextlib.contextmanager
def breaking_nbd(
    file: Path, *, replies: int, seconds: float, taken: int = 64 << 10, tcp: bool = False
) -> Iterator[dict[str, str]]:
    """Run the server for a file; yield the value of `"server":` in QEMU's NBD node."""
    with scratch("b") as directory:
        path = str(directory / "socket")
        port = str(free_port()) if tcp else ""
        argv = [sys.executable, "-m", "tests.lab.breaking_nbd", port or path, str(file)]
        process = spawn(
            [*argv, str(replies), str(taken), str(seconds)], stdout=subprocess.PIPE, cwd=TOP
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            if tcp:
                yield {"type": "inet", "host": "127.0.0.1", "port": port}
            else:
                yield {"type": "unix", "path": path}
        finally:
            end(process)


def _serve(address: str, file: Path, replies: int, taken: int, seconds: float) -> None:
    is_port = address.isdecimal()
    with socket.socket(socket.AF_INET if is_port else socket.AF_UNIX) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(address)) if is_port else address)
        listener.listen()
        print("listening", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                _negotiate(connection, file.stat().st_size)
                _answer(connection, file, replies, seconds / 2)
                steps = max(1, int(seconds / (2 if replies else 1) / _PAUSE_S))
                for _ in range(steps):
                    with contextlib.suppress(BlockingIOError):
                        connection.recv(taken // steps, socket.MSG_DONTWAIT)
                    time.sleep(_PAUSE_S)


def _negotiate(connection: socket.socket, size: int) -> None:
    connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
    _read(connection, 4)
    while True:
        _, option, length = struct.unpack(">QII", _read(connection, 16))
        _read(connection, length)
        if option == 7:  # NBD_OPT_GO
            # The size, and the flags HAS_FLAGS and SEND_FLUSH, in NBD_INFO_EXPORT.
            _reply(connection, option, 3, struct.pack(">HQH", 0, size, 0b101))
            _reply(connection, option, 1, b"")
            return
        _reply(connection, option, 0x80000001, b"")


def _reply(connection: socket.socket, option: int, kind: int, data: bytes) -> None:
    connection.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)


def _answer(connection: socket.socket, file: Path, replies: int, seconds: float) -> None:
    with file.open("r+b") as image:
        for _ in range(replies):
            head = struct.unpack(">IHHQQI", _read(connection, 28))
            _, _, kind, cookie, offset, length = head
            answer = struct.pack(">IIQ", 0x67446698, 0, cookie)
            if kind == 0:
                answer += os.pread(image.fileno(), length, offset)
            elif kind == 1:
                os.pwrite(image.fileno(), _read(connection, length), offset)
            time.sleep(seconds / replies)
            connection.sendall(answer)


def _read(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL) if size else b""
    if len(data) < size:
        raise ConnectionError
    return data


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
