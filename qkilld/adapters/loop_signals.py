"""Call a function in the event loop when the process receives a signal.

asyncio's add_signal_handler does the same. But it imports inspect, which takes 1 MB of memory, only
to check that the function is not a coroutine.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def call_at(numbers: Sequence[signal.Signals], function: Callable[[], object]) -> Iterator[None]:
    """Call `function` in the running loop at each of these signals. Main thread only."""
    loop = asyncio.get_running_loop()
    read, write = socket.socketpair()
    read.setblocking(False)
    write.setblocking(False)

    def receive() -> None:
        """Read the numbers of the received signals. These include signals that have other
        handlers."""
        if not set(numbers).isdisjoint(read.recv(4096)):
            function()

    with read, write:
        loop.add_reader(read, receive)
        # A signal must wake the loop, because Python's handler runs only when the loop wakes up.
        signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        previous = {number: signal.signal(number, _do_nothing) for number in numbers}
        try:
            for number in numbers:
                signal.siginterrupt(number, False)
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)
            loop.remove_reader(read)


def _do_nothing(number: int, frame: object) -> None:
    """Do nothing. Python writes to the wakeup descriptor only if there is a handler."""
