"""Read a process's block graph from its command line and -readconfig files.

Both reads may block, so a separate thread does them. Reading /proc/PID/cmdline takes the process's
memory lock. If the process's storage hangs, one of its threads may hold the memory lock all the
time. The -readconfig files may lie on storage that hangs, too. Reading another user's files needs
the ptrace right.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from qkilld.adapters.procfs import read_command_line, read_uid
from qkilld.adapters.qemu_args import parse_config
from qkilld.adapters.target_files import MAX_CONFIG, MAX_CONFIGS, read_config
from qkilld.adapters.target_threads import AllThreadsBlocked, shared
from qkilld.debug_log import about, note_once
from qkilld.evidence.block_graph import BlockGraph, config_paths, read_block_graph
from qkilld.evidence.storage import FilePlace
from qkilld.model.sample import ImagePlace

START_TIMEOUT_S: Final = 0.5
"""How long a sample waits until the thread that reads the command line has begun. On a busy host,
the thread may get no processor for a while. A sample without the command line may hide a wait, and
so delays SIGKILL until StorageStallSec=. After a second, an empty sample replaces a sample that is
not complete (engine.sampling.TIMEOUT)."""
TIMEOUT_S: Final = 0.05
"""How long a sample then waits for the result, which usually takes 1 ms. If it takes longer, the
read is probably blocked."""


class GraphReader:
    """Reads a command line once, because it does not change. Not thread-safe."""

    __slots__ = ("_graph", "_has_begun", "_pid", "_proc", "_thread")

    def __init__(self, pid: int, proc: Path = Path("/proc")) -> None:
        self._pid, self._proc = pid, proc
        self._thread: threading.Thread | None = None
        self._graph: BlockGraph | None = None
        self._has_begun = threading.Event()

    def read(self) -> BlockGraph | None:
        """Return the graph; None while it is unknown. Blocks for at most START_TIMEOUT_S plus
        TIMEOUT_S."""
        if self._graph is None:
            if self._thread is None or not self._thread.is_alive():
                self._has_begun.clear()
                self._thread = self._start()
            if self._thread is not None:
                self._has_begun.wait(START_TIMEOUT_S)
                self._thread.join(TIMEOUT_S)
            if self._graph is not None:
                self._thread = None
        return self._graph

    def _start(self) -> threading.Thread | None:
        try:
            return shared.start(self._pid, read_uid(self._pid, self._proc), self._read)
        except (OSError, AllThreadsBlocked) as error:
            note_once("reading the command line", error)
            return None

    def formatted(self, paths: list[str] | None) -> int | None:
        """Return how many of the open images (`paths`) are not known to be raw; None if unknown."""
        if self._graph is None or paths is None:
            return None
        images = self._graph.images
        return sum(path not in images or not images[path].raw for path in paths)

    def images(self, mounts: Mapping[str, str] | None) -> tuple[ImagePlace, ...] | None:
        """Return the open images; None if unknown. `mounts`: for each open image, its path and
        ImagePlace.mount."""
        if self._graph is None or mounts is None:
            return None
        images = self._graph.images
        return tuple(
            ImagePlace(images[path].names if path in images else (), mount)
            for path, mount in mounts.items()
        )

    def ringless(self, places: Mapping[str, FilePlace]) -> tuple[str, ...]:
        """Return the devices on which no image uses io_uring. `places`: the storage of each image
        open for writing, keyed by its path."""
        if self._graph is None:
            return ()
        images = self._graph.images
        may_have = {
            number
            for path, place in places.items()
            if path not in images or images[path].on_ring
            for number in place.disks
        }
        every = {number for place in places.values() for number in place.disks}
        return tuple(sorted(every - may_have))

    def _read(self) -> None:
        self._has_begun.set()
        about(self._pid)
        try:
            argv = read_command_line(self._pid, self._proc)
            if not argv[0]:
                return  # The process is exiting.
            # The last word ends with a zero byte, too, so splitting adds an empty word.
            argv = argv[:-1]
            directory = str((self._proc / str(self._pid) / "cwd").readlink())
            files = config_paths(argv)
            if len(files) > MAX_CONFIGS:
                raise ValueError(f"it has more than {MAX_CONFIGS} -readconfig files")
            texts = [read_config(self._pid, path, self._proc) for path in files]
            if sum(map(len, texts)) > MAX_CONFIG:
                raise ValueError("its -readconfig files are too long")
            sections = [section for text in texts for section in parse_config(text)]
            graph = read_block_graph(argv, sections)
            graph.locate_images(directory)
            self._graph = graph
        except (OSError, ValueError) as error:
            note_once("reading the command line", error)  # The graph stays unknown.
