"""Signals that call a function in the event loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

from qkilld.adapters.loop_signals import call_at


def test_the_loop_wakes_up_and_calls() -> None:
    """This works even if the kernel gives the signal to a thread that does not run the loop."""

    async def serve() -> None:
        called = asyncio.Event()
        with call_at((signal.SIGTERM, signal.SIGINT), called.set):
            other = threading.Thread(
                target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            )
            # Started by the loop, which then has nothing to do.
            asyncio.get_running_loop().call_later(0.05, other.start)
            await asyncio.wait_for(called.wait(), 10)
            other.join()
            called.clear()
            asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGINT)
            await asyncio.wait_for(called.wait(), 10)

    asyncio.run(serve())


def test_other_signals_and_the_end_of_it() -> None:
    got: list[int] = []

    async def serve() -> None:
        before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
        try:
            with call_at((signal.SIGTERM,), lambda: got.append(0)):
                os.kill(os.getpid(), signal.SIGUSR1)
                await asyncio.sleep(0.05)
        finally:
            signal.signal(signal.SIGUSR1, before)

    handler = signal.getsignal(signal.SIGTERM)
    asyncio.run(serve())
    assert got == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGTERM) is handler
