"""A new network namespace, with its loopback device up."""

from __future__ import annotations

import ctypes
import fcntl
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from tests.lab import needs

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 0x1


class NetworkNamespace:
    """A context manager: a thread in the namespace. Processes that the thread starts are in it,
    too."""

    def __init__(self) -> None:
        needs.root("to make a network namespace")
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.run(self._enter)

    def run(self, function: Callable[[], T]) -> T:
        """Call a function in the namespace; return what it returns, or raise what it raises."""
        answers: queue.Queue[tuple[bool, Any]] = queue.Queue()

        def work() -> None:
            try:
                answers.put((True, function()))
            except BaseException as error:
                answers.put((False, error))

        self._work.put(work)
        good, found = answers.get(timeout=60)
        if not good:
            raise found
        result: T = found
        return result

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _enter(self) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = struct.pack("16sh14x", b"lo", _IFF_UP)
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def __enter__(self) -> NetworkNamespace:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
