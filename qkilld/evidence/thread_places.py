"""Find the file, disk, pipe or socket behind a waiting thread's descriptor.

The link in /proc/PID/fd shows what a descriptor refers to, without access to the file itself. Cost:
5 µs for each waiting thread.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from qkilld.debug_log import note_once
from qkilld.evidence.storage import StorageReader
from qkilld.model.sample import FLUSH_CALLS, Thread


def place_threads(
    pid: int, threads: tuple[Thread, ...] | None, storage: StorageReader, proc: Path
) -> tuple[Thread, ...] | None:
    """Add to each thread what its descriptor refers to, and whether the thread is the first one of
    the process. Leave out threads that wait for input."""
    if not threads:
        return threads
    threads_with_places = (_place_thread(pid, thread, storage, proc) for thread in threads)
    return tuple(thread for thread in threads_with_places if not _waits_for_input(thread))


def _place_thread(pid: int, thread: Thread, storage: StorageReader, proc: Path) -> Thread:
    if thread.tid == pid:
        thread = dataclasses.replace(thread, first=True)
    if thread.descriptor is None:
        return thread
    kind = _kind(pid, thread.descriptor, proc)
    if kind not in ("file", ""):
        return dataclasses.replace(thread, target=kind)
    # A file that is being closed has no link any more, but `storage` still knows its disks.
    place = storage.place_of(thread.descriptor)
    if place is None and kind == "file":
        storage.refresh(waited_for=thread.descriptor, synced=thread.call in FLUSH_CALLS)
        place = storage.place_of(thread.descriptor)
    if place is None or not (place.disks or place.mount):
        return dataclasses.replace(thread, target="other" if kind else "")
    target = "disk" if place.disks else "mount"
    return dataclasses.replace(thread, target=target, disks=place.disks, mount=place.mount)


def _kind(pid: int, descriptor: int, proc: Path) -> str:
    """Return "file", "pipe", "socket" or "other"; "" if there is no such descriptor."""
    try:
        link = os.readlink(f"{proc}/{pid}/fd/{descriptor}")  # noqa: PTH115 - half the cost
    except OSError as error:
        note_once("reading the link of a thread's descriptor", error)
        return ""
    if link.startswith("/"):
        return "file"
    return {"pipe": "pipe", "socket": "socket"}.get(link.partition(":")[0], "other")


def _waits_for_input(thread: Thread) -> bool:
    reads = thread.call in ("read", "readv") and thread.state == "S"
    return reads and thread.target not in ("disk", "mount")
