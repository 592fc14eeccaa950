"""Receive and close descriptors that strangers send, and use sockets that strangers share. Never
blocks.

close(2) may block as long as the stranger wants. For a TCP socket with SO_LINGER, it waits until
the socket's data is acknowledged. For a file on FUSE, it waits until the FUSE server answers
FUSE_FLUSH, even after SIGKILL. Other calls block in the same way if they make the kernel drop
descriptors. These calls are recvmsg(2) without room for the descriptors, and close(2) of a socket
in which descriptors are still unread. A process that shares a socket with us can also make our
calls block by clearing O_NONBLOCK.

So each recvmsg(2) has room for all descriptors, threads close them, and no call depends on
O_NONBLOCK. A signal interrupts a thread that is stuck in closing a socket. Nothing interrupts a
thread that is stuck in closing a file. If all MAX_THREADS threads for files are stuck, or
MAX_PENDING files wait for them, descriptors are accepted only from a trusted end.

A process cannot end while close(2) of a file is stuck: exit_group(2) waits for the stuck thread. If
the file is not closed yet, exit_group(2) closes it, and gets stuck in the same way. (This was
measured with os._exit and SIGKILL. The kernel's fuse_flush is not killable.) So do not exit without
need while `closes_files()` is true.

Every package may use this module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from qkilld.debug_log import note

MAX_THREADS: Final = 8
"""The maximum number of threads that close sockets, and of threads that close files."""
MAX_PENDING: Final = 1024
"""How many files may wait to be closed."""
STUCK_S: Final = 0.1
"""If close(2) of a socket takes longer than this, it is interrupted."""
WATCH_S: Final = 0.02
WAKE_UP: Final = signal.SIGURG
"""Interrupts a blocking system call. This signal is ignored by default."""
_MOST: Final = 253
"""SCM_MAX_FD, the most descriptors that one message may carry (unix(7))."""
_CONTROL: Final = socket.CMSG_SPACE(_MOST * 4)
_NO_LINGER: Final = struct.pack("@ii", 0, 0)


class _Closer:
    """Threads that close descriptors. They exist only while there is something to close."""

    def __init__(self, *, interruptible: bool) -> None:
        self._interruptible = interruptible
        self._lock = threading.Lock()
        self._waiting: deque[int] = deque()
        self._threads = 0
        self._busy_since: dict[int, float] = {}
        """The time when each thread began to close its descriptor, keyed by thread id."""
        self._is_watched = False

    @property
    def full(self) -> bool:
        """Whether all threads are stuck, or too many descriptors wait for them."""
        if self._threads < MAX_THREADS:
            return False
        limit = time.monotonic() - STUCK_S
        with self._lock:
            stuck = sum(since < limit for since in self._busy_since.values())
            return stuck == MAX_THREADS or len(self._waiting) >= MAX_PENDING

    @property
    def works(self) -> bool:
        return self._threads > 0

    def put(self, fd: int) -> None:
        with self._lock:
            self._waiting.append(fd)
            starts = self._threads < MAX_THREADS
            self._threads += starts
            watches = self._interruptible and not self._is_watched
            self._is_watched |= watches
        if starts and not self._start(self._work):
            with self._lock:
                self._threads -= 1
        if watches and not self._start(self._watch):
            with self._lock:
                self._is_watched = False

    def _start(self, work: Callable[[], None]) -> bool:
        """Start a thread; return whether the system allows it."""
        try:
            threading.Thread(target=work, name="closer", daemon=True).start()
        except RuntimeError as error:
            note("starting a thread to close descriptors", error)
            return False
        return True

    def _work(self) -> None:
        own = threading.get_ident()
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                fd = self._waiting.popleft()
                self._busy_since[own] = time.monotonic()
            if self._interruptible:
                _forbid_linger(fd)
            with contextlib.suppress(OSError):
                os.close(fd)
            with self._lock:
                del self._busy_since[own]

    def _watch(self) -> None:
        """Interrupt threads that are stuck, until all threads have ended."""
        while True:
            with self._lock:
                if not self._threads:
                    self._is_watched = False
                    return
                now = time.monotonic()
                for thread, since in self._busy_since.items():
                    if now - since > STUCK_S:
                        signal.pthread_kill(thread, WAKE_UP)
            time.sleep(WATCH_S)


_sockets: Final = _Closer(interruptible=True)
_files: Final = _Closer(interruptible=False)


def set_up() -> None:
    """Allow WAKE_UP to interrupt system calls. Call this in the main thread."""
    signal.signal(WAKE_UP, lambda number, frame: None)


def closes_files() -> bool:
    """Return whether files wait to be closed. Closing them may take for ever."""
    return _files.works


def close_later(fd: int) -> None:
    """In a thread, close a descriptor that came from a stranger."""
    (_sockets if is_socket(fd) else _files).put(fd)


def is_socket(fd: int) -> bool:
    """Return whether a descriptor is a socket, without asking a file system, which may block."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")  # noqa: PTH115
    except OSError:
        return False


def receive(sock: socket.socket, size: int, *, trusted: bool = False) -> tuple[bytes, list[int]]:
    """Receive up to `size` bytes, and all descriptors that came with them.

    Raises OSError, such as BlockingIOError if there is nothing to receive, and ConnectionResetError
    if descriptors came that cannot be accepted now. Descriptors from a `trusted` end are always
    accepted.
    """
    if _files.full and not trusted:
        # Peek without room for descriptors. This shows whether descriptors have come, and leaves
        # them in the socket.
        peeked, _, flags, _ = sock.recvmsg(size, 0, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        if flags & socket.MSG_CTRUNC:
            raise ConnectionResetError("It sent descriptors, and earlier ones cannot be closed")
        size = len(peeked) or size
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    data, control, _, _ = sock.recvmsg(size, _CONTROL, flags)
    fds: list[int] = []
    for level, kind, content in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            count = len(content) // 4
            fds += struct.unpack(f"{count}i", content[: count * 4])
    return data, fds


class ForeignSocket(socket.socket):
    """A socket that a stranger shares, or whose other end may send descriptors. Another thread
    closes the descriptors that arrive.

    The methods defined here never wait, whatever O_NONBLOCK says.
    """

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self.family != socket.AF_UNIX or flags & ~socket.MSG_DONTWAIT:
            return super().recv(size, flags | socket.MSG_DONTWAIT)
        data, fds = receive(self, size)
        for fd in fds:
            close_later(fd)
        return data

    def send(self, data: Any, flags: int = 0) -> int:
        return super().send(data, flags | socket.MSG_DONTWAIT)

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None) -> int:
        return super().sendmsg(buffers, ancdata, flags | socket.MSG_DONTWAIT)

    def close(self) -> None:
        if (fd := self.detach()) >= 0:
            _sockets.put(fd)


def take_over(sock: socket.socket) -> ForeignSocket:
    """Turn a socket into a ForeignSocket, which then owns the descriptor."""
    foreign = ForeignSocket(sock.family, sock.type, sock.proto, fileno=sock.detach())
    foreign.setblocking(False)
    if foreign.family == socket.AF_UNIX:
        keep_urgent_data(foreign)
    return foreign


def keep_urgent_data(sock: socket.socket) -> None:
    """Make bytes sent with MSG_OOB arrive in order with all others. Otherwise, the kernel drops
    these bytes and closes the descriptors sent with them, which may block."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def _forbid_linger(fd: int) -> None:
    with contextlib.suppress(OSError):
        sock = socket.socket(fileno=fd)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        finally:
            sock.detach()
