"""Find leaks of a test: processes, descriptors, threads and asyncio tasks that it has left
behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from tests.lab import process

ENDING_S: Final = 1.0
"""Time for a thread that has finished its work to end."""
CLOSING_S: Final = 5.0
"""Time for a worker to close its files after the end of its job, on a busy machine."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The processes, descriptors and threads of this process at one moment."""

    children: frozenset[tuple[int, float]]
    """(pid, start time) of each child, including orphans: see process.become_subreaper()."""
    descriptors: frozenset[tuple[int, str]]
    """(number, link in /proc/self/fd) of each descriptor."""
    threads: frozenset[int]

    @classmethod
    def take(cls) -> Snapshot:
        return cls(
            frozenset((child.pid, child.create_time()) for child in _children()),
            frozenset(_descriptors()),
            frozenset(thread.ident or 0 for thread in threading.enumerate()),
        )

    def leaks_since(self, before: Snapshot) -> list[str]:
        """Return one line for each new process, descriptor and thread."""
        return [
            *(f"a process: {_describe(pid)}" for pid, _ in self.children - before.children),
            *(f"descriptor {n}: {what}" for n, what in self.descriptors - before.descriptors),
            *(f"a thread: {name}" for name in _thread_names(self.threads - before.threads)),
        ]


def lasting_leaks(before: Snapshot) -> list[str]:
    """Return the leaks since `before` that do not disappear within CLOSING_S."""
    deadline = time.monotonic() + CLOSING_S
    while leaks := Snapshot.take().leaks_since(before):
        if time.monotonic() >= deadline:
            break
        gc.collect()  # The descriptors of a closed loop's watchers end with the loop.
        time.sleep(0.05)
    return leaks


@contextlib.contextmanager
def unfinished_tasks() -> Iterator[list[str]]:
    """Collect the tasks that still run at the end of asyncio.run(). (asyncio.run() cancels them
    silently.)

    Loops that are not closed appear as open descriptors.
    """
    leftovers: list[str] = []
    cancel_all = asyncio.runners._cancel_all_tasks  # type: ignore[attr-defined]

    def note_and_cancel(loop: asyncio.AbstractEventLoop) -> None:
        leftovers.extend(repr(task) for task in asyncio.all_tasks(loop))
        cancel_all(loop)

    asyncio.runners._cancel_all_tasks = note_and_cancel  # type: ignore[attr-defined]
    try:
        yield leftovers
    finally:
        asyncio.runners._cancel_all_tasks = cancel_all  # type: ignore[attr-defined]


def end_processes(before: Snapshot) -> None:
    """Kill and reap the new children, so that they are not reported for the next test again."""
    known = {pid for pid, _ in before.children}
    for pid in process.children(os.getpid()):
        if pid not in known:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _children() -> list[psutil.Process]:
    """Return the direct children, except zombies. Zombies are orphans, which init would reap."""
    found = []
    for pid in process.children(os.getpid()):
        with contextlib.suppress(psutil.NoSuchProcess):
            child = psutil.Process(pid)
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def _describe(pid: int) -> str:
    try:
        return f"{pid} {psutil.Process(pid).cmdline()}"
    except psutil.Error:
        return f"{pid}, gone by now"


def _descriptors() -> Iterator[tuple[int, str]]:
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - one descriptor, closed at return
        with contextlib.suppress(FileNotFoundError):
            yield int(entry), str(Path("/proc/self/fd", entry).readlink())


def _thread_names(idents: frozenset[int]) -> list[str]:
    """Return the names of threads that are not about to end."""
    found = [thread for thread in threading.enumerate() if (thread.ident or 0) in idents]
    for thread in found:
        thread.join(ENDING_S)
    return [thread.name for thread in found if thread.is_alive()]
